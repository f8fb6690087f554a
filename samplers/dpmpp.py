"""DPM-Solver++ 2M (Lu et al. 2022b): x_0 extrapolated from this prediction and the last one, in log sigma."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .ddim import Step, Steps
from .parameterisation import Denoise, eps_from_x0, noised, over, times, x0_from_eps
from .schedule import Schedule, sigma_of


def dpmpp(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    *,
    order: Literal[1, 2] = 2,
    lower_order_final: bool = True,
) -> Steps:
    """Walk x (B, C, H, W) along `path`, one call of the network a step.

    x_s = sqrt((1 - a_s) / (1 - a_t)) x_t - sqrt(a_s) (exp(-h) - 1) D with h = log(sigma_t / sigma_s) (Lu et al. 2022b,
    algorithm 2): the image D, noised with the eps that D leaves of x_t.  Order 1, D = x_0, is DDIM.  The first step has
    order 1, and so has one to the clean image, where h is infinite; with `lower_order_final` also the last of a path
    of fewer than 15 steps.  A Step holds the network's x0, not D.  A ValueError is raised for any other order.
    """
    if order not in (1, 2):
        raise ValueError(f"the order is 1 or 2; got {order}")
    before: tuple[Tensor, Tensor] | None = None  # x0 and log sigma of the step before
    for i, (t, s) in enumerate(pairwise(path)):
        a_t, a_s = schedule(t), schedule(s)
        eps = denoise(x, times(t, x))
        x0, log_sigma = x0_from_eps(x, eps, a_t), sigma_of(a_t).log()
        last = lower_order_final and len(path) <= 15 and i == len(path) - 2
        if order == 1 or before is None or last or a_s == 1:
            clean, direction = x0, eps
        else:
            share = (log_sigma - sigma_of(a_s).log()) / (before[1] - log_sigma) / 2  # 1 / 2r
            clean = x0 + over(share, x) * (x0 - before[0])
            direction = eps_from_x0(x, clean, a_t)
        x, before = noised(clean, direction, a_s), (x0, log_sigma)
        sent = yield Step(t, s, x, x0, eps)
        x = x if sent is None else sent

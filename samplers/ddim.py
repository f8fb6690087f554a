"""DDIM (Song et al. 2021), forward and reverse: one step function, walked down or up a path of timesteps."""

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .noise import Noise
from .parameterisation import Denoise, over, times, x0_from_eps
from .schedule import Schedule


class Step(NamedTuple):
    """One step of a walk."""

    t: float  # the timestep left
    s: float  # the timestep reached
    x: Tensor  # (B, C, H, W)   the sample at s
    x0: Tensor  # (B, C, H, W)  the clean sample predicted on the way
    eps: Tensor  # (B, C, H, W) the noise predicted at t


Steps = Generator[Step, Tensor | None, None]  # a walk; it goes on from another x where one is sent to it


def spread(a_t: Tensor, a_s: Tensor, eta: float = 1.0) -> Tensor:
    """sigma_t, the standard deviation of the noise that a step adds: DDIM eq. 16; eta = 1 is DDPM's."""
    return eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()


def step(
    x: Tensor,
    eps: Tensor,
    a_t: Tensor,
    a_s: Tensor,
    *,
    eps_dir: Tensor | None = None,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t -> (x_s, x_0): DDIM eq. 12.

    x_s = sqrt(a_s) P_t + sqrt(1 - a_s - sigma²) D_t + sigma z, where P_t = x_0 predicted from `eps`, and the direction
    D_t is `eps` too, or `eps_dir` where the step is asymmetric (Asyrp: Kwon et al. 2023, eq. 6).

    x, eps, eps_dir: (B, C, H, W).  a_t, a_s: () or (B,), float64.  `noise` is drawn once where eta is not 0.
    """
    x0 = x0_from_eps(x, eps, a_t)
    direction = eps if eps_dir is None else eps_dir
    if eta == 0:
        return over(a_s.sqrt(), x) * x0 + over((1 - a_s).sqrt(), x) * direction, x0
    if noise is None:
        raise ValueError("a step with eta > 0 needs a noise source; pass noise=seeded([...])")
    if bool((a_s < a_t).any()):
        raise ValueError("eta > 0 has a meaning on the way down only: inversion takes eta = 0")
    sigma = spread(a_t, a_s, eta)
    towards = over((1 - a_s - sigma**2).clamp(min=0).sqrt(), x)
    return over(a_s.sqrt(), x) * x0 + towards * direction + over(sigma, x) * noise(x), x0


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    reached: Sequence[float] | None = None,
) -> Steps:
    """Walk x along `path`: downward it samples, upward it inverts.  Yields one Step per pair of timesteps.

    `reached` says where each step ends if that is not where the next begins (`path.strided`).  A ValueError is raised
    where it has not as many timesteps as there are steps.
    """
    if reached is not None and len(reached) != len(path) - 1:
        raise ValueError(f"a path of {len(path) - 1} steps reaches as many timesteps; got {len(reached)}")
    for t, s in pairwise(path) if reached is None else zip(path, reached, strict=False):
        eps = denoise(x, times(t, x))
        x, x0 = step(x, eps, schedule(t), schedule(s), eta=eta, noise=noise)
        sent = yield Step(t, s, x, x0, eps)
        x = x if sent is None else sent

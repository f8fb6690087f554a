"""DDIM inversion, as it is and refined until it is the inverse, and how well it comes back."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .ddim import Step, ddim, step
from .parameterisation import Denoise, times
from .path import papers, upward
from .schedule import Schedule


class RoundTrip(NamedTuple):
    """An image inverted and sampled again."""

    steps: int
    x_T: Tensor  # (B, C, H, W)
    x0: Tensor  # (B, C, H, W)
    psnr: Tensor  # (B,) dB


def last(steps: Iterable[Step]) -> Step:
    """Walk to the end."""
    end = deque(steps, maxlen=1)
    if not end:
        raise ValueError("a path needs at least two timesteps")
    return end[0]


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, per image.  2 x (B, C, H, W) in [-1, 1] -> (B,)."""
    return 10 * (peak**2 / (a.double() - b.double()).square().flatten(1).mean(1)).log10()


def invert(
    denoise: Denoise, x0: Tensor, schedule: Schedule, path: Sequence[float], *, iterations: int = 0
) -> Iterator[Step]:
    """Walk x0 (B, C, H, W) up `path`, which may begin at the clean image, -1; in float32 at least.

    The step down from s would take eps at (x_s, s), which is not known yet: DDIM inversion (Song et al. 2021, section
    4.3) takes it at (x_t, t), or at (x_t, s) where t = -1.  Each of the `iterations` takes it at the last guess of x_s
    (fixed-point iteration, Pan et al. 2023), one more call of the network each; where they converge, the step down
    comes back to x_t exactly.  They need small steps: they diverge where sqrt(1 - a_s) - sqrt(a_s / a_t) sqrt(1 - a_t)
    times the slope of eps exceeds 1, sooner under strong guidance.
    A Step holds the last eps and the x0 that x_t has with it.  A ValueError is raised for a path that falls.
    """
    if iterations < 0:
        raise ValueError(f"the number of iterations is 0 or more; got {iterations}")
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    for t, s in pairwise(path):
        if s < t:
            raise ValueError(f"inversion walks up; the path goes from {t} to {s}")
        a_t, a_s = schedule(t), schedule(s)
        eps = denoise(x, times(s if t < 0 else t, x))
        y, clean = step(x, eps, a_t, a_s)
        for _ in range(iterations):
            eps = denoise(y, times(s, x))
            y, clean = step(x, eps, a_t, a_s)
        x = y
        yield Step(t, s, x, clean, eps)


def round_trip(
    denoise: Denoise, x0: Tensor, schedule: Schedule, path: Sequence[float], *, iterations: int = 0
) -> RoundTrip:
    """Invert x0 (B, C, H, W) over a downward `path` and come back down it with eta = 0.

    Refined by `iterations` the way up is the whole path; without, the clean image stands in for the lowest noisy one.
    """
    up = list(reversed(path)) if iterations else upward(path)
    x_T = last(invert(denoise, x0, schedule, up, iterations=iterations)).x
    back = last(ddim(denoise, x_T, schedule, path)).x
    return RoundTrip(len(path) - 1, x_T, back, psnr(x0, back))


def round_trips(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    steps: Sequence[int] = (10, 20, 50, 100, 200, 500, 1000),
    *,
    iterations: int = 0,
) -> Iterator[RoundTrip]:
    """Invert x0 (B, C, H, W) and sample it again with eta = 0 over the papers' path, once for each number of steps."""
    for n in steps:
        yield round_trip(denoise, x0, schedule, papers(n, len(schedule) - 1), iterations=iterations)

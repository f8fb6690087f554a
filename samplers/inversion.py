"""DDIM inversion, and how well it comes back."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .ddim import Step, ddim
from .parameterisation import Denoise
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


def round_trips(
    denoise: Denoise, x0: Tensor, schedule: Schedule, steps: Sequence[int] = (10, 20, 50, 100, 200, 500, 1000)
) -> Iterator[RoundTrip]:
    """Invert x0 (B, C, H, W) and sample it again with eta = 0, once for each number of steps."""
    for n in steps:
        path = papers(n, len(schedule) - 1)
        x_T = last(ddim(denoise, x0, schedule, upward(path))).x
        back = last(ddim(denoise, x_T, schedule, path)).x
        yield RoundTrip(n, x_T, back, psnr(x0, back))

"""Paths of timesteps: which ones a sampler visits, downward and ending where the walk ends.

A path is a list of timesteps in walking order, mostly whole ones.  Timestep -1 is the clean image.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch

from .schedule import Schedule, sigma_of

Time = TypeVar("Time", bound=float)


def papers(n: int, top: int = 999) -> list[int]:
    """The sequence of Asyrp and DiffStyle: n timesteps from `top` to 0 inclusive, then -1."""
    _check(n, top + 1)
    fractions = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.ones(1, dtype=torch.float64)
    return [int(f * top + 1e-6) for f in reversed(fractions.tolist())] + [-1]


def leading(n: int, steps: int = 1000, *, offset: int = 0, end: int = -1) -> list[int]:
    """Multiples of steps // n, plus `offset` (Song et al. 2021).  SD and SDXL: offset 1, end 0."""
    _check(n, steps)
    gap = steps // n
    if not 0 <= offset < gap + (n == 1):
        raise ValueError(f"an offset lies in 0 ... {gap - 1} for {n} leading steps; got {offset}")
    return [k * gap + offset for k in reversed(range(n))] + [end]


def trailing(n: int, steps: int = 1000, *, end: int = -1) -> list[int]:
    """From the last timestep down in equal gaps (Lin et al. 2024, table 2)."""
    _check(n, steps)
    return [round(steps - k * steps / n) - 1 for k in range(n)] + [end]


def linspace(n: int, steps: int = 1000, *, end: int = -1) -> list[int]:
    """n timesteps from the last to 0 inclusive, rounded (Lin et al. 2024, table 2)."""
    _check(n, steps)
    if n == 1:
        return [steps - 1, end]
    return [round((steps - 1) * k / (n - 1)) for k in reversed(range(n))] + [end]


def fractions(n: int, steps: int = 1000, *, end: int = -1) -> list[float]:
    """n timesteps from the last to 0 inclusive, not rounded: k-diffusion's, whose networks are told fractions."""
    _check(n, steps)
    return [(steps - 1) * k / (n - 1) for k in reversed(range(n))] + [end] if n > 1 else [steps - 1, end]


def karras(
    schedule: Schedule, n: int, *, first: float | None = None, last: float = 0, rho: float = 7.0, end: float = -1
) -> list[float]:
    """n timesteps from `first` (the schedule's last) to `last` whose sigma^(1 / rho) are equally spaced, then `end`.

    Karras et al. 2022, eq. 5, with the log of sigma linear between whole timesteps.  diffusers' Euler and Heun take
    `first` and `last` from the spacing that is named beside Karras; its DPM-Solver++ spans the whole schedule.
    """
    _check(n, len(schedule))
    start = len(schedule) - 1 if first is None else first
    high, low = (float(sigma_of(schedule(t))) ** (1 / rho) for t in (start, last))
    if not high > low > 0:
        raise ValueError(f"Karras' timesteps fall from a noisy one to a less noisy one; got {start} to {last}")
    inner = [schedule.timestep((high + k / (n - 1) * (low - high)) ** rho) for k in range(1, n - 1)]
    return [float(start), *inner, *([float(last)] if n > 1 else []), end]


def without_lowest(path: Sequence[Time]) -> list[Time]:
    """One step less, to the same end: DPM-Solver's leading and linspace paths are those of n + 1 steps, so cut."""
    if len(path) < 3:
        raise ValueError(f"a path keeps one timestep above its end; got {list(path)}")
    return [*path[:-2], path[-1]]


def strided(path: Sequence[int], steps: int = 1000) -> list[int]:
    """Where diffusers' DDIM takes each step of a downward path: steps // n down, below 0 to the path's end.

    That is where the next step begins on leading paths, and on trailing ones where n divides `steps`; elsewhere
    `ddim(..., reached=strided(path))` repeats it, and `ddim(...)` alone loses nothing between two steps.
    """
    gap = steps // max(len(path) - 1, 1)
    return [t - gap if t >= gap else path[-1] for t in path[:-1]]


def upward(path: Sequence[Time]) -> list[Time]:
    """The same timesteps in the order of inversion; the clean image stands in for the lowest noisy one."""
    return [t for t in reversed(path) if t >= 0]


def _check(n: int, steps: int) -> None:
    if not 1 <= n <= steps:
        raise ValueError(f"the number of steps lies in 1 ... {steps}; got {n}")

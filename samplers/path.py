"""Paths of timesteps: which ones a sampler visits, downward and ending where the walk ends.

A path is a list of integers in walking order.  Timestep -1 is the clean image.
"""

import torch


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


def upward(path: list[int]) -> list[int]:
    """The same timesteps in the order of inversion; the clean image stands in for the lowest noisy one."""
    return [t for t in reversed(path) if t >= 0]


def _check(n: int, steps: int) -> None:
    if not 1 <= n <= steps:
        raise ValueError(f"the number of steps lies in 1 ... {steps}; got {n}")

"""Noise schedules: how much of the image is left at each timestep, and between two of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps, alpha cumulative (Ho et al. 2020, eq. 4).

    Timestep -1 is the clean image: alpha = 1.
    """

    alphas: Tensor  # (T,) float64, on the CPU

    def __post_init__(self) -> None:
        a = self.alphas
        if a.ndim != 1 or not len(a) or not (a.min() > 0 and a.max() <= 1 and a.diff().le(0).all()):  # nor NaN
            raise ValueError("a schedule is one row of cumulative alphas in (0, 1] that never rise")

    def __len__(self) -> int:
        return len(self.alphas)

    def __call__(self, t: float | Tensor) -> Tensor:
        """alpha at timesteps 0 ... T-1 and at -1, in float64 and in t's shape; a ValueError for any other.

        Between two whole timesteps the log of sigma = sqrt((1 - alpha) / alpha) is linear in t, as in k-diffusion.
        """
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not bool(((at == -1) | (at >= 0) & (at <= len(self) - 1)).all()):
            raise ValueError(f"timesteps lie in -1 ... {len(self) - 1}, none between -1 and 0; got {at.tolist()}")
        below = at.floor().long().clamp(min=0)
        share = at - below
        alpha = torch.where(at < 0, torch.ones((), dtype=torch.float64), self.alphas[below])
        if bool((share <= 0).all()):
            return alpha
        if bool((self.alphas[below][share > 0] == 1).any()):
            raise ValueError(f"where alpha is 1 there is no timestep between two whole ones; got {at.tolist()}")
        low, high = (sigma_of(self.alphas[k]).log() for k in (below, (below + 1).clamp(max=len(self) - 1)))
        return torch.where(share > 0, alpha_of((low + share * (high - low)).exp()), alpha)

    def timestep(self, sigma: float) -> float:
        """The timestep in 0 ... T-1 at which sqrt((1 - alpha) / alpha) is `sigma`; -1 where sigma is 0.

        A ValueError is raised for a sigma outside those of the table.
        """
        if sigma == 0:
            return -1.0
        table = sigma_of(self.alphas)
        low, high = float(table[0]), float(table[-1])
        if not 0 < low * (1 - 1e-9) <= sigma <= high * (1 + 1e-9):
            raise ValueError(f"sigma lies in {low:.6g} ... {high:.6g}, or is 0; got {sigma:.6g}")
        below = int(torch.searchsorted(table, sigma, right=True)) - 1
        if not 0 <= below < len(self) - 1:
            return float(min(max(below, 0), len(self) - 1))
        a, b = math.log(table[below]), math.log(table[below + 1])
        return below + (math.log(sigma) - a) / (b - a)


def sigma_of(alpha: Tensor) -> Tensor:
    """sigma = sqrt((1 - alpha) / alpha), the noise's share of x / sqrt(alpha) = x_0 + sigma eps."""
    return ((1 - alpha) / alpha).sqrt()


def alpha_of(sigma: Tensor) -> Tensor:
    """alpha = 1 / (1 + sigma²)."""
    return 1 / (1 + sigma**2)


def from_betas(betas: Tensor) -> Schedule:
    """beta_t = 1 - alpha_t / alpha_{t-1}.  (T,) -> a schedule of T timesteps."""
    return Schedule((1 - betas.double()).cumprod(0))


def linear(steps: int = 1000, beta_0: float = 1e-4, beta_1: float = 0.02) -> Schedule:
    """Betas in equal steps (Ho et al. 2020): DDPM, ADM and P2 checkpoints."""
    return from_betas(torch.linspace(beta_0, beta_1, steps, dtype=torch.float64))


def scaled_linear(steps: int = 1000, beta_0: float = 0.00085, beta_1: float = 0.012) -> Schedule:
    """Square roots of betas in equal steps (Rombach et al. 2022): Stable Diffusion and SDXL."""
    return from_betas(torch.linspace(beta_0**0.5, beta_1**0.5, steps, dtype=torch.float64) ** 2)


def cosine(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha as a squared cosine (Nichol & Dhariwal 2021, eq. 17), betas clipped: iDDPM and ADM at 64²."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def rescale_zero_terminal_snr(schedule: Schedule, floor: float = 2.0**-24) -> Schedule:
    """sqrt(alpha) shifted and scaled so that the last timestep is noise alone (Lin et al. 2024, algorithm 1).

    The last alpha is `floor` in the place of 0, where x_0 could not be had from eps and sigma would be infinite.  2^-24
    is what float32 can carry, and where diffusers' Euler stops.  Its DDIM and DDPM have 0 itself, which 2^-50 comes to
    in a walk of float64 (x in float64; the network computes in its own type).
    """
    if len(schedule) < 2 or not 0 < floor < float(schedule.alphas[-1]):
        raise ValueError(f"the floor lies between 0 and the last alpha of at least two; got {floor:g}")
    roots = schedule.alphas.sqrt()
    first, last = roots[0], roots[-1]
    return Schedule(((roots - last) * first / (first - last)).square().clamp(min=floor))

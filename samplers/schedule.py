"""Noise schedules: how much of the image is left at each timestep."""

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

    def __call__(self, t: int | Tensor) -> Tensor:
        """alpha at integer timesteps -1 ... T-1, in float64 and in t's shape."""
        where = torch.as_tensor(t, device="cpu").long()
        if bool((where < -1).any()) or bool((where >= len(self)).any()):
            raise ValueError(f"timesteps lie in -1 ... {len(self) - 1}; got {where.tolist()}")
        return torch.where(where < 0, torch.ones((), dtype=torch.float64), self.alphas[where.clamp(min=0)])


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

"""Euler's method and its ancestral variant in sigma (Karras et al. 2022; k-diffusion), which are DDIM in other words.

With y = x_t / sqrt(a) and sigma = sqrt((1 - a) / a) the probability-flow equation is dy / dsigma = eps, and Euler's
y_s = y_t + (sigma_s - sigma_t) eps is DDIM's step with eta = 0 (Song et al. 2021, eq. 13).
"""

from collections.abc import Sequence

from torch import Tensor

from .ddim import Steps, ddim
from .noise import Noise
from .parameterisation import Denoise
from .schedule import Schedule


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, path: Sequence[float]) -> Steps:
    """Walk x (B, C, H, W) along `path`, downward or upward, one call of the network a step."""
    return ddim(denoise, x, schedule, path)


def euler_ancestral(
    denoise: Denoise, x: Tensor, schedule: Schedule, path: Sequence[float], *, noise: Noise, eta: float = 1.0
) -> Steps:
    """Sample x (B, C, H, W) down `path`: Euler to sigma_down, then noise of sigma_up.

    sigma_up² = eta² sigma_s² (sigma_t² - sigma_s²) / sigma_t² and sigma_down² = sigma_s² - sigma_up²: DDIM's step with
    the same eta, and for eta = 1 DDPM's with the small variance.
    """
    return ddim(denoise, x, schedule, path, eta=eta, noise=noise)

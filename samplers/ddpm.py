"""DDPM's ancestral sampler (Ho et al. 2020), with fixed variances or the learned one (Nichol & Dhariwal 2021)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .ddim import Step, Steps
from .noise import Noise
from .parameterisation import Denoise, over, times, x0_from_eps
from .schedule import Schedule

Variance = Literal["small", "large", "learned"]


def betas(schedule: Schedule, t: float, s: float) -> tuple[Tensor, Tensor]:
    """beta of the step s -> t, and beta~, the variance of x_s given x_t and x_0 (Ho et al. 2020, eq. 7).

    At the last step beta~ is 0; its logarithm is taken from the step above, as iDDPM does.
    """
    a_t, a_s = schedule(t), schedule(s)
    if s < 0 and t + 1 < len(schedule):
        lower, upper = schedule(t), schedule(t + 1)
        floor = (1 - lower) / (1 - upper) * (1 - upper / lower)
    else:
        floor = torch.full((), 1e-20, dtype=torch.float64)
    beta = 1 - a_t / a_s
    return beta, floor if s < 0 else (1 - a_s) / (1 - a_t) * beta


def posterior_mean(x: Tensor, x0: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
    """E[x_s | x_t, x_0] (Ho et al. 2020, eq. 7), for any s below t."""
    a_t, a_s = schedule(t), schedule(s)
    beta = 1 - a_t / a_s
    return over(a_s.sqrt() * beta / (1 - a_t), x) * x0 + over((a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t), x) * x


def log_variance(schedule: Schedule, t: float, s: float, kind: Variance, v: Tensor | None = None) -> Tensor:
    """log of the variance of a step: beta~, beta, or v log beta + (1 - v) log beta~ (Nichol & Dhariwal 2021, eq. 15).

    `v` (B, C, H, W) is the network's own output in [-1, 1] for kind "learned".  -> (), or like v where it is learned.
    """
    beta, small = betas(schedule, t, s)
    if kind == "small":
        return small.log()
    if kind == "large":
        return beta.log()
    if kind != "learned":
        raise ValueError(f'the variance is "small", "large" or "learned"; got "{kind}"')
    if v is None:
        raise ValueError("a learned variance needs the network's variance channels")
    share = (v + 1) / 2
    return share * over(beta.log(), v) + (1 - share) * over(small.log(), v)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    *,
    noise: Noise,
    variance: Variance = "small",
    clip: float | None = None,
) -> Steps:
    """Sample x down `path`, which may skip timesteps; no noise is added at the last step.

    With variance "learned", `denoise` returns eps and the variance channels together, (B, 2C, H, W).
    `clip` bounds the predicted x_0, as the published samplers do with 1.
    """
    for t, s in pairwise(path):
        if s >= t:
            raise ValueError(f"ancestral sampling walks down; the path goes from {t} to {s}")
        out = denoise(x, times(t, x))
        if variance == "learned" and out.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"a learned variance needs {2 * x.shape[1]} output channels; the network has {out.shape[1]}"
            )
        eps, v = out[:, : x.shape[1]], out[:, x.shape[1] :] if variance == "learned" else None
        x0 = x0_from_eps(x, eps, schedule(t))
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = posterior_mean(x, x0, schedule, t, s)
        z = noise(x)
        x = mean if s < 0 else mean + (log_variance(schedule, t, s, variance, v) / 2).exp().to(x) * z
        sent = yield Step(t, s, x, x0, eps)
        x = x if sent is None else sent

"""What a network predicts: the noise eps, the clean image x0, or the velocity v; each gives the others.

Every sampler here keeps x_t = sqrt(a) x_0 + sqrt(1 - a) eps, as the networks were trained on: variance-preserving.
Karras et al. 2022 and k-diffusion keep y = x_0 + sigma eps instead, at most 15 times as large for Stable Diffusion:
y = x_t / sqrt(a), sigma = sqrt((1 - a) / a), the same eps and x_0.  A schedule has both alpha and sigma for every
timestep, whole or not, so that a step in one view is a step in the other.  Only the start differs: pure noise z
is here x_T = z, or `noised(0, z, a)` where k-diffusion begins with y = sigma z (0.2 % less, for Stable Diffusion).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .schedule import Schedule, alpha_of, sigma_of

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,)) -> eps (B, ...)
Prediction = Literal["eps", "x0", "v"]


def over(a: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,), kept in float64 until here, shaped and cast for x (B, ...)."""
    return a.to(x) if a.ndim == 0 else a.to(x).view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) eps (Ho et al. 2020, eq. 4)."""
    return over(a.sqrt(), x0) * x0 + over((1 - a).sqrt(), x0) * eps


def to_sigma(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """x_t -> y = x_t / sqrt(a) = x_0 + sigma eps, and sigma in float64 and a's shape."""
    return x / over(a.sqrt(), x), sigma_of(a)


def from_sigma(y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """y = x_0 + sigma eps -> x_t = y / sqrt(1 + sigma²), what k-diffusion shows the network, and alpha."""
    a = alpha_of(sigma)
    return y * over(a.sqrt(), y), a


def x0_from_eps(x: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a): DDIM (Song et al. 2021), eq. 9.  Never clipped."""
    return (x - over((1 - a).sqrt(), x) * eps) / over(a.sqrt(), x)


def eps_from_x0(x: Tensor, x0: Tensor, a: Tensor) -> Tensor:
    """The same, solved for eps; undefined at a = 1."""
    return (x - over(a.sqrt(), x) * x0) / over((1 - a).sqrt(), x)


def v_from_eps(x: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans & Ho 2022, section 4)."""
    return over(a.sqrt(), x) * eps - over((1 - a).sqrt(), x) * x0_from_eps(x, eps, a)


def eps_from_v(x: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """eps = sqrt(a) v + sqrt(1 - a) x_t (Salimans & Ho 2022, appendix D)."""
    return over(a.sqrt(), x) * v + over((1 - a).sqrt(), x) * x


def x0_from_v(x: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """x_0 = sqrt(a) x_t - sqrt(1 - a) v (Salimans & Ho 2022, appendix D)."""
    return over(a.sqrt(), x) * x - over((1 - a).sqrt(), x) * v


def as_eps(predict: Denoise, schedule: Schedule, kind: Prediction) -> Denoise:
    """A network that predicts `kind`, as one that predicts eps."""
    if kind == "eps":
        return predict
    if kind not in ("x0", "v"):
        raise ValueError(f'a network predicts "eps", "x0" or "v"; got "{kind}"')
    convert = eps_from_x0 if kind == "x0" else eps_from_v

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return convert(x, predict(x, t), schedule(t))

    return eps


def clipped(denoise: Denoise, schedule: Schedule, limit: float = 1.0) -> Denoise:
    """Keep the predicted x_0 within +-limit, as pixel models are usually sampled; inversion must not clip."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a = schedule(t)
        return eps_from_x0(x, x0_from_eps(x, denoise(x, t), a).clamp(-limit, limit), a)

    return eps


def whole(predict: Denoise) -> Denoise:
    """The network is told the nearest whole timestep, as some published samplers do over Karras' timesteps.

    It goes inside `as_eps`, which needs the timestep as it is: `as_eps(whole(predict), schedule, kind)`.
    """
    return lambda x, t: predict(x, t.round())


def computed_in(dtype: torch.dtype, predict: Denoise) -> Denoise:
    """The network computes in `dtype` while the walk keeps x in its own: small steps are lost in half precision."""
    return lambda x, t: predict(x.to(dtype), t).to(x)


def times(t: float, x: Tensor) -> Tensor:
    """One timestep for every image of x: (B,), in float32 or better."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

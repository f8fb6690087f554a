"""Classifier-free guidance (Ho & Salimans 2022), around any network: two predictions in one batch become one.

The batch layout, here and everywhere: all unconditional rows first, then all conditional ones in the same order.
"""

import torch
from torch import Tensor

from .parameterisation import Denoise, over

Interval = tuple[float, float]  # timesteps (low, high), both included


def paired(uncond: Tensor, cond: Tensor) -> Tensor:
    """2 x (B, ...) -> (2B, ...), the unconditional half first."""
    return torch.cat([uncond, cond])


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, ...) -> the unconditional and the conditional half, (B, ...) each.  A ValueError for an odd batch."""
    if len(rows) % 2:
        raise ValueError(f"a guided batch has an unconditional row for every conditional one; got {len(rows)} rows")
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def apart(uncond: Denoise, cond: Denoise) -> Denoise:
    """Both halves of a guided batch (2B, ...) in two calls of B rows: slower, and half the memory."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        (x_u, x_c), (t_u, t_c) = halves(x), halves(t)
        return paired(uncond(x_u, t_u), cond(x_c, t_c))

    return both


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """u + scale (c - u), 3 x (B, C, H, W), `scale` a number or (B,) (Ho & Salimans 2022, eq. 6 with scale = 1 + w).

    `rescale` in 0 ... 1 mixes in the same with c's standard deviation, per image (Lin et al. 2024, eq. 15 and 16).
    """
    g = over(scale, cond) if isinstance(scale, Tensor) else scale
    guided = uncond + g * (cond - uncond)
    if rescale == 0:
        return guided
    spread = [y.flatten(1).std(1).view(-1, *[1] * (y.ndim - 1)) for y in (cond, guided)]
    return guided * (rescale * spread[0] / spread[1] + (1 - rescale))


def guided(
    both: Denoise,
    cond: Denoise,
    scale: float | Tensor,
    *,
    rescale: float = 0.0,
    interval: Interval | None = None,
) -> Denoise:
    """A network and its conditional and unconditional inputs, as one prediction (B, C, H, W) for samplers.

    `both` predicts (2B, C, H, W) for such a batch, in the layout above; `cond` predicts for the conditional rows alone
    and is the only one called where the scale is 1 or no row's timestep is in `interval` (Kynkäänniemi et al. 2024).
    `scale` (B,) is one for every image; a batch of several timesteps, the images varying fastest, repeats it.
    Wrap what the network itself predicts, eps, x0 or v, and convert with `as_eps` afterwards: for `rescale` that
    matters.  Raises ValueError for a scale of another shape, a rescale outside 0 ... 1.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale lies in 0 ... 1; got {rescale}")
    if isinstance(scale, Tensor) and scale.ndim > 1:
        raise ValueError(f"scale is one number, or one an image (B,); got {tuple(scale.shape)}")
    off = bool((torch.as_tensor(scale) == 1).all())

    def predict(x: Tensor, t: Tensor) -> Tensor:
        inside = None if interval is None else (t >= interval[0]) & (t <= interval[1])
        if off or (inside is not None and not bool(inside.any())):
            return cond(x, t)
        g = scale
        if isinstance(g, Tensor) and g.ndim:
            if len(x) % len(g):
                raise ValueError(f"{len(g)} scales do not fit a batch of {len(x)} images")
            g = g.repeat(len(x) // len(g))
        u, c = halves(both(paired(x, x), paired(t, t)))
        out = guide(u, c, g, rescale)
        if inside is None or bool(inside.all()):
            return out
        return torch.where(inside.to(x.device).view(-1, *[1] * (x.ndim - 1)), out, c)

    return predict

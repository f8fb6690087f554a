"""FreeU (Si et al. 2024): in the two coarsest blocks of the decoder, more of h and less of the skips' low frequencies.

    h' = b h in the first half of its channels,   skip' = IFFT(s FFT(skip)) at the lowest frequencies        (eq. 3, 5)

Here b is a constant, as in the authors' first code and in diffusers; the paper's b (eq. 2) varies with the mean of h.
The lowest frequencies are the four about the centre of the shifted spectrum, 0 and -1 on each axis, so that the filter
is two products with small matrices and needs no transform.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ops import Ops, Site
from ..model.unet import UNetConfig


class FreeU(NamedTuple):
    """How much of h and of the skips' low frequencies, in the coarsest block (1) and the next (2); 1: no change."""

    b1: float
    b2: float
    s1: float
    s2: float


PRESETS: Mapping[str, FreeU] = MappingProxyType(
    {
        "sdxl": FreeU(1.3, 1.4, 0.9, 0.2),
        "sd15": FreeU(1.5, 1.6, 0.9, 0.2),
        "sd21": FreeU(1.4, 1.6, 0.9, 0.2),
        "consistory": FreeU(1.1, 1.2, 0.6, 0.4),
    }
)


def freeu(ops: Ops, cfg: UNetConfig, factors: FreeU) -> Ops:
    """Verbs in which `join` is FreeU's at every stage of the decoder's first two blocks.

    A ValueError is raised for factors that are not finite.  At 1, 1, 1, 1 the verbs are `ops`.
    """
    if not all(math.isfinite(f) for f in factors):
        raise ValueError(f"FreeU's factors are finite numbers; got {tuple(factors)}")
    if factors == (1, 1, 1, 1):
        return ops
    per = cfg.blocks + 1
    pairs = {f"dec.{i}": (factors.b1, factors.s1) if i < per else (factors.b2, factors.s2) for i in range(2 * per)}

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        b, s = pairs.get(site.stage, (1.0, 1.0))
        return ops.join(site, raised(h, b), lowered(skip, s))

    return replace(ops, join=join)


def raised(h: Tensor, b: float) -> Tensor:
    """h (B, C, H, W) with the first C / 2 channels times b."""
    if b == 1:
        return h
    half = h.shape[1] // 2
    return torch.cat([h[:, :half] * b, h[:, half:]], dim=1)


def lowered(skip: Tensor, s: float) -> Tensor:
    """skip (B, C, H, W) with its frequencies 0 and -1 of both axes times s; the real part.

    Their share of pixel (y, x) is the mean over (m, n) of cos(u a + v b) summed over u, v in 0, 1, where a = 2 pi (y -
    m) / H, b = 2 pi (x - n) / W: that is (1 + cos a)(1 + cos b) - sin a sin b.
    """
    if s == 1:
        return skip
    kind = torch.promote_types(skip.dtype, torch.float32)
    z = skip.to(kind)
    (cy, sy), (cx, sx) = (waves(n, z) for n in z.shape[2:])
    low = cy @ z @ cx - sy @ z @ sx.T
    return (z + (s - 1) * low).to(skip.dtype)


def waves(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + cos(2 pi (y - m) / n)) / n and sin(2 pi (y - m) / n) / n, 2 x (n, n); one pixel has frequency 0 alone."""
    y = torch.arange(n, device=like.device, dtype=like.dtype)
    a = 2 * math.pi / n * (y[:, None] - y)
    if n == 1:
        return torch.ones_like(a), torch.zeros_like(a)
    return (1 + a.cos()) / n, a.sin() / n

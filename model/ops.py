"""The five verbs a network is made of, and the sites where they are spoken.

A method wraps a verb and hands on every argument that it does not use, so that methods stack; what else an attention
shall see it adds to `seen` (`kernels.sources.also`), and the verb beneath does it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import geglu as gate
from ..kernels import group_norm as norm
from ..kernels import reference
from ..kernels.device import HALF, takes_triton
from ..kernels.source_attention import WIDEST, source_attention
from ..kernels.sources import Seen


class Site(NamedTuple):
    """Where in a network a verb is spoken."""

    stage: str  # "enc.0" ... "enc.n-1", "mid", "dec.0" ... "dec.n-1", "out"
    depth: int  # which one of its kind within the stage, in order of execution
    kind: str  # self, cross, image (attend) | norm (group_norm) | join | res, self, cross, ff, transformer (add)


def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None) -> Tensor:
    """Scaled dot-product attention, also to what is `seen` besides the own keys, k and v.

    (B, H, N, D), 2 x (B, H, M, D) -> (B, H, N, D).  Logits are in float32 or wider whatever the inputs are, here as in
    what replaces this verb: those of Stable Diffusion 2 overflow float16.  A ValueError is raised for a bias together
    with `seen`.
    """
    if seen is None:
        return reference.attention(q, k, v, bias)
    unbiased(site, bias)
    return source_attention(q, k, v, seen.sources, pool=seen.pool, ref=seen.ref)[0]


def softmax_attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
) -> Tensor:
    """`attend` written out in products and a softmax, in float32 or wider."""
    kind, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if seen is None:
        return reference.softmax_attention(q, k, v, bias).to(kind)
    unbiased(site, bias)
    pool = None if seen.pool is None else (seen.pool[0].to(wide), seen.pool[1].to(wide))
    return reference.source_attention(q, k, v, seen.sources, pool, seen.ref)[0].to(kind)


def triton_attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
) -> Tensor:
    """`attend` by the kernel of source attention where that takes the inputs, and by torch where it does not."""
    fits = bias is None and k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[2] > 0
    if seen is None and fits and takes_triton(q, HALF, WIDEST):
        return source_attention(q, k, v)[0]
    return attend(site, q, k, v, bias, seen)


def unbiased(site: Site, bias: Tensor | None) -> None:
    """Refuse a bias where other keys are seen: it has a column for each of the own keys only."""
    if bias is not None:
        raise ValueError(f"attention at {site} has a bias, which says nothing of the other keys that it shall see")


def group_norm(
    site: Site,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None = None,
) -> Tensor:
    """Group normalisation, then SiLU if `silu`; with ref (B,), over the pixels of both images i and ref[i].

    (B, C, H, W) -> (B, C, H, W).
    """
    if ref is None:
        return reference.group_norm(x, weight, bias, groups, eps, silu)
    return norm.group_norm(x, weight, bias, groups, eps, silu, ref)


def joined_group_norm(
    site: Site,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None = None,
) -> Tensor:
    """`group_norm` with both images side by side in memory."""
    return reference.group_norm(x, weight, bias, groups, eps, silu, ref)


def triton_group_norm(
    site: Site,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None = None,
) -> Tensor:
    """`group_norm` by its kernels where they take the inputs, and by torch where they do not."""
    return norm.group_norm(x, weight, bias, groups, eps, silu, ref)


def geglu(x: Tensor) -> Tensor:
    """The gate of a transformer's feed-forward layer.  (..., 2C) -> (..., C)."""
    return reference.geglu(x)


def concat(site: Site, h: Tensor, skip: Tensor) -> Tensor:
    """What a decoder stage sees: h first, then the skip.  (B, C, H, W), (B, D, H, W) -> (B, C + D, H, W)."""
    return torch.cat([h, skip], dim=1)


def add(site: Site, x: Tensor, dx: Tensor) -> Tensor:
    """What a branch contributes to the residual stream."""
    return x + dx


@dataclass(frozen=True)
class Ops:
    """The verbs.  Kernels replace them, methods wrap them; each is told its Site, except `geglu`, which needs none."""

    attend: Callable[..., Tensor] = attend
    group_norm: Callable[..., Tensor] = group_norm
    geglu: Callable[[Tensor], Tensor] = geglu
    join: Callable[[Site, Tensor, Tensor], Tensor] = concat
    add: Callable[[Site, Tensor, Tensor], Tensor] = add


TORCH = Ops()
JVP = Ops(softmax_attend, joined_group_norm)  # for torch.func.jvp: fused attention has no forward-mode derivative


def triton() -> Ops:
    """`attend`, `group_norm` and `geglu` by Triton on Nvidia devices since Ampere, attention in half precision, to the
    own keys for heads up to 128 and to others too up to 256; the other verbs, and all of them elsewhere, by torch."""
    return Ops(triton_attend, triton_group_norm, gate.geglu)

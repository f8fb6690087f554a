"""Attention of each image to its own keys and any number of other sources, AdaIN folded in, as one custom op."""

from typing import Any

import torch
from torch import Tensor

from . import reference, source_attention_torch
from .adain import token_major, token_stats
from .device import HALF, dual, integers, refuse, takes_triton
from .sources import Sources

WIDEST = 128  # the widest head that a kernel holds in registers, and gains from with no sources to see
WIDER = 256  # the widest head that it takes


def source_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sources: Sources | None = None,
    *,
    pool: tuple[Tensor, Tensor] | None = None,
    ref: Tensor | None = None,
    stats: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """softmax over [own keys, sources' keys] of scale * q k, times the values; none of it side by side in memory.

    q (B, H, N, D); k, v (B, H, M, D); pool 2 x (P, H, T, D), the keys and values that `sources` has ranges of, by
    default k and v; any strides.  With ref (B,), integers, q and the own k take the token statistics of image ref[i]
    (StyleAligned, Hertz et al. 2024, eq. 5), though k in memory does not (docs/kernels.md); keys of the pool are taken
    as they are.  `stats` is token_stats(q, k, eps) where it is known.  scale is 1 / sqrt(D) unless given, and positive.

    Returns the output (B, H, N, D), in memory (B, N, H, D), and the log-sum-exp (B, H, N), float32 or float64, in nats.
    Gradients reach q, k, v, the pool and, through ref, the statistics; one derivative, reverse mode.

    With K the keys an image sees: 4 B H N K D FLOP, B H N K exponentials; reads q once, the keys once for every block
    of queries, from cache but for the first; writes the output and B H N sums.  Triton on Nvidia devices since Ampere,
    in half precision, for heads up to 256; on CPU a fused call for the own keys and each source, and a merge; anywhere
    else the same of plain products, a block of queries at a time.

    ValueError: shapes that do not fit, sources of another batch or outside the pool, stats without ref, and, where a
    kernel would have to wait for the device to know, only on other devices: a ref outside the batch.
    """
    _check(q, k, v, sources, pool, ref, stats)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < factor < float("inf"):
        raise ValueError(f"scale is positive and finite; got {scale}")
    if dual(q, k, v, *(pool or ()), stats):
        if stats is not None:
            raise ValueError("statistics that are given have no forward derivative: leave stats out")
        return reference.source_attention(q, k, v, sources, pool, ref, factor, eps)
    if ref is not None and stats is None:
        stats = token_stats(q, k, eps)
    pk, pv = (None, None) if pool is None else pool
    if sources is None:
        sources = Sources.none(q.shape[0], q.device)
    tables = sources.offsets, sources.segments, sources.gains
    out, lse = torch.ops.diaphane.source_attention(q, k, v, pk, pv, *tables, stats, ref, factor)
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sources: Sources | None,
    pool: tuple[Tensor, Tensor] | None,
    ref: Tensor | None,
    stats: Tensor | None,
) -> None:
    if q.ndim != 4 or 0 in (q.shape[1], q.shape[3]) or not q.dtype.is_floating_point:
        raise ValueError(f"q is (B, H, N, D) of a floating type, H and D > 0; got {tuple(q.shape)} {q.dtype}")
    b, h, _, d = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, h, d) or k.shape != v.shape or k.shape[2] == 0:
        raise ValueError(
            f"q {tuple(q.shape)} takes k and v (B, H, M, D), M > 0; got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    pk, pv = (k, v) if pool is None else pool
    if pk.ndim != 4 or (pk.shape[1], pk.shape[3]) != (h, d) or pk.shape != pv.shape:
        raise ValueError(
            f"q {tuple(q.shape)} takes a pool (P, H, T, D) twice; got {tuple(pk.shape)}, {tuple(pv.shape)}"
        )
    for name, x in (("k", k), ("v", v), ("the pool's keys", pk), ("the pool's values", pv)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device}, and so is every input; {name}: {x.dtype} on {x.device}")
    if sources is not None:
        if sources.images != b:
            raise ValueError(f"sources are of {sources.images} images, q of {b}")
        if sources.pool_images > pk.shape[0] or sources.pool_rows > pk.shape[2]:
            need = f"{sources.pool_images} images of {sources.pool_rows} rows"
            raise ValueError(f"sources need a pool of at least {need}; got {pk.shape[0]} of {pk.shape[2]}")
        if sources.gains.device != q.device:
            raise ValueError(f"sources are on {sources.gains.device}, q on {q.device}; build them there")
    if ref is not None and (ref.shape != (b,) or not integers(ref) or ref.device != q.device):
        raise ValueError(f"ref is {b} integers on {q.device}; got {tuple(ref.shape)} {ref.dtype} on {ref.device}")
    if stats is not None and (ref is None or stats.shape != (2, 2, b, h, d)):
        raise ValueError(f"stats come with ref and are {(2, 2, b, h, d)}, of q and k; got {tuple(stats.shape)}")


_TABLES = "Tensor offsets, Tensor segments, Tensor gains, Tensor? stats, Tensor? ref, float scale"
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? pk, Tensor? pv, {_TABLES}"


@torch.library.custom_op("diaphane::source_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if takes_triton(q, HALF, WIDER):
        from . import source_attention_triton

        return source_attention_triton.forward(q, *rest)
    return source_attention_torch.forward(q, *rest)


@_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return token_major(q), q.new_empty(q.shape[:3], dtype=sums)


@torch.library.custom_op(
    "diaphane::source_attention_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor? g_lse, Tensor out, Tensor lse, {_INPUTS}) -> Tensor[]",
)
def _backward(g: Tensor, g_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients by q, k, v, and, where there are any, the pool's keys and values and the statistics."""
    if takes_triton(q, HALF, WIDER):
        from . import source_attention_triton

        return source_attention_triton.backward(g, g_lse, out, lse, q, *rest)
    return source_attention_torch.backward(g, g_lse, out, lse, q, *rest)


@_backward.register_fake
def _(
    g: Tensor,
    g_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pv: Tensor | None,
    offsets: Tensor,
    segments: Tensor,
    gains: Tensor,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    grads = [token_major(x) for x in (q, k, v, pk, pv) if x is not None]
    return grads if stats is None else [*grads, torch.empty_like(stats)]


_backward.register_autograd(refuse("source_attention_backward", "source_attention"))


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple:
    out, lse, *tensors = ctx.saved_tensors
    if g is None:
        g = torch.zeros_like(out)
    grads = iter(torch.ops.diaphane.source_attention_backward(g, g_lse, out, lse, *tensors, ctx.scale))
    q, k, v, pk, pv, _, _, _, stats, _ = tensors
    by_inputs = [None if x is None else next(grads) for x in (q, k, v, pk, pv)]
    return *by_inputs, None, None, None, None if stats is None else next(grads), None, None


_forward.register_autograd(_gradients, setup_context=_context)

"""Cross-attention that also gives chosen columns of its probabilities, averaged over heads, as one custom op."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .adain import accumulator, rows, token_major
from .device import HALF, dual, integers, refuse, takes_triton
from .source_attention import WIDEST

MOST = 128  # columns that its kernel holds in registers
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def masked_maps(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention, and the maps of chosen keys: how much of each query's softmax they get, the mean over heads.

    q (B, H, N, D); k, v (B, H, M, D), any strides; tokens integers (B, T), or (T,) for every image alike, and -1 for no
    key, whose map is 0.  scale is 1 / sqrt(D) unless given, and positive.  Returns the output (B, H, N, D), in memory
    (B, N, H, D), and the maps (B, N, T), float32 or float64.  Gradients reach q, k and v from both; one derivative.

    The N x M probabilities are not built: a column is exp(scale q k_t - lse) (docs/kernels.md, eq. M1).  Beside the
    attention's 4 B H N M D FLOP that takes 2 B H N T D more and B H N T exponentials; the maps are written once, in
    4 B N T bytes.  Triton on Nvidia devices since Ampere, in half precision, for heads up to 128 and 128 columns; on
    CPU a fused call and a small product a head; anywhere else the definition.

    ValueError: shapes that do not fit, tokens that are no integers, and, on CPU, a token that is no key; on a GPU,
    where asking would wait for the device, its map is NaN (or, in the definition, torch's own assertion).
    """
    factor = _checked(q, k, v, tokens, scale)
    if dual(q, k, v) or not _fused(q, tokens):
        return reference.masked_maps(q, k, v, tokens, factor)
    out, _, maps = torch.ops.diaphane.masked_maps(q, k, v, _each(tokens, q), factor)
    return out, maps


def token_maps(q: Tensor, k: Tensor, tokens: Tensor, *, scale: float | None = None) -> Tensor:
    """The maps of `masked_maps` alone, for an attention that something else computes.

    (B, H, N, D), (B, H, M, D), (B, T) or (T,) -> (B, N, T).  2 B H N (M + T) D FLOP and B H N (M + T) exponentials;
    reads q and k once.  ValueError: as `masked_maps`.
    """
    factor = _checked(q, k, k, tokens, scale)
    if dual(q, k) or not _fused(q, tokens):
        return reference.masked_maps(q, k, k, tokens, factor)[1]
    return torch.ops.diaphane.masked_maps(q, k, None, _each(tokens, q), factor)[2]


def _fused(q: Tensor, tokens: Tensor) -> bool:
    return q.device.type == "cpu" or (takes_triton(q, HALF, WIDEST) and 0 < tokens.shape[-1] <= MOST)


def _each(tokens: Tensor, q: Tensor) -> Tensor:
    return tokens.to(torch.int32).expand(q.shape[0], -1).contiguous()


def _checked(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float | None) -> float:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"masked_maps takes q (B, H, N, D), none of them 0; got {tuple(q.shape)}")
    b, h, _, d = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (b, h, d) or k.shape != v.shape or k.shape[2] == 0:
        got = f"{tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q {tuple(q.shape)} takes k and v (B, H, M, D), M > 0; got {got}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"q is {q.dtype} on {q.device}, and so is every input; {name}: {x.dtype} on {x.device}")
    if (
        not integers(tokens)
        or tokens.device != q.device
        or tokens.ndim not in (1, 2)
        or tokens.shape[:-1] not in ((), (b,))
    ):
        got = f"{tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
        raise ValueError(f"tokens are integers, (T,) or ({b}, T), on {q.device}; got {got}")
    factor: float = d**-0.5 if scale is None else scale
    if not factor > 0:
        raise ValueError(f"scale is positive; got {scale}")
    return factor


_INPUTS = "Tensor q, Tensor k, Tensor? v, Tensor tokens, float scale"


@torch.library.custom_op("diaphane::masked_maps", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
def _forward(q: Tensor, k: Tensor, v: Tensor | None, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, empty without v; the log-sum-exp (B, H, N); the maps."""
    if takes_triton(q, HALF, WIDEST):
        from . import masked_maps_triton

        return masked_maps_triton.forward(q, k, v, tokens, scale)
    outside = (tokens < -1) | (tokens >= k.shape[2])
    if outside.any():
        known = f"0 to {k.shape[2] - 1}, or -1 for none"
        raise ValueError(f"a token is one of the keys, {known}; got {tokens[outside][0].item()}")
    out, lse = _attend(rows(q), rows(k), rows(k if v is None else v), scale=scale)
    heads = zip(q.unbind(1), chosen(k, tokens).unbind(1), lse.unbind(1), strict=True)
    total = q.new_zeros((len(q), q.shape[2], tokens.shape[1]), dtype=lse.dtype)
    for one, keys, sums in heads:
        total += column(one, keys, sums, scale)
    maps = (total / q.shape[1]).masked_fill_((tokens < 0)[:, None], 0.0)
    if v is None:
        return q.new_empty(0), lse.contiguous(), maps
    return out if out.transpose(1, 2).is_contiguous() else token_major(q).copy_(out), lse.contiguous(), maps


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    sums = accumulator(q)
    out = q.new_empty(0) if v is None else token_major(q)
    return out, q.new_empty((b, h, n), dtype=sums), q.new_empty((b, n, tokens.shape[1]), dtype=sums)


def chosen(k: Tensor, tokens: Tensor) -> Tensor:
    """The keys of the tokens, and the first for -1.  (B, H, M, D), (B, T) -> (B, H, T, D)."""
    return k.gather(2, tokens.long().clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def column(q: Tensor, keys: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Probabilities of some keys of one head.  (B, N, D), (B, T, D), (B, N) -> (B, N, T)."""
    return (q.to(lse.dtype) @ keys.to(lse.dtype).mT * scale - lse[..., None]).exp()


@torch.library.custom_op(
    "diaphane::masked_maps_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor? g_lse, Tensor g_maps, Tensor out, Tensor lse, {_INPUTS}) -> Tensor[]",
)
def _backward(
    g: Tensor,
    g_lse: Tensor | None,
    g_maps: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    tokens: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients by q, k and, where it is given, v (docs/kernels.md, eq. M2).

    The columns reach the softmax's sum through the log-sum-exp, whose gradient source attention's backward takes, and
    the chosen keys directly.
    """
    if takes_triton(q, HALF, WIDEST):
        from . import masked_maps_triton

        return masked_maps_triton.backward(g, g_lse, g_maps, out, lse, q, k, v, tokens, scale)
    b, h, _, _ = q.shape
    g_maps = g_maps.masked_fill((tokens < 0)[:, None], 0.0) / h
    keys = chosen(k, tokens)
    by_lse, by_q, by_keys = [], [], []
    for i in range(h):
        weight = g_maps * column(q[:, i], keys[:, i], lse[:, i], scale)
        by_lse.append(-weight.sum(-1))
        by_q.append(weight @ keys[:, i].to(lse.dtype) * scale)
        by_keys.append(weight.mT @ q[:, i].to(lse.dtype) * scale)
    sums = torch.stack(by_lse, 1)
    sums = sums if g_lse is None else sums + g_lse
    if v is None:
        g = out = torch.zeros_like(q)
    results = [token_major(x) for x in (q, k, v) if x is not None]
    g, out, *given = (x.to(lse.dtype) for x in (g, out, q, k, k if v is None else v))  # rounded once, at the end
    none = tokens.new_zeros(b + 1), tokens.new_zeros((0, 4)), lse.new_zeros((0, 2), dtype=torch.float32)
    rest = torch.ops.diaphane.source_attention_backward(g, sums, out, lse, *given, None, None, *none, None, None, scale)
    onehot = (tokens[:, :, None] == torch.arange(k.shape[2], device=k.device)).to(lse.dtype)  # (B, T, M)
    dq = rest[0] + torch.stack(by_q, 1)
    dk = rest[1] + onehot.mT[:, None] @ torch.stack(by_keys, 1)
    return [result.copy_(x) for result, x in zip(results, (dq, dk, rest[2]), strict=False)]


@_backward.register_fake
def _(
    g: Tensor,
    g_lse: Tensor | None,
    g_maps: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    tokens: Tensor,
    scale: float,
) -> list[Tensor]:
    return [token_major(x) for x in (q, k, v) if x is not None]


_backward.register_autograd(refuse("masked_maps_backward", "masked_maps"))


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, tokens, ctx.scale = inputs
    ctx.save_for_backward(*output[:2], q, k, v, tokens)
    ctx.maps = output[2].shape
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, g: Tensor | None, g_lse: Tensor | None, g_maps: Tensor | None) -> tuple:
    out, lse, q, k, v, tokens = ctx.saved_tensors
    g = torch.zeros_like(out) if g is None else g
    g_maps = lse.new_zeros(ctx.maps) if g_maps is None else g_maps
    grads = torch.ops.diaphane.masked_maps_backward(g, g_lse, g_maps, out, lse, q, k, v, tokens, ctx.scale)
    return grads[0], grads[1], None if v is None else grads[2], None, None


_forward.register_autograd(_gradients, setup_context=_context)

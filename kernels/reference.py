"""Every verb in plain torch: the definition, the default, the fallback."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sources import Sources


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v.  (B, H, N, D), 2 x (B, H, M, D) -> (B, H, N, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attention` written out; it has every derivative, forward mode too, and keeps all N x M weights in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None = None,
) -> Tensor:
    """GroupNorm (Wu & He 2018), then x * sigmoid(x) if `silu`.  (B, C, ...) -> (B, C, ...).

    With ref (B,), integers, image i takes the mean and variance of its own pixels and those of image ref[i] together
    (StyleAligned's code, "share group norm").
    """
    if ref is None:
        x = torch.group_norm(x, groups, weight, bias, eps)
    else:
        both = torch.cat([x.flatten(2), x[ref.long()].flatten(2)], dim=2)
        x = F.group_norm(both, groups, weight, bias, eps)[..., : x[0, 0].numel()].view(x.shape)
    return F.silu(x) if silu else x


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) for the two halves a, b of the last axis (Shazeer 2020).  (..., 2C) -> (..., C)."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def token_stats(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean over tokens, and sqrt(variance + eps) with N - 1 in the denominator.  (..., N, D) -> 2 x (..., D)."""
    mean = x.mean(-2)
    squares = (x - mean[..., None, :]).square().sum(-2)
    return mean, (squares / max(x.shape[-2] - 1, 1) + eps).sqrt()


def adain(x: Tensor, ref: Tensor, eps: float = 1e-5) -> Tensor:
    """Every image takes the token statistics of image ref[i] (Huang & Belongie 2017, eq. 8).  (B, ..., N, D), (B,)."""
    mean, std = (s[..., None, :] for s in token_stats(x, eps))
    return (x - mean) / std * std[ref.long()] + mean[ref.long()]


def source_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sources: Sources | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    ref: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Attention of each image to its own keys and its sources', written out: keys side by side, one softmax.

    q (B, H, N, D), k and v (B, H, M, D), pool 2 x (P, H, T, D), by default k and v.  AdaIN of q and of the own keys
    towards image ref[i]; the pool is taken as it is.  Returns the output (B, H, N, D) and the log-sum-exp (B, H, N).
    """
    pk, pv = (k, v) if pool is None else pool
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if ref is not None:
        q, k = adain(q, ref, eps), adain(k, ref, eps)
    listed = [[] for _ in q] if sources is None else sources.listed()
    outs, sums = [], []
    for i, seen in enumerate(listed):
        logits = [q[i] @ k[i].transpose(-2, -1) * factor]
        values = [v[i]]
        for p, start, stop, gain, shift in seen:
            logits.append(q[i] @ pk[p, :, start:stop].transpose(-2, -1) * (factor * gain) + shift)
            values.append(pv[p, :, start:stop])
        row = torch.cat(logits, -1)
        outs.append(row.softmax(-1) @ torch.cat(values, -2))
        sums.append(row.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


def masked_maps(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention, and of its probabilities the columns of chosen keys, averaged over heads.

    q (B, H, N, D), k and v (B, H, M, D), tokens integers (B, T) or (T,), of which -1 stands for no key, so that its map
    is 0.  Returns the output (B, H, N, D) and the maps (B, N, T), float32 or float64.
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (q @ k.transpose(-2, -1) * factor).softmax(-1)
    chosen = tokens.long().expand(q.shape[0], -1)[:, None, None, :]
    columns = weights.gather(-1, chosen.clamp(min=0).expand(-1, *q.shape[1:3], -1))
    sums = torch.promote_types(q.dtype, torch.float32)
    return weights @ v, (columns.to(sums) * (chosen >= 0)).mean(1)


def match(src: Tensor, tgt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every row of tgt, of each source the row inside its mask with which its cosine is largest, and that cosine.

    src (S, M, C), tgt (B, N, C), mask bool (S, M) -> index int64 (B, S, N), similarity float32 or float64 (B, S, N).
    Of equal rows the first is taken.  A row of zeros has a cosine of 0; an empty mask gives index 0 and -1.
    """
    src, tgt = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (src, tgt))
    src, tgt = (x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) for x in (src, tgt))
    cosine = torch.einsum("smc,bnc->bsnm", src, tgt)
    if mask is not None:
        cosine = torch.where(mask[:, None], cosine, -1.0)
    similarity, index = cosine.clamp(min=-1).max(-1)
    return index, similarity


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask is true, image by image and in order, and where each image's part begins.

    bool (B, N) -> int64 (K,), numbers of rows of the flattened mask, and int32 (B + 1,).
    """
    edges = torch.cat([mask.new_zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
    return mask.flatten().nonzero().flatten(), edges


def gather(x: Tensor, index: Tensor, halves: int = 1) -> Tensor:
    """The rows that `compact` kept, side by side, for each half of the batch.

    (halves B, H, N, D), (K,) -> (halves, H, K, D).
    """
    rows = x.unflatten(0, (halves, -1)).transpose(2, 3).flatten(1, 2)
    return rows[:, index].transpose(1, 2)

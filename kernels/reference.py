"""Every verb in plain torch: the definition, the default, the fallback."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v.  (B, H, N, D), 2 x (B, H, M, D) -> (B, H, N, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attention` written out; it has every derivative, forward mode too, and keeps all N x M weights in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """GroupNorm (Wu & He 2018), then x * sigmoid(x) if `silu`.  (B, C, ...) -> (B, C, ...)."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) for the two halves a, b of the last axis (Shazeer 2020).  (..., 2C) -> (..., C)."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)

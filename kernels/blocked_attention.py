"""Attention and its gradients in plain torch, a block of queries at a time: where no fused call gives what it takes."""

import torch
from torch import Tensor

LOGITS = 2**23  # the most that are in memory at once, where a block of 16 queries has no more


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), in the type of q, and the log-sum-exp (B, H, N), float32 or float64, in nats.

    q (B, H, N, D), 2 x (B, H, M, D).  Half precision is worked out in float32.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = k.to(work), v.to(work)
    outs, sums = [], []
    for part in q.split(rows(q, k), 2):
        logits = (part.to(work) * scale) @ k.transpose(-2, -1)
        sums.append(logits.logsumexp(-1))
        outs.append((logits.sub_(sums[-1][..., None]).exp_() @ v).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k, v, given the output and the log-sum-exp of these keys or of more (Dao et al. 2022, appendix
    B.2).  All are float32, or all float64."""
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    n = rows(q, k)
    delta = (g * out).sum(-1)
    for each in zip(*(x.split(n, 2) for x in (g, q, lse[..., None], delta[..., None])), strict=True):
        g_part, q_part, lse_part, delta_part = each
        p = ((q_part * scale) @ k.transpose(-2, -1)).sub_(lse_part).exp_()
        dv += p.transpose(-2, -1) @ g_part
        ds = (g_part @ v.transpose(-2, -1)).sub_(delta_part).mul_(p)
        dq.append(ds @ k * scale)
        dk += ds.transpose(-2, -1) @ (q_part * scale)
    return torch.cat(dq, 2), dk, dv


def rows(q: Tensor, k: Tensor) -> int:
    """Queries of a block."""
    return max(LOGITS // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 16)

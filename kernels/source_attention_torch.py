"""Source attention in torch: a call for the own keys, one per source, merged by their log-sum-exps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocked_attention
from .adain import rows as side_by_side
from .adain import stats_gradient, token_major
from .sources import Source, Sources


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pv: Tensor | None,
    offsets: Tensor,
    segments: Tensor,
    gains: Tensor,
    stats: Tensor | None,
    ref: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), in memory (B, N, H, D), and the log-sum-exp (B, H, N), in nats."""
    wanted = q
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)  # torch's call reads nothing else rightly
    pk, pv = (None if x is None else side_by_side(x) for x in (pk, pv))
    if stats is not None and ref is not None:
        work = stats.dtype  # half precision would overflow where a key hardly varies
        k, v = k.to(work), v.to(work)
        pk, pv = (k, v) if pk is None or pv is None else (pk.to(work), pv.to(work))
        seen, own, row = folded(q.to(work), stats, ref, scale)
        out, lse = _attend(own, k, v, scale)
        lse = lse + row
    else:
        seen = q
        out, lse = _attend(q, k, v, scale)
    pk, pv = (k, v) if pk is None or pv is None else (pk, pv)
    for images, rows, gain, shift in _calls(offsets, segments, gains):
        kk, vv = (_rows(x, rows).expand(len(images), -1, -1, -1) for x in (pk, pv))
        at = _at(images)
        out_s, lse_s = _attend(seen[at], kk, vv, scale * gain)
        out_o, lse_o, lse_s = out[at], lse[at], lse_s + shift
        out_o.lerp_(out_s, torch.sigmoid(lse_s - lse_o)[..., None].to(out.dtype))
        torch.logaddexp(lse_o, lse_s, out=lse_o)
        if not isinstance(at, slice):  # they are copies
            out[at], lse[at] = out_o, lse_o
    if out.dtype != wanted.dtype or not out.transpose(1, 2).is_contiguous():
        out = token_major(wanted).copy_(out)
    return out, lse.contiguous()


def folded(q: Tensor, stats: Tensor, ref: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """AdaIN of q; q against unchanged own keys; and what to add to a row of their logits (docs/kernels.md, eq. 3).

    (B, H, N, D), (2, 2, B, H, D), (B,) -> 2 x (B, H, N, D), (B, H, N).
    """
    i, refs = ref.long(), ref.tolist()
    for b, r in enumerate(refs):
        if not 0 <= r < len(q):
            raise ValueError(f"ref[{b}] is an image of the batch, 0 to {len(q) - 1}; got {r}")
    (mean_q, std_q), (mean_k, std_k) = stats[..., None, :]
    gain_q, gain_k = std_q[i] / std_q, std_k[i] / std_k
    seen, own, row = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[:3])
    for b, r in enumerate(refs):  # an image stays in cache, and products by its heads need no copy
        if b == r:
            seen[b], own[b], row[b] = q[b], q[b], 0
            continue
        centred, gain, level = q[b] - mean_q[b], gain_q[b], mean_q[r]
        torch.addcmul(level, centred, gain, out=seen[b])
        torch.addcmul(level * gain_k[b], centred, gain * gain_k[b], out=own[b])
        torch.sub(seen[b] @ mean_k[r].mT, own[b] @ mean_k[b].mT, out=row[b, ..., None])
    return seen, own, row * scale


def backward(
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
    ref: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients by q, k, v, the pool where it is not (k, v), and stats where there are any.

    Every call is told the whole output and the whole log-sum-exp, so that the probabilities it recomputes are those of
    the one softmax (docs/kernels.md, eq. 7).  Under AdaIN the two are computed again from the keys that the gradient is
    taken at: folded logits differ from theirs by a rounding, which a peaked softmax would magnify.
    """
    results = [token_major(x) for x in (q, k, v, pk, pv) if x is not None]
    g, out, q, k, v = (side_by_side(x) for x in (g, out, q, k, v))
    pk, pv = (None if x is None else side_by_side(x) for x in (pk, pv))
    work = lse.dtype
    g, out, q, k, v = (x.to(work) for x in (g, out, q, k, v))
    raw_q, raw_k, d = q, k, q.shape[-1]
    if stats is not None and ref is not None:
        pk, pv = (raw_k, v) if pk is None or pv is None else (pk.to(work), pv.to(work))
        i = ref.long()
        q, k = (
            torch.ops.diaphane.centred_affine(x, m, s[i] / s, m[i]) for x, (m, s) in zip((q, k), stats, strict=True)
        )
        out, lse = forward(q, k, v, pk, pv, offsets, segments, gains, None, None, scale)
    pk, pv = (raw_k, v) if pk is None or pv is None else (pk.to(work), pv.to(work))
    if (
        g_lse is not None
    ):  # a channel in which the output is -g_lse and its gradient 1 turns g . out into g . out - g_lse
        q, k, v, pk, pv, out, g = (F.pad(x, (0, 8)) for x in (q, k, v, pk, pv, out, g))
        out[..., d], g[..., d] = -g_lse, 1
    dq, dk, dv = _attend_backward(g, q, k, v, out, lse, scale)
    dpk, dpv = torch.zeros_like(pk), torch.zeros_like(pv)
    for images, rows, gain, shift in _calls(offsets, segments, gains):
        kk, vv = (_rows(x, rows).expand(len(images), -1, -1, -1) for x in (pk, pv))
        at = _at(images)
        grads = _attend_backward(g[at], q[at], kk, vv, out[at], lse[at] - shift, scale * gain)
        dq[at] += grads[0]
        for total, part in ((dpk, grads[1]), (dpv, grads[2])):
            for source, piece in zip(rows, part.sum(0).split([s.stop - s.start for s in rows], 1), strict=True):
                total[source.image, :, source.start : source.stop] += piece
    dq, dk, dv, dpk, dpv = (x[..., :d] for x in (dq, dk, dv, dpk, dpv))
    by_stats = []
    if stats is not None and ref is not None:
        dq, by_q = stats_gradient(dq, raw_q, stats[0], ref)
        dk, by_k = stats_gradient(dk, raw_k, stats[1], ref)
        by_stats = [torch.stack([by_q, by_k])]
    found = [dq, dk, dv, dpk, dpv] if len(results) == 5 else [dq, dk + dpk, dv + dpv]
    return [result.copy_(x) for result, x in zip(results, found, strict=True)] + by_stats


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return blocked_attention.attend(q, k, v, scale)


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if fused(q):
        of = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return of(g, q, k, v, out, lse, 0.0, False, scale=scale)
    return blocked_attention.attend_backward(g, q, k, v, out, lse, scale)


def fused(q: Tensor) -> bool:
    """Torch has a call that returns log-sum-exps and takes them back: on CPU, for queries that there are."""
    return q.device.type == "cpu" and q.shape[2] > 0


def _calls(offsets: Tensor, segments: Tensor, gains: Tensor) -> list[tuple[list[int], list[Source], float, float]]:
    """Images that see the same rows with the same scale and shift, those rows, and the two."""
    listed = Sources(offsets, segments, gains, 0, 0, 0).listed()
    images: dict[tuple[float, float, tuple[Source, ...]], list[int]] = {}
    for i, seen in enumerate(listed):
        alike: dict[tuple[float, float], list[Source]] = {}
        for source in seen:
            alike.setdefault((source.scale, source.shift), []).append(source)
        for (gain, shift), rows in alike.items():
            images.setdefault((gain, shift, tuple(rows)), []).append(i)
    return [(some, list(rows), gain, shift) for (gain, shift, rows), some in images.items()]


def _rows(x: Tensor, rows: list[Source]) -> Tensor:
    """Those rows of the pool, a view where they are one range.  (P, H, T, D) -> (1, H, rows, D)."""
    parts = [x[s.image : s.image + 1, :, s.start : s.stop] for s in rows]
    return parts[0] if len(parts) == 1 else torch.cat([p.transpose(1, 2) for p in parts], 1).transpose(1, 2)


def _at(images: list[int]) -> slice | list[int]:
    """An index of those images, which gives a view where they follow each other."""
    return slice(images[0], images[-1] + 1) if images == list(range(images[0], images[-1] + 1)) else images

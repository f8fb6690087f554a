"""Source attention and what else computes it: fused calls over keys side by side, merges, masks, gathers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adain import token_stats
from .attention_problem import Problem
from .cases import CPU, EDGES, SDXL, Case, sources
from .compact import Kept, compact, gather
from .contests import OURS, Contest, Unavailable, compiled, entry
from .source_attention import source_attention
from .sources import Sources
from .timing import Way

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def contest(case: Case, dtype: torch.dtype, device: torch.device) -> Contest:
    """Every way to compute a case of source attention."""
    p = Problem(case, dtype, device)
    ways: dict[str, Callable[[], Way]] = {OURS: partial(_ours, p)}
    if case.sees == "own":
        ways |= {name: partial(_alone, p, backend) for name, backend in BACKENDS.items()}
        ways |= {"xformers": partial(_xformers, p), "FlexAttention": partial(_flex, p)}
        return Contest("source_attention", case.name, case.why, p.work(), ways, p.judge)
    if case.sees == "kept":
        ways |= {f"masked, {name}": partial(_masked, p, backend) for name, backend in BACKENDS.items()}
        ways |= {"gather per image": partial(_gathered, p)}
    else:
        ways |= {f"concatenated, {name}": partial(_concatenated, p, backend) for name, backend in BACKENDS.items()}
        ways |= {"concatenated, xformers": partial(_xformers, p)}
        if not p.plain:
            ways |= {"concatenated, written out": partial(_logits, p)}
    if case.sees == "shared":
        calls = _fused(device)
        for fold in (False, True)[: 1 + case.adain]:
            how = "two calls and a merge" + ", folded" * fold
            ways |= {f"{how}, {name}": partial(_merged, p, call, fold) for name, call in calls.items()}
    ways |= {"varlen": partial(_varlen, p), "FlexAttention": partial(_flex, p)}
    return Contest("source_attention", case.name, case.why, p.work(), ways, p.judge)


def _ours(p: Problem) -> Way:
    case = p.case
    if case.sees != "kept":
        seen = sources(case, p.device)
        return Way(lambda: source_attention(p.q, p.k, p.v, seen, ref=p.ref)[0])

    n = p.per_half
    sees = [[j in p.sees(i) for j in range(n)] for i in range(n)]
    mask = p.kept.to(p.device)

    def lists() -> tuple[Kept, Sources]:
        kept = compact(mask)
        return kept, kept.sources(sees, case.halves)

    kept, seen = lists()

    def run() -> Tensor:
        pool = gather(p.k, kept, case.halves), gather(p.v, kept, case.halves)
        return source_attention(p.q, p.k, p.v, seen, pool=pool)[0]

    return Way(run, lists)


def _alone(p: Problem, backend: SDPBackend) -> Way:
    return Way(lambda: F.scaled_dot_product_attention(p.q, p.k, p.v), within=_only(p, backend))


def _only(p: Problem, backend: SDPBackend) -> Callable[[], Any]:
    """One backend of torch's fused call and no other."""
    if p.device.type == "cpu" and backend in (BACKENDS["cuDNN"], BACKENDS["efficient"]):
        raise Unavailable("the backend is CUDA's")
    return partial(sdpa_kernel, [backend])


def _side_by_side(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """q, and the keys and values of every image followed by those that it sees; a reference sees itself again."""
    q, k = p.aligned()
    seen = [p.sees(i) or [i] * (p.case.sees == "shared") for i in range(p.case.batch)]
    if len({len(s) for s in seen}) > 1:
        raise Unavailable("images see unlike numbers of others, which are not one tensor")
    columns = list(zip(*seen, strict=True))
    keys, values = ([_picked(x, c) for c in columns] for x in (p.k, p.v))
    if p.case.scale != 1:
        gains = [1.0 if s == [i] else p.case.scale for i, s in enumerate(seen)]
        keys = [x * x.new_tensor(gains)[:, None, None, None] for x in keys]
    return q, torch.cat([k, *keys], 2), torch.cat([p.v, *values], 2)


def _picked(x: Tensor, images: tuple[int, ...]) -> Tensor:
    """Those images; an expanded view where they are one and the same."""
    return x[images[0]].expand_as(x) if len(set(images)) == 1 else x[list(images)]


def _bias(p: Problem, k: Tensor) -> Tensor | None:
    """What is added to the logits of keys side by side."""
    if not p.case.shift:
        return None
    return torch.cat([k.new_zeros(p.m), k.new_full((k.shape[2] - p.m,), p.case.shift)])[None, None, None]


def _concatenated(p: Problem, backend: SDPBackend) -> Way:
    def run() -> Tensor:
        q, k, v = _side_by_side(p)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(p, k))

    return Way(run, within=_only(p, backend))


def _logits(p: Problem) -> Way:
    """The official StyleAligned's way with a shift: every logit in memory."""

    def run() -> Tensor:
        q, k, v = _side_by_side(p)
        logits = q @ k.transpose(-2, -1) * p.scale
        logits[..., p.m :] += p.case.shift
        return logits.softmax(-1) @ v

    return Way(run)


Fused = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _fused(device: torch.device) -> dict[str, Fused]:
    """The calls that give a log-sum-exp too: (q, k, v, scale) -> (B, H, N, D), (B, H, N)."""
    aten = torch.ops.aten
    if device.type == "cpu":
        return {"flash": lambda q, k, v, s: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=s)}

    def efficient(q: Tensor, k: Tensor, v: Tensor, s: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=s)
        return out, lse[..., : q.shape[2]]

    def cudnn(q: Tensor, k: Tensor, v: Tensor, s: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=s)
        return out, lse.reshape(q.shape[:3])

    return {
        "flash": lambda q, k, v, s: aten._scaled_dot_product_flash_attention(q, k, v, scale=s)[:2],
        "cuDNN": cudnn,
        "efficient": efficient,
    }


def _merged(p: Problem, fused: Fused, fold: bool) -> Way:
    """One call for the own keys, one for the references' with the queries of all their images in a row."""
    refs, case = p.case.refs, p.case
    size = case.batch // len(set(refs))
    if size == 1 or any(r != i // size * size for i, r in enumerate(refs)):
        raise Unavailable("references do not come first in groups of one size, of two images at least")

    def others(x: Tensor) -> Tensor:
        """(B, H, N, D) -> (groups, H, (size - 1) N, D), a view of (B, N, H, D) in memory."""
        return x.transpose(1, 2).unflatten(0, (-1, size))[:, 1:].flatten(1, 2).transpose(1, 2)

    def run() -> Tensor:
        row: Tensor | float = 0.0
        if fold and p.ref is not None:
            q, own, row = _folded(p, p.ref)
            q, own, k = q.to(p.q.dtype), own.to(p.q.dtype), p.k
        else:
            q, k = p.aligned()
            own = q
        out, lse = fused(own, k, p.v, p.scale)
        lse = lse + row
        first_k, first_v = p.k[::size], p.v[::size]
        far, far_lse = fused(others(q), first_k, first_v, p.scale * case.scale)
        near_lse = lse.unflatten(0, (-1, size))[:, 1:]
        far_lse = far_lse.unflatten(2, (size - 1, -1)).transpose(1, 2) + case.shift
        weight = torch.sigmoid(far_lse - near_lse).to(out.dtype)[..., None]
        far = far.unflatten(2, (size - 1, -1)).transpose(1, 2)
        grouped = out.unflatten(0, (-1, size))
        return torch.cat([grouped[:, :1], torch.lerp(grouped[:, 1:], far, weight)], 1).flatten(0, 1)

    return Way(run)


def _folded(p: Problem, ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AdaIN of q; q against unchanged own keys; and what to add to a row of their logits: all images at once."""
    i = ref.long()
    (mean_q, std_q), (mean_k, std_k) = token_stats(p.q, p.k)[..., None, :]
    gain_q, gain_k = std_q[i] / std_q, std_k[i] / std_k
    centred = p.q - mean_q
    q = torch.addcmul(mean_q[i], centred, gain_q)
    own = torch.addcmul(mean_q[i] * gain_k, centred, gain_q * gain_k)
    row = q @ mean_k[i].transpose(-2, -1) - own @ mean_k.transpose(-2, -1)
    return q, own, row[..., 0] * p.scale


def _masked(p: Problem, backend: SDPBackend) -> Way:
    """Every image under a mask of all the tokens of its half."""
    n = p.per_half
    masks = [p.allowed[h * n : (h + 1) * n, h * n * p.m : (h + 1) * n * p.m] for h in range(p.case.halves)]

    def run() -> Tensor:
        outs = []
        for q, k, v, mask in zip(*(x.split(n) for x in (p.q, p.k, p.v)), masks, strict=True):
            keys, values = (x.transpose(0, 1).flatten(1, 2).expand(n, -1, -1, -1) for x in (k, v))
            outs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None]))
        return torch.cat(outs)

    return Way(run, within=_only(p, backend))


def _gathered(p: Problem) -> Way:
    """The official ConsiStory's way: an image at a time, its keys taken by a boolean index."""

    def run() -> Tensor:
        every, values = (x.transpose(1, 2).flatten(0, 1) for x in (p.k, p.v))
        outs = []
        for q, seen in zip(p.q, p.allowed, strict=True):
            k, v = every[seen].transpose(0, 1), values[seen].transpose(0, 1)
            outs.append(F.scaled_dot_product_attention(q[None], k[None], v[None]))
        return torch.cat(outs)

    return Way(run)


def _varlen(p: Problem) -> Way:
    """The keys of each image packed one after the other by an index that is made once."""
    if p.device.type != "cuda":
        raise Unavailable("varlen attention is CUDA's")
    if not p.plain:
        raise Unavailable("varlen attention has no scale or shift of a source")
    from torch.nn.attention.varlen import varlen_attn

    def lists() -> tuple[Tensor, Tensor, Tensor, int]:
        counts = torch.tensor([0] + [len(rows) for rows in p.rows])
        starts = torch.arange(p.case.batch + 1, dtype=torch.int32) * p.case.tokens
        packed = torch.cat(p.rows)
        return packed, starts.to(p.device), counts.cumsum(0).to(p.device, torch.int32), int(counts.max())

    packed, queries, keys, longest = lists()

    def run() -> Tensor:
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in p.aligned())
        k, v = k.index_select(0, packed), p.v.transpose(1, 2).flatten(0, 1).index_select(0, packed)
        out: Any = varlen_attn(q, k, v, queries, keys, p.case.tokens, longest)
        return out.unflatten(0, (p.case.batch, -1)).transpose(1, 2)

    return Way(run, lists)


def _flex(p: Problem) -> Way:
    """Over the keys of all images, which lie side by side as they are, under a block mask; a shift by score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention)
    if p.case.sees == "own":
        return Way(lambda: attend(p.q, p.k, p.v))
    m, allowed, scale, shift = p.m, p.allowed, p.case.scale, p.case.shift

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed[b, j]

    def moved(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j // m == b, score, score * scale + shift)

    make: Any = create_block_mask if p.device.type == "cpu" else torch.compile(create_block_mask)
    shape = (p.case.batch, None, p.case.tokens, p.case.batch * m)
    mask = make(sees, *shape, device=p.device)

    def run() -> Tensor:
        q, k = p.aligned()
        keys, values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (k, p.v))
        return attend(q, keys, values, score_mod=None if p.plain else moved, block_mask=mask)

    return Way(run, lambda: make(sees, *shape, device=p.device))


def _xformers(p: Problem) -> Way:
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unavailable("xformers is not installed") from None

    def run() -> Tensor:
        q, k, v = _side_by_side(p) if p.case.sees != "own" else (p.q, p.k, p.v)
        bias = _bias(p, k)
        spread = None if bias is None else bias.expand(*q.shape[:3], -1)
        out = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=spread)
        return out.transpose(1, 2)

    return Way(run)


ENTRY = entry("source_attention", SDXL, CPU, [case for case in EDGES if case.sees != "listed"], contest)

"""Masked maps, the match by cosine and compaction beside torch's own, and the usual ways around them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .compact import compact, gather
from .contests import OURS, Contest, Entry, Work, compiled, judged
from .masked_maps import masked_maps
from .match import match
from .timing import Way


class Maps(NamedTuple):
    """Cross-attention of `tokens` queries to `keys`, of which `columns` are wanted as maps."""

    name: str
    why: str
    batch: int
    heads: int
    tokens: int
    dim: int = 64
    keys: int = 77
    columns: int = 2


class Match(NamedTuple):
    """The rows of `batch` images sought among the masked rows of `sources`."""

    name: str
    why: str
    sources: int
    batch: int
    rows: int
    channels: int
    share: float = 0.3  # of a source's rows inside its mask


class Compact(NamedTuple):
    """Keys and values of `batch` images in `halves`, of which a half keeps the same share of its tokens."""

    name: str
    why: str
    batch: int
    heads: int
    tokens: int
    dim: int = 64
    halves: int = 2
    share: float = 0.15


MAPS = [
    Maps("maps-4096", "ConsiStory's subject masks, 4 images, guidance", 8, 10, 4096),
    Maps("maps-1024", "ConsiStory's subject masks, 4 images, guidance", 8, 20, 1024),
    Maps("cpu-maps", "an image and its unconditional half", 2, 10, 1024),
    Maps("tiny", "to see that it runs", 2, 2, 33, 8, 7),
]
MATCH = [
    Match("match-4096", "DIFT at 64 x 64, 4 images, 2 anchors", 2, 4, 4096, 1280),
    Match("match-1024", "DIFT at 32 x 32, 4 images, 2 anchors", 2, 4, 1024, 1280),
    Match("cpu-match", "DIFT at 32 x 32, an image, an anchor", 1, 1, 1024, 640),
    Match("tiny", "to see that it runs", 2, 2, 20, 8),
]


COMPACT = [
    Compact("kept-4096", "ConsiStory, 4 images, guidance, p 0.3, dropout 0.5", 8, 10, 4096),
    Compact("kept-1024", "ConsiStory, 4 images, guidance, p 0.3, dropout 0.5", 8, 20, 1024),
    Compact("cpu-kept-tokens", "4 images, p 0.25", 4, 10, 1024, halves=1, share=0.25),
    Compact("tiny", "to see that it runs", 4, 2, 20, 8),
]


def maps_contest(case: Maps, dtype: torch.dtype, device: torch.device) -> Contest:
    """Attention and the maps of some of its keys."""
    b, h, n, m, d, t = case.batch, case.heads, case.tokens, case.keys, case.dim, case.columns
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, r, h, d, generator=g).to(device, dtype).transpose(1, 2) for r in (n, m, m))
    tokens = torch.arange(1, 1 + t, device=device).expand(b, -1)

    def apart() -> tuple[Tensor, Tensor]:
        weights = (q @ k.transpose(-2, -1) * d**-0.5).softmax(-1)
        return F.scaled_dot_product_attention(q, k, v), weights[..., 1 : 1 + t].float().mean(1)

    def compile_it() -> Way:
        run = compiled(reference.masked_maps)
        return Way(lambda: run(q, k, v, tokens))

    def definition(kind: torch.dtype) -> tuple[Tensor, ...]:
        return reference.masked_maps(q.to(kind), k.to(kind), v.to(kind), tokens)

    moved = sum(x.numel() * x.element_size() for x in (q, q, k, v)) + 4 * b * n * t
    work = Work(4.0 * b * h * n * m * d, b * h * n * m, moved)
    ways = {
        OURS: lambda: Way(lambda: masked_maps(q, k, v, tokens)),
        "torch": lambda: Way(lambda: reference.masked_maps(q, k, v, tokens)),
        "torch, compiled": compile_it,
        "SDPA, and the probabilities again": lambda: Way(apart),
    }
    return Contest("masked_maps", case.name, case.why, work, ways, judged(definition, dtype))


def match_contest(case: Match, dtype: torch.dtype, device: torch.device) -> Contest:
    """The best match of every row, judged by how much worse its cosine is than the best one, and by what it is said
    to be."""
    g = torch.Generator().manual_seed(0)
    src = torch.randn(case.sources, case.rows, case.channels, generator=g).to(device, dtype)
    tgt = torch.randn(case.batch, case.rows, case.channels, generator=g).to(device, dtype)
    mask = (torch.rand(case.sources, case.rows, generator=g) < case.share).to(device)

    def compile_it() -> Way:
        run = compiled(reference.match)
        return Way(lambda: run(src, tgt, mask))

    def judge(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
        index, said = found
        unit, sought = (F.normalize(x.double(), dim=-1) for x in (src, tgt))
        worst = 0.0
        for s in range(case.sources):
            for b in range(case.batch):
                cosine = (sought[b] @ unit[s].T).masked_fill(~mask[s], -1)
                best, got = cosine.max(-1).values, cosine.gather(1, index[b, s, :, None].long())[:, 0]
                worst = max(worst, (best - got).max().item(), (said[b, s] - best).abs().max().item())
        return worst, 64 * torch.finfo(torch.float32).eps

    rows, n, c = mask.sum().item(), case.batch * case.rows, case.channels
    moved = (src.numel() + tgt.numel()) * src.element_size() + 12 * case.sources * n
    work = Work(2.0 * rows * n * c, 0, moved)
    ways = {
        OURS: lambda: Way(lambda: match(src, tgt, mask)),
        "torch": lambda: Way(lambda: reference.match(src, tgt, mask)),
        "torch, compiled": compile_it,
    }
    return Contest("match", case.name, case.why, work, ways, judge)


def compact_contest(case: Compact, dtype: torch.dtype, device: torch.device) -> Contest:
    """The kept rows of keys and values side by side, as a layer needs them; their lists are made once for all layers
    of a size, and timed apart."""
    g = torch.Generator().manual_seed(0)
    n = case.batch // case.halves
    shape = (case.batch, case.tokens, case.heads, case.dim)
    k, v = (torch.randn(shape, generator=g).to(device, dtype).transpose(1, 2) for _ in range(2))
    mask = (torch.rand(n, case.tokens, generator=g) < case.share).to(device)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(0, (case.halves, n)).flatten(1, 2)

    def ours() -> Way:
        kept = compact(mask)
        return Way(lambda: (gather(k, kept, case.halves), gather(v, kept, case.halves)), lambda: compact(mask))

    def indexed() -> Way:
        at = reference.compact(mask)[0]
        return Way(
            lambda: tuple(rows(x).index_select(1, at).transpose(1, 2) for x in (k, v)), lambda: reference.compact(mask)
        )

    def boolean() -> Way:
        return Way(lambda: tuple(rows(x)[:, mask.flatten()].transpose(1, 2) for x in (k, v)))

    def definition(kind: torch.dtype) -> tuple[Tensor, ...]:
        at = reference.compact(mask)[0]
        return tuple(reference.gather(x.to(kind), at, case.halves) for x in (k, v))

    moved = 4.0 * case.halves * mask.sum().item() * case.heads * case.dim * k.element_size()
    ways = {OURS: ours, "torch, an index": indexed, "torch, a boolean index": boolean}
    return Contest("compact", case.name, case.why, Work(0, 0, moved), ways, judged(definition, dtype))


ENTRIES = (
    Entry(
        "masked_maps",
        {case.name: case for case in MAPS},
        {"cuda": ("maps-4096", "maps-1024"), "cpu": ("cpu-maps",)},
        maps_contest,
    ),
    Entry(
        "match",
        {case.name: case for case in MATCH},
        {"cuda": ("match-4096", "match-1024"), "cpu": ("cpu-match",)},
        match_contest,
    ),
    Entry(
        "compact",
        {case.name: case for case in COMPACT},
        {"cuda": ("kept-4096", "kept-1024"), "cpu": ("cpu-kept-tokens",)},
        compact_contest,
    ),
)

"""Masked maps, the match by cosine and compaction beside torch's own, and the usual ways around them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cases_maps import (
    KEPT_EDGES,
    KEPT_SDXL,
    MAPS_EDGES,
    MAPS_SDXL,
    MATCH_EDGES,
    MATCH_SDXL,
    KeptCase,
    MapsCase,
    MatchCase,
    kept_inputs,
    maps_inputs,
    match_inputs,
)
from .compact import compact, gather
from .contests import OURS, Contest, Work, compiled, entry, judged
from .masked_maps import masked_maps
from .match import match
from .timing import Way

MAPS_CPU = [MapsCase("cpu-maps", "an image and its unconditional half", 2, 10, 1024)]
MATCH_CPU = [MatchCase("cpu-match", "DIFT at 32 x 32, an image, an anchor", 1, 1, 1024, 1024, 640)]
KEPT_CPU = [KeptCase("cpu-kept", "4 images, p 0.25", 4, 10, 1024, halves=1, share=0.25)]
CLOSE = 64 * torch.finfo(torch.float32).eps  # how much worse than the best a match may be: cosines are float32's


def maps_contest(case: MapsCase, dtype: torch.dtype, device: torch.device) -> Contest:
    """Attention and the maps of some of its keys."""
    q, k, v, tokens = maps_inputs(case, dtype, device).values()
    every = tokens.expand(case.batch, -1)[:, None]

    def apart() -> tuple[Tensor, Tensor]:
        weights = (q @ k.transpose(-2, -1) * case.dim**-0.5).softmax(-1).float().mean(1)
        maps = weights.gather(-1, every.clamp(min=0).expand(-1, case.tokens, -1)) * (every >= 0)
        return F.scaled_dot_product_attention(q, k, v), maps

    def compile_it() -> Way:
        run = compiled(reference.masked_maps)
        return Way(lambda: run(q, k, v, tokens))

    def definition(kind: torch.dtype) -> tuple[Tensor, ...]:
        return reference.masked_maps(q.to(kind), k.to(kind), v.to(kind), tokens)

    pairs = case.batch * case.heads * case.tokens
    moved = sum(x.numel() * x.element_size() for x in (q, q, k, v)) + 4 * case.tokens * every.numel()
    work = Work(4.0 * pairs * case.keys * case.dim, pairs * case.keys, moved)
    ways = {
        OURS: lambda: Way(lambda: masked_maps(q, k, v, tokens)),
        "torch": lambda: Way(lambda: reference.masked_maps(q, k, v, tokens)),
        "torch, compiled": compile_it,
        "SDPA, and the probabilities again": lambda: Way(apart),
    }
    steep = (q.float() @ k.float().transpose(-2, -1) * case.dim**-0.5).amax(-1).abs().amax().item()
    lost = steep * torch.finfo(torch.float32).eps  # by exp(logit - lse) where the two are rounded in float32
    return Contest("masked_maps", case.name, case.why, work, ways, judged(definition, dtype, lost))


def match_contest(case: MatchCase, dtype: torch.dtype, device: torch.device) -> Contest:
    """The best match of every row, judged by how much worse its cosine is than the best one, and by what it is said
    to be."""
    made = match_inputs(case, dtype, device)
    src, tgt, mask = made["src"], made["tgt"], made["mask"]
    assert src is not None
    assert tgt is not None
    inside = torch.ones(src.shape[:2], dtype=torch.bool, device=device) if mask is None else mask

    def compile_it() -> Way:
        run = compiled(reference.match)
        return Way(lambda: run(src, tgt, mask))

    def judge(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
        index, said = found
        unit, sought = (F.normalize(x.double(), dim=-1) for x in (src, tgt))
        worst = 0.0
        for s in range(case.sources):
            for b in range(case.targets):
                cosine = (sought[b] @ unit[s].T).masked_fill(~inside[s], -1)
                best, got = cosine.max(-1).values, cosine.gather(1, index[b, s, :, None].long())[:, 0]
                worst = max(worst, (best - got).max().item(), (said[b, s] - best).abs().max().item())
        return (worst if worst == worst else float("inf")), CLOSE

    rows = case.targets * case.tokens
    moved = (src.numel() + tgt.numel()) * src.element_size() + 12 * case.sources * rows
    work = Work(2.0 * inside.sum().item() * rows * case.channels, 0, moved)
    ways = {
        OURS: lambda: Way(lambda: match(src, tgt, mask)),
        "torch": lambda: Way(lambda: reference.match(src, tgt, mask)),
        "torch, compiled": compile_it,
    }
    return Contest("match", case.name, case.why, work, ways, judge)


def compact_contest(case: KeptCase, dtype: torch.dtype, device: torch.device) -> Contest:
    """The kept rows side by side, as a layer needs them of its keys and again of its values; the list of them is made
    once for all layers of a size, and timed apart."""
    x, mask = kept_inputs(case, dtype, device)
    count = int(mask.sum())

    def rows() -> Tensor:
        return x.transpose(1, 2).unflatten(0, (case.halves, -1)).flatten(1, 2)

    def ours() -> Way:
        kept = compact(mask)
        return Way(lambda: gather(x, kept, case.halves)[:, :, :count], lambda: compact(mask))  # it may be padded

    def indexed() -> Way:
        at = reference.compact(mask)[0]
        return Way(lambda: rows().index_select(1, at).transpose(1, 2), lambda: reference.compact(mask))

    def boolean() -> Way:
        return Way(lambda: rows()[:, mask.flatten()].transpose(1, 2))

    def definition(kind: torch.dtype) -> tuple[Tensor]:
        return (reference.gather(x.to(kind), reference.compact(mask)[0], case.halves),)

    moved = 2.0 * case.halves * count * case.heads * case.dim * x.element_size()
    ways = {OURS: ours, "torch, an index": indexed, "torch, a boolean index": boolean}
    return Contest("compact", case.name, case.why, Work(0, 0, moved), ways, judged(definition, dtype))


ENTRIES = (
    entry("masked_maps", MAPS_SDXL, MAPS_CPU, MAPS_EDGES, maps_contest),
    entry("match", MATCH_SDXL, MATCH_CPU, MATCH_EDGES, match_contest),
    entry("compact", KEPT_SDXL, KEPT_CPU, KEPT_EDGES, compact_contest),
)

"""What tests of masked maps, the match and compaction share: errors beside float64, and the most that they may be."""

from math import isfinite

import torch
from diaphane.kernels import reference
from diaphane.kernels.cases_maps import (
    KeptCase,
    MapsCase,
    MatchCase,
    kept_inputs,
    maps_inputs,
    match_inputs,
)
from diaphane.kernels.compact import compact, gather
from diaphane.kernels.masked_maps import masked_maps, token_maps
from diaphane.kernels.match import match
from torch import Tensor

# what runs in the interpreter in half precision; in float32 every case does
HALF = ("maps", "maps-40", "maps-huge", "match", "match-huge", "match-small", "kept", "kept-apart")
BFLOAT = ("maps", "match", "kept")
Errors = dict[str, tuple[float, float]]


def results(run, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What a call returns, out or nothing and the maps, and gradients, d<input>, of a fixed weighting of both."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, maps = run(q, k, v, tokens)
    found = [x for x in (out, maps) if x is not None]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in enumerate(found)]
    grads = torch.autograd.grad(found, (q, k, v), weights, allow_unused=True)
    named = {f"d{n}": g for n, g in zip("qkv", grads, strict=True) if g is not None}
    return {"maps": maps.detach()} | ({} if out is None else {"out": out.detach()}) | named


def error(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference in units of the truth's; NaN is infinite."""
    worst = ((found.double() - true.double()).norm() / true.double().norm()).item()
    return worst if worst == worst else float("inf")


def maps_errors(case: MapsCase, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """Of everything that is not zero: its distance from float64, and twice what the definition errs in the same type.

    Where the definition is exact: twice the type's precision, or what exp(logit - lse) loses to float32's rounding.
    """
    made = maps_inputs(case, dtype, device)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in made.items()}
    runs = {
        "": (masked_maps, reference.masked_maps),
        "alone ": (
            lambda q, k, v, tokens: (None, token_maps(q, k, tokens)),
            lambda q, k, v, tokens: (None, reference.masked_maps(q, k, v, tokens)[1]),
        ),
    }
    logits = exact["q"] @ exact["k"].mT * case.dim**-0.5
    floor = max(2 * torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * logits.abs().max().item())
    found = {}
    for word, (run, definition) in runs.items():
        ours, plain, true = results(run, **made), results(definition, **made), results(definition, **exact)
        assert ours.keys() == plain.keys() == true.keys()
        for name, x in true.items():
            if x.norm() > 1e-6 and x.abs().max() < torch.finfo(dtype).max:
                most = 2 * error(plain[name], x)
                found[word + name] = error(ours[name], x), max(most, floor) if isfinite(most) else 4 * floor
            elif x.norm() == 0:
                found[word + name] = ours[name].abs().max().item(), 8 * torch.finfo(dtype).eps
    return found


def match_errors(case: MatchCase, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """How far cosines are from the truth; how many rows are outside the mask, or not the first of their equals."""
    made = match_inputs(case, dtype, device)
    src, tgt, mask = made["src"], made["tgt"], made["mask"]
    assert src is not None
    assert tgt is not None
    index, said = match(src, tgt, mask)
    assert index.shape == said.shape == (case.targets, case.sources, case.tokens)
    worse = wrong = outside = late = 0.0
    for s in range(case.sources):
        kept = torch.ones(case.rows, dtype=torch.bool, device=device) if mask is None else mask[s]
        one = src[s].double()
        for b in range(case.targets):
            cosine = cosines(tgt[b].double(), one).masked_fill(~kept, -1)
            at, best = index[b, s], cosine.max(-1).values
            got = cosine.gather(1, at[:, None])[:, 0]
            worse = max(worse, (best - got).max().item())
            wrong = max(wrong, (said[b, s] - best).abs().max().item())
            if kept.any():
                outside += (~kept[at]).sum().item()
                late += (((cosine == got[:, None]) & kept).int().argmax(1) != at).sum().item()
            else:
                late += (at != 0).sum().item()
    most = 16 * torch.finfo(torch.float32).eps
    return {"worse": (worse, most), "said": (wrong, most), "outside": (outside, 0.0), "not the first": (late, 0.0)}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, C), (M, C) -> (N, M); of a row of zeros, 0."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return a @ b.mT


def kept_errors(case: KeptCase, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """How many numbers of the list, of the pool and of the gradient are not what they should be."""
    x, mask = kept_inputs(case, dtype, device)
    index, edges = reference.compact(mask)
    found = {}
    for word, kept in (("", compact(mask)), ("padded ", compact(mask, padded=True))):
        leaf = x.detach().requires_grad_()
        pool = gather(leaf, kept, case.halves)
        weight = torch.randn(pool.shape, generator=torch.Generator().manual_seed(1)).to(pool)
        weight[:, :, len(index) :] = float("nan")  # what is behind the last row is nobody's gradient
        (grad,) = torch.autograd.grad(pool, leaf, weight)
        true = reference.gather(leaf, index, case.halves)
        (want,) = torch.autograd.grad(true, leaf, weight[:, :, : len(index)])
        padding = torch.zeros(case.halves, case.heads, pool.shape[2] - len(index), case.dim).to(pool)
        pairs = {
            "index": (kept.index, torch.cat([index, index.new_zeros(len(kept.index) - len(index))])),
            "edges": (kept.edges, edges),
            "pool": (pool, torch.cat([true, padding], 2)),
            "gradient": (grad, want),
        }
        found |= {
            word + n: (float((a != b).sum()) if a.shape == b.shape else float("inf"), 0.0)
            for n, (a, b) in pairs.items()
        }
    return found

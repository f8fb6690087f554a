"""The best match by cosine of every row of some images among the masked rows of others, as one custom op."""

import torch
from torch import Tensor

from . import reference
from .adain import accumulator
from .device import dual, on_nvidia, refuse

CHUNK = 1 << 21  # cosines that are held at a time, 8 MiB of them


def match(src: Tensor, tgt: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For every row of tgt, of each source the row inside its mask with which its cosine is largest, and that cosine.

    src (S, M, C), tgt (B, N, C), mask bool (S, M), by default all of it -> index int64 (B, S, N), rows of the source,
    and similarity (B, S, N), float32, or float64 of float64.  DIFT's correspondence (Tang et al. 2023, section 3.2), as
    ConsiStory has it (Tewel et al. 2024, section 3.2): 1 - similarity is the distance.

    Of equal cosines the first row's is taken.  A row of zeros has a cosine of 0, and to a target that is not finite the
    similarity is NaN.  A row outside the mask has -1: an empty mask gives index 0 and similarity -1 everywhere, a
    distance of 2.  Half precision is multiplied and normalised in float32, which tells rows apart that cosines in half
    precision would not.

    2 S B N M C FLOP, less where tiles, or on CPU rows, are outside the mask; reads tgt once for every source and src
    once for every block of targets; the N x M cosines never leave the chip (on CPU and elsewhere: 2^21 are held at a
    time).  Triton on Nvidia devices since Ampere, not in float64; torch anywhere else.  It has no derivative, but in
    forward mode, by its definition, which keeps all cosines.

    ValueError: shapes, types or devices that do not fit, or a side with no row.
    """
    if src.ndim != 3 or tgt.ndim != 3 or src.shape[2] != tgt.shape[2] or 0 in src.shape or 0 in tgt.shape:
        raise ValueError(
            f"match takes (S, M, C) and (B, N, C), none of them 0; got {tuple(src.shape)} and {tuple(tgt.shape)}"
        )
    if src.dtype != tgt.dtype or src.device != tgt.device or not src.dtype.is_floating_point:
        got = f"{src.dtype} on {src.device} and {tgt.dtype} on {tgt.device}"
        raise ValueError(f"match takes sources and targets of one floating type on one device; got {got}")
    if mask is not None and (mask.shape != src.shape[:2] or mask.dtype != torch.bool or mask.device != src.device):
        want = f"{tuple(src.shape[:2])} on {src.device}"
        raise ValueError(f"the mask is bool {want}; got {mask.dtype} {tuple(mask.shape)} on {mask.device}")
    if dual(src, tgt):
        return reference.match(src, tgt, mask)
    index, similarity = torch.ops.diaphane.match(src, tgt, mask)
    return index, similarity


@torch.library.custom_op(
    "diaphane::match", mutates_args=(), schema="(Tensor src, Tensor tgt, Tensor? mask) -> (Tensor, Tensor)"
)
def _forward(src: Tensor, tgt: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if on_nvidia(src):
        from . import match_triton

        return match_triton.forward(src, tgt, mask)
    index, similarity = _empty(src, tgt)
    for s in range(len(src)):
        rows, kept = src[s], None
        if mask is not None and src.device.type == "cpu":  # elsewhere, the number of rows is not known without waiting
            kept = mask[s].nonzero().flatten()
            rows = rows[kept]
        one = unit(rows)
        first = _firsts(one) if src.device.type == "cpu" else None
        chunk = max(1, CHUNK // max(1, len(one)))
        for b in range(len(tgt)):
            for n in range(0, tgt.shape[1], chunk):
                if len(one) == 0:
                    index[b, s], similarity[b, s] = 0, -1
                    break
                cosine = unit(tgt[b, n : n + chunk]) @ one.mT
                if mask is not None and kept is None:
                    cosine = torch.where(mask[s], cosine, -1.0)
                value, at = cosine.max(-1)
                at = at if first is None else first[at]
                at = at if kept is None else kept[at]
                index[b, s, n : n + chunk] = torch.where(value > -1, at, 0)
                similarity[b, s, n : n + chunk] = value.clamp(min=-1)
    return index, similarity


def _firsts(x: Tensor) -> Tensor:
    """For every row the first that is equal to it: a product sums equal rows in unlike orders.  (M, C) -> (M,)."""
    numbers = torch.arange(len(x))
    weights = torch.linspace(2, 3, x.shape[1], dtype=x.dtype).sqrt()
    alike = (x * weights).sum(-1).unique(return_inverse=True)[1]
    first = numbers.scatter_reduce(0, alike, numbers, "amin", include_self=False)[alike]
    return torch.where((x[first] == x).all(-1), first, numbers)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, or 0, in the type in which sums are kept."""
    x = x.to(accumulator(x)).contiguous()  # so that equal rows have equal norms
    return x * inverse_norm(x)[..., None]


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |row|, 0 for a row of zeros, NaN for one that is not finite, in the type in which sums are kept."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x))
    return torch.where(norm == 0, 0.0, torch.where(norm.isinf(), torch.nan, 1 / norm))


def _empty(src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    shape = len(tgt), len(src), tgt.shape[1]
    return src.new_empty(shape, dtype=torch.int64), src.new_empty(shape, dtype=accumulator(src))


@_forward.register_fake
def _(src: Tensor, tgt: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(src, tgt)


_forward.register_autograd(refuse("match", "the cosine of the rows that its index gathers"))

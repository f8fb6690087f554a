"""The Triton kernel of the match by cosine: the largest of each row of a product, of which only a tile exists."""
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adain import rows
from .builds import Build, architecture, launch
from .match import inverse_norm
from .source_attention_kernels_triton import _dot


class Tile(NamedTuple):
    """Targets, sources and channels of a tile, warps, and stages of the pipeline."""

    targets: int
    sources: int
    channels: int
    warps: int
    stages: int


TABLE = {
    (90, "half"): Tile(128, 128, 64, 8, 3),
    (90, "single"): Tile(64, 64, 32, 8, 2),
    (80, "half"): Tile(128, 128, 64, 8, 2),
    (80, "single"): Tile(64, 64, 32, 8, 2),
}


@triton.jit
def match_kernel(
    SRC, TGT, MASK, UNIT_S, UNIT_T, INDEX, VALUE, n_s, n_t, C, s_b, s_n, t_b, t_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of rows of one target against all rows of one source; tiles wholly outside the mask cost nothing."""
    source, target = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    tp = TGT + target.to(tl.int64) * t_b + m[:, None].to(tl.int64) * t_n
    sp = SRC + source.to(tl.int64) * s_b
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    index = tl.zeros([BLOCK_M], tl.int32)
    for start in tl.range(0, n_s, BLOCK_N, num_stages=1):
        at = start + n
        inside = at < n_s
        if MASKED:
            inside = tl.load(MASK + source.to(tl.int64) * n_s + at, mask=inside, other=0) != 0
        if tl.max(inside.to(tl.int32), 0) > 0:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
                near = first + c < C
                x = tl.load(tp + (first + c)[None, :], mask=(m < n_t)[:, None] & near[None, :], other=0.0)
                y = tl.load(
                    sp + at[:, None].to(tl.int64) * s_n + (first + c)[None, :],
                    mask=inside[:, None] & near[None, :], other=0.0,
                )  # fmt: skip
                acc = _dot(x, y.T, acc, WIDEN)
            unit = tl.load(UNIT_S + source.to(tl.int64) * n_s + at, mask=inside, other=0.0)
            cosine = tl.where(inside[None, :], acc * unit[None, :], -float("inf"))
            top, which = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
            index = tl.where(top > best, start + which, index)
            best = tl.maximum(best, top)
    unit = tl.load(UNIT_T + target.to(tl.int64) * n_t + m, mask=m < n_t, other=0.0)
    none = best == -float("inf")
    value = tl.where(none, -1.0, tl.where(none, 0.0, best) * unit)
    value = tl.where(unit == unit, value, unit)  # of a target that is NaN
    to = (target.to(tl.int64) * tl.num_programs(1) + source) * n_t + m
    tl.store(INDEX + to, tl.where(value > -1.0, index, 0).to(tl.int64), mask=m < n_t)
    tl.store(VALUE + to, tl.where(value < -1.0, -1.0, value), mask=m < n_t)


INTERPRETED = not isinstance(match_kernel, triton.JITFunction)


def forward(src: Tensor, tgt: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Index, int64, and cosine, float32, of the best row.  (S, M, C), (B, N, C), bool (S, M) -> 2 x (B, S, N)."""
    src, tgt = rows(src), rows(tgt)
    (s, m, c), (b, n, _) = src.shape, tgt.shape
    index = src.new_empty((b, s, n), dtype=torch.int64)
    value = src.new_empty((b, s, n), dtype=torch.float32)
    targets, sources, channels, warps, stages = config(src)
    launch(
        match_kernel, (-(-n // targets), s, b), src.device,
        src, tgt, None if mask is None else mask.contiguous().view(torch.uint8), inverse_norm(src), inverse_norm(tgt),
        index, value, m, n, c, *src.stride()[:2], *tgt.stride()[:2],
        targets, sources, channels, stages, mask is not None, INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return index, value


def config(src: Tensor) -> Tile:
    """The row of the table for a device and a type; the interpreter, slow by the tile, takes large ones."""
    if INTERPRETED:
        return Tile(128, 128, 128, 4, 1)
    arch = architecture(torch.cuda.get_device_capability(src.device))
    return TABLE[arch, "single" if src.dtype == torch.float32 else "half"]


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched on an architecture, in float16, from which bfloat16 differs in name."""
    for (table, precision), (targets, sources, channels, warps, stages) in TABLE.items():
        if table != arch:
            continue
        half = precision == "half"
        types = {"SRC": "*fp16", "TGT": "*fp16"} if half else {"SRC": "*fp32", "TGT": "*fp32"}
        types |= {"MASK": "*u8", "UNIT_S": "*fp32", "UNIT_T": "*fp32", "INDEX": "*i64", "VALUE": "*fp32"}
        aligned = (*types, "C", "s_b", "s_n", "t_b", "t_n")
        types |= dict.fromkeys(("n_s", "n_t", "C", "s_b", "s_n", "t_b", "t_n"), "i32")
        for masked in (True, False):
            constants = {"BLOCK_M": targets, "BLOCK_N": sources, "BLOCK_C": channels, "STAGES": stages}
            constants |= {"MASKED": masked, "WIDEN": False} | ({} if masked else {"MASK": None})
            label = f"match {precision}" + (" masked" if masked else "")
            yield Build(label, match_kernel, types, constants, aligned, warps, stages, half)

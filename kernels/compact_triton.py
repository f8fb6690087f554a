"""Triton kernels of compaction: the list of kept tokens, the rows it picks, and their way back."""
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adain import rows
from .adain_triton import TILE, WARPS
from .builds import Build, block, launch


@triton.jit
def compact_kernel(MASK, INDEX, EDGES, n, BLOCK: tl.constexpr):
    """One image: what those before it keep is counted, then its own tokens are listed in order."""
    image = tl.program_id(0)
    t = tl.arange(0, BLOCK)
    first = image * n
    seen = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, first, BLOCK, num_stages=1):
        seen += tl.load(MASK + start + t, mask=start + t < first, other=0).to(tl.int32)
    kept = tl.sum(seen, 0)
    if image == 0:
        tl.store(EDGES, 0)
    for start in tl.range(0, n, BLOCK, num_stages=1):
        keep = tl.load(MASK + first + start + t, mask=start + t < n, other=0).to(tl.int32)
        to = kept + tl.cumsum(keep, 0) - 1
        tl.store(INDEX + to, (first + start + t).to(tl.int64), mask=keep != 0)
        kept += tl.sum(keep, 0)
    tl.store(EDGES + image + 1, kept)


@triton.jit
def gather_kernel(
    X, OUT, INDEX, EDGES, n, T, H, D, images, x_b, x_h, x_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A block of the pool's rows of one head and half: kept rows, and zeros past them."""
    h, half = tl.program_id(1), tl.program_id(2)
    to = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    kept = to < tl.load(EDGES + images)
    index = tl.load(INDEX + to, mask=kept, other=0)
    image, row = half.to(tl.int64) * images + index // n, index % n
    at = X + h.to(tl.int64) * x_h + (image * x_b + row * x_n)[:, None] + d[None, :]
    x = tl.load(at, mask=kept[:, None] & (d < D)[None, :], other=0.0)
    out = OUT + ((half.to(tl.int64) * T + to)[:, None] * H + h) * D + d[None, :]
    tl.store(out, x, mask=(to < T)[:, None] & (d < D)[None, :])


@triton.jit
def scatter_kernel(
    G, OUT, INDEX, EDGES, T, H, D, images, n, g_b, g_h, g_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A block of the pool's rows of one head and half, stored where `gather_kernel` found them."""
    h, half = tl.program_id(1), tl.program_id(2)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    kept = (at < T) & (at < tl.load(EDGES + images))
    inside = kept[:, None] & (d < D)[None, :]
    index = tl.load(INDEX + at, mask=kept, other=0)
    base = G + half.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    g = tl.load(base + at[:, None].to(tl.int64) * g_n + d[None, :], mask=inside, other=0.0)
    row = half.to(tl.int64) * images * n + index
    tl.store(OUT + (row[:, None] * H + h) * D + d[None, :], g, mask=inside)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool (B, N) -> int64 (B N,), zeros past the last edge, and int32 (B + 1,)."""
    images, n = mask.shape
    index = torch.zeros(images * n, dtype=torch.int64, device=mask.device)
    edges = mask.new_empty(images + 1, dtype=torch.int32)
    bytes_ = mask.contiguous().view(torch.uint8)
    launch(compact_kernel, (images,), mask.device, bytes_, index, edges, n, TILE, num_warps=WARPS)
    return index, edges


def gather(x: Tensor, index: Tensor, edges: Tensor, halves: int) -> Tensor:
    """(halves B, H, N, D) -> (halves, H, T, D), in memory (halves, T, H, D)."""
    x = rows(x)
    _, h, n, d = x.shape
    t, wide = len(index), block(d)
    out = x.new_empty((halves, t, h, d)).transpose(1, 2)
    grid = (-(-t // (TILE // wide)), h, halves)
    if t:
        launch(
            gather_kernel, grid, x.device,
            x, out, index, edges, n, t, h, d, len(edges) - 1, *x.stride()[:3], TILE // wide, wide, num_warps=WARPS,
        )  # fmt: skip
    return out


def scatter(g: Tensor, index: Tensor, edges: Tensor, tokens: int) -> Tensor:
    """(halves, H, T, D) -> (halves B, H, N, D), in memory (halves B, N, H, D), zeros where nothing was taken."""
    g = rows(g)
    halves, h, t, d = g.shape
    images, wide = len(edges) - 1, block(d)
    out = torch.zeros((halves * images, tokens, h, d), dtype=g.dtype, device=g.device).transpose(1, 2)
    grid = (-(-t // (TILE // wide)), h, halves)
    if t:
        launch(
            scatter_kernel, grid, g.device,
            g, out, index, edges, t, h, d, images, tokens, *g.stride()[:3], TILE // wide, wide, num_warps=WARPS,
        )  # fmt: skip
    return out


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched; they are the same on every architecture."""
    lists = {"MASK": "*u8", "INDEX": "*i64", "EDGES": "*i32"}
    types = {**lists, "n": "i32"}
    yield Build("compact", compact_kernel, types, {"BLOCK": TILE}, tuple(lists), WARPS, 2, False)
    for name, kernel in (("gather", gather_kernel), ("scatter", scatter_kernel)):
        for kind in ("fp16", "fp32"):
            for wide in (64, 128, 256):
                constants = {"BLOCK_N": TILE // wide, "BLOCK_D": wide}
                types = {n: lists.get(n, f"*{kind}" if n in ("X", "G", "OUT") else "i32") for n in kernel.arg_names}
                strides = [n for n in kernel.arg_names if n[-2:] in ("_b", "_h", "_n")]
                pointers = [n for n in kernel.arg_names if types[n].startswith("*")]
                aligned = (*pointers, *strides, "D")
                yield Build(f"{name} {kind} {wide}", kernel, types, constants, aligned, WARPS, 2, False)

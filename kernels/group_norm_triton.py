"""Launches of the GroupNorm kernels, and the tiles that they work on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .builds import Build, launch
from .group_norm_kernels_triton import (
    apply_kernel,
    channels_kernel,
    gradient_kernel,
    merge_kernel,
    sums_kernel,
    whole_kernel,
)
from .group_norm_torch import channels_last, empty, slopes

WHOLE = 65_536  # the most elements of a group that one program reads twice, from cache the second time
TILE, WARPS = 4096, 8  # elements of a tile
WHOLE_TILE, WHOLE_WARPS = 8192, 16
CHUNKS, TILES = 64, 4  # the most chunks of the pixels; the fewest tiles of a chunk
MERGED, MERGE_WARPS = 1024, 4  # chunks at a time
WIDE = (64, 256, 1024)  # pixels of a tile where pixels are next to each other in memory; 64 where channels are


class Tiles(NamedTuple):
    """How an image (C, P) is cut: tiles of block_c channels and block_p pixels, chunks of some tiles' pixels."""

    block_c: int
    block_p: int
    last: bool
    chunk: int
    chunks: int

    @classmethod
    def of(cls, x: Tensor) -> "Tiles":
        """Those of x (B, C, ...), dense."""
        last, pixels = channels_last(x), x[0, 0].numel()
        block_p = 64 if last else next((w for w in WIDE if pixels <= w), WIDE[-1])
        chunk = block_p * max(TILES, -(-pixels // (block_p * CHUNKS)))
        return cls(TILE // block_p, block_p, last, chunk, -(-pixels // chunk))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, laid out as x, and the mean and variance of every group, float32 (2, B, G)."""
    x, y, weight, bias = dense(x), empty(x), weight.contiguous(), bias.contiguous()
    (b, c), pixels = x.shape[:2], x[0, 0].numel()
    of, per = Tiles.of(x), c // groups
    stats = x.new_empty((2, b, groups), dtype=torch.float32)
    step = x.stride(0)
    ref = None if ref is None else ref.contiguous()
    if not of.last and per * pixels <= WHOLE:
        launch(
            whole_kernel, (groups, b), x.device,
            x, y, stats, weight, bias, ref, c, pixels, per, b * groups, step, eps,
            WHOLE_TILE, WHOLE_TILE // of.block_p, of.block_p, silu, ref is not None, num_warps=WHOLE_WARPS,
        )  # fmt: skip
        return y, stats
    sums = x.new_empty((2, b, c, of.chunks), dtype=torch.float32)
    columns = -(-c // of.block_c)
    launch(
        channels_kernel, (of.chunks, columns, b), x.device,
        x, sums, c, pixels, of.chunk, step, of.block_c, of.block_p, of.last, num_warps=WARPS,
    )  # fmt: skip
    launch(
        merge_kernel, (groups, b), x.device,
        sums, stats, pixels, per, of.chunk, of.chunks, MERGED, num_warps=MERGE_WARPS,
    )  # fmt: skip
    launch(
        apply_kernel, (-(-pixels // of.block_p), columns, b), x.device,
        x, y, stats, weight, bias, ref, c, pixels, per, step, eps,
        of.block_c, of.block_p, of.last, silu, ref is not None, num_warps=WARPS,
    )  # fmt: skip
    return y, stats


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, by the weight and by the bias, from two passes over x and its gradient."""
    x, dx, w, shift = dense(x), empty(x), weight.contiguous(), bias.contiguous()
    of = Tiles.of(x)
    if not dense_in(g, of.last):
        g = empty(x).copy_(g)
    (b, c), pixels, stats = x.shape[:2], x[0, 0].numel(), stats.contiguous()
    ref = None if ref is None else ref.contiguous()
    columns, per = -(-c // of.block_c), c // groups
    sums = x.new_empty((2, b, c, of.chunks), dtype=torch.float32)
    strides = (g.stride(0), x.stride(0))
    how = (of.block_c, of.block_p, of.last, silu, ref is not None)
    launch(
        sums_kernel, (of.chunks, columns, b), x.device,
        g, x, stats, w, shift, ref, sums, c, pixels, per, of.chunk, *strides, eps, *how, num_warps=WARPS,
    )  # fmt: skip
    sums = sums.sum(-1)
    common = slopes(sums, weight, stats, eps, ref, per * pixels)
    launch(
        gradient_kernel, (-(-pixels // of.block_p), columns, b), x.device,
        g, x, dx, stats, common, w, shift, ref, c, pixels, per, *strides, eps, *how, num_warps=WARPS,
    )  # fmt: skip
    return dx, sums[1].sum(0).to(weight.dtype), sums[0].sum(0).to(bias.dtype)


def dense(x: Tensor) -> Tensor:
    """x with every image in one piece of memory, in the layout of `empty(x)`, copied only where it is not."""
    return x if dense_in(x, channels_last(x)) else x.contiguous()


def dense_in(x: Tensor, last: bool) -> bool:
    """Every image is one piece of memory, its channels last or, if not `last`, contiguous."""
    return (x[:1].movedim(1, -1) if last else x[:1]).is_contiguous()


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched, with SiLU and a reference, which take the most; the same everywhere.

    In float16 all of them, of the other two types the largest tiles.
    """
    layouts = [(WIDE[-1], False), (64, True)]
    for half in ("fp16", "bf16", "fp32"):
        for block_p, last in [*[(w, False) for w in WIDE[:-1] if half == "fp16"], *layouts]:
            tile = {"BLOCK_C": TILE // block_p, "BLOCK_P": block_p, "LAST": last}
            name = f"{half} {block_p}{' last' if last else ''}"
            yield _build(channels_kernel, name, half, tile, WARPS)
            for kernel in (apply_kernel, sums_kernel, gradient_kernel):
                yield _build(kernel, name, half, tile | {"SILU": True, "POOLED": True}, WARPS)
            if not last:
                tile = {"BLOCK": WHOLE_TILE, "BLOCK_C": WHOLE_TILE // block_p, "BLOCK_P": block_p}
                yield _build(whole_kernel, name, half, tile | {"SILU": True, "POOLED": True}, WHOLE_WARPS)
    yield _build(merge_kernel, "fp32", "fp32", {"BLOCK": MERGED}, MERGE_WARPS)


def _build(kernel, name: str, half: str, constants: dict, warps: int) -> Build:
    types, aligned = {}, []
    for argument in kernel.arg_names:
        if argument in ("X", "Y", "G_Y", "DX", "W", "BIAS"):
            types[argument] = f"*{half}"
        elif argument in ("S", "OUT", "STATS", "SLOPES"):
            types[argument] = "*fp32"
        else:
            types[argument] = "*i64" if argument == "REF" else "fp32" if argument == "eps" else "i32"
        if types[argument].startswith("*") or argument in ("C", "P", "chunk", "g_b", "x_b"):
            aligned.append(argument)
    return Build(f"{kernel.__name__} {name}", kernel, types, constants, tuple(aligned), warps, 3, False)

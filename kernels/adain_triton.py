"""Triton kernels for token statistics, centred affine maps and their moments."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adain import rows, token_major
from .builds import Build, block, launch

WARPS, TILE = 8, 4096  # elements of a tile


@triton.jit
def stats_kernel(
    Q, K, S, n_q, n_k, H, D, q_b, q_h, q_n, k_b, k_h, k_n, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and sqrt(variance + eps) over tokens: tiles are merged (Chan et al. 1979, eq. 2.1)."""
    h, b, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_N)
    if which == 0:
        base = Q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        n = n_q
        step = q_n
    else:
        base = K + b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        n = n_k
        step = k_n
    first = tl.load(base + d, mask=d < D, other=0.0).to(
        tl.float32
    )  # all is measured from it, so no large mean is squared
    mean = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=2):
        rows = start + t
        inside = (rows < n)[:, None] & (d < D)[None, :]
        x = tl.load(base + rows[:, None].to(tl.int64) * step + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - first[None, :], 0.0)
        count = tl.minimum(n - start, BLOCK_N).to(tl.float32)
        tile = tl.sum(x, 0) / count
        off = tl.where(inside, x - tile[None, :], 0.0)
        ratio = count / (start + count)
        away = tile - mean
        squares += tl.sum(off * off, 0) + away * away * (start * ratio)
        mean += away * ratio
    deviation = tl.sqrt(squares / tl.maximum(n - 1, 1).to(tl.float32) + eps)
    B, step_s = tl.num_programs(1).to(tl.int64), H * D
    at = S + (which * 2 * B + b) * step_s + h * D + d
    tl.store(at, first + mean, mask=d < D)
    tl.store(at + B * step_s, deviation, mask=d < D)


@triton.jit
def affine_kernel(X, Y, CENTRE, GAIN, OFFSET, n, H, D, x_b, x_h, x_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(x - centre) * gain + offset, per image, head and channel; y is (B, N, H, D) in memory."""
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    rows = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = (rows < n)[:, None] & (d < D)[None, :]
    at = (b * H + h) * D + d
    centre = tl.load(CENTRE + at, mask=d < D, other=0.0)
    gain = tl.load(GAIN + at, mask=d < D, other=0.0)
    offset = tl.load(OFFSET + at, mask=d < D, other=0.0)
    base = X + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h
    x = tl.load(base + rows[:, None] * x_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = (x - centre[None, :]) * gain[None, :] + offset[None, :]
    to = Y + ((b.to(tl.int64) * n + rows)[:, None] * H + h) * D + d[None, :]
    tl.store(to, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def moments_kernel(
    G, X, CENTRE, S, n, H, D, g_b, g_h, g_n, x_b, x_h, x_n,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Over tokens: the sum of g, and of g (x - centre)."""
    h, b = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_N)
    centre = tl.load(CENTRE + (b * H + h) * D + d, mask=d < D, other=0.0)
    g_base = G + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    x_base = X + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h
    total = tl.zeros([BLOCK_D], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=2):
        rows = (start + t).to(tl.int64)
        inside = (rows < n)[:, None] & (d < D)[None, :]
        g = tl.load(g_base + rows[:, None] * g_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_base + rows[:, None] * x_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        weighted += tl.sum(g * (x - centre[None, :]), 0)
    at = S + (b * H + h) * D + d
    tl.store(at, total, mask=d < D)
    tl.store(at + tl.num_programs(1) * H * D, weighted, mask=d < D)


def token_stats(q: Tensor, k: Tensor | None, eps: float) -> Tensor:
    """(B, H, N, D), (B, H, M, D) -> float32 (2, 2, B, H, D), in one launch."""
    q = rows(q)
    b, h, n, d = q.shape
    other = q if k is None else rows(k)
    out = q.new_empty((1 if k is None else 2, 2, b, h, d), dtype=torch.float32)
    wide = block(d)
    strides = (*q.stride()[:3], *other.stride()[:3])
    launch(
        stats_kernel, (h, b, len(out)), q.device,
        q, other, out, n, other.shape[2], h, d, *strides, eps, TILE // wide, wide, num_warps=WARPS,
    )  # fmt: skip
    return out


def centred_affine(x: Tensor, centre: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """(x - centre) * gain + offset.  (B, H, N, D), 3 x (B, H, D) -> (B, H, N, D), in memory (B, N, H, D)."""
    x, y = rows(x), token_major(x)
    b, h, n, d = x.shape
    wide = block(d)
    vectors = (v.float().contiguous() for v in (centre, gain, offset))
    grid = (-(-n // (TILE // wide)), h, b)
    launch(affine_kernel, grid, x.device, x, y, *vectors, n, h, d, *x.stride()[:3], TILE // wide, wide, num_warps=WARPS)
    return y


def moments(g: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Over tokens: the sum of g, and of g (x - centre).  2 x (B, H, N, D), (B, H, D) -> float32 (2, B, H, D)."""
    g, x = rows(g), rows(x)
    b, h, n, d = x.shape
    wide = block(d)
    out = x.new_empty((2, b, h, d), dtype=torch.float32)
    strides = (*g.stride()[:3], *x.stride()[:3])
    launch(
        moments_kernel, (h, b), x.device,
        g, x, centre.float().contiguous(), out, n, h, d, *strides, TILE // wide, wide, num_warps=WARPS,
    )  # fmt: skip
    return out


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched; they are the same on every architecture."""
    for kernel, pointers, counts, strides in (
        (stats_kernel, "Q K", "n_q n_k H D", "q_b q_h q_n k_b k_h k_n"),
        (affine_kernel, "X Y", "n H D", "x_b x_h x_n"),
        (moments_kernel, "G X", "n H D", "g_b g_h g_n x_b x_h x_n"),
    ):
        sums = [n for n in ("S", "CENTRE", "GAIN", "OFFSET") if n in kernel.arg_names]
        for half in ("fp16", "fp32"):
            for wide in (64, 128, 256):
                types = dict.fromkeys(pointers.split(), f"*{half}") | dict.fromkeys(sums, "*fp32")
                types |= dict.fromkeys((*counts.split(), *strides.split()), "i32") | {"eps": "fp32"}
                aligned = (*pointers.split(), *sums, *strides.split(), "D")
                constants = {"BLOCK_N": TILE // wide, "BLOCK_D": wide}
                name = f"{kernel.__name__} {half} {wide}"
                yield Build(name, kernel, types, constants, aligned, WARPS, 2, False)

"""Triton kernels of GroupNorm and SiLU: one launch for small groups, three for large ones, two backward."""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _place(c, p, C, P, LAST: tl.constexpr):
    """Where channels c and pixels p of an image are, and whether there are such: tiles (c, p), or (p, c) if LAST."""
    if LAST:
        at = p[:, None].to(tl.int64) * C + c[None, :]
        inside = (p < P)[:, None] & (c < C)[None, :]
    else:
        at = c[:, None].to(tl.int64) * P + p[None, :]
        inside = (c < C)[:, None] & (p < P)[None, :]
    return at, inside


@triton.jit
def _spread(v, LAST: tl.constexpr):
    """Numbers of channels, along a tile."""
    if LAST:
        v = v[None, :]
    else:
        v = v[:, None]
    return v


@triton.jit
def _mixed(mean, var, mean_r, var_r):
    """The mean and variance of two images of as many pixels, together (docs/kernels.md, eq. N1)."""
    away = (mean - mean_r) * 0.5
    return mean - away, (var + var_r) * 0.5 + away * away


@triton.jit
def _normalisers(STATS, REF, b, group, near, G, size, eps, POOLED: tl.constexpr):
    """The mean that is subtracted, the factor that multiplies, and the own mean, of the groups of channels of image b.

    STATS is (2, B, G), the means and then the variances, B G = size numbers of each.
    """
    at = b * G + group
    own = tl.load(STATS + at, mask=near, other=0.0)
    mean = own
    var = tl.load(STATS + size + at, mask=near, other=1.0)
    if POOLED:
        to = tl.load(REF + b).to(tl.int32) * G + group
        there = near & (to >= 0) & (to < size)  # a reference outside the batch is NaN, not what lies there
        mean_r = tl.load(STATS + to, mask=there, other=float("nan"))
        mean, var = _mixed(mean, var, mean_r, tl.load(STATS + size + to, mask=there, other=1.0))
    return mean, 1.0 / tl.sqrt(var + eps), own


@triton.jit
def _moments_of(base, N, BLOCK: tl.constexpr):
    """Mean and variance of N numbers in a row: every lane by itself (Welford 1962), then all of them."""
    i = tl.arange(0, BLOCK)
    first = tl.load(base).to(tl.float32)  # all is measured from it, so no large mean is squared
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=2):
        inside = start + i < N
        x = tl.load(base + start + i, mask=inside, other=0.0).to(tl.float32) - first
        away = tl.where(inside, x - mean, 0.0)
        mean += away / (start // BLOCK + 1)
        squares += away * (x - mean)
    count = tl.where(i < N, (N - 1 - i) // BLOCK + 1, 0).to(tl.float32)
    total = tl.sum(mean * count, 0) / N
    off = mean - total
    return first + total, tl.sum(squares + count * off * off, 0) / N


@triton.jit
def whole_kernel(
    X, Y, S, W, BIAS, REF, C, P, CG, size, x_b, eps,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """A whole group of an image whose pixels are contiguous: its statistics, then itself once more, from cache."""
    g, b = tl.program_id(0), tl.program_id(1)
    base = X + b.to(tl.int64) * x_b + g.to(tl.int64) * CG * P
    mean, var = _moments_of(base, CG * P, BLOCK)
    at = S + b * tl.num_programs(0) + g
    tl.store(at, mean)
    tl.store(at + size, var)
    if POOLED:
        r = tl.load(REF + b).to(tl.int64)
        there = (r >= 0) & (r < tl.num_programs(1))
        mean_r, var_r = _moments_of(X + tl.where(there, r, 0) * x_b + g.to(tl.int64) * CG * P, CG * P, BLOCK)
        mean, var = _mixed(mean, var, tl.where(there, mean_r, float("nan")), var_r)
    rstd = 1.0 / tl.sqrt(var + eps)
    to = Y + (b.to(tl.int64) * C + g * CG) * P
    for tile in tl.range(0, tl.cdiv(CG, BLOCK_C) * tl.cdiv(P, BLOCK_P), num_stages=2):
        c = tile // tl.cdiv(P, BLOCK_P) * BLOCK_C + tl.arange(0, BLOCK_C)
        p = tile % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
        weight = tl.load(W + g * CG + c, mask=c < CG, other=0.0).to(tl.float32) * rstd
        bias = tl.load(BIAS + g * CG + c, mask=c < CG, other=0.0).to(tl.float32)
        within = c[:, None] * P + p[None, :]
        inside = (c < CG)[:, None] & (p < P)[None, :]
        x = tl.load(base + within, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * weight[:, None] + bias[:, None]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(to + within, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def channels_kernel(
    X, S, C, P, chunk, x_b,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Mean, and squared deviations from it, of each channel over a chunk of pixels: S (2, B, C, chunks)."""
    s, b = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_P)
    base = X + b.to(tl.int64) * x_b
    start = s * chunk
    end = tl.minimum(start + chunk, P)
    at, _ = _place(c, start + tl.arange(0, 1), C, P, LAST)
    first = tl.load(base + at, mask=_spread(c < C, LAST), other=0.0).to(tl.float32)
    at, _ = _place(c, t, C, P, LAST)
    mean = tl.zeros_like(at).to(tl.float32)
    squares = tl.zeros_like(mean)
    for p in tl.range(start, end, BLOCK_P, num_stages=2):
        at, inside = _place(c, p + t, C, P, LAST)
        x = tl.load(base + at, mask=inside, other=0.0).to(tl.float32) - first
        away = tl.where(inside, x - mean, 0.0)
        mean += away / ((p - start) // BLOCK_P + 1)
        squares += away * (x - mean)
    lane = tl.where(start + t < end, (end - start - 1 - t) // BLOCK_P + 1, 0).to(tl.float32)
    count = lane[:, None] if LAST else lane[None, :]
    total = tl.sum(mean * count, 0 if LAST else 1) / (end - start).to(tl.float32)
    off = mean - _spread(total, LAST)
    squares = tl.sum(squares + count * off * off, 0 if LAST else 1)
    to = S + (b.to(tl.int64) * C + c) * tl.num_programs(0) + s
    first = tl.sum(first, 0 if LAST else 1)
    tl.store(to, first + total, mask=c < C)
    tl.store(to + tl.num_programs(2).to(tl.int64) * C * tl.num_programs(0), squares, mask=c < C)


@triton.jit
def merge_kernel(S, OUT, P, CG, chunk, chunks, BLOCK: tl.constexpr):
    """Mean and variance of a group from those of its channels' chunks (Chan et al. 1979, eq. 2.1), measured apart."""
    g, b = tl.program_id(0), tl.program_id(1)
    G, B = tl.num_programs(0), tl.num_programs(1)
    n = CG * chunks
    base = S + (b * G + g).to(tl.int64) * n
    size = (B * G).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    N = 1.0 * CG * P
    first = tl.load(base)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=1):
        at = start + i
        count = tl.minimum(chunk, P - at % chunks * chunk).to(tl.float32)
        total += tl.where(at < n, tl.load(base + at, mask=at < n, other=0.0) - first, 0.0) * count
    mean = tl.sum(total, 0) / N
    squares = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=1):
        at = start + i
        count = tl.minimum(chunk, P - at % chunks * chunk).to(tl.float32)
        off = tl.load(base + at, mask=at < n, other=0.0) - first - mean
        squares += tl.where(at < n, tl.load(base + size + at, mask=at < n, other=0.0) + count * off * off, 0.0)
    tl.store(OUT + b * G + g, first + mean)
    tl.store(OUT + (B + b) * G + g, tl.sum(squares, 0) / N)


@triton.jit
def apply_kernel(
    X, Y, STATS, W, BIAS, REF, C, P, CG, x_b, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """A tile, normalised by the statistics of its groups."""
    b = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    near = c < C
    size = tl.num_programs(2) * (C // CG)
    mean, rstd, _ = _normalisers(STATS, REF, b, c // CG, near, C // CG, size, eps, POOLED)
    weight = tl.load(W + c, mask=near, other=0.0).to(tl.float32) * rstd
    bias = tl.load(BIAS + c, mask=near, other=0.0).to(tl.float32)
    at, inside = _place(c, p, C, P, LAST)
    x = tl.load(X + b.to(tl.int64) * x_b + at, mask=inside, other=0.0).to(tl.float32)
    y = (x - _spread(mean, LAST)) * _spread(weight, LAST) + _spread(bias, LAST)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(Y + b.to(tl.int64) * C * P + at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _before_silu(g, unit, weight, bias, SILU: tl.constexpr):
    """The gradient before the activation."""
    if SILU:
        z = unit * weight + bias
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    return g


@triton.jit
def sums_kernel(
    G_Y, X, STATS, W, BIAS, REF, S, C, P, CG, chunk, g_b, x_b, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Of each channel over a chunk of pixels, the sum of the gradient and of it times the normalised: S as above."""
    s, b = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_P)
    near = c < C
    size = tl.num_programs(2) * (C // CG)
    mean, rstd, _ = _normalisers(STATS, REF, b, c // CG, near, C // CG, size, eps, POOLED)
    mean, rstd = _spread(mean, LAST), _spread(rstd, LAST)
    weight = _spread(tl.load(W + c, mask=near, other=0.0).to(tl.float32), LAST)
    bias = _spread(tl.load(BIAS + c, mask=near, other=0.0).to(tl.float32), LAST)
    at, _ = _place(c, t, C, P, LAST)
    total = tl.zeros_like(at).to(tl.float32)
    weighted = tl.zeros_like(total)
    start = s * chunk
    end = tl.minimum(start + chunk, P)
    for p in tl.range(start, end, BLOCK_P, num_stages=2):
        at, inside = _place(c, p + t, C, P, LAST)
        x = tl.load(X + b.to(tl.int64) * x_b + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(G_Y + b.to(tl.int64) * g_b + at, mask=inside, other=0.0).to(tl.float32)
        unit = (x - mean) * rstd
        g = _before_silu(g, unit, weight, bias, SILU)
        total += g
        weighted += g * unit
    to = S + (b.to(tl.int64) * C + c) * tl.num_programs(0) + s
    half = tl.num_programs(2).to(tl.int64) * C * tl.num_programs(0)
    tl.store(to, tl.sum(total, 0 if LAST else 1), mask=near)
    tl.store(to + half, tl.sum(weighted, 0 if LAST else 1), mask=near)


@triton.jit
def gradient_kernel(
    G_Y, X, DX, STATS, SLOPES, W, BIAS, REF, C, P, CG, g_b, x_b, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LAST: tl.constexpr, SILU: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile: what reaches it itself, and what reaches it through the statistics of its groups."""
    b = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    near = c < C
    size = tl.num_programs(2) * (C // CG)
    mean, rstd, own = _normalisers(STATS, REF, b, c // CG, near, C // CG, size, eps, POOLED)
    weight = tl.load(W + c, mask=near, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + c, mask=near, other=0.0).to(tl.float32)
    group = b * (C // CG) + c // CG
    level = tl.load(SLOPES + group, mask=near, other=0.0)
    slope = tl.load(SLOPES + size + group, mask=near, other=0.0)
    at, inside = _place(c, p, C, P, LAST)
    x = tl.load(X + b.to(tl.int64) * x_b + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G_Y + b.to(tl.int64) * g_b + at, mask=inside, other=0.0).to(tl.float32)
    unit = (x - _spread(mean, LAST)) * _spread(rstd, LAST)
    g = _before_silu(g, unit, _spread(weight, LAST), _spread(bias, LAST), SILU)
    dx = g * _spread(weight * rstd, LAST) + (x - _spread(own, LAST)) * _spread(slope, LAST) + _spread(level, LAST)
    tl.store(DX + b.to(tl.int64) * C * P + at, dx.to(DX.dtype.element_ty), mask=inside)

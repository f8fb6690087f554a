"""Triton kernels of source attention: forward, and backward by queries and by keys, without atomics."""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, rows, d, step, end, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """Rows of a head, zero outside of it."""
    at = base + rows[:, None].to(tl.int64) * step + d[None, :]
    if D == BLOCK_D:
        if TAIL:
            x = tl.load(at, mask=(rows < end)[:, None], other=0.0)
        else:
            x = tl.load(at)
    else:
        x = tl.load(at, mask=(rows < end)[:, None] & (d < D)[None, :], other=0.0)
    return x


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a b + acc in float32; the interpreter multiplies no bfloat16, so there the operands are widened."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _gain(at):
    """A scale, or a shift, in float32: the interpreter's are float64."""
    return tl.load(at).to(tl.float32)


@triton.jit
def _tile(
    acc, total, top, q, kp, vp, start, end, n, d, k_n, v_n, gain,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running output, sum and maximum (Milakov & Gimelshein 2018, algorithm 3).

    Of wide heads the logits are those of keys by queries, so that it is not the queries that registers hold.
    """
    at = start + n
    k = _rows(kp, at, d, k_n, end, D, BLOCK_D, TAIL)
    if BLOCK_D > 128:
        s = _dot(k, q.T, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), WIDEN)
    else:
        s = _dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDEN)
    if TAIL:  # a gain of 0 times -inf would be NaN, so it is p that is masked
        inside = tl.expand_dims(at < end, 1 if BLOCK_D > 128 else 0)
        peak = tl.maximum(top, tl.max(tl.where(inside, s, -float("inf")), 0 if BLOCK_D > 128 else 1) * gain)
        p = tl.where(inside, tl.exp2(s * gain - tl.expand_dims(peak, 0 if BLOCK_D > 128 else 1)), 0.0)
    else:
        peak = tl.maximum(top, tl.max(s, 0 if BLOCK_D > 128 else 1) * gain)
        p = tl.exp2(s * gain - tl.expand_dims(peak, 0 if BLOCK_D > 128 else 1))
    decay = tl.exp2(top - peak)
    total = total * decay + tl.sum(p, 0 if BLOCK_D > 128 else 1)
    p = p.to(q.dtype)
    v = _rows(vp, at, d, v_n, end, D, BLOCK_D, TAIL)
    if BLOCK_D > 128:
        p = p.T
    return _dot(p, v, acc * decay[:, None], WIDEN), total, peak


@triton.jit
def _source(
    acc, total, top, q, kp, vp, lo, hi, d, k_n, v_n, gain, shift,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Keys lo to hi, with logits gain * q k + shift: the shift moves the maximum (docs/kernels.md, eq. 6)."""
    n = tl.arange(0, BLOCK_N)
    top = top - shift
    full = lo + (hi - lo) // BLOCK_N * BLOCK_N
    for start in tl.range(lo, full, BLOCK_N, num_stages=STAGES):
        acc, total, top = _tile(
            acc, total, top, q, kp, vp, start, hi, n, d, k_n, v_n, gain, D, BLOCK_M, BLOCK_N, BLOCK_D, False, WIDEN
        )
    if full < hi:
        acc, total, top = _tile(
            acc, total, top, q, kp, vp, full, hi, n, d, k_n, v_n, gain, D, BLOCK_M, BLOCK_N, BLOCK_D, True, WIDEN
        )
    return acc, total, top + shift


@triton.jit
def forward_kernel(
    Q, K, V, PK, PV, OUT, LSE, OFFSETS, SEGMENTS, GAINS, STATS, REF, scale, n_q, n_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_b, pk_h, pk_n, pv_b, pv_h, pv_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    ADAIN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one image and head: its own keys, then every source."""
    b, h = tl.program_id(1), tl.program_id(2)
    B, H = tl.num_programs(1), tl.num_programs(2)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
    gain = scale * LOG2E
    own = q
    own_gain = gain
    shift = tl.zeros([BLOCK_M], tl.float32)
    if ADAIN:
        r = tl.load(REF + b).to(tl.int32)
        near = d < D
        at, to = (b * H + h) * D + d, (r * H + h) * D + d
        size = B * H * D
        mean_q = tl.load(STATS + at, mask=near, other=0.0)
        gain_q = tl.load(STATS + size + to, mask=near, other=0.0) / tl.load(STATS + size + at, mask=near, other=1.0)
        offset_q = tl.load(STATS + to, mask=near, other=0.0)
        mean_k = tl.load(STATS + 2 * size + at, mask=near, other=0.0)
        std_k = tl.load(STATS + 3 * size + to, mask=near, other=0.0)
        gain_k = std_k / tl.load(STATS + 3 * size + at, mask=near, other=1.0)
        offset_k = tl.load(STATS + 2 * size + to, mask=near, other=0.0)
        std_q = tl.load(STATS + size + to, mask=near, other=0.0)
        # no token is further than sqrt(N - 1) deviations from the mean (Samuelson 1968): a power of two keeps q finite
        most = tl.max(gain_k * (tl.abs(offset_q) + std_q * tl.sqrt(n_q.to(tl.float32))), 0)
        down = tl.exp2(tl.minimum(tl.floor(15.0 - tl.log2(tl.maximum(most, 1.0))), 0.0))
        wide = (q.to(tl.float32) - mean_q[None, :]) * gain_q[None, :] + offset_q[None, :]
        q = wide.to(q.dtype)
        own = (wide * (gain_k * down)[None, :]).to(q.dtype)
        own_gain = gain / down
        # of the rounded queries, so that the mean of k cancels (docs/kernels.md, section 3)
        constant = tl.sum(q.to(tl.float32) * offset_k[None, :], 1)
        shift = constant * gain - tl.sum(own.to(tl.float32) * mean_k[None, :], 1) * own_gain
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    kp, vp = K + b64 * k_b + h64 * k_h, V + b64 * v_b + h64 * v_h
    acc, total, top = _source(
        acc, total, top, own, kp, vp, 0, n_k, d, k_n, v_n, own_gain, shift,
        D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
    )  # fmt: skip
    for s in tl.range(tl.load(OFFSETS + b), tl.load(OFFSETS + b + 1), num_stages=1):
        p = tl.load(SEGMENTS + 4 * s + 1).to(tl.int64)
        kp, vp = PK + p * pk_b + h64 * pk_h, PV + p * pv_b + h64 * pv_h
        acc, total, top = _source(
            acc, total, top, q, kp, vp, tl.load(SEGMENTS + 4 * s + 2), tl.load(SEGMENTS + 4 * s + 3), d, pk_n, pv_n,
            gain * _gain(GAINS + 2 * s), _gain(GAINS + 2 * s + 1) * LOG2E,
            D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
        )  # fmt: skip
    to = OUT + ((b64 * n_q + m)[:, None] * H + h) * D + d[None, :]
    tl.store(to, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=(m < n_q)[:, None] & (d < D)[None, :])
    tl.store(LSE + (b64 * H + h) * n_q + m, (top + tl.log2(total)) / LOG2E, mask=m < n_q)


@triton.jit
def _query_tile(
    acc, q, g, lse, delta, kp, vp, start, end, n, d, k_n, v_n, gain, weight,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the gradient of a block of queries."""
    at = start + n
    k = _rows(kp, at, d, k_n, end, D, BLOCK_D, TAIL)
    v = _rows(vp, at, d, v_n, end, D, BLOCK_D, TAIL)
    lse, delta = tl.expand_dims(lse, 0 if BLOCK_D > 128 else 1), tl.expand_dims(delta, 0 if BLOCK_D > 128 else 1)
    if BLOCK_D > 128:
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        p = tl.exp2(_dot(k, q.T, zero, WIDEN) * gain - lse)
        ds = p * (_dot(v, g.T, zero, WIDEN) - delta) * weight
    else:
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        p = tl.exp2(_dot(q, k.T, zero, WIDEN) * gain - lse)
        ds = p * (_dot(g, v.T, zero, WIDEN) - delta) * weight
    if TAIL:
        ds = tl.where(tl.expand_dims(at < end, 1 if BLOCK_D > 128 else 0), ds, 0.0)
    ds = ds.to(k.dtype)
    if BLOCK_D > 128:
        ds = ds.T
    return _dot(ds, k, acc, WIDEN)


@triton.jit
def _query_source(
    acc, q, g, lse, delta, kp, vp, lo, hi, d, k_n, v_n, gain, weight,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    full = lo + (hi - lo) // BLOCK_N * BLOCK_N
    for start in tl.range(lo, full, BLOCK_N, num_stages=STAGES):
        acc = _query_tile(
            acc, q, g, lse, delta, kp, vp, start, hi, n, d, k_n, v_n, gain, weight,
            D, BLOCK_M, BLOCK_N, BLOCK_D, False, WIDEN,
        )  # fmt: skip
    if full < hi:
        acc = _query_tile(
            acc, q, g, lse, delta, kp, vp, full, hi, n, d, k_n, v_n, gain, weight,
            D, BLOCK_M, BLOCK_N, BLOCK_D, True, WIDEN,
        )  # fmt: skip
    return acc


@triton.jit
def queries_kernel(
    Q, K, V, PK, PV, G, LSE, DELTA, DQ, OFFSETS, SEGMENTS, GAINS, scale, n_q, n_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_b, pk_h, pk_n, pv_b, pv_h, pv_n, g_b, g_h, g_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient by a block of queries (Dao et al. 2022, algorithm 4), over the own keys and then every source."""
    b, h = tl.program_id(1), tl.program_id(2)
    H = tl.num_programs(2)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
    g = _rows(G + b64 * g_b + h64 * g_h, m, d, g_n, n_q, D, BLOCK_D, True)
    row = (b64 * H + h) * n_q + m
    lse = tl.load(LSE + row, mask=m < n_q, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + row, mask=m < n_q, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    kp, vp = K + b64 * k_b + h64 * k_h, V + b64 * v_b + h64 * v_h
    acc = _query_source(
        acc, q, g, lse, delta, kp, vp, 0, n_k, d, k_n, v_n, scale * LOG2E, 1.0,
        D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
    )  # fmt: skip
    for s in tl.range(tl.load(OFFSETS + b), tl.load(OFFSETS + b + 1), num_stages=1):
        p = tl.load(SEGMENTS + 4 * s + 1).to(tl.int64)
        kp, vp = PK + p * pk_b + h64 * pk_h, PV + p * pv_b + h64 * pv_h
        weight = _gain(GAINS + 2 * s)
        acc = _query_source(
            acc, q, g, lse - _gain(GAINS + 2 * s + 1) * LOG2E, delta, kp, vp,
            tl.load(SEGMENTS + 4 * s + 2), tl.load(SEGMENTS + 4 * s + 3), d, pk_n, pv_n, scale * LOG2E * weight, weight,
            D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
        )  # fmt: skip
    to = DQ + ((b64 * n_q + m)[:, None] * H + h) * D + d[None, :]
    tl.store(to, (acc * scale).to(DQ.dtype.element_ty), mask=(m < n_q)[:, None] & (d < D)[None, :])


@triton.jit
def _key_source(
    dk, dv, k, v, n, lo, hi, Q, G, LSE, DELTA, b, h, n_q, q_b, q_h, q_n, g_b, g_h, g_n, gain, weight, shift,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """What the queries of image b, which see rows lo to hi, add to the gradients of a block of keys and values."""
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    seen = ((n >= lo) & (n < hi))[None, :]
    row = (b64 * tl.num_programs(2) + h) * n_q
    for start in tl.range(0, n_q, BLOCK_M, num_stages=STAGES):
        m = start + tl.arange(0, BLOCK_M)
        q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
        g = _rows(G + b64 * g_b + h64 * g_h, m, d, g_n, n_q, D, BLOCK_D, True)
        lse = tl.load(LSE + row + m, mask=m < n_q, other=float("inf")) * LOG2E - shift
        delta = tl.load(DELTA + row + m, mask=m < n_q, other=0.0)
        p = tl.where(seen, tl.exp2(_dot(q, k.T, zero, WIDEN) * gain - lse[:, None]), 0.0)
        dv = _dot(p.to(g.dtype).T, g, dv, WIDEN)
        ds = p * (_dot(g, v.T, zero, WIDEN) - delta[:, None]) * weight
        dk = _dot(ds.to(q.dtype).T, q, dk, WIDEN)
    return dk, dv


@triton.jit
def keys_kernel(
    Q, K, V, G, LSE, DELTA, DK, DV, SEGMENTS, GAINS, scale, n_q, n_k, own, segments,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradients by a block of keys and values: from their own image where `own`, then from whoever sees them."""
    at, h = tl.program_id(1), tl.program_id(2)
    H = tl.num_programs(2)
    a64, h64 = at.to(tl.int64), h.to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = _rows(K + a64 * k_b + h64 * k_h, n, d, k_n, n_k, D, BLOCK_D, True)
    v = _rows(V + a64 * v_b + h64 * v_h, n, d, v_n, n_k, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if own != 0:
        dk, dv = _key_source(
            dk, dv, k, v, n, 0, n_k, Q, G, LSE, DELTA, at, h, n_q, q_b, q_h, q_n, g_b, g_h, g_n,
            scale * LOG2E, 1.0, 0.0,
            D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
        )  # fmt: skip
    for s in tl.range(0, segments, num_stages=1):
        lo, hi = tl.load(SEGMENTS + 4 * s + 2), tl.load(SEGMENTS + 4 * s + 3)
        if (tl.load(SEGMENTS + 4 * s + 1) == at) & (lo < first + BLOCK_N) & (hi > first):
            weight = _gain(GAINS + 2 * s)
            dk, dv = _key_source(
                dk, dv, k, v, n, lo, hi, Q, G, LSE, DELTA, tl.load(SEGMENTS + 4 * s), h, n_q, q_b, q_h, q_n,
                g_b, g_h, g_n, scale * LOG2E * weight, weight, _gain(GAINS + 2 * s + 1) * LOG2E,
                D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, WIDEN,
            )  # fmt: skip
    to = ((a64 * n_k + n)[:, None] * H + h) * D + d[None, :]
    inside = (n < n_k)[:, None] & (d < D)[None, :]
    tl.store(DK + to, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + to, dv.to(DV.dtype.element_ty), mask=inside)

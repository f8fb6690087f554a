"""Triton kernels of masked maps: attention over few keys with chosen columns added up, and the gradients of both."""
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .source_attention_kernels_triton import LOG2E, _dot, _rows


@triton.jit
def _head(
    q, kp, vp, end, d, k_n, v_n, gain,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    VALUES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The output, where VALUES, and the log2-sum-exp2 of one head; few keys, so every tile is masked alike."""
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        k = _rows(kp, start + n, d, k_n, end, D, BLOCK_D, True)
        s = _dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDEN) * gain
        s = tl.where((start + n < end)[None, :], s, -float("inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - peak)
        p = tl.exp2(s - peak[:, None])
        total = total * decay + tl.sum(p, 1)
        top = peak
        if VALUES:
            v = _rows(vp, start + n, d, v_n, end, D, BLOCK_D, True)
            acc = _dot(p.to(v.dtype), v, acc * decay[:, None], WIDEN)
    return acc / total[:, None], top + tl.log2(total)


@triton.jit
def maps_kernel(
    Q, K, V, TOKENS, OUT, LSE, MAPS, scale, n_q, n_k, H, T, each,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, VALUES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of queries of one image: `each` heads, one after the other, and the sum of their columns."""
    b, part = tl.program_id(1), tl.program_id(2)
    b64 = b.to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    token = tl.load(TOKENS + b * T + t, mask=t < T, other=-1)
    known = (token >= 0) & (token < n_k)
    maps = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    gain = scale * LOG2E
    for i in tl.range(0, each, num_stages=1):
        h = part.to(tl.int64) * each + i
        q = _rows(Q + b64 * q_b + h * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
        kp = K + b64 * k_b + h * k_h
        out, lse = _head(
            q, kp, V + b64 * v_b + h * v_h, n_k, d, k_n, v_n, gain,
            D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, VALUES, WIDEN,
        )  # fmt: skip
        if VALUES:
            to = OUT + ((b64 * n_q + m)[:, None] * H + h) * D + d[None, :]
            tl.store(to, out.to(OUT.dtype.element_ty), mask=(m < n_q)[:, None] & (d < D)[None, :])
        tl.store(LSE + (b64 * H + h) * n_q + m, lse / LOG2E, mask=m < n_q)
        at = kp + token[:, None].to(tl.int64) * k_n + d[None, :]
        keys = tl.load(at, mask=known[:, None] & (d < D)[None, :], other=0.0)
        s = _dot(q, keys.T, tl.zeros([BLOCK_M, BLOCK_T], tl.float32), WIDEN)
        maps += tl.exp2(s * gain - lse[:, None])
    maps = tl.where(known[None, :], maps / H, tl.where((token == -1)[None, :], 0.0, float("nan")))
    to = MAPS + ((part * tl.num_programs(1) + b64) * n_q + m)[:, None] * T + t[None, :]
    tl.store(to, maps, mask=(m < n_q)[:, None] & (t < T)[None, :])


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    """a b + acc for a float32 a, brought to the size of 1 before it is rounded: gradients of maps may be tiny."""
    peak = tl.max(tl.abs(a))
    peak = tl.where(peak > 0.0, peak, 1.0)
    return acc + _dot((a / peak).to(b.dtype), b, tl.zeros_like(acc), WIDEN) * peak


@triton.jit
def _tile(
    q, k, g_maps, lse, m, n, b, n_q, n_k, gain,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile, and what the loss asks of them through the maps."""
    s = _dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDEN)
    p = tl.where((n < n_k)[None, :], tl.exp2(s * gain - lse[:, None]), 0.0)
    at = g_maps + (b * n_q + m)[:, None] * n_k + n[None, :]
    return p, tl.load(at, mask=(m < n_q)[:, None] & (n < n_k)[None, :], other=0.0)


@triton.jit
def maps_queries_kernel(
    Q, K, V, G, GMAPS, LSE, DELTA, WHOLE, DQ, scale, n_q, n_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    VALUES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient by a block of queries of one head, and delta with the maps' share of it, which keys need too."""
    h = tl.program_id(2)
    H = tl.num_programs(2)
    b64, h64 = tl.program_id(1).to(tl.int64), h.to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    gain = scale * LOG2E
    row = (b64 * H + h) * n_q + m
    kp, vp = K + b64 * k_b + h64 * k_h, V + b64 * v_b + h64 * v_h
    q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
    lse = tl.load(LSE + row, mask=m < n_q, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + row, mask=m < n_q, other=0.0)
    for start in tl.range(0, n_k, BLOCK_N, num_stages=STAGES):
        k = _rows(kp, start + n, d, k_n, n_k, D, BLOCK_D, True)
        p, asked = _tile(q, k, GMAPS, lse, m, start + n, b64, n_q, n_k, gain, BLOCK_M, BLOCK_N, WIDEN)
        delta += tl.sum(p * asked, 1)
    tl.store(WHOLE + row, delta, mask=m < n_q)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, n_k, BLOCK_N, num_stages=STAGES):
        k = _rows(kp, start + n, d, k_n, n_k, D, BLOCK_D, True)
        p, asked = _tile(q, k, GMAPS, lse, m, start + n, b64, n_q, n_k, gain, BLOCK_M, BLOCK_N, WIDEN)
        if VALUES:
            g = _rows(G + b64 * g_b + h64 * g_h, m, d, g_n, n_q, D, BLOCK_D, True)
            asked = _dot(g, _rows(vp, start + n, d, v_n, n_k, D, BLOCK_D, True).T, asked, WIDEN)
        acc = _product(p * (asked - delta[:, None]), k, acc, WIDEN)
    to = DQ + ((b64 * n_q + m)[:, None] * H + h) * D + d[None, :]
    tl.store(to, (acc * scale).to(DQ.dtype.element_ty), mask=(m < n_q)[:, None] & (d < D)[None, :])


@triton.jit
def maps_keys_kernel(
    Q, K, V, G, GMAPS, LSE, WHOLE, DK, DV, scale, n_q, n_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    VALUES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradients by a block of keys and values of one head."""
    h = tl.program_id(2)
    H = tl.num_programs(2)
    b64, h64 = tl.program_id(1).to(tl.int64), h.to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    gain = scale * LOG2E
    vp = V + b64 * v_b + h64 * v_h
    k = _rows(K + b64 * k_b + h64 * k_h, n, d, k_n, n_k, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, n_q, BLOCK_M, num_stages=STAGES):
        m = start + tl.arange(0, BLOCK_M)
        row = (b64 * H + h) * n_q + m
        q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
        lse = tl.load(LSE + row, mask=m < n_q, other=float("inf")) * LOG2E
        delta = tl.load(WHOLE + row, mask=m < n_q, other=0.0)
        p, asked = _tile(q, k, GMAPS, lse, m, n, b64, n_q, n_k, gain, BLOCK_M, BLOCK_N, WIDEN)
        if VALUES:
            g = _rows(G + b64 * g_b + h64 * g_h, m, d, g_n, n_q, D, BLOCK_D, True)
            asked = _dot(g, _rows(vp, n, d, v_n, n_k, D, BLOCK_D, True).T, asked, WIDEN)
            dv = _dot(p.to(g.dtype).T, g, dv, WIDEN)
        dk = _product((p * (asked - delta[:, None])).T, q, dk, WIDEN)
    to = ((b64 * n_k + n)[:, None] * H + h) * D + d[None, :]
    inside = (n < n_k)[:, None] & (d < D)[None, :]
    tl.store(DK + to, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    if VALUES:
        tl.store(DV + to, dv.to(DV.dtype.element_ty), mask=inside)

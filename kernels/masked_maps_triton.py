"""The Triton kernel of masked maps: attention over few keys, head by head, with chosen columns added up as it goes."""
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adain import rows, token_major
from .builds import Build, Config, architecture, block, launch
from .source_attention_kernels_triton import LOG2E, _dot, _rows

TABLE = {
    (90, 64): Config(64, 32, 4, 2),
    (90, 128): Config(64, 32, 8, 2),
    (80, 64): Config(64, 32, 8, 2),
    (80, 128): Config(64, 32, 8, 2),
}  # (architecture, channels of a tile), in half precision
PROGRAMS = 264  # two for each processor of the largest card


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
    for h in tl.range(part * each, part * each + each, num_stages=1):
        h64 = h.to(tl.int64)
        q = _rows(Q + b64 * q_b + h64 * q_h, m, d, q_n, n_q, D, BLOCK_D, True)
        kp = K + b64 * k_b + h64 * k_h
        out, lse = _head(
            q, kp, V + b64 * v_b + h64 * v_h, n_k, d, k_n, v_n, gain,
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


INTERPRETED = not isinstance(maps_kernel, triton.JITFunction)


def forward(q: Tensor, k: Tensor, v: Tensor | None, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, (B, N, H, D) in memory, or nothing without v; the log-sum-exp (B, H, N); the maps (B, N, T)."""
    q, k = rows(q), rows(k)
    v = k if v is None else rows(v)
    values = v is not k
    b, h, n, d = q.shape
    out = token_major(q) if values else q.new_empty(0)
    lse = q.new_empty((b, h, n), dtype=torch.float32)
    block_m, block_n, warps, stages = config(q)
    each = heads_of_a_program(h, b * -(-n // block_m))
    maps = q.new_empty((h // each, b, n, tokens.shape[1]), dtype=torch.float32)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    launch(
        maps_kernel, (-(-n // block_m), b, h // each), q.device,
        q, k, v, tokens, out, lse, maps, scale, n, k.shape[2], h, tokens.shape[1], each, *strides,
        d, block_m, block_n, block(d), columns(tokens.shape[1]), stages, values, INTERPRETED,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse, maps[0] if len(maps) == 1 else maps.sum(0)


def heads_of_a_program(heads: int, programs: int) -> int:
    """As many heads one after the other as leave enough programs; a divisor of their number."""
    return next(
        each
        for each in range(heads, 0, -1)
        if heads % each == 0 and (programs * heads // each >= PROGRAMS or each == 1)
    )


def columns(tokens: int) -> int:
    """The tile that holds the chosen columns: 16, 32, 64 or 128."""
    return max(16, triton.next_power_of_2(tokens))


def config(q: Tensor) -> Config:
    """The row of the table for a device and a head; the interpreter, slow by the tile, takes large ones."""
    if INTERPRETED:
        return Config(128, 128, 4, 1)
    return TABLE[architecture(torch.cuda.get_device_capability(q.device)), block(q.shape[-1])]


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched on an architecture, in float16, from which bfloat16 differs in name."""
    for (table, wide), (block_m, block_n, warps, stages) in TABLE.items():
        if table != arch:
            continue
        types, aligned = {"TOKENS": "*i32", "LSE": "*fp32", "MAPS": "*fp32", "scale": "fp32"}, ["TOKENS", "LSE", "MAPS"]
        for name in maps_kernel.arg_names:
            if name in ("Q", "K", "V", "OUT"):
                types[name] = "*fp16"
            types.setdefault(name, "i32")
            if name in ("Q", "K", "V", "OUT") or name[-2:] in ("_b", "_h", "_n"):
                aligned.append(name)
        for tokens in (16, 32, 64, 128):
            for values in (True, False):
                constants = {"D": wide, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": wide, "BLOCK_T": tokens}
                constants |= {"STAGES": stages, "VALUES": values, "WIDEN": False}
                label = f"maps {wide} {tokens}" + (" values" if values else "")
                yield Build(label, maps_kernel, types, constants, tuple(aligned), warps, stages, True)

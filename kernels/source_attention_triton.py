"""Launches of the source attention kernels, and their table of configurations."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .adain import rows, stats_gradient, token_major
from .builds import Build, Config, architecture, block, launch
from .source_attention_kernels_triton import forward_kernel, keys_kernel, queries_kernel

# (architecture, kernel, channels of a tile), in half precision: the largest tiles that spill no register
TABLE = {
    (90, "forward", 64): Config(128, 128, 8, 2),
    (90, "forward", 128): Config(128, 64, 8, 2),
    (90, "forward", 256): Config(64, 32, 8, 1),
    (90, "queries", 64): Config(128, 64, 8, 2),
    (90, "queries", 128): Config(64, 64, 8, 2),
    (90, "queries", 256): Config(64, 32, 8, 1),
    (90, "keys", 64): Config(64, 64, 8, 2),
    (90, "keys", 128): Config(64, 32, 8, 1),
    (90, "keys", 256): Config(32, 32, 8, 1),
    (80, "forward", 64): Config(128, 64, 8, 3),
    (80, "forward", 128): Config(128, 32, 8, 2),
    (80, "forward", 256): Config(64, 16, 8, 1),
    (80, "queries", 64): Config(128, 32, 8, 2),
    (80, "queries", 128): Config(128, 16, 8, 2),
    (80, "queries", 256): Config(64, 32, 8, 1),
    (80, "keys", 64): Config(64, 32, 8, 2),
    (80, "keys", 128): Config(64, 64, 8, 1),
    (80, "keys", 256): Config(64, 16, 8, 1),
}
# of sm_80's, where a head does not fill a tile of 128 and masks take registers: nothing is left to load ahead into
RAGGED = {"forward": Config(128, 32, 8, 1), "queries": Config(128, 16, 8, 1)}
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pv: Tensor | None,
    offsets: Tensor,
    segments: Tensor,
    gains: Tensor,
    stats: Tensor | None,
    ref: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), in memory (B, N, H, D), and the log-sum-exp (B, H, N), in nats."""
    q, k, v = rows(q), rows(k), rows(v)
    pk, pv = (k, v) if pk is None or pv is None else (rows(pk), rows(pv))
    out, lse = token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    b, h, n, d = q.shape
    block_m, block_n, warps, stages = config("forward", q)
    strides = [s for x in (q, k, v, pk, pv) for s in x.stride()[:3]]
    stats = None if stats is None else stats.contiguous()
    launch(
        forward_kernel, (-(-n // block_m), b, h), q.device,
        q, k, v, pk, pv, out, lse, offsets, segments, gains, stats, ref, scale, n, k.shape[2], *strides,
        d, block_m, block_n, block(d), stages, stats is not None, INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def backward(
    g: Tensor,
    g_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pk: Tensor | None,
    pv: Tensor | None,
    offsets: Tensor,
    segments: Tensor,
    gains: Tensor,
    stats: Tensor | None,
    ref: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """Gradients by q, k, v, the pool where it is not (k, v), and stats where there are any.

    Under AdaIN q and k are normalised in memory and the output is computed again from them: the gradient is taken where
    the keys are, and a log-sum-exp of folded logits would differ by a rounding.
    """
    g, q, k, v = rows(g), rows(q), rows(k), rows(v)
    apart = stats is not None or pk is not None
    pool = (k, v) if pk is None or pv is None else (rows(pk), rows(pv))
    raw_q, raw_k = q, k
    if stats is not None and ref is not None:
        i = ref.long()
        q, k = (
            torch.ops.diaphane.centred_affine(x, m, s[i] / s, m[i]) for x, (m, s) in zip((q, k), stats, strict=True)
        )
        out, lse = forward(q, k, v, *pool, offsets, segments, gains, None, None, scale)
    b, h, n, d = q.shape
    delta = (g.float() * out.float()).sum(-1)
    delta = (delta if g_lse is None else delta - g_lse).contiguous()
    shared = (scale, n, k.shape[2])
    dq = token_major(q)
    block_m, block_n, warps, stages = config("queries", q)
    strides = [s for x in (q, k, v, *pool, g) for s in x.stride()[:3]]
    launch(
        queries_kernel, (-(-n // block_m), b, h), q.device,
        q, k, v, *pool, g, lse, delta, dq, offsets, segments, gains, *shared, *strides,
        d, block_m, block_n, block(d), stages, INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    of = (q, g, lse, delta, segments, gains, scale)
    dk, dv = _keys(*of, k, v, own=True, segments_seen=0 if apart else len(segments))
    found = [dk, dv]
    if apart:
        dpk, dpv = _keys(*of, *pool, own=False, segments_seen=len(segments))
        found = [dk, dv, dpk, dpv]
    by_stats = []
    if stats is not None and ref is not None:
        dq, by_q = stats_gradient(dq, raw_q, stats[0], ref)
        found[0], by_k = stats_gradient(dk, raw_k, stats[1], ref)
        by_stats = [torch.stack([by_q, by_k])]
        if pk is None:
            found = [found[0] + found[2], found[1] + found[3]]
    return [dq, *found, *by_stats]


def _keys(
    q: Tensor,
    g: Tensor,
    lse: Tensor,
    delta: Tensor,
    segments: Tensor,
    gains: Tensor,
    scale: float,
    k: Tensor,
    v: Tensor,
    own: bool,
    segments_seen: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by keys and values (P, H, T, D), from their own images where `own` and from the sources."""
    dk, dv = token_major(k), token_major(v)
    p, h, t, d = k.shape
    block_m, block_n, warps, stages = config("keys", q)
    strides = [s for x in (q, k, v, g) for s in x.stride()[:3]]
    launch(
        keys_kernel, (-(-t // block_n), p, h), q.device,
        q, k, v, g, lse, delta, dk, dv, segments, gains, scale, q.shape[2], t, int(own), segments_seen, *strides,
        d, block_m, block_n, block(d), stages, INTERPRETED, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dk, dv


def config(kernel: str, q: Tensor) -> Config:
    """The row of the table for a device and a head; the interpreter, slow by the tile, takes large ones."""
    if INTERPRETED:
        return Config(128, 128, 4, 1)
    return _row(architecture(torch.cuda.get_device_capability(q.device)), kernel, q.shape[-1])


def _row(arch: int, kernel: str, channels: int) -> Config:
    if arch == 80 and kernel in RAGGED and 64 < channels < 128:
        return RAGGED[kernel]
    return TABLE[arch, kernel, block(channels)]


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched on an architecture, in float16, and in bfloat16 those of heads up to 64;
    and the heads of Stable Diffusion 1.5, which do not fill their tiles."""
    for (table, kernel, wide), how in TABLE.items():
        if table != arch:
            continue
        head = 160 if wide == 256 else wide  # the wide tile is there for Stable Diffusion 1.5
        for half in ("fp16", "bf16") if wide == 64 else ("fp16",):
            for adain in (False, True) if kernel == "forward" else (None,):
                yield _build(kernel, half, head, how, adain)
    for head in (40, 80):
        for kernel in ("forward", "queries", "keys"):
            yield _build(kernel, "fp16", head, _row(arch, kernel, head), True if kernel == "forward" else None)


def _build(kernel: str, half: str, head: int, how: Config, adain: bool | None) -> Build:
    function = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}[kernel]
    types, aligned = {}, []
    for name in function.arg_names:
        if name in ("Q", "K", "V", "PK", "PV", "OUT", "G", "DQ", "DK", "DV"):
            types[name] = f"*{half}"
        elif name in ("LSE", "DELTA", "GAINS", "STATS"):
            types[name] = "*fp32"
        elif name in ("OFFSETS", "SEGMENTS", "REF"):
            types[name] = "*i32"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
        if types[name].startswith("*") or name[-2:] in ("_b", "_n") or (name[-2:] == "_h" and head % 16 == 0):
            aligned.append(name)
    constants: dict = {
        "D": head,
        "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n,
        "BLOCK_D": block(head),
        "STAGES": how.stages,
        "WIDEN": False,
    }
    if adain is not None:
        constants["ADAIN"] = adain
    if adain is False:
        constants |= {"STATS": None, "REF": None}
    label = f"{kernel} {half} {head}" + (" adain" if adain else "")
    return Build(label, function, types, constants, tuple(aligned), how.warps, how.stages, True)

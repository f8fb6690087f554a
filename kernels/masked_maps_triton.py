"""Launches of the kernels of masked maps, and their table of configurations."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .adain import rows, token_major
from .builds import Build, Config, architecture, block, launch
from .masked_maps_kernels_triton import maps_kernel, maps_keys_kernel, maps_queries_kernel

# (architecture, kernel, channels of a tile), in half precision: the largest tiles that spill no register
TABLE = {
    (90, "maps", 64): Config(64, 32, 4, 2),
    (90, "maps", 128): Config(64, 32, 8, 2),
    (90, "maps_queries", 64): Config(64, 32, 8, 2),
    (90, "maps_queries", 128): Config(64, 32, 8, 2),
    (90, "maps_keys", 64): Config(64, 32, 8, 2),
    (90, "maps_keys", 128): Config(64, 32, 8, 2),
    (80, "maps", 64): Config(64, 32, 8, 2),
    (80, "maps", 128): Config(64, 32, 8, 2),
    (80, "maps_queries", 64): Config(64, 32, 8, 2),
    (80, "maps_queries", 128): Config(64, 32, 8, 2),
    (80, "maps_keys", 64): Config(64, 32, 8, 2),
    (80, "maps_keys", 128): Config(64, 32, 4, 2),
}
PROGRAMS = 264  # two for each processor of the largest card
INTERPRETED = not isinstance(maps_kernel, triton.JITFunction)


def forward(q: Tensor, k: Tensor, v: Tensor | None, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, (B, N, H, D) in memory, or nothing without v; the log-sum-exp (B, H, N); the maps (B, N, T)."""
    values = v is not None
    q, k, v = rows(q), rows(k), rows(k if v is None else v)
    b, h, n, d = q.shape
    out = token_major(q) if values else q.new_empty(0)
    lse = q.new_empty((b, h, n), dtype=torch.float32)
    block_m, block_n, warps, stages = config("maps", q)
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


def backward(
    g: Tensor,
    g_lse: Tensor | None,
    g_maps: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    tokens: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients by q, k and, where it is given, v; that by the maps is spread over the keys, in 4 B N M bytes."""
    values = v is not None
    q, k, v = rows(q), rows(k), rows(k if v is None else v)
    g = rows(g) if values else q
    b, h, n, d = q.shape
    delta = (g.float() * out.float()).sum(-1) if values else torch.zeros_like(lse)
    delta = (delta if g_lse is None else delta - g_lse).contiguous()
    whole = lse.new_empty(lse.shape)
    known = ((tokens >= 0) & (tokens < k.shape[2]))[:, None]
    at = tokens.clamp(0, k.shape[2] - 1).long()[:, None].expand(-1, n, -1)
    asked = torch.zeros((b, n, k.shape[2]), dtype=torch.float32, device=q.device)
    asked.scatter_add_(2, at, torch.where(known, g_maps / h, 0.0))
    dq, dk, dv = token_major(q), token_major(k), token_major(v)
    inputs = q, k, v, g, asked, lse
    shape = scale, n, k.shape[2], *(s for x in (q, k, v, g) for s in x.stride()[:3])
    for name, kernel, others, length in (
        ("maps_queries", maps_queries_kernel, (delta, whole, dq), 0),
        ("maps_keys", maps_keys_kernel, (whole, dk, dv), 1),
    ):
        block_m, block_n, warps, stages = config(name, q)
        blocks = -(-(n, k.shape[2])[length] // (block_m, block_n)[length])
        launch(
            kernel, (blocks, b, h), q.device, *inputs, *others, *shape,
            d, block_m, block_n, block(d), stages, values, INTERPRETED,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return [dq, dk, dv] if values else [dq, dk]


def heads_of_a_program(heads: int, programs: int) -> int:
    """As many heads one after the other as leave enough programs; a divisor of their number."""
    fitting = [each for each in range(1, heads + 1) if heads % each == 0 and programs * (heads // each) >= PROGRAMS]
    return max(fitting, default=1)


def columns(tokens: int) -> int:
    """The tile that holds the chosen columns: 16, for some words, or 128, for all."""
    return 16 if tokens <= 16 else 128


def config(kernel: str, q: Tensor) -> Config:
    """The row of the table for a device and a head; the interpreter, slow by the tile, takes large ones."""
    if INTERPRETED:
        return Config(128, 128, 4, 1)
    return TABLE[architecture(torch.cuda.get_device_capability(q.device)), kernel, block(q.shape[-1])]


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched on an architecture, in float16, from which bfloat16 differs in name."""
    for (table, name, wide), (block_m, block_n, warps, stages) in TABLE.items():
        if table != arch:
            continue
        kernel = {"maps": maps_kernel, "maps_queries": maps_queries_kernel, "maps_keys": maps_keys_kernel}[name]
        half, single = ("Q", "K", "V", "G", "OUT", "DQ", "DK", "DV"), ("LSE", "MAPS", "GMAPS", "DELTA", "WHOLE")
        known = dict.fromkeys(half, "*fp16") | dict.fromkeys(single, "*fp32") | {"TOKENS": "*i32", "scale": "fp32"}
        types = {n: known.get(n, "i32") for n in kernel.arg_names}
        aligned = tuple(n for n in kernel.arg_names if types[n].startswith("*") or n[-2:] in ("_b", "_h", "_n"))
        for tokens in (16, 128) if name == "maps" else (None,):
            for values in (True, False):
                constants = {"D": wide, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": wide, "STAGES": stages}
                constants |= {"VALUES": values, "WIDEN": False} | ({} if tokens is None else {"BLOCK_T": tokens})
                label = f"{name} {wide}" + (f" {tokens}" if tokens else "") + (" values" if values else "")
                yield Build(label, kernel, types, constants, aligned, warps, stages, True)

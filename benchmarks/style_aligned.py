"""StyleAligned against the published formulation written in plain torch, and against plain generation, whole steps.

python benchmarks/style_aligned.py out/bench                   # tiny and small networks
python benchmarks/style_aligned.py out/bench --net full        # SDXL's size, random weights: 10.3 GB in float32
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from diaphane.methods.prompt import Prompt
from diaphane.methods.style_aligned import PRESETS, Sharing, style_aligned
from diaphane.methods.style_chunks import chunked
from diaphane.methods.text_to_image import denoiser
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import SDXL, UNet
from diaphane.samplers.ddim import ddim
from diaphane.samplers.inversion import last
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from timing import conditions, interleaved, ratio, timing, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

NETS = {
    "tiny": replace(SDXL, channels=(32, 64, 96), depth=(0, 2, 3), mid_depth=3, head_dim=16),
    "small": replace(SDXL, channels=(96, 192, 384), depth=(0, 1, 2), mid_depth=2),
    "full": SDXL,
}
TEXT = 77


def network(name: str, dtype: torch.dtype) -> UNet:
    """A UNet with random weights of the size that initialisation gives."""
    with torch.device("meta"):
        unet = UNet(NETS[name])
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in unet.parameters():
        p.normal_(generator=generator).mul_(p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(0.5)
    return unet


def speaking(unet: UNet, rows: list[int], n: int, ops: Ops) -> Denoise:
    """The guided network of some pictures of n."""
    gen, cfg, dtype = torch.Generator().manual_seed(1), unet.cfg, next(unet.parameters()).dtype
    texts = [torch.randn(n, TEXT, cfg.context_dim, generator=gen)[rows].to(dtype) for _ in range(2)]
    pooled = [torch.randn(n, cfg.pooled_dim or 0, generator=gen)[rows].to(dtype) for _ in range(2)]
    positive, negative = (Prompt(*pair) for pair in zip(texts, pooled, strict=True))
    ids = torch.full((len(rows), cfg.ids), 512.0)
    return denoiser(unet, positive, negative, schedule=scaled_linear(), ids=ids, guidance=5.0, ops=ops)


def published(n: int, sharing: Sharing) -> Ops:
    """The authors' formulation: everything of the reference beside everything of each image, copied in memory."""

    def first(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, n))[:, :1].expand(-1, n, *x.shape[1:]).flatten(0, 1)

    def adain(x: Tensor) -> Tensor:
        mean, std = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + 1e-5).sqrt()
        return (x - mean) / std * first(std) + first(mean)

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        if site.kind != "self":
            return F.scaled_dot_product_attention(q, k, v)
        q, k = adain(q), adain(k)
        gain = torch.full((n, 1, 1, 1), sharing.scale, dtype=k.dtype)
        gain[0] = 1
        keys = torch.cat([k, first(k) * gain.repeat(len(k) // n, 1, 1, 1)], -2)
        values = torch.cat([v, first(v)], -2)
        if sharing.shift == 0:
            return F.scaled_dot_product_attention(q, keys, values)
        logits = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits[..., k.shape[2] :] += sharing.shift
        return logits.softmax(-1) @ values

    def group_norm(site: Site, x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        y = F.group_norm(torch.cat([x, first(x)], -2), groups, w, b, eps)[:, :, : x.shape[2]]
        return F.silu(y) if silu else y

    return replace(TORCH, attend=attend, group_norm=group_norm if sharing.norms else TORCH.group_norm)


def times(name: str, side: int, n: int, steps: int, rounds: int, dtype: torch.dtype, presets: list[str]) -> list[dict]:
    """Seconds of whole walks of n pictures: plain, ours, the published formulation."""
    unet, path, rows = network(name, dtype), leading(1000 // 20)[: steps + 1], []
    x = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(2))

    def walk(ops: Ops) -> Callable[[], Tensor]:
        denoise = speaking(unet, list(range(n)), n, ops)
        return lambda: last(ddim(denoise, x, scaled_linear(), path)).x

    for preset in presets:
        sharing = PRESETS[preset].sharing
        rivals = {
            "plain": walk(TORCH),
            "diaphane": walk(style_aligned(TORCH, [0] * n, sharing)),
            "published": walk(published(n, sharing)),
        }
        ours, theirs = rivals["diaphane"](), rivals["published"]()
        error = float((ours - theirs).std() / theirs.std())
        if not error < (1e-3 if dtype == torch.float32 else 5e-2):
            raise SystemExit(
                f"{name}, {preset}: the two formulations differ by {error:.2e}: no timing is worth printing"
            )
        seconds = interleaved(rivals, rounds, warmup=0 if name == "full" else 1)
        for rival in ("plain", "published"):
            rows.append(
                {
                    "case": f"{name}, {n} pictures of {side}², {steps} steps, {preset}: diaphane / {rival}",
                    "ratio": ratio(seconds["diaphane"], seconds[rival]),
                    "seconds": timing(seconds["diaphane"]).median,
                    "theirs": timing(seconds[rival]).median,
                    "difference": error,
                    "at most": 1.2 if rival == "plain" and preset == "sdxl" and name == "full" else "",
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(),
                }
                | conditions()
            )
    return rows


def peak(unet: UNet, side: int, n: int, way: str) -> float:
    """MiB that the allocator holds at most during one step of n pictures, beyond the network, the texts and x."""
    sharing, dtype = PRESETS["defaults"].sharing, next(unet.parameters()).dtype
    x, t, refs = torch.randn(n, 4, side, side, dtype=dtype), torch.full((n,), 500.0), [0] * n
    if way in ("whole", "published"):
        ops = published(n, sharing) if way == "published" else style_aligned(TORCH, refs, sharing)
        denoise = speaking(unet, list(range(n)), n, ops)
    else:
        denoise = chunked(lambda rows, ops: speaking(unet, rows, n, ops), refs, sharing, size=2, kept=way == "kept")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        assert torch.isfinite(denoise(x, t)).all()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def memory(name: str, side: int, sets: list[int], dtype: torch.dtype) -> list[dict]:
    """Peaks for sets of several sizes."""
    unet, rows = network(name, dtype), []
    for way in ("published", "whole", "chunked", "kept"):
        for n in sets:
            case = f"{name}, peak MiB of a step beyond the network and the texts, {way} set of {n}, {side}²"
            rows.append({"case": case, "MiB": peak(unet, side, n, way)} | conditions())
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--net", choices=tuple(NETS), nargs="+", default=["tiny", "small"])
    parser.add_argument("--presets", choices=tuple(PRESETS), nargs="+", default=["sdxl", "transfer"])
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets", type=int, nargs="*", default=[3, 5, 9, 17], help="of the measure of memory")
    parser.add_argument("--no-times", action="store_true", help="memory only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in () if args.no_times else args.net:
        rows += times(name, args.side, args.n, args.steps, args.rounds, dtype, args.presets)
    rows += memory(args.net[-1], args.side, args.sets, dtype)
    write(rows, args.out / "style_aligned.csv")


if __name__ == "__main__":
    main()

"""ConsiStory against the published schedule written in plain torch: two whole walks, a gather and a call for each row.

python benchmarks/consistory.py out/bench                      # tiny and small networks
python benchmarks/consistory.py out/bench --net full --device cuda --dtype float16 --side 128    # SDXL's size
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diaphane.methods.consistory import places
from diaphane.methods.cost import shares
from diaphane.methods.prompt import Prompt, beside, conditioning
from diaphane.methods.scene import Scene, Settings
from diaphane.methods.story import Story
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import SDXL, UNet
from diaphane.samplers.ddim import ddim, step
from diaphane.samplers.guidance import guide
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from timing import conditions, interleaved, ratio, timing, write
from torch import Tensor

NETS = {
    "tiny": replace(SDXL, channels=(32, 64, 96), depth=(0, 2, 3), mid_depth=3, head_dim=16),
    "small": replace(SDXL, channels=(96, 192, 384), depth=(0, 1, 2), mid_depth=2),
    "full": SDXL,
}
TEXT, GUIDANCE, ANCHORS = 77, 5.0, 2
WAYS = ("published", "diaphane", "early")


def network(name: str, dtype: torch.dtype, device: str) -> UNet:
    """A UNet with random weights of the size that initialisation gives."""
    with torch.device("meta"):
        unet = UNet(NETS[name])
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for p in unet.parameters():
        p.normal_(generator=generator).mul_(p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(0.5)
    return unet


def scene_of(unet: UNet, n: int, device: str) -> Scene:
    """n pictures whose subject is the token at place 5."""
    gen, cfg = torch.Generator().manual_seed(1), unet.cfg
    texts = torch.randn(n, TEXT, cfg.context_dim, generator=gen), torch.randn(n, cfg.pooled_dim or 0, generator=gen)
    positive = Prompt(*(t.to(device) for t in texts))
    return Scene(
        unet=unet, positive=positive, negative=positive.zeros(), tokens=torch.full((n, 1), 5, device=device),
        schedule=scaled_linear(), ids=torch.full((n, cfg.ids), 512.0), guidance=GUIDANCE,
    )  # fmt: skip


class Uniform:
    """The same draws for every contestant."""

    def __init__(self, n: int):
        self.n, self.drawn = n, dict[int, list[Tensor]]()

    def __call__(self, call: int, sizes: list[int]) -> list[Tensor]:
        gen = torch.Generator().manual_seed(call)
        return self.drawn.setdefault(call, [torch.rand(self.n, size, generator=gen) for size in sizes])


def otsu(x: Tensor) -> float:
    """The threshold, on the CPU, by numpy's histogram."""
    flat = x.float().cpu().numpy().ravel()
    if (flat == flat[0]).all():
        return float(flat[0])
    counts, edges = np.histogram(flat, bins=256)
    centres, counts = (edges[1:] + edges[:-1]) / 2, counts.astype(np.float32)
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    left, right = np.cumsum(counts * centres) / below, (np.cumsum((counts * centres)[::-1]) / above[::-1])[::-1]
    return float(centres[np.argmax(below[:-1] * above[1:] * (left[:-1] - right[1:]) ** 2)])


@dataclass
class Published:
    """One walk of the published schedule: what it knows and what it stores."""

    unet: UNet
    n: int
    masks: dict[int, Tensor] = field(default_factory=dict)  # after the dropout
    queries: dict[Site, Tensor] | None = None
    share: float = 0.0
    carried: tuple[Tensor, Tensor, Tensor] | None = None  # nearest pixels, distances (n, n, N), masks
    store: dict[Site, list[Tensor]] = field(default_factory=dict)
    feature: Tensor | None = None
    plain: bool = False

    def ops(self) -> Ops:
        """Verbs in plain torch."""
        where, n = places(self.unet.cfg), self.n

        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
            level, decoder = where.level[site.stage], site.stage.startswith("dec")
            if site.kind == "cross":
                probs = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
                if level == where.maps and not self.plain:
                    self.store.setdefault(site, []).append(probs[-n:].mean(1))
                return probs @ v
            if not decoder or (self.plain and self.queries is None):
                return F.scaled_dot_product_attention(q, k, v)
            if self.plain and self.queries is not None:
                self.queries[site] = q
                return F.scaled_dot_product_attention(q, k, v)
            if self.queries is not None and self.masks:
                q = self.share * self.queries[site] + (1 - self.share) * q
            if not self.masks:
                return F.scaled_dot_product_attention(q, k, v)
            out = []
            for row in range(len(q)):
                half, i = divmod(row, n)
                keep = self.masks[level].clone()
                keep[ANCHORS:] = False
                keep[i] = True
                rows = slice(half * n, half * n + n)
                keys, values = (x[rows].permute(0, 2, 1, 3).flatten(0, 1)[keep.flatten()] for x in (k, v))
                out.append(
                    F.scaled_dot_product_attention(q[row : row + 1], *(x.transpose(0, 1)[None] for x in (keys, values)))
                )
            return torch.cat(out)

        def add(site: Site, x: Tensor, dx: Tensor) -> Tensor:
            here = site.kind == "self" and site.stage != "mid" and where.level[site.stage] == where.fine
            if self.carried is not None and here and not self.plain:
                pixel, distance, mask = self.carried
                rows = dx[-n:]
                for i in range(n):
                    sources = [j for j in range(ANCHORS) if j != i]
                    best, which = distance[i, sources].min(0)
                    at = torch.stack([pixel[i, j] for j in sources]).gather(0, which[None])[0]
                    chosen = mask[i] & (best < otsu(best))
                    picked = torch.tensor(sources, device=dx.device)[which][chosen]
                    rows[i, chosen] = 0.8 * rows[picked, at[chosen]] + 0.2 * rows[i, chosen]
            return x + dx

        def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
            if site.stage == where.feature and not self.plain:
                self.feature = h[-n:].clone()
            return torch.cat([h, skip], 1)

        return replace(TORCH, attend=attend, add=add, join=join)

    def masked(self, side: tuple[int, int], tokens: Tensor) -> dict[int, Tensor]:
        """Subject masks of the last 20 calls."""
        where = places(self.unet.cfg)
        sizes = where.sizes(side)
        maps = torch.stack([m for kept in self.store.values() for m in kept[-20:]]).mean(0)
        found = {}
        for level in where.shared:
            rows = []
            for i in range(self.n):
                one = maps[i, :, tokens[i, 0]].view(1, 1, *sizes[where.maps])
                big = F.interpolate(one, size=sizes[level], mode="bilinear").flatten()
                rows.append(big > otsu(big))
            found[level] = torch.stack(rows)
        return found


def published(scene: Scene, x_T: Tensor, path: list[int], draws: Uniform) -> Tensor:
    """Two complete walks; a plain pass at each of the first steps."""
    unet, n, device = scene.unet, scene.images, x_T.device
    assert scene.negative is not None
    assert scene.ids is not None
    embed = conditioning(unet, beside(scene.negative, scene.positive), torch.cat([scene.ids, scene.ids]))
    where, steps, kind = places(unet.cfg), len(path) - 1, next(unet.parameters()).dtype
    carried, x, settings = None, x_T, Settings()
    for stage in (1, 2):
        x, run, found, feature = x_T, Published(unet, n), {}, None
        ops = run.ops()
        for i, (t, s) in enumerate(pairwise(path)):
            rows, c = torch.cat([x, x]).to(kind), embed(torch.full((2 * n,), float(t), device=device))
            run.queries = None
            if i <= steps // 10:
                run.plain, run.queries = True, {}
                unet(rows, c, ops)
                run.share = 0.9 + (0.81836735 - 0.9) * i / max(steps // 10, 1)
            run.plain = False
            run.carried = carried if stage == 2 and steps // 10 <= i <= steps // 3 else None
            u, e = unet(rows, c, ops).to(x.dtype).chunk(2)
            x, _ = step(x, guide(u, e, GUIDANCE), scene.schedule(t), scene.schedule(s))
            if t == settings.feature_at(path):
                feature = run.feature
            found = run.masked((x.shape[2], x.shape[3]), scene.tokens)
            uniform = draws(i, [found[level].shape[1] for level in where.shared])
            pairs = zip(where.shared, uniform, strict=True)
            run.masks = {level: found[level] & ~(u.to(device) < settings.dropout) for level, u in pairs}
        if stage == 1:
            assert feature is not None
            carried = nearest(feature, found[where.fine])
    return x


def nearest(feature: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest pixels and distances for every ordered pair of pictures."""
    line = torch.tensor([-0.5, 0.0, -0.5], device=feature.device).exp()
    line = line / line.sum()
    weight = (line[:, None] * line).expand(feature.shape[1], 1, 3, 3)
    y = F.normalize(F.conv2d(feature.float(), weight, padding=1, groups=feature.shape[1]).flatten(2), dim=1)
    pixel, distance = [], []
    for i in range(len(y)):
        d = 1 - torch.einsum("ncs,cp->nsp", y, y[i])
        d[~mask] = 2.0
        best, at = d.min(1)
        best[i] = torch.inf
        pixel.append(at)
        distance.append(best)
    return torch.stack(pixel), torch.stack(distance), mask


def contestants(
    name: str, side: int, n: int, steps: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Whole walks to the latents."""
    unet = network(name, dtype, device)
    scene, path = scene_of(unet, n, device), leading(steps, offset=1, end=0)
    x = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(2)).to(device)
    draws = Uniform(n)

    def story(early: bool) -> Tensor:
        settings = replace(settings_for(path), early=early)
        made = Story(scene, lambda: ddim, x, path, settings, draws=draws, anchors=ANCHORS)
        for _ in made.steps():
            pass
        passes[early] = made.tally.passes(shares(unet, (side, side), TEXT))
        return made.x

    return {
        "published": lambda: published(scene, x, path, draws),
        "diaphane": lambda: story(False),
        "early": lambda: story(True),
    }


passes: dict[bool, float] = {}


def settings_for(path: list[int]) -> Settings:
    """The windows of the published schedule at any number of steps."""
    from diaphane.methods.scene import by_steps

    return by_steps(Settings(), path)


def peak(name: str, side: int, n: int, steps: int, way: str, dtype: torch.dtype, device: str) -> float:
    """MiB that a whole walk takes beyond the network, in this process."""
    contestants("tiny", 8, n, 4, dtype, device)[way]()  # what is loaded at the first call is no part of it
    run = contestants(name, side, n, steps, dtype, device)[way]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark begins anew
    run()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A figure of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measured(name: str, args: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    """Seconds, passes and memory of each way, whose pictures are compared first."""
    rivals = contestants(name, args.side, args.n, args.steps, dtype, args.device)
    ours, theirs = rivals["diaphane"](), rivals["published"]()
    error = float((ours - theirs).abs().mean() / theirs.std())
    if not error < (1e-2 if dtype == torch.float32 else 0.5):
        raise SystemExit(f"{name}: the two differ by {error:.2e}: no timing is worth printing")
    seconds = interleaved(rivals, args.rounds, warmup=0)
    rows = []
    for way in WAYS:
        words = ["--peak", way, "--net", name, "--side", str(args.side), "--n", str(args.n), "--steps", str(args.steps)]
        words += ["--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)]
        out = subprocess.run([sys.executable, __file__, ".", *words], capture_output=True, check=True, text=True)
        whole = 2 * (args.steps + args.steps // 10 + 1)
        rows.append(
            {
                "case": f"{name}, {args.n} pictures of {args.side}², {args.steps} steps: {way}",
                "passes": {"published": whole, "diaphane": passes.get(False), "early": passes.get(True)}[way],
                "seconds": timing(seconds[way]).median,
                "ratio": ratio(seconds[way], seconds["published"]),
                "at most": 0.8 if way == "diaphane" else "",
                "MiB": json.loads(out.stdout),
                "difference": error if way == "diaphane" else "",
                "dtype": args.dtype,
                "threads": args.threads,
            }
            | conditions()
        )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--net", choices=tuple(NETS), nargs="+", default=["tiny", "small"])
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=WAYS, help="print that and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.peak:
        print(json.dumps(peak(args.net[0], args.side, args.n, args.steps, args.peak, dtype, args.device)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.net:
        rows += measured(name, args, dtype)
    write(rows, args.out / "consistory.csv")


if __name__ == "__main__":
    main()

"""A small network that reads a picture's factors, to judge samples and injections where the truth is known.

python examples/shapes/reader.py runs/shapes/reader.safetensors
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import world
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

HEADS = {"kind": 6, "pattern": 4, "texture": 3, "place": 2, "solid": 3, "ground": 3, "light": 2}


class Reading(NamedTuple):
    """What a picture shows: logits of the three choices, and the continuous factors."""

    kind: Tensor  # (B, 6)
    pattern: Tensor  # (B, 4)
    texture: Tensor  # (B, 3)
    place: Tensor  # (B, 2) in half sides
    solid: Tensor  # (B, 3) the object's colour, RGB in [0, 1]
    ground: Tensor  # (B, 3) the mean of the two ground colours
    light: Tensor  # (B, 2) cosine and sine of the light's direction


class Reader(nn.Module):
    """Five convolutions, then one linear layer for all factors.  (B, 3, 32, 32) in [-1, 1] -> Reading."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [5, width, width, 2 * width, 2 * width, 3 * width]  # the picture, and where each pixel is
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in channels[1:])
        self.heads = nn.Linear(3 * width * 16, sum(HEADS.values()))

    def forward(self, x: Tensor) -> Reading:
        axis = torch.linspace(-1, 1, x.shape[-1], device=x.device).expand(len(x), 1, x.shape[-1], -1)
        x = torch.cat([x, axis, axis.transpose(2, 3)], 1)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.silu(norm(conv(x)))
            if i in (0, 2, 3):
                x = F.max_pool2d(x, 2)
        return Reading(*self.heads(x.flatten(1)).split(list(HEADS.values()), dim=1))


def truth(scene: world.Scene) -> Reading:
    """The same factors from the scene itself; choices as indices (B,)."""
    ground = scene.palette[:, 1:].mean(1)
    light = torch.stack([scene.light.cos(), scene.light.sin()], 1)
    return Reading(scene.kind, scene.pattern, scene.texture, scene.place, scene.palette[:, 0], ground, light)


def loss(read: Reading, true: Reading) -> Tensor:
    """Cross-entropies of the choices and squared errors of the rest."""
    choices = sum(F.cross_entropy(getattr(read, name), getattr(true, name)) for name in ("kind", "pattern", "texture"))
    rest = ("place", "solid", "ground", "light")
    return choices + sum(10 * F.mse_loss(getattr(read, name), getattr(true, name)) for name in rest)


def worn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with some noise and softness, so that imperfect ones are read too."""
    level = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
    soft = 0.5 * torch.rand(len(x), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(x, blurred, soft) + level * torch.randn(x.shape, generator=generator)


def load(path: Path) -> Reader:
    """A trained reader."""
    reader = Reader()
    reader.load_state_dict(load_file(path))
    return reader.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    reader = Reader()
    optimiser = torch.optim.Adam(reader.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=args.steps)
    generator = torch.Generator().manual_seed(1)
    for _ in (bar := trange(args.steps)):
        scene = world.sample(args.batch, generator)
        total = loss(reader(worn(world.render(scene), generator)), truth(scene))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        decay.step()
        bar.set_postfix(loss=f"{total.item():.3f}")
    args.file.parent.mkdir(parents=True, exist_ok=True)
    save_file(reader.state_dict(), args.file)

    scene = world.sample(1024, torch.Generator().manual_seed(2))
    with torch.no_grad():
        read, true = reader.eval()(world.render(scene)), truth(scene)
    for name in HEADS:
        a, b = getattr(read, name), getattr(true, name)
        right = f"{(a.argmax(1) == b).float().mean():.3f} right" if b.ndim == 1 else f"{(a - b).abs().mean():.3f} off"
        print(f"{name:8} {right}")
    print(f"wrote {args.file}")


if __name__ == "__main__":
    main()

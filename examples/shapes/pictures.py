"""Draw the pictures that ship beside the embedded model: contents and styles it was not trained on.

    python examples/shapes/pictures.py weights/embedded/shapes/pictures

Contents: the six kinds of object on striped and checkered grounds, each in another place.  Styles: a disc in the middle
of a plain ground, in palettes far apart and in all textures.  So a result shows at a glance whose content it has.
The halves are masks for local mixing.
"""

import argparse
import math
from pathlib import Path

import torch
import world
from PIL import Image
from torch import Tensor

SEED = 20_000_003  # far from the seeds of training
PLACES = ((-0.2, -0.15), (0.22, 0.1), (0.0, 0.2), (-0.25, 0.2), (0.15, -0.2), (0.2, 0.22))
PATTERNS = ("checker", "vertical", "horizontal", "checker", "vertical", "horizontal")
HUES = (0.02, 0.12, 0.33, 0.5, 0.62, 0.83)  # of the styles' grounds: red, yellow, green, cyan, blue, magenta


def contents(generator: torch.Generator) -> world.Scene:
    """Every kind once, on a patterned ground, smooth."""
    return world.sample(6, generator)._replace(
        kind=torch.arange(6),
        place=torch.tensor(PLACES),
        size=torch.full((6,), 1.1),
        pattern=torch.tensor([world.PATTERNS.index(name) for name in PATTERNS]),
        texture=torch.zeros(6, dtype=torch.long),
    )


def styles(generator: torch.Generator) -> world.Scene:
    """A disc in the middle of a plain ground, in six palettes and all textures."""
    ground = torch.tensor(HUES)
    strong, bright = torch.full((6,), 0.85), torch.full((6,), 0.9)
    palette = torch.stack(
        [
            world.hsv(ground + 0.5, strong, bright),
            world.hsv(ground, torch.full((6,), 0.5), bright),
            world.hsv(ground, torch.full((6,), 0.7), torch.full((6,), 0.45)),
        ],
        dim=1,
    )
    return world.sample(6, generator)._replace(
        kind=torch.zeros(6, dtype=torch.long),
        place=torch.zeros(6, 2),
        size=torch.ones(6),
        pattern=torch.zeros(6, dtype=torch.long),
        palette=palette,
        texture=torch.tensor([0, 1, 2, 1, 2, 0]),
        light=torch.arange(6) * math.pi / 3,
    )


def save(pictures: Tensor, folder: Path, name: str) -> None:
    """One PNG a picture, numbered from 1."""
    for i, row in enumerate(pictures):
        pixels = ((row + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{name}-{i + 1}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    save(world.render(contents(generator)), folder, "content")
    save(world.render(styles(generator)), folder, "style")
    for name, box in {"left": (0, 0, 16, 32), "right": (16, 0, 32, 32)}.items():
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(folder / f"mask-{name}.png")
    print(f"wrote 6 contents, 6 styles and 2 masks to {folder}")


if __name__ == "__main__":
    main()

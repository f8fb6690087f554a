"""The shapes world: pictures of one object on a ground, drawn from factors that are all known exactly.

Content (where and what): kind, place, size and rotation of the object, pattern of the ground.
Style (how it looks): palette of three colours, surface texture, direction of the light.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("disc", "square", "triangle", "ring", "cross", "crescent")
PATTERNS = ("plain", "vertical", "horizontal", "checker")
TEXTURES = ("smooth", "hatched", "dotted")


class Scene(NamedTuple):
    """A batch of pictures as their factors.  Lengths are in units of half the picture's side."""

    kind: Tensor  # (B,)   index into KINDS
    place: Tensor  # (B, 2) centre of the object (x to the right, y down), each in [-0.35, 0.35]
    size: Tensor  # (B,)   scale of the object, in [0.8, 1.2]
    angle: Tensor  # (B,)   rotation in radians, in [-0.5, 0.5]
    pattern: Tensor  # (B,)   index into PATTERNS
    phase: Tensor  # (B,)   of the pattern, in [0, 2 pi)
    palette: Tensor  # (B, 3, 3) object, light ground, dark ground; RGB in [0, 1]
    texture: Tensor  # (B,)   index into TEXTURES
    light: Tensor  # (B,)   direction the light comes from, in [0, 2 pi)

    def take(self, rows: Tensor | slice | list[int]) -> "Scene":
        """The same factors for some rows only."""
        return Scene(*(factor[rows] for factor in self))


def hsv(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Hue (in turns, periodic), saturation and value, each (B,) -> RGB (B, 3)."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def sample(n: int, generator: torch.Generator | None = None) -> Scene:
    """n scenes with independent, uniformly drawn factors."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def choice(options: tuple[str, ...]) -> Tensor:
        return torch.randint(len(options), (n,), generator=generator)

    hue = uniform(0, 1)
    palette = torch.stack(
        [
            hsv(hue + uniform(0.3, 0.7), uniform(0.7, 1.0), uniform(0.6, 1.0)),
            hsv(hue, uniform(0.2, 0.6), uniform(0.75, 0.95)),
            hsv(hue + uniform(-0.08, 0.08), uniform(0.4, 0.8), uniform(0.3, 0.55)),
        ],
        dim=1,
    )
    return Scene(
        kind=choice(KINDS),
        place=uniform(-0.35, 0.35, 2),
        size=uniform(0.8, 1.2),
        angle=uniform(-0.5, 0.5),
        pattern=choice(PATTERNS),
        phase=uniform(0, 2 * math.pi),
        palette=palette,
        texture=choice(TEXTURES),
        light=uniform(0, 2 * math.pi),
    )


def distance(kind: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (roughly) to the object's outline, negative inside.  (B,), 2 x (B, H, W) -> (B, H, W)."""
    r = torch.hypot(x, y)
    every = torch.stack(
        [
            r - 0.48,
            torch.maximum(x.abs(), y.abs()) - 0.42,
            torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.3,
            (r - 0.42).abs() - 0.13,
            torch.minimum(torch.maximum(x.abs() - 0.55, y.abs() - 0.17), torch.maximum(y.abs() - 0.55, x.abs() - 0.17)),
            torch.maximum(r - 0.52, 0.42 - torch.hypot(x - 0.26, y)),
        ]
    )
    return every.gather(0, kind.view(1, -1, 1, 1).expand(1, *x.shape))[0]


def _ground(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """Share of the light ground colour at each pixel.  (B, H, W) -> (B, H, W)."""
    across = torch.sin(10 * x + scene.phase[:, None, None])
    along = torch.sin(10 * y + scene.phase[:, None, None])
    waves = torch.stack([torch.zeros_like(x), across, along, across * along])
    wave = waves.gather(0, scene.pattern.view(1, -1, 1, 1).expand(1, *x.shape))[0]
    return torch.sigmoid(8 * wave)


def _texture(scene: Scene, side: int) -> Tensor:
    """Brightness of the surface at each pixel, around 0.  -> (B, side, side)."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    hatched = ((row + column) % 4 < 2).float() * 2 - 1
    dotted = ((row % 4 < 2) & (column % 4 < 2)).float() * 2 - 0.5
    return torch.stack([torch.zeros(side, side), hatched, dotted])[scene.texture]


def mask(scene: Scene, side: int = 32) -> Tensor:
    """How much of each pixel the object covers.  -> (B, 1, side, side) in [0, 1]."""
    x, y = _grid(len(scene.kind), side)
    x, y = ((p - scene.place[:, i, None, None]) / scene.size[:, None, None] for i, p in enumerate((x, y)))
    cos, sin = scene.angle.cos()[:, None, None], scene.angle.sin()[:, None, None]
    return torch.sigmoid(-side * distance(scene.kind, x * cos + y * sin, y * cos - x * sin))[:, None]


def _grid(n: int, side: int) -> tuple[Tensor, Tensor]:
    centres = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x.expand(n, -1, -1), y.expand(n, -1, -1)


def render(scene: Scene, side: int = 32) -> Tensor:
    """Draw the scenes.  -> (B, 3, side, side) in [-1, 1]."""
    x, y = _grid(len(scene.kind), side)
    solid, light, dark = (scene.palette[:, i, :, None, None] for i in range(3))
    picture = torch.lerp(dark, light, _ground(scene, x, y)[:, None])
    picture = torch.lerp(picture, solid, mask(scene, side))
    lit = x * scene.light.cos()[:, None, None] + y * scene.light.sin()[:, None, None]
    shade = 1 + 0.2 * lit + 0.1 * _texture(scene, side)
    return ((picture * shade[:, None]).clamp(0, 1)) * 2 - 1


def sheet(pictures: Tensor, columns: int, scale: int = 4):
    """Pictures (N, 3, H, W) in [-1, 1] as one Pillow image, row by row."""
    from PIL import Image

    n, _, _, w = pictures.shape
    pad = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, -n % columns), value=1.0)
    grid = pad.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).reshape(-1, columns * w, 3)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)

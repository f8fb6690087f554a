"""Pictures with what was found in them: masks laid over them, and matches drawn as lines between two."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

TINT = (255, 96, 32)


def mask_picture(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask (N,) of `size`, (height, width), in the tint of `overlaid` on black: either is seen on white paper."""
    pixels = mask.detach().cpu().reshape(*size, 1).numpy()
    return Image.fromarray(np.where(pixels, TINT, 0).astype(np.uint8))


def overlaid(picture: Image.Image, mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A picture, tinted where the mask (N,) of `size` is, and darker elsewhere."""
    pixels = mask.detach().cpu().reshape(size).numpy().astype(np.uint8) * 255
    inside = Image.fromarray(pixels).resize(picture.size, Image.Resampling.NEAREST)
    base = picture.convert("RGB")
    lit = Image.blend(base, Image.new("RGB", picture.size, TINT), 0.3)
    dark = Image.blend(base, Image.new("RGB", picture.size, (0, 0, 0)), 0.55)
    return Image.composite(lit, dark, inside)


def matched(
    target: Image.Image,
    source: Image.Image,
    pixel: Tensor,
    chosen: Tensor,
    size: tuple[int, int],
    *,
    count: int = 32,
) -> Image.Image:
    """Target and source side by side, lines from some of the chosen pixels to their matches.

    pixel int64 (N,) of the source for each pixel of the target, chosen bool (N,), of `size` pixels, (height, width).
    """
    gap = 8
    canvas = Image.new("RGB", (target.width + gap + source.width, max(target.height, source.height)), (255, 255, 255))
    canvas.paste(target.convert("RGB"), (0, 0))
    canvas.paste(source.convert("RGB"), (target.width + gap, 0))
    draw, where = ImageDraw.Draw(canvas), chosen.detach().cpu().nonzero().flatten().tolist()
    step = max(1, -(-len(where) // count))
    thick = max(1, target.height // 256)
    for i, p in enumerate(where[::step]):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618 % 1, 0.9, 1.0)
        colour = (int(255 * red), int(255 * green), int(255 * blue))
        a, b = centre(p, size, target.size), centre(int(pixel[p]), size, source.size)
        b = (b[0] + target.width + gap, b[1])
        draw.line([a, b], fill=colour, width=thick)
        for x, y in (a, b):
            draw.ellipse([x - 2 * thick, y - 2 * thick, x + 2 * thick, y + 2 * thick], fill=colour)
    return canvas


def centre(p: int, size: tuple[int, int], picture: Sequence[int]) -> tuple[float, float]:
    """The middle of pixel p of a grid (height, width) in a picture (width, height)."""
    row, column = divmod(p, size[1])
    return (column + 0.5) / size[1] * picture[0], (row + 0.5) / size[0] * picture[1]

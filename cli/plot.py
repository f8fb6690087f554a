"""A line plot drawn with Pillow."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .sheet import GREY, INK, PAPER, font, width

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (140, 86, 75))
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 70, 190, 50, 60  # pixels: the whole, and what surrounds the axes
SHARP = 2  # drawn so many times larger, then reduced


def plot(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    across: str,
    along: str,
    low: float = -1.0,
    high: float = 1.0,
) -> Image.Image:
    """Named lines over x, y in low ... high, the first one broad; a nan leaves a gap."""
    canvas = Image.new("RGB", (WIDE * SHARP, HIGH * SHARP), PAPER)
    draw, letters, big = ImageDraw.Draw(canvas), font(13 * SHARP), font(17 * SHARP)
    left, right, top, bottom = LEFT * SHARP, (WIDE - RIGHT) * SHARP, TOP * SHARP, (HIGH - BOTTOM) * SHARP
    first, span = min(x), (max(x) - min(x)) or 1.0

    def place(u: float, v: float) -> tuple[float, float]:
        v = min(max(v, low), high)
        return left + (u - first) / span * (right - left), bottom - (v - low) / (high - low) * (bottom - top)

    for i in range(9):
        level = low + (high - low) * i / 8
        y = place(first, level)[1]
        draw.line([(left, y), (right, y)], fill=INK if abs(level) < 1e-9 else (225, 225, 228), width=SHARP)
        text = f"{level:.2f}".rstrip("0").rstrip(".") or "0"
        draw.text((left - 8 * SHARP - width(text, letters), y - 9 * SHARP), text, GREY, font=letters)
    gap = next(g for g in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if g >= span / 7 or g == 1000)
    for at in range(math.ceil(first / gap) * gap, math.floor(first + span) + 1, gap):
        u, text = place(at, low)[0], str(at)
        draw.line([(u, bottom), (u, bottom + 5 * SHARP)], fill=INK, width=SHARP)
        draw.text((u - width(text, letters) / 2, bottom + 8 * SHARP), text, GREY, font=letters)
    draw.rectangle([left, top, right, bottom], outline=INK, width=SHARP)
    for i, (name, values) in enumerate(lines.items()):
        colour, previous = COLOURS[i % len(COLOURS)], None
        for u, v in sorted(zip(x, values, strict=True)):
            here = None if math.isnan(v) else place(u, v)
            if here and previous:
                draw.line([previous, here], fill=colour, width=(2 if i else 6) * SHARP)
            previous = here
        y = top + i * 22 * SHARP
        draw.line(
            [(right + 14 * SHARP, y + 9 * SHARP), (right + 38 * SHARP, y + 9 * SHARP)], fill=colour, width=3 * SHARP
        )
        draw.text((right + 44 * SHARP, y), name, INK, font=letters)
    draw.text((left, 14 * SHARP), title, INK, font=big)
    draw.text(((left + right - width(across, letters)) / 2, bottom + 30 * SHARP), across, INK, font=letters)
    draw.text((4 * SHARP, top - 22 * SHARP), along, INK, font=letters)
    return canvas.resize((WIDE, HIGH), Image.Resampling.BOX)

"""Contact sheets: pictures in labelled rows on white."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Row = Sequence[Image.Image | None]
INK, GREY, PAPER = (20, 20, 24), (110, 110, 118), (255, 255, 255)
SIZE, GAP = 14, 4  # of the letters and between pictures, in pixels


def font(size: int = SIZE) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def shown(picture: Image.Image, edge: int) -> Image.Image:
    """A picture at a height of `edge` pixels: small ones in whole multiples, so that every pixel stays sharp."""
    factor = edge / picture.height
    kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BILINEAR
    size = (round(picture.width * factor), edge)
    return picture.convert("RGB").resize(size, kind)


def edge_of(pictures: Sequence[Image.Image | None]) -> int:
    """The height at which pictures are shown: 96 ... 191 pixels for small ones, as they are up to 256."""
    tallest = max(picture.height for picture in pictures if picture is not None)
    return tallest * max(1, math.ceil(96 / tallest)) if tallest < 256 else 256


def sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    note: str = "",
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    edge: int | None = None,
) -> Image.Image:
    """Rows of pictures (None: an empty place) labelled above and to the left; texts may have lines."""
    edge = edge or edge_of([picture for row in rows for picture in row])
    wide = max(edge, *(round(p.width * edge / p.height) for row in rows for p in row if p is not None))
    letters, big = font(), font(SIZE + 4)
    left = max((width(label, letters) for label in labels), default=0) + (2 * GAP if labels else 0)
    head = (lines(title) * (SIZE + 10) if title else 0) + (lines(note) * (SIZE + 4) + GAP if note else 0)
    names = (max(map(lines, columns)) * (SIZE + 4) + GAP) if columns else 0
    widest = max(max(len(row) for row in rows) * (wide + GAP), width(title, big) - left, width(note, letters) - left)
    canvas = Image.new("RGB", (left + widest + 2 * GAP, head + names + len(rows) * (edge + GAP) + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((GAP, GAP), title, INK, font=big)
    draw.multiline_text((GAP, GAP + (lines(title) * (SIZE + 10) if title else 0)), note, GREY, font=letters, spacing=4)
    for j, name in enumerate(columns):
        draw.multiline_text((left + GAP + j * (wide + GAP), GAP + head), name, INK, font=letters, spacing=4)
    for i, row in enumerate(rows):
        top = GAP + head + names + i * (edge + GAP)
        if i < len(labels):
            middle = top + (edge - lines(labels[i]) * (SIZE + 4)) // 2
            draw.multiline_text((GAP, middle), labels[i], INK, font=letters, spacing=4)
        for j, picture in enumerate(row):
            if picture is not None:
                canvas.paste(shown(picture, edge), (left + GAP + j * (wide + GAP), top))
    return canvas


def grid(pictures: Sequence[Image.Image], *, title: str = "", columns: int = 8) -> Image.Image:
    """Pictures in reading order."""
    columns = min(columns, len(pictures))
    return sheet([pictures[i : i + columns] for i in range(0, len(pictures), columns)], title=title)


def stacked(parts: Sequence[Image.Image], space: int = 16) -> Image.Image:
    """Sheets one below the other."""
    height = sum(part.height + space for part in parts)
    canvas = Image.new("RGB", (max(part.width for part in parts), height), PAPER)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height + space
    return canvas


def side_by_side(parts: Sequence[Image.Image], space: int = 32) -> Image.Image:
    """Sheets in columns."""
    canvas = Image.new("RGB", (sum(part.width + space for part in parts), max(part.height for part in parts)), PAPER)
    left = space // 2
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + space
    return canvas


def headed(picture: Image.Image, title: str, text: str) -> Image.Image:
    """A sheet under a heading and some lines of text."""
    big, letters = font(SIZE + 8), font(SIZE + 2)
    top = SIZE + 24 + lines(text) * (SIZE + 8) + 8
    wide = max(picture.width, width(title, big) + 2 * GAP, width(text, letters) + 2 * GAP)
    canvas = Image.new("RGB", (wide, top + picture.height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 4), title, INK, font=big)
    draw.multiline_text((GAP, SIZE + 24), text, GREY, font=letters, spacing=6)
    canvas.paste(picture, (0, top))
    return canvas


def width(text: str, letters: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    """Pixels that a text takes."""
    return max((math.ceil(letters.getlength(row)) for row in text.splitlines()), default=0)


def lines(text: str) -> int:
    """How many lines a text has."""
    return text.count("\n") + 1

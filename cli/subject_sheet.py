"""What comes of `diaphane consistory` besides its pictures: a line about what it took, and a sheet of what it saw."""

import argparse
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..methods.anchors import Kept
from ..methods.cast import Masks, Tally
from ..methods.dift import Matches
from .marked import mask_picture, matched, overlaid
from .sheet import edge_of, sheet, stacked
from .sheet import shown as shown_at

SHOWN = 8  # pictures with their masks on a sheet


@dataclass
class Drawn:
    """What came of a batch."""

    pictures: Tensor  # (B, 3, H, W)
    rows: list[int]
    masks: list[list[Masks]]
    matches: Matches | None
    chosen: Tensor | None
    sources: list[int]
    apart: bool  # the anchors are not among the pictures
    fine: int
    sizes: dict[int, tuple[int, int]]
    tally: Tally
    images: int
    kept: Kept | None

    def light(self) -> "Drawn":
        """Without pictures and what is kept."""
        return replace(self, pictures=self.pictures[:0], kept=None)


def report(found: Sequence[Drawn], part: Tally, steps: int | None, seconds: float, device: torch.device) -> str:
    """Passes of the network, those of the published schedule of so many steps, time and peak memory, in a line."""
    images = sum(one.images for one in found)
    passes = sum(one.tally.passes(part) * one.images for one in found) / images
    published = "" if steps is None else f" (published: {2 * (steps + steps // 10 + 1)})"
    if device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated(device))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
    return (
        f"{images} pictures in {passes:.1f} passes each of the UNet{published}, {seconds:.1f} s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )


def sheet_of(args: argparse.Namespace, pictures: Sequence[Image.Image], found: Sequence[Drawn]) -> Image.Image:
    """The pictures, their masks at the end and at some steps, and matches with an anchor."""
    shown = list(pictures[:SHOWN])
    rows: list[list[Image.Image | None]] = [list(shown)]
    labels = ["picture"]
    first = found[0] if found else None
    if first is not None and len(first.rows) <= len(shown):
        real = first.images - len(first.rows)
        shown_rows = [real + i for i in range(len(first.rows))]
        last = first.masks[0][-1][first.fine]
        rows.append([overlaid(shown[i], last[r], first.sizes[first.fine]) for i, r in enumerate(shown_rows)])
        labels.append("subject")
        calls = len(first.masks[0])
        for call in sorted({round(j * (calls - 1) / 4) for j in range(5)}):
            masks = first.masks[0][call][first.fine]
            rows.append([mask_picture(masks[r], first.sizes[first.fine]) for r in shown_rows])
            labels.append(f"after {call + 1}")
    title = f"ConsiStory, {len(pictures)} pictures of {', '.join(args.subject)}, {args.steps} steps"
    note = "second row: the masks at the end of the first walk; below: after so many calls of the network"
    parts = [sheet(rows, title=title, note=note if len(rows) > 1 else "", labels=labels if len(rows) > 1 else ())]
    parts += list(lines_of(shown, first)) if first is not None else []
    return stacked(parts) if len(parts) > 1 else parts[0]


def lines_of(shown: Sequence[Image.Image], first: Drawn) -> Iterator[Image.Image]:
    """Each picture of the first batch beside the first source that it has matches with."""
    if first.matches is None or first.chosen is None or first.apart or len(first.rows) > len(shown):
        return
    size, edge = first.sizes[first.fine], edge_of(shown)
    drawn = []
    for i in range(len(first.rows)):
        for k, j in enumerate(first.sources):
            if bool(first.matches.distance[i, k].isfinite().any()) and j < len(shown):
                pair = shown_at(shown[i], edge), shown_at(shown[j], edge)
                drawn.append(matched(*pair, first.matches.pixel[i, k], first.chosen[i], size))
                break
    if drawn:
        yield sheet(
            [drawn[k : k + 2] for k in range(0, len(drawn), 2)], title="matches: a picture, an anchor", edge=edge
        )

"""MultiDiffusion (Bar-Tal et al. 2023): pictures of any size from a network of one, by overlapping windows.

Each window of x is denoised by itself, and where windows overlap their predictions are averaged (their eq. 5, all
weights 1).  The authors average what a DDIM step makes of each window; with eta = 0 a step is linear in eps at an x
that windows share, so the mean of eps gives the same, and serves every other sampler too.

With StyleAligned every window has a reference of a window's size beside it (Hertz et al. 2024, figure 12); with several
references, each window the nearest.  The authors' code has one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers.parameterisation import Denoise
from .style_reference import Trajectory


class View(NamedTuple):
    """A window: rows top ... bottom - 1, columns left ... right - 1, both modulo the size."""

    top: int
    bottom: int
    left: int
    right: int


class Batch(NamedTuple):
    """What one call of the network is about."""

    references: list[int]  # which references, the first rows of the batch
    views: list[int]  # which windows, the rows after them
    refs: list[int]  # for `style_aligned`: the row of each row's reference; its own for a reference


Make = Callable[[Batch], Denoise]


def windows(height: int, width: int, window: int = 64, stride: int = 8, *, circular: bool = False) -> list[View]:
    """Windows of `window` latents every `stride`, row by row; no larger than the picture.

    `circular` wraps columns around, for pictures whose ends meet.  Where the stride does not come out even, a last
    window ends with the picture; the authors leave the rest unpainted.  A ValueError is raised for a stride that would
    leave gaps.
    """
    if not (1 <= stride <= window and height >= 1 and width >= 1):
        raise ValueError(f"the stride lies in 1 ... window, or windows would leave gaps; got {stride} and {window}")
    tall, wide = min(window, height), min(window, width)
    tops = starts(height, tall, stride)
    lefts = list(range(0, width, stride)) if circular and width > wide else starts(width, wide, stride)
    return [View(top, top + tall, left, left + wide) for top in tops for left in lefts]


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side."""
    found = list(range(0, size - window + 1, stride))
    return found if found[-1] == size - window else [*found, size - window]


def nearest(views: Sequence[View], places: Sequence[float], width: int, *, circular: bool = False) -> list[int]:
    """For each window the reference that is nearest to its middle; `places` of references are shares of the width.

    0 is the left end, 1 the right; `spread` gives even ones.  Of two equally near the first.
    """
    if not places:
        raise ValueError("windows have no reference to be near to: give at least one place")

    def away(view: View, place: float) -> float:
        gap = abs(((view.left + view.right) / 2 / width) - place)
        return min(gap % 1, 1 - gap % 1) if circular else gap

    return [min(range(len(places)), key=lambda i: round(away(view, places[i]), 9)) for view in views]


def spread(n: int) -> list[float]:
    """Places of n references side by side."""
    return [(i + 0.5) / n for i in range(n)]


def multidiffusion(
    make: Make,
    views: Sequence[View],
    *,
    batch: int = 1,
    references: Trajectory | None = None,
    assigned: Sequence[int] | None = None,
) -> Denoise:
    """x (1, C, H, W), any size -> eps, by windows of it, `batch` at a time.

    `make` gives the network of a batch: prompts, ids and `style_aligned(ops, batch.refs)` for its rows.  `references`
    are where R pictures of a window's size are at each step (`style_reference.drawn` for those drawn themselves),
    `assigned` which one each window has, by default the first.  Without references it is MultiDiffusion as it was.
    A ValueError is raised for windows that leave latents of x uncovered, and for assignments that do not fit.
    """
    if batch < 1 or not views:
        raise ValueError(f"windows are denoised at least one at a time, and there is one; got {batch}, {len(views)}")
    held = 0 if references is None else references.latents.shape[1]
    whose = list(assigned or [0] * len(views))
    if held and (len(whose) != len(views) or not all(0 <= i < held for i in whose)):
        raise ValueError(f"each of {len(views)} windows has a reference 0 ... {held - 1}; got {whose}")
    calls = []
    for start in range(0, len(views), batch):
        some = list(range(start, min(start + batch, len(views))))
        used = sorted({whose[i] for i in some}) if held else []
        ahead = len(used)
        refs = [*range(ahead), *(used.index(whose[i]) if held else j for j, i in enumerate(some))]
        about = Batch(used, some, refs)
        calls.append((about, make(about)))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError(f"windows are of one picture at a time; got {len(x)}")
        count, total = overlaps(views, *x.shape[2:]).to(x), torch.zeros_like(x)
        for about, denoise in calls:
            rows = [cut(x, views[i]) for i in about.views]
            if references is not None:
                rows = [references.at(t).to(x)[about.references], *rows]
            part = torch.cat(rows)
            eps = denoise(part, t[:1].expand(len(part)))[len(about.references) :]
            for i, one in zip(about.views, eps.split(1), strict=True):
                total = put(total, views[i], one)
        return total / count

    return predict


def overlaps(views: Sequence[View], height: int, width: int) -> Tensor:
    """How many windows cover each latent, (height, width).  ValueError: one sticks out, or none covers one."""
    count = torch.zeros(height, width)
    for view in views:
        if view.bottom > height or view.right - view.left > width:
            raise ValueError(f"{view} is no window of {height} x {width} latents: make windows of that size")
        count[view.top : view.bottom, columns(view, width, count.device)] += 1
    if not covered(views, height, width):
        raise ValueError(f"the windows leave parts of {height} x {width} latents uncovered: make windows of that size")
    return count


def covered(views: Sequence[View], height: int, width: int) -> bool:
    """Whether every latent is in some window; told from their edges alone, so that one graph holds a whole step."""
    edges = sorted({0, *(y for view in views for y in (view.top, view.bottom) if y < height)})
    for y in edges:
        spans: list[tuple[int, int]] = []
        for view in views:
            if view.top <= y < view.bottom:
                left, right = view.left % width, view.left % width + view.right - view.left
                spans += [(left, right)] if right <= width else [(left, width), (0, right - width)]
        reached = 0
        for left, right in sorted(spans):
            if left > reached:
                return False
            reached = max(reached, right)
        if reached < width:
            return False
    return True


def columns(view: View, width: int, device: torch.device) -> Tensor:
    """The columns of a window, modulo the width."""
    return torch.arange(view.left, view.right, device=device) % width


def cut(x: Tensor, view: View) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w)."""
    return x[:, :, view.top : view.bottom].index_select(3, columns(view, x.shape[3], x.device))


def put(x: Tensor, view: View, part: Tensor) -> Tensor:
    """x with a window added where it was cut."""
    rows = torch.arange(view.top, view.bottom, device=x.device)[:, None]
    everywhere = (slice(None), slice(None), rows, columns(view, x.shape[3], x.device)[None])
    added = torch.zeros_like(x)
    added[everywhere] = part.to(x)
    return x + added

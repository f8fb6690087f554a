"""Correspondences between pictures from a diffusion feature (DIFT, Tang et al. 2023), and what is carried along them.

The feature is what the first decoder block hands on at t = 261.  For every pixel of a target the nearest by cosine is
sought among the subject's pixels of each source; Otsu's threshold on the distances says which matches are trusted; and
there the source's self-attention output is mixed in (ConsiStory, Tewel et al. 2024, section 3.3):

    x_t(p) <- (1 - alpha) x_t(p) + alpha x_s(src(p))   where the target's mask holds and dist(p) < tau        (eq. 5, 6)

The paper does this for all pictures at once.  The authors' code goes through them in order and in place, so that a
later picture reads rows that were altered already; `waves` has both orders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.match import match
from .subject_masks import Size, otsu


def smoothed(feature: Tensor) -> Tensor:
    """A Gaussian of 3 x 3 with sigma 1 over each channel, zeros beyond the edge: the code's.  (B, C, H, W)."""
    line = torch.tensor([-0.5, 0.0, -0.5], device=feature.device, dtype=feature.dtype).exp()
    line = line / line.sum()
    weight = (line[:, None] * line).expand(feature.shape[1], 1, 3, 3)
    return F.conv2d(feature, weight, padding=1, groups=feature.shape[1])


class Matches(NamedTuple):
    """For every pixel of B targets the nearest pixel of each of S sources."""

    pixel: Tensor  # int64 (B, S, N)  a pixel of the source
    distance: Tensor  # (B, S, N)     1 - cosine; 2 where a source has no subject; inf where it is not to be read


def matches(source: Tensor, mask: Tensor, target: Tensor, size: Size, sees: Tensor) -> Matches:
    """Nearest pixels at `size`; source (S, C, H, W) and its mask bool (S, N), target (B, C, H, W), sees bool (B, S)."""
    src, tgt = (
        F.interpolate(
            y.detach().to(torch.promote_types(y.dtype, torch.float32)), size=size, mode="bilinear", align_corners=False
        )
        .flatten(2)
        .transpose(1, 2)
        for y in (source, target)
    )
    index, cosine = match(src, tgt, mask)
    return Matches(index, torch.where(sees[..., None], 1 - cosine, torch.inf))


class Plan(NamedTuple):
    """Which pixel takes what: the same for every layer and step."""

    row: Tensor  # int64 (B, N)    image * N + pixel of the source
    chosen: Tensor  # bool (B, N)
    threshold: Tensor  # (B,)      tau


def plan(found: Matches, mask: Tensor, images: Sequence[int] | None = None) -> Plan:
    """The best source of every pixel, trusted inside the target's mask, bool (B, N), where it is nearer than tau.

    `images` are the sources' places in the batch, where they are not its first pictures.
    """
    best = found.distance.argmin(1, keepdim=True)
    distance = found.distance.gather(1, best)[:, 0]
    image = best[:, 0] if images is None else torch.tensor(images, device=mask.device)[best[:, 0]]
    row = image * mask.shape[1] + found.pixel.gather(1, best)[:, 0]
    threshold = otsu(distance)
    return Plan(row, mask & (distance < threshold[:, None]), threshold)


def waves(sees: Sequence[Sequence[bool]], *, sequential: bool = True) -> list[tuple[int, int]]:
    """Ranges of images that may be altered at once: none reads an earlier one of its range.

    Not `sequential`, all of them are one range, and each reads what the others were before.
    """
    edges = [0]
    for i, row in enumerate(sees):
        if sequential and any(row[edges[-1] : i]):
            edges.append(i)
    return list(zip(edges, [*edges[1:], len(sees)], strict=True))


def injected(
    x: Tensor, told: Plan, order: Sequence[tuple[int, int]], alpha: float = 0.8, source: Tensor | None = None
) -> Tensor:
    """x (B, N, C) with alpha of the source's rows where it was chosen; the sources are x itself, or `source` (K, C)."""
    for start, stop in order:
        rows = x.flatten(0, 1) if source is None else source
        mixed = torch.lerp(x[start:stop], rows[told.row[start:stop]].to(x), alpha)
        part = torch.where(told.chosen[start:stop, :, None], mixed, x[start:stop])
        x = torch.cat([x[:start], part, x[stop:]])
    return x

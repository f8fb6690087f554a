"""How the norms of h and of its skip go together (Jeong et al. 2024, figure 4b): r_homo, r_hetero, r_alt."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .blend import BLENDS, Blend, norm
from .taps import Tap


class Correlations(NamedTuple):
    """Pearson correlations between |h| and |g| over a set of images, at one timestep."""

    t: float
    homo: float  # h and g of the same image
    hetero: float  # h of one image and g of another, the mean over all pairs of different images
    alt: dict[str, float]  # |h blended with another image's h| and |g|, by name of the blend


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's r of two rows (N,); nan where either is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a @ b) / (a.norm() * b.norm()))


def correlate(t: float, h: Tensor, g: Tensor, *, gamma: float = 0.3, blends: dict[str, Blend] = BLENDS) -> Correlations:
    """The three correlations of h (N, C, H, W) and the matched skip g (N, C', H, W) of N images.

    |.| is the L2 norm of the whole map.  For image i the other image j runs over all others by cyclic shifts; r_hetero
    and r_alt are means over the shifts.  Over all pairs, as the paper prints its sum, r_hetero is -r_homo / (N - 1)
    whatever the network: that it is near 0 says only that N is not small.
    """
    if len(h) < 3:
        raise ValueError(f"a correlation needs at least 3 images; got {len(h)}")
    size_h, size_g = norm(h).flatten(), norm(g).flatten()
    shifts = range(1, len(h))
    hetero = [pearson(size_h.roll(k), size_g) for k in shifts]
    alt = {
        name: sum(pearson(norm(blend(h, h.roll(k, 0), gamma)).flatten(), size_g) for k in shifts) / len(shifts)
        for name, blend in blends.items()
    }
    return Correlations(t, pearson(size_h, size_g), sum(hetero) / len(hetero), alt)


@torch.no_grad()
def correlations(taps: Iterable[Tap], *, gamma: float = 0.3) -> Iterator[Correlations]:
    """The correlations at every timestep of a tapped walk: `correlations(tapped(unet, x, schedule, path))`."""
    for tap in taps:
        yield correlate(tap.step.t, tap.h, tap.skips[-1], gamma=gamma)

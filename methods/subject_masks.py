"""Where the subject is (ConsiStory, Tewel et al. 2024, section 3.1): attention to its words, averaged, thresholded.

A map is the mean, over heads, layers and calls of the network, of the probability with which a pixel attends to a
word.  At each resolution it is resized, split by Otsu's threshold, and united with those of the subject's other words:
that is all there is to several subjects.

The paper averages over all previous steps, the authors' code over the last 20; the code thresholds each resolution for
itself, so that the mask at 64² is not the one at 32² enlarged.  Both are here; the code's are the defaults.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import masked_maps

Size = tuple[int, int]  # (height, width) in tokens


def token_maps(q: Tensor, k: Tensor, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
    """The probabilities of chosen keys, averaged over heads: columns of softmax(q k^T / sqrt(D) + bias).

    q (B, H, N, D), k (B, H, M, D), tokens (B, T) of which -1 has a map of zeros -> (B, N, T), float32 or float64.
    """
    if bias is None:
        return masked_maps.token_maps(q, k, tokens)
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).to(torch.promote_types(q.dtype, torch.float32))
    chosen = tokens[:, None, None, :].expand(-1, *q.shape[1:3], -1)
    shares = (logits.gather(-1, chosen.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)).exp()
    return (shares * (chosen >= 0)).mean(1)


def otsu(x: Tensor, bins: int = 256) -> Tensor:
    """Otsu's threshold (1979) of each row, (..., N) -> (...): two classes with the most variance between them.

    As scikit-image computes it: a histogram from the least to the greatest value, in x's own type; counts in float32;
    the first of equal maxima; the centre of a bin is what is returned.  A row of equal values returns that value.  It
    never waits for the device.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    flat = low == high
    span = torch.where(flat, torch.ones_like(low), high - low)
    low, top = torch.where(flat, 0, low), torch.where(flat, 1, high)
    x = torch.where(flat, 0, x)
    edges = torch.arange(bins, device=x.device, dtype=x.dtype) * (span / bins) + low
    edges = torch.cat([edges, top], dim=-1)
    bin_of = ((x - low) / span * bins).long().clamp(0, bins - 1)
    bin_of = bin_of - (x < edges.gather(-1, bin_of)).long()
    bin_of = bin_of + ((x >= edges.gather(-1, bin_of + 1)) & (bin_of < bins - 1)).long()
    kind = torch.promote_types(x.dtype, torch.float32)
    zeros = torch.zeros(*x.shape[:-1], bins, device=x.device, dtype=kind)
    counts = zeros.scatter_add(-1, bin_of, torch.ones_like(x, dtype=kind))
    centres = (edges[..., 1:] + edges[..., :-1]) / 2
    below, mass = counts.cumsum(-1), counts * centres.to(kind)
    above = counts.flip(-1).cumsum(-1).flip(-1)
    left, right = mass.cumsum(-1) / below, mass.flip(-1).cumsum(-1).flip(-1) / above
    between = below[..., :-1] * above[..., 1:] * (left[..., :-1] - right[..., 1:]).square()
    best = centres.gather(-1, between.argmax(-1, keepdim=True))
    return torch.where(flat, high, best)[..., 0]


class Thresholded(NamedTuple):
    """A mask at one resolution, and how it came about."""

    mask: Tensor  # bool (B, N)
    thresholds: Tensor  # (B, T), of each word's map


def thresholded(maps: Tensor, tokens: Tensor, size: Size, to: Size) -> Thresholded:
    """Maps (B, N, T) of `size` pixels -> the mask of the subject at `to`: above the threshold of any word's map.

    tokens (B, T): where they are -1, the word is not in the prompt of that picture and its map does not count.
    """
    b, _, words = maps.shape
    grid = maps.transpose(1, 2).unflatten(-1, size)
    resized = F.interpolate(grid, size=to, mode="bilinear", align_corners=False).flatten(2)
    threshold = otsu(resized.reshape(b * words, -1)).view(b, words)
    inside = (resized > threshold[..., None]) & (tokens[..., None] >= 0)
    return Thresholded(inside.any(1), threshold)


def masks(maps: Tensor, tokens: Tensor, size: Size, sizes: Mapping[int, Size]) -> dict[int, Tensor]:
    """The mask of the subject at the size of every level: {level: bool (B, N)}."""
    return {level: thresholded(maps, tokens, size, to).mask for level, to in sizes.items()}


def dropped(mask: Tensor, uniform: Tensor, p: float) -> Tensor:
    """A mask without the tokens whose draw is below p; mask and uniform (B, N)."""
    return mask & ~(uniform < p)


class Draws(Protocol):
    """Uniform numbers in [0, 1) for the dropout after call `call` of the network, (B, n) for each n of `sizes`.

    Asked again for a call, it answers the same: both stages drop the same tokens.
    """

    def __call__(self, call: int, sizes: Sequence[int]) -> list[Tensor]: ...


class Seeded:
    """Draws from a generator of its own for each picture, so that they do not depend on the batch."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.drawn: list[list[Tensor]] = []

    def __call__(self, call: int, sizes: Sequence[int]) -> list[Tensor]:
        while len(self.drawn) <= call:
            rows = [[torch.rand(n, generator=g) for n in sizes] for g in self.generators]
            self.drawn.append([torch.stack(column) for column in zip(*rows, strict=True)])
        return self.drawn[call]


class Together:
    """The authors' draws: one generator for all pictures, after each call first the coarse level, then the fine one."""

    def __init__(self, images: int, seed: int = 0):
        self.images, self.generator = images, torch.Generator().manual_seed(seed)
        self.drawn: list[list[Tensor]] = []

    def __call__(self, call: int, sizes: Sequence[int]) -> list[Tensor]:
        while len(self.drawn) <= call:
            self.drawn.append([torch.rand(self.images, n, generator=self.generator) for n in sizes])
        return self.drawn[call]

"""What attention looks at, reduced as it is made: shared maps between pictures, and maps of words.

A whole map is never kept: it is one head of one image at a time, averaged over heads, layers and calls into a running
mean.  StyleAligned's figure 10 is one row of a shared map, where a chosen token of a picture looks in its reference;
figure 11 the three largest principal components of the mean map as red, green and blue.  Neither says over what it was
averaged; here it is over heads, and over the layers of one resolution.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.masked_maps import token_maps
from ..kernels.sources import Seen
from ..model.ops import Ops, Site


@dataclass
class Mean:
    """A running mean of maps of one shape."""

    value: Tensor
    count: int = 0

    def add(self, more: Tensor) -> None:
        """Take one more.  A ValueError is raised for one of another shape."""
        if more.shape != self.value.shape:
            raise ValueError(
                f"layers and calls that see different keys have no mean: {tuple(self.value.shape)} and then "
                f"{tuple(more.shape)} weights; name sites= that see the same"
            )
        self.count += 1
        self.value = self.value + (more - self.value) / self.count


@dataclass
class SharedMaps:
    """Mean self-attention of chosen images of n, over heads, layers and calls: one for each image and resolution.

    `means[image, N].value` is (Q, N + S): N columns for the own tokens, then those of its sources, such as the
    reference.  Of a guided batch it is the half with the text.  It goes innermost: `style_aligned(maps.watching(ops),
    refs)`, and sees what the verb beneath would.  One run each.
    """

    images: Sequence[int]
    n: int
    queries: Sequence[int] | None = None  # rows to keep, tokens of the image; all by default
    tokens: int | None = None  # only layers of so many tokens; all by default
    sites: Container[Site] | None = None  # only these layers; all by default
    means: dict[tuple[int, int], Mean] = field(default_factory=dict)

    def watching(self, ops: Ops) -> Ops:
        """The same verbs, looked at.  SharedMaps, like every method, hands on what it is given."""

        def attend(
            site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
        ) -> Tensor:
            tokens = q.shape[2]
            if site.kind == "self" and self.tokens in (None, tokens) and (self.sites is None or site in self.sites):
                for image in self.images:
                    row = len(q) - self.n + image
                    if not 0 <= image < self.n or row < 0:
                        raise ValueError(f"there is no image {image} among {self.n} in a batch of {len(q)}")
                    part = weights(q.detach(), k.detach(), row, seen, self.queries)
                    at = image, tokens
                    self.means.setdefault(at, Mean(torch.zeros_like(part))).add(part)
            return ops.attend(site, q, k, v, bias, seen)

        return replace(ops, attend=attend)

    def mean(self, image: int, tokens: int) -> Tensor:
        """The mean map of an image at a resolution, (Q, N + S).  A ValueError is raised where none was seen."""
        if (image, tokens) not in self.means:
            seen = ", ".join(f"{n} tokens of image {i}" for i, n in self.means) or "none"
            raise ValueError(f"no layer of {tokens} tokens was seen of image {image}: there are {seen}")
        return self.means[image, tokens].value


def weights(q: Tensor, k: Tensor, row: int, seen: Seen | None, queries: Sequence[int] | None = None) -> Tensor:
    """The softmax of one image of an attention, mean over heads: own tokens, then sources in their order.

    q (B, H, N, D), k (B, H, M, D) -> (Q, M + S), float32 or better; one head at a time in memory.
    """
    seen = seen or Seen()
    own_q, own_k = (x[row : row + 1].to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    if seen.ref is not None:
        r = int(seen.ref[row])
        pair = torch.tensor([1, 1], device=q.device)
        own_q, own_k = (
            reference.adain(torch.cat([x, whole[r : r + 1].to(x)]), pair)[:1] for x, whole in ((own_q, q), (own_k, k))
        )
    chosen = own_q[0] if queries is None else own_q[0][:, list(queries)]
    pool = k if seen.pool is None else seen.pool[0]
    sources = [] if seen.sources is None else seen.sources.listed()[row]
    total: Tensor | None = None
    for head in range(q.shape[1]):
        a = chosen[head] * q.shape[-1] ** -0.5
        logits = [a @ own_k[0, head].T]
        for s in sources:
            logits.append(a @ pool[s.image, head, s.start : s.stop].to(a).T * s.scale + s.shift)
        found = torch.cat(logits, 1).softmax(-1)
        total = found if total is None else total + found
    assert total is not None
    return total / q.shape[1]


@dataclass
class WordMaps:
    """Mean cross-attention to chosen tokens of the text, of n images, over heads, layers and calls.

    `words[w]` are the tokens of word w; a map is the mean over them.  `means[N].value` is (n, W, N).  Of a guided batch
    it is the half with the text.  One run each.
    """

    words: Sequence[Sequence[int]]
    n: int
    means: dict[int, Mean] = field(default_factory=dict)

    def watching(self, ops: Ops) -> Ops:
        """The same verbs, looked at."""

        def attend(
            site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
        ) -> Tensor:
            if site.kind == "cross":
                if len(q) < self.n or any(not word or max(word) >= k.shape[2] for word in self.words):
                    raise ValueError(
                        f"words are tokens 0 ... {k.shape[2] - 1} of {self.n} images; got {self.words}, {len(q)} rows"
                    )
                part = self.mapped(q.detach()[-self.n :], k.detach()[-self.n :])
                self.means.setdefault(q.shape[2], Mean(torch.zeros_like(part))).add(part)
            return ops.attend(site, q, k, v, bias, seen)

        return replace(ops, attend=attend)

    def mapped(self, q: Tensor, k: Tensor) -> Tensor:
        """Of all images: (n, W, N)."""
        at = torch.tensor([token for word in self.words for token in word], device=q.device)
        each = token_maps(q, k, at).split([len(word) for word in self.words], dim=-1)
        return torch.stack([found.mean(-1) for found in each], dim=1)

    def combined(self, size: tuple[int, int]) -> Tensor:
        """The mean over all layers at the finest resolution seen; `size` of the latents -> (n, W, h, w)."""
        if not self.means:
            raise ValueError("no attention to text was seen: draw with the verbs of `watching`")
        fine = grid(size, max(self.means))
        total = sum(
            each.count * F.interpolate(each.value.unflatten(2, grid(size, n)), fine, mode="bilinear")
            for n, each in self.means.items()
        )
        assert isinstance(total, Tensor)
        return total / sum(each.count for each in self.means.values())


def grid(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """(rows, columns) of the tokens of a layer; `size` is (H, W) of the latents.  ValueError: no level has so many."""
    height, width = size
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(f"no level of {size[0]} x {size[1]} latents has {tokens} tokens")
    return height, width


def principal(mean: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """The left singular vectors of a map without its column means, and all singular values: (N, S) -> (N, k), (N,).

    From the N x N products in float64; signs are such that the largest entry of each vector is positive.
    """
    centred = (mean - mean.mean(0)).double()
    squares, vectors = torch.linalg.eigh(centred @ centred.T)
    left = vectors.flip(1)[:, :k]
    signs = left.gather(0, left.abs().argmax(0)[None]).sign()
    return (left * signs).to(mean), squares.flip(0).clamp(min=0).sqrt().to(mean)


def colours(mean: Tensor, shape: tuple[int, int]) -> Tensor:
    """The three largest principal components of a map (N, S), each over its range: a picture (3, h, w) in 0 ... 1."""
    left = principal(mean)[0]
    low, high = left.amin(0), left.amax(0)
    return ((left - low) / (high - low).clamp(min=torch.finfo(left.dtype).tiny)).T.unflatten(1, shape)


def picture(found: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w), over its range from black over red and yellow to white, or colours (3, h, w) in 0 ... 1, enlarged.

    -> (3, H, W) in [-1, 1], every token a square.
    """
    if found.ndim == 2:
        low, high = found.min(), found.max()
        share = (found - low) / (high - low).clamp(min=torch.finfo(found.dtype).tiny)
        found = torch.stack([(3 * share - i).clamp(0, 1) for i in range(3)])
    return F.interpolate(found[None].float(), size, mode="nearest")[0] * 2 - 1

"""What a text-conditioned UNet held while pictures were drawn: where words are, what looks at what, h and the skips."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.ops import TORCH, Ops
from ..model.unet import UNetConfig
from ..samplers.parameterisation import Denoise
from .attention_maps import SharedMaps
from .consistory import Heard, Told, consistory, places
from .dift import Matches, matches, smoothed
from .statistics import Statistics
from .style_aligned import style_aligned
from .subject_masks import Size, thresholded


@dataclass
class Inside:
    """A run of n pictures drawn together, looked into.  Looking changes nothing.

    `tokens` (n, W) are the places of W words in each text, -1 where a text has not the word.  Word maps are kept of
    every call, means over heads and layers of the coarsest level that attends; self-attention at that level is
    averaged over the calls at the timesteps in `looks`, and the DIFT feature kept of the one at `feature_at`.  With
    `refs`, the pictures are StyleAligned to their references, and self-attention's maps have their columns too.
    """

    cfg: UNetConfig
    tokens: Tensor
    path: Sequence[float]
    looks: Collection[float]  # timesteps of the path
    feature_at: float  # another
    refs: Sequence[int] | None = None
    size: Size = (0, 0)  # of the latents
    words: dict[float, Tensor] = field(default_factory=dict)  # timestep -> (n, N, W)
    feature: Tensor | None = None  # (n, C, h, w), smoothed
    shared: SharedMaps = field(init=False)
    statistics: Statistics = field(init=False)
    calls: list[float] = field(default_factory=list)  # the timestep of each call that the statistics count

    def __post_init__(self) -> None:
        self.where, n = places(self.cfg), len(self.tokens)
        self.shared, self.statistics = SharedMaps(range(n), n), Statistics(n)

    def around(self, speaking: Callable[[Ops], Denoise]) -> Denoise:
        """A denoiser made of one that speaks given verbs: the same, looked into at every call."""
        n = len(self.tokens)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            now, heard = min(self.path, key=lambda one: abs(one - float(t[0]))), Heard()
            self.size = (x.shape[2], x.shape[3])
            ops = TORCH
            if now in self.looks:
                h, w = self.grid
                self.shared.tokens = h * w
                ops = self.shared.watching(ops)
            if self.refs is not None:
                ops = style_aligned(ops, self.refs, device=x.device)
            ops = consistory(ops, self.where, Told(images=n, tokens=self.tokens.to(x.device)), heard)
            eps = speaking(self.statistics.watching(ops))(x, t)
            self.calls.append(now)
            self.words[now] = torch.stack(heard.maps).mean(0)
            if now == self.feature_at:
                self.feature = smoothed(heard.feature[-1][-n:])
            return eps

        return denoise

    @property
    def grid(self) -> Size:
        """Tokens of the level that is read, (height, width)."""
        return self.where.sizes(self.size)[self.where.maps]

    def mean_words(self, until: float = -1) -> Tensor:
        """The mean of the word maps of all calls at timesteps >= until, (n, N, W)."""
        return torch.stack([found for t, found in self.words.items() if t >= until]).mean(0)

    def masks(self, until: float = -1) -> Tensor:
        """Where Otsu's threshold sees any of the words by then: bool (n, N)."""
        return thresholded(self.mean_words(until), self.tokens.to(self.mean_words().device), self.grid, self.grid).mask

    def matched(self) -> Matches:
        """For every pixel of each picture the nearest in the first picture's mask, at the resolution of the maps.

        A ValueError is raised where the walk did not come by the feature's timestep.
        """
        if self.feature is None:
            raise ValueError(f"no call was at timestep {self.feature_at:g}, where the feature is taken")
        sees = torch.ones(len(self.feature), 1, dtype=torch.bool, device=self.feature.device)
        return matches(self.feature[:1], self.masks()[:1], self.feature, self.grid, sees)

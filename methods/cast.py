"""What both stages of a ConsiStory set share, what goes from a call to the next, and what was run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.blocks import Words
from ..model.ops import TORCH, triton
from ..model.unet import words
from .anchors import Kept
from .consistory import Others, others
from .scene import Scene, Settings
from .subject_masks import Draws

Masks = Mapping[int, Tensor]  # level -> bool (B, N)


@dataclass
class Tally:
    """What was run of the network, in whole batches: its parts, each counted for itself."""

    encoders: float = 0.0  # encoder and bottleneck
    decoders: float = 0.0
    queries: float = 0.0  # the decoder up to its last self-attention's queries
    maps: float = 0.0  # the decoder up to its last cross-attention that is read
    features: float = 0.0  # the decoder up to the feature

    def passes(self, shares: "Tally") -> float:
        """The same in passes of the network, `shares` being what each part is of one."""
        return sum(getattr(self, name) * getattr(shares, name) for name in vars(self))


@dataclass(frozen=True)
class Focus:
    """The masks after a call: the subject, and what of it is left after the dropout."""

    masks: Masks
    kept: Masks
    made: dict[int, dict[int, Others]] = field(default_factory=dict)  # by halves and level

    def others(self, cast: "Cast", halves: int) -> dict[int, Others]:
        """What is seen at each level, built once."""
        keep = cast.keep.images if cast.keep else 0
        if halves not in self.made:
            self.made[halves] = {
                k: others(m, cast.sees, halves, align=cast.align, keep=keep) for k, m in self.kept.items()
            }
        return self.made[halves]


class Branch(NamedTuple):
    """Where the second stage leaves the first: what was predicted up to there, and what goes on."""

    eps: tuple[Tensor, ...]  # of the calls before
    history: tuple[Tensor, ...]  # maps
    focus: Focus | None
    plain: dict[str, Tensor]  # queries of the plain pass at that call, where it has one
    other: Tensor | None = None  # what is predicted there under the negative texts, which nothing is injected into


@dataclass(frozen=True, kw_only=True)
class Cast:
    """What both stages share: the pictures, who looks at whom, and what is known beforehand."""

    scene: Scene
    settings: Settings
    sees: Sequence[Sequence[bool]]
    draws: Draws
    path: Sequence[float]
    anchors: Kept | None = None  # cached, in the place of pictures in the batch
    keep: Kept | None = None  # to be filled
    shelf: torch.device | None = None  # where what is kept lies; None: where it is made
    pinned: Callable[[float], Tensor] | None = None  # t -> the first pictures as they are to be seen then, (P, C, H, W)
    align: bool = False
    given: Callable[[int, int, Masks], Masks] | None = None  # (stage, call, masks) -> others in the place of those

    @property
    def apart(self) -> bool:
        """Whether no other method is in the verbs that makes one row of the batch depend on another, or tells them."""
        ops, fast = self.scene.ops, triton()
        return ops.attend in (TORCH.attend, fast.attend) and ops.group_norm in (TORCH.group_norm, fast.group_norm)

    @property
    def injects(self) -> bool:
        """Whether anything is injected anywhere on the path."""
        return any(self.settings.injects(t) for t in self.path[:-1])

    @cached_property
    def words(self) -> Words:
        """What the network reads of the prompts, negative ones in front; these are not read where they are zeros.

        That is so where no other method is in the verbs, which would be told of the other half alone, and where this
        one does anything: else the walk is the plain one, bit for bit.
        """
        scene, weight = self.scene, next(self.scene.unet.parameters())
        texts = [prompt.context.to(weight) for prompt in (scene.negative, scene.positive) if prompt is not None]
        acts = self.settings.attend or self.injects
        silent = scene.images if self.apart and acts and len(texts) > 1 and not bool(texts[0].any()) else 0
        return words(scene.unet, torch.cat(texts), silent)

"""What a ConsiStory set is: its pictures' texts and subject, and the settings of the method with their windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.ops import TORCH, Ops
from ..model.unet import UNet
from ..samplers.guidance import Interval
from ..samplers.parameterisation import Prediction
from ..samplers.schedule import Schedule
from .controlnet import Control
from .prompt import Prompt


class SceneError(ValueError):
    """A set that cannot be drawn: a subject that no prompt names, shapes that do not fit, settings out of range."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The method's settings; the defaults are the authors' at 50 steps, their windows said in timesteps.

    The paper: masks of all previous calls (`window=None`), queries blended in the first 5 steps, injection in t 900 ...
    680 (the code goes on to 661), a first stage that ends at the feature (`early=True`), pictures altered all at once
    (`sequential=False`).
    """

    dropout: float = 0.5  # share of the subject's tokens that others do not see
    window: int | None = 20  # masks are of the last so many calls; None: of all
    attend: bool = True  # subject-driven self-attention; without it there is no blending either
    blend: tuple[float, float] | None = (0.9, 0.81836735)  # share of plain queries, from the first timestep ...
    blend_until: float = 881  # ... to this one
    inject: tuple[float, float] | None = (881, 661)  # timesteps between which features are injected
    alpha: float = 0.8
    sequential: bool = True
    dift: float = 261  # the feature is of the timestep that is nearest
    dift_b: float = 1.0  # the code's FreeU has multiplied half of the feature by its b2 in place before it is read
    early: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise SceneError(f"the dropout lies in 0 ... 1; got {self.dropout}")
        if self.window is not None and self.window < 1:
            raise SceneError(f"masks are of 1 call or more; got a window of {self.window}")
        shares = (*(self.blend or ()), self.alpha)
        if not all(0 <= share <= 1 for share in shares):
            raise SceneError(f"shares of queries and features lie in 0 ... 1; got {shares}")
        if self.inject is not None and self.inject[0] < self.inject[1]:
            raise SceneError(f"injection goes down from a timestep to a lower one; got {self.inject}")
        if not math.isfinite(self.dift_b):
            raise SceneError(f"the feature's factor is finite; got {self.dift_b}")

    def injects(self, t: float) -> bool:
        """Whether features are injected at a timestep."""
        return self.inject is not None and self.alpha > 0 and self.inject[1] <= t <= self.inject[0]

    def blends(self, t: float, first: float) -> float:
        """The share of plain queries at a timestep of a walk from `first`."""
        if self.blend is None or not self.attend or t < self.blend_until:
            return 0.0
        return strength(t, first, self.blend_until, self.blend)

    def feature_at(self, path: Sequence[float]) -> float:
        """The timestep of a path at which the feature is taken."""
        return min(path[:-1], key=lambda t: abs(t - self.dift))


def strength(t: float, first: float, last: float, ends: tuple[float, float] = (0.9, 0.81836735)) -> float:
    """v, falling in a line from `first` to `last`; the default ends are 0.9 and what 5 of 49 steps to 0.1 leave."""
    return ends[0] if first == last else ends[0] + (first - t) / (first - last) * (ends[1] - ends[0])


def by_steps(settings: Settings, path: Sequence[float]) -> Settings:
    """Windows as the authors' code has them for any n: blending to step n / 10, injection to n / 3."""
    n = len(path) - 1
    inject = None if settings.inject is None else (path[n // 10], path[n // 3])
    return replace(settings, blend_until=path[n // 10], inject=inject)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """B pictures of one subject: everything that `methods.text_to_image.denoiser` takes, and where the subject is said.

    SceneError: a picture whose prompt has none of the subject's words; rows that do not fit.
    """

    unet: UNet
    positive: Prompt  # B rows
    tokens: Tensor  # int64 (B, T) places of the subject's words among the text's tokens, -1: not in this prompt
    schedule: Schedule
    negative: Prompt | None = None
    ids: Tensor | None = None
    negative_ids: Tensor | None = None
    prediction: Prediction = "eps"
    guidance: float | Tensor = 5.0
    rescale: float = 0.0
    interval: Interval | None = None
    controls: Sequence[Control] = ()
    canvas: Tensor | None = None
    whole_times: bool = False
    ops: Ops = TORCH
    control_ops: Ops = TORCH

    def __post_init__(self) -> None:
        n, room = self.positive.context.shape[:2]
        if self.tokens.ndim != 2 or len(self.tokens) != n or self.tokens.dtype.is_floating_point:
            raise SceneError(
                f"the subject's places are integers ({n}, words); got {tuple(self.tokens.shape)} {self.tokens.dtype}"
            )
        if bool((self.tokens >= room).any()):
            raise SceneError(f"the subject's places are among {room} tokens; got {int(self.tokens.max())}")
        if bool((absent := (self.tokens < 0).all(1)).any()):
            raise SceneError(f"the prompt of picture {int(absent.long().argmax())} has none of the subject's words")
        if self.negative is not None and len(self.negative.context) != n:
            raise SceneError(f"{n} prompts, {len(self.negative.context)} negative ones: give as many")

    @property
    def images(self) -> int:
        """B."""
        return len(self.positive.context)

    @property
    def words(self) -> Tensor:
        """The subject's places on the network's device."""
        return self.tokens.to(next(self.unet.parameters()).device)

    @property
    def guided(self) -> bool:
        """Whether every call has both halves of a guided batch."""
        return self.negative is not None and not bool((torch.as_tensor(self.guidance) == 1).all())


def anchored(images: int, anchors: int, *, apart: bool = False) -> list[list[bool]]:
    """sees[i][j]: every picture looks at the first `anchors`; `apart`, these do not look at each other (real ones)."""
    if not 1 <= anchors <= images:
        raise SceneError(f"the anchors are 1 ... {images} of {images} pictures; got {anchors}")
    return [[j < anchors and j != i and not (apart and i < anchors) for j in range(images)] for i in range(images)]

"""ConsiStory's two stages (Tewel et al. 2024): one walk that finds the subjects and their matches, one that uses them.

    stage 1   subject-driven attention and blended queries; at t = 261 the feature is taken, at the end the masks
    between   matches between the subjects
    stage 2   the same again from x_T, and features injected along the matches

The published schedule is two complete walks of 50 calls and 6 plain passes each: 112.  What is here gives the same
pictures with less:

    the plain pass of the first call, which has no masks, is left out                                          -2
    up to the injection both stages are the same: the second repeats the first's predictions, so that any
    sampler, with its noise and its memory, comes to the same x; and it takes over the queries there          -10
    a plain pass shares encoder and bottleneck with the call beside it, and ends at the decoder's last query   -5 x 0.5
    nothing is injected into the negative half: where stage 2 begins, that half is as in stage 1               -0.5
    stage 1 ends at its last map, which only the conditional half has                                          -0.6

`early` ends stage 1 at the feature, as the paper has it, with the masks of then: 13 calls less, other pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise

import torch
from torch import Tensor

from ..model.unet import UNet
from ..samplers.ddim import Step
from ..samplers.parameterisation import times
from .anchors import Kept
from .cast import Cast, Masks, Tally
from .dift import Matches, Plan, matches, plan, smoothed, waves
from .scene import Scene, SceneError, Settings, anchored
from .stage import Stage
from .subject_masks import Draws
from .text_to_image import Walk


class Story:
    """One set of pictures: walk it by `steps`, then read what came of it."""

    def __init__(
        self,
        scene: Scene,
        walks: Callable[[], Walk],
        x: Tensor,
        path: Sequence[float],
        settings: Settings | None = None,
        *,
        draws: Draws,
        anchors: int | Kept = 2,
        sees: Sequence[Sequence[bool]] | None = None,
        keep: bool = False,
        shelf: torch.device | None = None,
        said: dict[str, str] | None = None,
        pinned: Callable[[float], Tensor] | None = None,
        align: bool = False,
        given: Callable[[int, int, Masks], Masks] | None = None,
        whole: bool = False,
    ):
        """x (B, C, H, W) is x_T; `walks` gives the sampler, its noise begun anew, once for each stage.

        `anchors` is how many of the first pictures all look at, or what was kept of others that were drawn before;
        `sees`, (B, B), says who looks at whom instead.  `keep` keeps what further pictures need of the first `anchors`,
        on the device `shelf`, together with what is `said` of the model.  `pinned` gives the first pictures as they are
        at each timestep, for real ones (appendix E), with `align` for AdaIN of their keys.  `given` are masks from
        elsewhere, told those that were found.  `whole` walks stage 1 to its end.
        SceneError: what does not fit.
        """
        settings, n = settings or Settings(), scene.images
        if len(x) != n:
            raise SceneError(f"x_T is of {len(x)} pictures, the prompts of {n}")
        if len(path) < 2 or any(a <= b for a, b in pairwise(path)):
            raise SceneError(f"a path falls over at least one step; got {list(path)}")
        size, said = (x.shape[2], x.shape[3]), (said or {}) | told(scene.unet, settings)
        cached = anchors if isinstance(anchors, Kept) else None
        if cached is not None:
            cached.fits(path, size, said)
            sees = [[False] * n for _ in range(n)]
        elif sees is None:
            sees = anchored(n, anchors if isinstance(anchors, int) else 1)
        elif len(sees) != n or any(len(row) != n for row in sees):
            raise SceneError(f"sees is ({n}, {n}): who looks at whom")
        if keep and (not isinstance(anchors, int) or not 1 <= anchors <= n):
            raise SceneError(f"anchors are kept of 1 ... {n} of the pictures that are drawn, not of cached ones")
        many = anchors if isinstance(anchors, int) else anchors.images
        self.kept = Kept(many, size, tuple(path), said) if keep else None
        self.cast = Cast(scene=scene, settings=settings, sees=sees, draws=draws, path=path, anchors=cached,
                         keep=self.kept, shelf=shelf, pinned=pinned, align=align, given=given)  # fmt: skip
        self.walks, self.start, self.x, self.whole = walks, x, x, whole
        self.masks: list[list[Masks]] = []  # by stage, after each call (of stage 2: from the branch on)
        self.sources: list[int] = []  # pictures, of the batch or of the cached anchors, that are looked at
        self.matches: Matches | None = None  # (B, sources, N) at the level of the injection
        self.plan: Plan | None = None
        self.raw: Tensor | None = None  # the feature (B, C, H, W)
        self.tally = Tally()

    @property
    def two(self) -> bool:
        """Whether there is a second stage: whether anything is injected anywhere on the path, or kept to be."""
        cast = self.cast
        looked = any(look and i != j for i, row in enumerate(cast.sees) for j, look in enumerate(row))
        return cast.injects and (looked or cast.anchors is not None or cast.keep is not None)

    def steps(self) -> Iterator[tuple[int, Step]]:
        """(1 or 2, Step) for each step of both stages; afterwards `x` is the pictures' latents."""
        first = Stage(self.cast)
        yield from ((1, step) for step in self.walked(first))
        if not self.two:
            if self.whole:
                self.prepared(first)
            return
        carried, order = self.prepared(first)
        second = Stage(self.cast, 2, carried=carried, order=order, branch=first.branch)
        yield from ((2, step) for step in self.walked(second))

    def walked(self, stage: Stage) -> Iterator[Step]:
        """One stage's walk; x is where it ends."""
        cast, x = self.cast, self.start
        steps = self.walks()(stage, x, cast.scene.schedule, cast.path)
        short = stage.number == 1 and self.two and not self.whole
        last = cast.settings.feature_at(cast.path) if short and cast.settings.early else cast.path[-2]
        for t in cast.path[:-1]:
            if short and t == last:
                stage.look(x, times(t, x))
                break
            step = next(steps)
            x = step.x
            yield step
        self.x = x
        self.masks.append(stage.seen)
        for name, value in vars(stage.tally).items():
            setattr(self.tally, name, getattr(self.tally, name) + value)

    def prepared(self, first: Stage) -> tuple[Plan | None, list[tuple[int, int]]]:
        """Between the stages: matches, and what is carried along them."""
        cast, anchors, fine = self.cast, self.cast.anchors, first.where.fine
        assert first.feature is not None
        assert first.focus is not None
        feature, mask = smoothed(wide(first.feature)), first.focus.masks[fine]
        size = first.where.sizes((self.x.shape[2], self.x.shape[3]))[fine]
        self.raw = first.feature
        if anchors is None:
            own = [[look and i != j for j, look in enumerate(row)] for i, row in enumerate(cast.sees)]
            self.sources = [j for j in range(len(own)) if any(row[j] for row in own)]
            sees = torch.tensor(own, device=mask.device)[:, self.sources]
            order = waves(own, sequential=cast.settings.sequential)
            if self.sources:
                self.matches = matches(feature[self.sources], mask[self.sources], feature, size, sees)
                self.plan = plan(self.matches, mask, self.sources)
        else:
            if anchors.feature is None or anchors.masks is None:
                raise SceneError("the anchors were drawn without injection: these pictures cannot have any")
            sees = torch.ones(len(mask), anchors.images, dtype=torch.bool, device=mask.device)
            source, inside = anchors.feature.to(feature), anchors.masks.to(mask.device)
            self.matches = matches(source, inside, feature, size, sees)
            found = plan(self.matches, mask)
            self.plan, order = found._replace(row=anchors.row().to(mask.device)[found.row]), [(0, len(mask))]
            self.sources = list(range(anchors.images))
        if self.kept is not None:
            self.kept.feature, self.kept.masks = feature[: self.kept.images], mask[: self.kept.images]
            self.kept.branch = len(first.branch.eps if first.branch else ())
        return self.plan, order


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def told(unet: UNet, settings: Settings) -> dict[str, str]:
    """What anchors and further pictures have to have in common."""
    own = ("dropout", "window", "sequential")  # which may be other than the anchors'
    same = {f.name: repr(getattr(settings, f.name)) for f in fields(settings) if f.name not in own}
    return same | {"dtype": str(next(unet.parameters()).dtype).removeprefix("torch.")}

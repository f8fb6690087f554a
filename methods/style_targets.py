"""What is for StyleAligned's targets alone, and not for their references: ControlNets and LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.blocks import Cond
from ..model.controlnet import Residuals
from ..model.ops import TORCH, Ops
from .controlnet import Control, rows
from .taps import Embed


def references(refs: Sequence[int]) -> list[int]:
    """The images of a batch that are references of others, in order."""
    return sorted({r for i, r in enumerate(refs) if r != i})


def targets(refs: Sequence[int]) -> list[int]:
    """The others."""
    heads = references(refs)
    return [i for i in range(len(refs)) if i not in heads]


def weights(refs: Sequence[int], weight: float | Sequence[float] = 1.0) -> Tensor:
    """The weights of a LoRA that draws the targets only (Hertz et al. 2024, appendix B): (n,), 0 at references.

    For `methods.lora.beside`; `weight` is one for all, or one for each target.
    """
    where = targets(refs)
    each = torch.tensor([weight] * len(where) if isinstance(weight, float | int) else list(weight))
    return torch.zeros(len(refs)).index_copy(0, torch.tensor(where, dtype=torch.long), each.float())


@dataclass(frozen=True, kw_only=True)
class TargetControl(Control):
    """A ControlNet that sees the targets, whose hints are one a target: references get residuals of zeros.

    `negative_text` tells it the negative text and pooled text in both halves of a guided batch, as the authors' code
    does by a slip.
    """

    refs: Sequence[int]
    negative_text: bool = False

    def residuals(self, x: Tensor, t: Tensor, embed: Embed, ops: Ops = TORCH) -> Residuals:
        """What it adds at x (B, C, H, W), B a multiple of the images of `refs`.

        A ValueError is raised for a batch that is no multiple.
        """
        n = len(self.refs)
        copies, rest = divmod(len(x), n)
        if rest:
            raise ValueError(f"references are of {n} images, which do not go into a batch of {len(x)} rows")
        where = torch.tensor([i + n * j for j in range(copies) for i in targets(self.refs)], device=x.device)
        said = where % n if self.negative_text else where
        c, kind = embed(t), next(self.net.parameters()).dtype
        own = Cond(c.emb[said], None if c.context is None else c.context[said])
        seen = x[where, : self.net.in_channels].to(kind)
        found = self.net(seen, own, rows(self.hint, len(where)).to(x).to(kind), ops)
        if isinstance(self.scale, Tensor):
            found = found.scaled(rows(self.scale.view(-1, 1, 1, 1), len(where)).to(found.h))
        else:
            found = found.scaled(self.scale)

        def spread(y: Tensor) -> Tensor:
            return y.new_zeros(len(x), *y.shape[1:]).index_copy(0, where, y)

        return Residuals(spread(found.h), [spread(skip) for skip in found.skips])

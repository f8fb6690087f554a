"""A text-conditioned UNet as samplers see it, and ControlNets (Zhang et al. 2023) that add to its h and skips."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.controlnet import ControlNet, Residuals, controlled
from ..model.ops import TORCH, Ops
from ..model.unet import UNet
from ..samplers.parameterisation import Denoise
from .prompt import Prompt, conditioning
from .taps import Embed, rows


@dataclass(frozen=True, kw_only=True)
class Control:
    """One ControlNet with its hint, how much of it, and when."""

    net: ControlNet
    hint: Tensor  # (B, 3, H, W) in [0, 1] at the size of the pictures; fewer rows are repeated
    scale: float | Tensor = 1.0  # or (B,), one a picture
    first: float | None = None  # on where last <= t <= first; None: no bound
    last: float | None = None

    def __post_init__(self):
        if not isinstance(self.hint, Tensor) or not self.hint.is_floating_point():
            raise ValueError("a hint is a tensor of a floating type, its values in [0, 1]")

    def on(self, t: Tensor) -> bool:
        """Whether it is on at t, which is one timestep for the whole batch."""
        if self.first is None and self.last is None:
            return True
        now = float(t[0])
        return (self.first is None or now <= self.first) and (self.last is None or now >= self.last)

    def residuals(self, x: Tensor, t: Tensor, embed: Embed, ops: Ops = TORCH) -> Residuals:
        """What it adds at x (B, C, H, W), of which it sees the latents, not what an inpainting UNet takes besides.

        `embed` is its own conditioning, t (B,) -> Cond.
        """
        kind = next(self.net.parameters()).dtype
        found = self.net(x[:, : self.net.in_channels].to(kind), embed(t), rows(self.hint, len(x)).to(x).to(kind), ops)
        if isinstance(self.scale, Tensor):
            return found.scaled(rows(self.scale.view(-1, 1, 1, 1), len(x)).to(found.h))
        return found.scaled(self.scale)


def between(path: Sequence[float], start: float = 0.0, end: float = 1.0) -> tuple[float, float]:
    """(first, last) timesteps of the steps of a path that lie between two fractions of it, for `Control`.

    Step i of n is one if i / n >= start and (i + 1) / n <= end.  A ValueError is raised where none is.
    """
    n = len(path) - 1
    inside = [t for i, t in enumerate(path[:-1]) if i / n >= start and (i + 1) / n <= end]
    if not inside:
        raise ValueError(f"no step of {n} lies between {start} and {end}")
    return inside[0], inside[-1]


def predicting(
    unet: UNet,
    prompt: Prompt,
    ids: Tensor | None = None,
    *,
    controls: Sequence[Control] = (),
    canvas: Tensor | None = None,
    ops: Ops = TORCH,
    control_ops: Ops = TORCH,
) -> Denoise:
    """(x (B, 4, H, W), t (B,)) -> what the network predicts, (B, 4, H, W) in x's type, for B rows of prompt and ids.

    The network computes in its own type.  `canvas` (B, 5, H, W) is what an inpainting UNet sees beside x; fewer rows
    are repeated.  `ops` is what the UNet speaks, `control_ops` what the ControlNets do: an image prompt, for one, is
    for the UNet only.  With nothing to control it is the UNet alone.
    """
    kind = next(unet.parameters()).dtype
    embed = conditioning(unet, prompt, ids)
    embeds = [conditioning(control.net, prompt, ids) for control in controls]
    extra = None if canvas is None else canvas.to(kind)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        c, y = embed(t), x.to(kind)
        y = y if extra is None else torch.cat([y, rows(extra, len(x)).to(y)], dim=1)
        deep, skips = unet.encode(y, c, ops)
        h = unet.middle(deep, c, ops)
        for control, own in zip(controls, embeds, strict=True):
            if control.on(t):
                found = control.residuals(y, t, own, control_ops)
                found = Residuals(found.h.to(kind), [skip.to(kind) for skip in found.skips])
                h, skips = controlled(h, skips, found)
        return unet.decode(h, skips, c, ops)[:, : x.shape[1]].to(x.dtype)

    return predict

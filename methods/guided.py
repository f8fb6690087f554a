"""A text-conditioned UNet under guidance, as the three lists that h-space methods walk with.

    unet = Guided(parts.unet, positive, negative, schedule=schedule, ids=ids, guidance=5.0)
    content = invert(unet, x0, schedule, path)
    diffstyle(unet, style.x_T, [Content(content.h)], schedule, path, noise=seeded(seeds))

h and the skips of B pictures then have 2B rows, the negative prompt's first (`samplers.guidance`), and are edited in
both halves: eps = eps(h' | negative) + g (eps(h' | text) - eps(h' | negative)).
"""

import torch
from torch import Tensor

from ..model.blocks import Cond, ThreeLists
from ..model.ops import TORCH, Ops
from ..model.unet import UNet
from ..samplers.guidance import guide, halves, paired
from ..samplers.parameterisation import Prediction, as_eps
from ..samplers.schedule import Schedule
from .prompt import Prompt, beside, conditioning
from .taps import rows


class Guided(ThreeLists):
    """What `methods.text_to_image.denoiser` predicts with, h and the skips in hand; any prediction comes out as eps."""

    def __init__(
        self,
        unet: UNet,
        positive: Prompt,
        negative: Prompt | None = None,
        *,
        schedule: Schedule,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        prediction: Prediction = "eps",
        guidance: float | Tensor = 5.0,
        rescale: float = 0.0,
        canvas: Tensor | None = None,
    ):
        """Prompts and ids have B rows, or one for all; without `negative`, or at guidance 1, h has B rows too."""
        super().__init__()
        self.unet, self.in_channels, self.multiple = unet, unet.cfg.out_channels, unet.multiple
        self.schedule, self.canvas = schedule, canvas
        self.prediction: Prediction = prediction
        self.guidance, self.rescale = guidance, rescale
        self.guiding = negative is not None and not bool((torch.as_tensor(guidance) == 1).all())
        self.says = [(positive, ids)]
        if negative is not None and self.guiding:
            self.says.insert(0, (negative, ids if negative_ids is None else negative_ids))

    def embed(self, t: Tensor) -> Cond:
        """Timesteps (B,) -> the conditioning of 2B rows."""
        n = len(t)
        prompt = beside(*(said.over(n) for said, _ in self.says))
        sizes = [rows(ids, n) for _, ids in self.says if ids is not None]
        both = torch.cat([t] * len(self.says))
        return conditioning(self.unet, prompt, torch.cat(sizes) if sizes else None)(both)

    def encode(self, x: Tensor, c: Cond, ops: Ops = TORCH) -> tuple[Tensor, list[Tensor]]:
        x = x.to(next(self.unet.parameters()).dtype)
        if self.canvas is not None:
            x = torch.cat([x, rows(self.canvas, len(x)).to(x)], dim=1)
        return self.unet.encode(paired(x, x) if self.guiding else x, c, ops)

    def middle(self, h: Tensor, c: Cond, ops: Ops = TORCH) -> Tensor:
        return self.unet.middle(h, c, ops)

    def decode(self, h: Tensor, skips: list[Tensor], c: Cond, ops: Ops = TORCH) -> Tensor:
        """h and skips of 2B rows -> what the network predicts for B pictures, guided."""
        out = self.unet.decode(h, skips, c, ops)
        return guide(*halves(out), self.guidance, self.rescale) if self.guiding else out

    def predict(self, h: Tensor, skips: list[Tensor], c: Cond, x: Tensor, t: Tensor, ops: Ops = TORCH) -> Tensor:
        """h, skips -> eps in x's type."""
        return as_eps(lambda x, t: self.decode(h, skips, c, ops).to(x), self.schedule, self.prediction)(x, t)

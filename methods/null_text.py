"""A UNet as null-text inversion takes it: both encodings without gradients, then a decoder that reads another text."""

import torch
from torch import Tensor

from ..model.blocks import ThreeLists
from ..model.ops import TORCH, Ops
from ..samplers.guidance import guide
from ..samplers.null_text import Decode, Halfway
from .taps import Embed


def decoder_null(unet: ThreeLists, cond: Embed, uncond: Embed, scale: float | Tensor, ops: Ops = TORCH) -> Halfway:
    """(x_t, t) -> null text (B, M, D) -> the guided prediction u + scale (c - u), u decoded under that null text.

    `cond` and `uncond` give the conditioning of the two predictions; the null text takes the place of `uncond`'s
    context in the decoder, its pooled text and sizes stay.  Where the null text is `uncond`'s own, this is guidance.
    """

    def halfway(x: Tensor, t: Tensor) -> Decode:
        with torch.no_grad():
            c, empty = unet(x, cond(t), ops), uncond(t)
            deep, skips = unet.encode(x, empty, ops)
            h = unet.middle(deep, empty, ops)
        return lambda null: guide(unet.decode(h, skips, empty._replace(context=null), ops), c, scale)

    return halfway

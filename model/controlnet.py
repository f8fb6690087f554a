"""ControlNet (Zhang et al. 2023) for the text-conditioned UNets: what a hint adds to h and to every skip, as values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Cond, takes
from .ops import TORCH, Ops
from .unet import SD15, SDXL, Conditioned, UNetConfig, bottleneck, encoder


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UNetConfig):
    hint: tuple[int, ...] = (16, 32, 96, 256)  # widths of the hint's convolutions; each but the first halves it
    hint_channels: int = 3


def controlling(cfg: UNetConfig) -> ControlNetConfig:
    """The configuration of the published ControlNets for a UNet."""
    return ControlNetConfig(**vars(cfg))


# diffusers/controlnet-{canny,depth}-sdxl-1.0, -mid (transformer_layers_per_block 0, 0, 1) and -small (0, 0, 0, and no
# attention in its down blocks): the empty transformers are there, with a norm and projections.  Their float16 files of
# 545,197,729 bytes and 320 MB are twice these parameters and a header
SDXL_CONTROL = controlling(SDXL)  # 1,251,014,160 parameters
SDXL_CONTROL_MID = replace(SDXL_CONTROL, depth=(0, 0, 1), mid_depth=1, hollow=(1,))  # 272,586,000
SDXL_CONTROL_SMALL = replace(SDXL_CONTROL, depth=(0, 0, 0), mid_depth=0)  # 160,111,120
SD15_CONTROL = controlling(SD15)  # 361,279,120


class Residuals(NamedTuple):
    """What a ControlNet adds: to the bottleneck's output, and to each skip, fine to coarse."""

    h: Tensor
    skips: list[Tensor]

    def scaled(self, scale: float | Tensor) -> "Residuals":
        """All of them times a number (the conditioning scale)."""
        return Residuals(scale * self.h, [scale * skip for skip in self.skips])


def controlled(h: Tensor, skips: Sequence[Tensor], residuals: Residuals) -> tuple[Tensor, list[Tensor]]:
    """h (of `middle`) and skips of a UNet, with a ControlNet's residuals added; what `decode` then takes.

    A ValueError is raised where the ControlNet is of another kind of UNet.
    """
    pairs = list(zip([h, *skips], [residuals.h, *residuals.skips], strict=False))
    if len(skips) != len(residuals.skips) or any(a.shape[1:] != b.shape[1:] for a, b in pairs):
        a, b = ([tuple(x.shape[1:]) for x in (one[0], *one[1])] for one in ((h, skips), residuals))
        raise ValueError(f"the ControlNet is made for another UNet: its residuals are {b}, h and skips {a}")
    return h + residuals.h, [skip + r for skip, r in zip(skips, residuals.skips, strict=True)]


class ControlNet(Conditioned):
    """A UNet's encoder and bottleneck, a hint added after the first convolution, and a 1 x 1 convolution a skip."""

    def __init__(self, cfg: ControlNetConfig = SDXL_CONTROL):
        super().__init__(cfg)
        stages, widths = map(list, zip(*encoder(cfg), strict=True))
        self.enc, self.mid = nn.ModuleList(stages), bottleneck(cfg)
        self.zeros = nn.ModuleList(nn.Conv2d(ch, ch, 1) for ch in widths)
        self.zero_mid = nn.Conv2d(cfg.channels[-1], cfg.channels[-1], 1)
        self.hint = nn.ModuleList([nn.Conv2d(cfg.hint_channels, cfg.hint[0], 3, padding=1)])
        for cin, cout in zip(cfg.hint, cfg.hint[1:], strict=False):
            self.hint.append(nn.Conv2d(cin, cin, 3, padding=1))
            self.hint.append(nn.Conv2d(cin, cout, 3, stride=2, padding=1))
        self.hint.append(nn.Conv2d(cfg.hint[-1], cfg.channels[0], 3, padding=1))
        self.in_channels = cfg.in_channels
        self.hint_channels, self.factor = cfg.hint_channels, 2 ** (len(cfg.hint) - 1)

    def seen(self, hint: Tensor) -> Tensor:
        """The hint as latents are: (B, 3, 8H, 8W), in [0, 1] -> (B, C, H, W)."""
        for conv in self.hint[:-1]:
            hint = F.silu(conv(hint))
        return self.hint[-1](hint)

    def forward(self, x: Tensor, c: Cond, hint: Tensor, ops: Ops = TORCH) -> Residuals:
        """Latents (B, 4, H, W), conditioning, a hint (B, 3, 8H, 8W) in [0, 1] -> residuals.

        The conditioning is this network's own `embed`.  A ValueError is raised for shapes that do not fit.
        """
        takes(x, self.in_channels, 1)
        want = (x.shape[0], self.hint_channels, self.factor * x.shape[2], self.factor * x.shape[3])
        if tuple(hint.shape) != want:
            raise ValueError(f"the hint of x {tuple(x.shape)} is {want}; got {tuple(hint.shape)}")
        seen, skips = self.seen(hint), []
        for i, stage in enumerate(self.enc):
            x = stage(x, c, ops) if i else stage(x, c, ops) + seen
            skips.append(x)
        h = self.mid(x, c, ops)
        return Residuals(self.zero_mid(h), [zero(skip) for zero, skip in zip(self.zeros, skips, strict=True)])

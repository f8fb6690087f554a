"""Ho et al.'s DDPM UNet (2020), in the PyTorch form of the public checkpoints; the papers on h-space call it DDPM++."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Cond, Norm, Stage, Stem, ThreeLists, Up, sinusoid, widths
from .ops import Ops, Site


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    resolution: int = 256
    in_channels: int = 3
    out_channels: int = 3
    base: int = 128  # width of the stem; the time embedding has four times as many
    mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # width of each level over `base`, fine to coarse
    blocks: int = 2  # residual blocks per level (decoder: one more)
    attention: tuple[int, ...] = (16,)  # resolutions with self-attention; the bottleneck always has it
    groups: int = 32
    dropout: float = 0.0  # in training only


DDPM_256 = DDPMConfig()  # CelebA-HQ, LSUN church, bedroom, cat: 113,673,219 parameters
DDPM_CIFAR10 = DDPMConfig(resolution=32, mult=(1, 2, 2, 2), dropout=0.1)  # 35,746,307


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut."""

    def __init__(self, cin: int, cout: int, cfg: DDPMConfig, stage: str, i: int = 0):
        super().__init__()
        self.norm1 = Norm(cin, Site(stage, 3 * i, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * cfg.base, cout)
        self.norm2 = Norm(cout, Site(stage, 3 * i + 1, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.site, self.dropout = Site(stage, i, "res"), cfg.dropout

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H, W)
        h = self.conv1(self.norm1(x, ops)) + self.emb(F.silu(c.emb))[:, :, None, None]
        h = self.conv2(F.dropout(self.norm2(h, ops), self.dropout, self.training))
        return ops.add(self.site, self.skip(x), h)


class Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, channels: int, cfg: DDPMConfig, stage: str):
        super().__init__()
        self.norm = Norm(channels, Site(stage, 2, "norm"), groups=cfg.groups, eps=1e-6, silu=False)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.site = Site(stage, 0, "self")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.norm(x, ops).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (proj(y)[:, None] for proj in (self.q, self.k, self.v))  # (B, 1, N, C)
        y = self.out(ops.attend(self.site, q, k, v)[:, 0])
        return ops.add(self.site, x, y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Halve the resolution: a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DDPM(ThreeLists):
    """At 256²: 18 skips, h (B, 512, 8, 8)."""

    def __init__(self, cfg: DDPMConfig = DDPM_256):
        super().__init__()
        channels = widths(cfg.base, cfg.mult)
        self.cfg, self.in_channels, self.multiple = cfg, cfg.in_channels, 2 ** (len(channels) - 1)
        self.time = nn.Sequential(nn.Linear(cfg.base, 4 * cfg.base), nn.SiLU(), nn.Linear(4 * cfg.base, 4 * cfg.base))

        def stage(name: str, cin: int, cout: int, level: int) -> Stage:
            block = ResBlock(cin, cout, cfg, name)
            attends = cfg.resolution >> level in cfg.attention
            return Stage([block, Attention(cout, cfg, name)] if attends else [block])

        self.enc, emitted = nn.ModuleList([Stage([Stem(cfg.in_channels, cfg.base)])]), [cfg.base]
        for level, cout in enumerate(channels):
            for _ in range(cfg.blocks):
                self.enc.append(stage(f"enc.{len(self.enc)}", emitted[-1], cout, level))
                emitted.append(cout)
            if level < len(channels) - 1:
                self.enc.append(Stage([Down(cout)]))
                emitted.append(cout)

        ch = channels[-1]
        self.mid = Stage([ResBlock(ch, ch, cfg, "mid", 0), Attention(ch, cfg, "mid"), ResBlock(ch, ch, cfg, "mid", 1)])

        self.dec = nn.ModuleList()
        for level, cout in reversed(list(enumerate(channels))):
            for _ in range(cfg.blocks + 1):
                self.dec.append(stage(f"dec.{len(self.dec)}", ch + emitted.pop(), cout, level))
                ch = cout
            if level:
                self.dec[-1].append(Up(cout))  # type: ignore[operator]
        self.norm_out = Norm(ch, Site("out", 0, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, cfg.out_channels, 3, padding=1)

    def embed(self, t: Tensor) -> Cond:
        """Timesteps (B,), integers or floats in [0, 1000) -> the time embedding (B, 4 base)."""
        emb = sinusoid(t, self.cfg.base, cos_first=False, last_exponent=True)
        return Cond(self.time(emb.to(self.conv_out.weight.dtype)))

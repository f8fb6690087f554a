"""Dhariwal & Nichol's ADM UNet (2021): guided-diffusion's networks, with iDDPM's and P2's among its settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Cond, Norm, Stage, Stem, ThreeLists, Up, double, half, sinusoid, widths
from .ops import Ops, Site


@dataclass(frozen=True, kw_only=True)
class ADMConfig:
    resolution: int = 256
    in_channels: int = 3
    out_channels: int = 6  # twice in_channels: eps, then what interpolates the log variances
    base: int = 256  # the time embedding has four times as many
    mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)  # width of each level over `base`, fine to coarse
    blocks: int = 2  # residual blocks per level (decoder: one more)
    attention: tuple[int, ...] = (32, 16, 8)  # resolutions with self-attention; the bottleneck always has it
    head_dim: int | None = 64  # channels of a head; None: `heads` heads everywhere
    heads: int = 4
    classes: int | None = None
    scale_shift: bool = True  # the time embedding scales and shifts the second norm; else it is added before it
    updown: bool = True  # residual blocks change the resolution; else convolutions do
    qkv: Literal["legacy", "new"] = "legacy"  # rows of the qkv weight: (heads, 3, d) or (3, heads, d)
    resample_conv: bool = True  # without `updown`: pooling and repeating are followed by a convolution
    dropout: float = 0.0  # in training only

    def __post_init__(self):
        if self.qkv not in ("legacy", "new"):
            raise ValueError(f"qkv is 'legacy' or 'new', not {self.qkv!r}")

    @property
    def learned_sigma(self) -> bool:
        """Whether the second half of the output is about the variance (Nichol & Dhariwal 2021, eq. 15)."""
        return self.out_channels == 2 * self.in_channels


ADM_256 = ADMConfig()  # ImageNet without classes: 552,814,086 parameters
ADM_512 = ADMConfig(resolution=512, mult=(0.5, 1, 1, 2, 2, 4, 4), classes=1000)  # ImageNet: 558,997,638
LSUN = replace(ADM_256, dropout=0.1)  # bedroom, cat, horse
P2_256 = ADMConfig(base=128, blocks=1, attention=(16,))  # P2's four, iDDPM's AFHQ dogs and FFHQ: 93,563,910


class ResBlock(nn.Module):
    """norm, SiLU, [resample,] conv, norm with time, SiLU, conv, + shortcut [resampled]."""

    def __init__(
        self,
        cin: int,
        cout: int,
        cfg: ADMConfig,
        stage: str,
        i: int = 0,  # residual blocks before it in the stage
        norms: int = 0,  # and norms
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.norm1 = Norm(cin, Site(stage, norms, "norm"))
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * cfg.base, 2 * cout if cfg.scale_shift else cout)
        self.norm2 = Norm(cout, Site(stage, norms + 1, "norm"), silu=not cfg.scale_shift)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.resample, self.scale_shift, self.dropout = resample, cfg.scale_shift, cfg.dropout
        self.site = Site(stage, i, "res")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H', W')
        h, emb = self.norm1(x, ops), self.emb(F.silu(c.emb))[:, :, None, None]
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = F.silu(self.norm2(h, ops) * (1 + scale) + shift)
        else:
            h = self.norm2(h + emb, ops)
        h = self.conv2(F.dropout(h, self.dropout, self.training))
        return ops.add(self.site, self.skip(x), h)


class Attention(nn.Module):
    """Self-attention over pixels."""

    def __init__(self, channels: int, cfg: ADMConfig, stage: str):
        super().__init__()
        self.heads, rest = divmod(channels, cfg.head_dim) if cfg.head_dim else (cfg.heads, channels % cfg.heads)
        if rest:
            want = f"heads of {cfg.head_dim} channels" if cfg.head_dim else f"{cfg.heads} heads"
            raise ValueError(f"{channels} channels at {stage} do not divide into {want}")
        self.norm = Norm(channels, Site(stage, 2, "norm"), silu=False)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.legacy, self.site = cfg.qkv == "legacy", Site(stage, 0, "self")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.qkv(self.norm(x, ops).flatten(2).transpose(1, 2))  # (B, N, 3C)
        parts = (self.heads, 3, -1) if self.legacy else (3, self.heads, -1)
        q, k, v = (p.transpose(1, 2) for p in y.unflatten(2, parts).unbind(3 if self.legacy else 2))  # (B, H, N, D)
        y = self.out(ops.attend(self.site, q, k, v).transpose(1, 2).flatten(2))
        return ops.add(self.site, x, y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Halve the resolution: a strided convolution, padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:
        return self.conv(x)


class Resample(nn.Module):
    """Halve or double the resolution, and nothing else."""

    def __init__(self, resample: Callable[[Tensor], Tensor]):
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:
        return self.resample(x)


class ADM(ThreeLists):
    """At 256²: 18 skips, h (B, 1024, 8, 8); P2's: 12 skips, h (B, 512, 8, 8)."""

    def __init__(self, cfg: ADMConfig = ADM_256):
        super().__init__()
        channels = widths(cfg.base, cfg.mult)
        self.cfg, self.in_channels, self.multiple = cfg, cfg.in_channels, 2 ** (len(channels) - 1)
        self.time = nn.Sequential(nn.Linear(cfg.base, 4 * cfg.base), nn.SiLU(), nn.Linear(4 * cfg.base, 4 * cfg.base))
        self.label = nn.Embedding(cfg.classes, 4 * cfg.base) if cfg.classes else None

        def attends(level: int) -> bool:
            return cfg.resolution >> level in cfg.attention

        def stage(name: str, cin: int, cout: int, level: int) -> list[nn.Module]:
            block = ResBlock(cin, cout, cfg, name)
            return [block, Attention(cout, cfg, name)] if attends(level) else [block]

        def down(name: str, ch: int) -> nn.Module:
            if cfg.updown:
                return ResBlock(ch, ch, cfg, name, resample=half)
            return Down(ch) if cfg.resample_conv else Resample(half)

        def up(name: str, ch: int, norms: int) -> nn.Module:
            if cfg.updown:
                return ResBlock(ch, ch, cfg, name, 1, norms, resample=double)
            return Up(ch) if cfg.resample_conv else Resample(double)

        ch = channels[0]
        self.enc, emitted = nn.ModuleList([Stage([Stem(cfg.in_channels, ch)])]), [ch]
        for level, cout in enumerate(channels):
            for _ in range(cfg.blocks):
                self.enc.append(Stage(stage(f"enc.{len(self.enc)}", emitted[-1], cout, level)))
                emitted.append(cout)
            if level < len(channels) - 1:
                self.enc.append(Stage([down(f"enc.{len(self.enc)}", cout)]))
                emitted.append(cout)

        ch = channels[-1]
        self.mid = Stage([ResBlock(ch, ch, cfg, "mid"), Attention(ch, cfg, "mid"), ResBlock(ch, ch, cfg, "mid", 1, 3)])

        self.dec = nn.ModuleList()
        for level, cout in reversed(list(enumerate(channels))):
            for i in range(cfg.blocks + 1):
                name = f"dec.{len(self.dec)}"
                members, ch = stage(name, ch + emitted.pop(), cout, level), cout
                last = [up(name, ch, 2 + attends(level))] if level and i == cfg.blocks else []
                self.dec.append(Stage(members + last))
        self.norm_out = Norm(ch, Site("out", 0, "norm"))
        self.conv_out = nn.Conv2d(ch, cfg.out_channels, 3, padding=1)

    def embed(self, t: Tensor, label: Tensor | None = None) -> Cond:
        """Timesteps (B,), integers or floats in [0, 1000), and classes (B,) -> the embedding (B, 4 base).

        Without `label` no class is added, which is how the h-space papers' code runs class-conditional networks.
        A ValueError is raised for classes given to a network that has none, and for classes it does not have.
        """
        emb = sinusoid(t, self.cfg.base, cos_first=True, last_exponent=False)
        emb = self.time(emb.to(self.conv_out.weight.dtype))
        if label is None:
            return Cond(emb)
        if self.label is None:
            raise ValueError("label is for networks with classes; this one has none")
        if bool(((label < 0) | (label >= self.label.num_embeddings)).any()):
            raise ValueError(f"label is in 0...{self.label.num_embeddings - 1}; got {label.tolist()}")
        return Cond(emb + self.label(label))

"""Song et al.'s DDPM++ UNet (2021), as score_sde's `ncsnpp` builds it for CIFAR-10."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Cond, Norm, Stage, Stem, ThreeLists, double, half, sinusoid, widths
from .ops import Ops, Site


@dataclass(frozen=True, kw_only=True)
class DDPMppConfig:
    resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    base: int = 128  # width of the stem; the time embedding has four times as many
    mult: tuple[int, ...] = (1, 2, 2, 2)  # width of each level over `base`, fine to coarse
    blocks: int = 4  # residual blocks per level (decoder: one more)
    attention: tuple[int, ...] = (16,)  # resolutions with self-attention; the bottleneck always has it
    dropout: float = 0.1  # in training only


CIFAR10 = DDPMppConfig()  # 61,804,419 parameters
CIFAR10_DEEP = DDPMppConfig(blocks=8)  # 106,632,579


def norm(channels: int, site: Site, *, silu: bool = True) -> Norm:
    """Group normalisation in at most 32 groups of at least four channels."""
    return Norm(channels, site, groups=min(channels // 4, 32), eps=1e-6, silu=silu)


class ResBlock(nn.Module):
    """BigGAN's residual block: norm, SiLU, [resample,] conv, + time, norm, SiLU, conv, + shortcut; all over sqrt 2."""

    def __init__(
        self,
        cin: int,
        cout: int,
        cfg: DDPMppConfig,
        stage: str,
        i: int = 0,  # residual blocks before it in the stage
        norms: int = 0,  # and norms
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.norm1 = norm(cin, Site(stage, norms, "norm"))
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * cfg.base, cout)
        self.norm2 = norm(cout, Site(stage, norms + 1, "norm"))
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout or resample else nn.Identity()
        self.resample, self.dropout, self.site = resample, cfg.dropout, Site(stage, i, "res")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H', W')
        h = self.norm1(x, ops)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.emb(F.silu(c.emb))[:, :, None, None]
        h = self.conv2(F.dropout(self.norm2(h, ops), self.dropout, self.training))
        return ops.add(self.site, self.skip(x), h) * 0.5**0.5


class Attention(nn.Module):
    """Self-attention over pixels, one head; the sum with its input over sqrt 2."""

    def __init__(self, channels: int, stage: str):
        super().__init__()
        self.norm = norm(channels, Site(stage, 2, "norm"), silu=False)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.site = Site(stage, 0, "self")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.norm(x, ops).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (proj(y)[:, None] for proj in (self.q, self.k, self.v))  # (B, 1, N, C)
        y = self.out(ops.attend(self.site, q, k, v)[:, 0])
        return ops.add(self.site, x, y.transpose(1, 2).unflatten(2, x.shape[2:])) * 0.5**0.5


class DDPMpp(ThreeLists):
    """On CIFAR-10: 20 skips (deep: 36), h (B, 256, 4, 4).  The score is -eps / sigma(t), t running over [0, 999]."""

    def __init__(self, cfg: DDPMppConfig = CIFAR10):
        super().__init__()
        channels = widths(cfg.base, cfg.mult)
        self.cfg, self.in_channels, self.multiple = cfg, cfg.in_channels, 2 ** (len(channels) - 1)
        self.time = nn.Sequential(nn.Linear(cfg.base, 4 * cfg.base), nn.SiLU(), nn.Linear(4 * cfg.base, 4 * cfg.base))

        def attends(level: int) -> bool:
            return cfg.resolution >> level in cfg.attention

        self.enc, emitted = nn.ModuleList([Stage([Stem(cfg.in_channels, cfg.base)])]), [cfg.base]
        for level, cout in enumerate(channels):
            for _ in range(cfg.blocks):
                name = f"enc.{len(self.enc)}"
                block = ResBlock(emitted[-1], cout, cfg, name)
                self.enc.append(Stage([block, Attention(cout, name)] if attends(level) else [block]))
                emitted.append(cout)
            if level < len(channels) - 1:
                self.enc.append(Stage([ResBlock(cout, cout, cfg, f"enc.{len(self.enc)}", resample=half)]))
                emitted.append(cout)

        ch = channels[-1]
        self.mid = Stage([ResBlock(ch, ch, cfg, "mid"), Attention(ch, "mid"), ResBlock(ch, ch, cfg, "mid", 1, 3)])

        self.dec = nn.ModuleList()
        for level, cout in reversed(list(enumerate(channels))):
            for i in range(cfg.blocks + 1):
                name = f"dec.{len(self.dec)}"
                members: list[nn.Module] = [ResBlock(ch + emitted.pop(), cout, cfg, name)]
                ch = cout
                if i == cfg.blocks and attends(level):
                    members.append(Attention(ch, name))
                if i == cfg.blocks and level:
                    members.append(ResBlock(ch, ch, cfg, name, 1, 2 + attends(level), resample=double))
                self.dec.append(Stage(members))
        self.norm_out = norm(ch, Site("out", 0, "norm"))
        self.conv_out = nn.Conv2d(ch, cfg.out_channels, 3, padding=1)

    def embed(self, t: Tensor) -> Cond:
        """Timesteps (B,), integers or floats in [0, 999] (999 times the time of the VP SDE) -> (B, 4 base)."""
        emb = sinusoid(t, self.cfg.base, cos_first=False, last_exponent=True)
        return Cond(self.time(emb.to(self.conv_out.weight.dtype)))

"""What every UNet here is built from: the contract of three lists, and the modules that speak the verbs."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import TORCH, Ops, Site


class Words(NamedTuple):
    """What a network has read of a text once, for any number of timesteps: keys and values of every attention to it."""

    read: Mapping[str, tuple[Tensor, Tensor]]  # by stage and depth, "dec.1.3"; 2 x (B - silent, heads, M, D)
    silent: int = 0  # rows in front whose text is zeros: they get the last projection's bias, whatever they ask

    def last(self, n: int) -> "Words":
        """Those of the last n rows, none of them silent."""
        return Words({name: (k[-n:], v[-n:]) for name, (k, v) in self.read.items()})


class Cond(NamedTuple):
    """What conditions every block: the time embedding, and text tokens where a network takes any."""

    emb: Tensor  # (B, E)
    context: Tensor | None = None  # (B, M, C)
    words: Words | None = None  # in the place of the context, where that has been read

    @property
    def text(self) -> Tensor | Words | None:
        """What attentions to the text are given."""
        return self.context if self.words is None else self.words


class ThreeLists(nn.Module):
    """The contract: `enc` emits one skip a stage, `mid` returns h, `dec` takes one skip a stage, last one first."""

    enc: nn.ModuleList
    mid: "Stage"
    dec: nn.ModuleList
    norm_out: "Norm"
    conv_out: nn.Conv2d
    in_channels: int
    multiple: int  # H and W are multiples of this; 1: they are halved to what is next above the half

    def embed(self, t: Tensor) -> Cond:
        """Timesteps (B,) -> what every block is conditioned on; each family says what else it takes."""
        raise TypeError(f"{type(self).__name__} has no embed")

    def encode(self, x: Tensor, c: Cond, ops: Ops = TORCH) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, H, W) -> the input of `middle`, and one skip per encoder stage, fine to coarse.

        A ValueError is raised where C is not the network's, or H or W is no multiple of `multiple`.
        """
        takes(x, self.in_channels, self.multiple)
        skips: list[Tensor] = []
        for stage in self.enc:
            x = stage(x, c, ops)
            skips.append(x)
        return x, skips

    def middle(self, h: Tensor, c: Cond, ops: Ops = TORCH) -> Tensor:
        """The bottleneck.  What it returns is h-space (Kwon et al. 2023)."""
        return self.mid(h, c, ops)

    def decode(self, h: Tensor, skips: list[Tensor], c: Cond, ops: Ops = TORCH) -> Tensor:
        """h, skips -> the network's output (B, C, H, W).  Stage i of the decoder joins skip n-1-i."""
        if len(skips) != len(self.dec):
            raise ValueError(f"decode takes {len(self.dec)} skips, one per decoder stage; got {len(skips)}")
        sizes = [(skip.shape[2], skip.shape[3]) for skip in skips[:-1]]  # what the stages before these skips come to
        for i, (stage, skip) in enumerate(zip(self.dec, reversed(skips), strict=True)):
            h = stage(ops.join(Site(f"dec.{i}", 0, "join"), h, skip), c, ops, sizes.pop() if sizes else None)
        return self.conv_out(self.norm_out(h, ops))

    def predict(self, h: Tensor, skips: list[Tensor], c: Cond, x: Tensor, t: Tensor, ops: Ops = TORCH) -> Tensor:
        """h, skips of x (B, C, H, W) at timesteps t (B,) -> eps (B, C, H, W): `decode` without a learned variance."""
        return self.decode(h, skips, c, ops)[:, : x.shape[1]]

    def forward(self, x: Tensor, c: Cond, ops: Ops = TORCH) -> Tensor:
        """x (B, C, H, W) -> eps, or eps and the variance channels where the network has learned them."""
        h, skips = self.encode(x, c, ops)
        return self.decode(self.middle(h, c, ops), skips, c, ops)


class Stage(nn.ModuleList):
    """The modules between two skips, applied in order; an `Up` among them is told the `size` of the next skip."""

    def forward(self, x: Tensor, c: Cond, ops: Ops, size: tuple[int, int] | None = None) -> Tensor:
        for module in self:
            x = module(x, c, ops, size) if isinstance(module, Up) else module(x, c, ops)
        return x


def takes(x: Tensor, channels: int, multiple: int) -> None:
    """Raises ValueError where x is not (B, channels, H, W) with H and W multiples of `multiple`."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:] or x.shape[2] % multiple or x.shape[3] % multiple:
        want = f"(B, {channels}, H, W)" + (f" with H and W multiples of {multiple}" if multiple > 1 else "")
        raise ValueError(f"the network takes x {want}; got {tuple(x.shape)}")


class Stem(nn.Conv2d):
    """The first convolution."""

    def __init__(self, cin: int, cout: int):
        super().__init__(cin, cout, 3, padding=1)

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class Norm(nn.Module):
    """Group normalisation with SiLU folded in where the next thing is a convolution."""

    def __init__(self, channels: int, site: Site, *, groups: int = 32, eps: float = 1e-5, silu: bool = True):
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups of a group normalisation")
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.site, self.groups, self.eps, self.silu = site, groups, eps, silu

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.group_norm(self.site, x, self.weight, self.bias, self.groups, self.eps, self.silu)


def half(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 pixels.  (B, C, H, W) -> (B, C, H / 2, W / 2)."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Every pixel four times.  (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Up(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution.

    What was n pixels wide before its halving, n odd, would come to n + 1; `size` is what it shall come to, and the last
    row or column is left out before the convolution.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, c: Cond, ops: Ops, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            return self.conv(double(x))
        if not all(2 * n - 1 <= side <= 2 * n for n, side in zip(x.shape[2:], size, strict=True)):
            raise ValueError(f"a skip of {size} cannot follow what is doubled from {tuple(x.shape[2:])}")
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # pixel i is i // 2 in either case


def widths(base: int, mult: tuple[float, ...]) -> tuple[int, ...]:
    """Channels per level, fine to coarse."""
    return tuple(int(base * m) for m in mult)


def sinusoid(t: Tensor, dim: int, *, cos_first: bool, last_exponent: bool) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim), in float64 for float64 t, else in float32.

    Frequencies fall from 1 to 1/10000: `last_exponent` includes 1/10000 (Ho et al. 2020), otherwise it is the
    first one left out (Dhariwal & Nichol 2021).  An odd `dim` is padded with one zero.  A ValueError is raised
    where t is not (B,).
    """
    if t.ndim != 1:
        raise ValueError(f"t is (B,), one timestep an image; got {tuple(t.shape)}")
    half = dim // 2
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    exponent = torch.arange(half, device=t.device, dtype=dtype) / (half - 1 if last_exponent else half)
    args = t.to(dtype)[:, None] * torch.exp(-math.log(10000) * exponent)
    parts = [args.cos(), args.sin()] if cos_first else [args.sin(), args.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


def denoiser(
    unet: ThreeLists,
    cond: Callable[[Tensor], Cond] | None = None,
    ops: Ops = TORCH,
    *,
    variance: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network as samplers see it: (x (B, C, H, W), t (B,)) -> eps (B, C, H, W).

    `cond` makes the conditioning from t; the network's own `embed` by default (for a label: `partial(unet.embed,
    label=y)`).  The channels of a learned variance are left out unless `variance`.
    """
    embed = cond or unet.embed

    def eps(x: Tensor, t: Tensor) -> Tensor:
        out = unet(x, embed(t), ops)
        return out if variance else out[:, : x.shape[1]]

    return eps

"""Stable Diffusion's autoencoder (Rombach et al. 2022): pictures to latents an eighth as large, and back."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Norm, double
from .ops import TORCH, Ops, Site
from .swap import swapped

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level, fine to coarse
    blocks: int = 2  # residual blocks per level (decoder: one more)
    groups: int = 32
    scaling: float = 0.13025  # latents are this times what the encoder gives
    upcast: bool = True  # activations overflow float16 (diffusers' force_upcast): float32 is used in its place


SDXL_VAE = VAEConfig()  # 83,653,863 parameters
SDXL_VAE_FP16_FIX = replace(SDXL_VAE, upcast=False)  # the same latents, smaller activations
SD_VAE = replace(SDXL_VAE, scaling=0.18215, upcast=False)  # Stable Diffusion 1 and 2


class NonFiniteError(ValueError):
    """The place where NaN or infinity came up first: a module of the autoencoder, or what went in."""


class Moments(NamedTuple):
    """The encoder's Gaussian over latents, before scaling."""

    mean: Tensor  # (B, L, H / 8, W / 8)
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class Stem(nn.Conv2d):
    """A first convolution."""

    def __init__(self, cin: int, cout: int):
        super().__init__(cin, cout, 3, padding=1)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + shortcut."""

    def __init__(self, cin: int, cout: int, cfg: VAEConfig, stage: str, i: int = 0, norms: int = 0):
        super().__init__()
        self.norm1 = Norm(cin, Site(stage, norms, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = Norm(cout, Site(stage, norms + 1, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.site = Site(stage, i, "res")

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H, W)
        return ops.add(self.site, self.skip(x), self.conv2(self.norm2(self.conv1(self.norm1(x, ops)), ops)))


class Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, channels: int, cfg: VAEConfig, stage: str):
        super().__init__()
        self.norm = Norm(channels, Site(stage, 2, "norm"), groups=cfg.groups, eps=1e-6, silu=False)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.site = Site(stage, 0, "self")

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.norm(x, ops).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (proj(y)[:, None] for proj in (self.q, self.k, self.v))  # (B, 1, N, C)
        y = self.out(ops.attend(self.site, q, k, v)[:, 0])
        return ops.add(self.site, x, y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Halve the resolution: a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return self.conv(double(x))


class Out(nn.Module):
    """norm, SiLU, conv."""

    def __init__(self, cin: int, cout: int, cfg: VAEConfig, stage: str):
        super().__init__()
        self.norm = Norm(cin, Site(stage, 0, "norm"), groups=cfg.groups, eps=1e-6)
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return self.conv(self.norm(x, ops))


class Stage(nn.ModuleList):
    """Modules applied in order."""

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        for module in self:
            x = module(x, ops)
        return x


def middle(channels: int, cfg: VAEConfig, stage: str) -> Stage:
    """A residual block, attention, a residual block."""
    blocks = (ResBlock(channels, channels, cfg, stage, i, 3 * i) for i in range(2))
    return Stage([next(blocks), Attention(channels, cfg, stage), next(blocks)])


class VAE(nn.Module):
    """Two lists: `enc` (stem, levels, middle, out) and `dec` (stem, middle, levels, out)."""

    def __init__(self, cfg: VAEConfig = SDXL_VAE):
        super().__init__()
        self.cfg, self.multiple = cfg, 2 ** (len(cfg.channels) - 1)
        last, ch, z = len(cfg.channels) - 1, cfg.channels[0], cfg.latent_channels
        self.enc = nn.ModuleList([Stage([Stem(cfg.in_channels, ch)])])
        for level, cout in enumerate(cfg.channels):
            name = f"enc.{level + 1}"
            widths = [ch, *[cout] * cfg.blocks]
            blocks = [ResBlock(widths[i], cout, cfg, name, i, 2 * i) for i in range(cfg.blocks)]
            self.enc.append(Stage([*blocks, Down(cout)] if level < last else blocks))
            ch = cout
        self.enc.append(middle(ch, cfg, f"enc.{last + 2}"))
        self.enc.append(Stage([Out(ch, 2 * z, cfg, f"enc.{last + 3}")]))
        self.quant, self.post_quant = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

        self.dec = nn.ModuleList([Stage([Stem(z, ch)]), middle(ch, cfg, "dec.1")])
        for level, cout in reversed(list(enumerate(cfg.channels))):
            name = f"dec.{last - level + 2}"
            widths = [ch, *[cout] * cfg.blocks]
            blocks = [ResBlock(widths[i], cout, cfg, name, i, 2 * i) for i in range(cfg.blocks + 1)]
            self.dec.append(Stage([*blocks, Up(cout)] if level else blocks))
            ch = cout
        self.dec.append(Stage([Out(ch, cfg.in_channels, cfg, f"dec.{last + 3}")]))

    def encode(self, x: Tensor, ops: Ops = TORCH, *, checked: bool = False) -> Moments:
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log variance (B, 4, H / 8, W / 8), before scaling.

        A ValueError is raised where x has other channels, or H or W is no multiple of 8, and, if `checked`, a
        NonFiniteError that names the first module whose output has NaN or infinity in it.
        """
        m = self.multiple
        if x.ndim != 4 or x.shape[1] != self.cfg.in_channels or x.shape[2] % m or x.shape[3] % m or 0 in x.shape[2:]:
            want = f"(B, {self.cfg.in_channels}, H, W) with H and W multiples of {m}"
            raise ValueError(f"the autoencoder takes pictures {want}; got {tuple(x.shape)}")
        x = through(named("enc", self.enc), x, ops, "the picture" if checked else None)
        mean, logvar = self.quant(x).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor, ops: Ops = TORCH, *, checked: bool = False) -> Tensor:
        """Latents over `scaling` (B, 4, H, W) -> pictures (B, 3, 8H, 8W) about [-1, 1], not clamped.

        A ValueError is raised where z has other channels, and, if `checked`, a NonFiniteError as in `encode`.
        """
        if z.ndim != 4 or z.shape[1] != self.cfg.latent_channels or 0 in z.shape[2:]:
            raise ValueError(f"latents are (B, {self.cfg.latent_channels}, H, W); got {tuple(z.shape)}")
        if checked:
            finite("the latents", z)
        return through(named("dec", self.dec), self.post_quant(z), ops, "post_quant" if checked else None)

    def latents(self, x: Tensor, noise: Tensor | None = None, ops: Ops = TORCH) -> Tensor:
        """Pictures in [-1, 1] -> scaled latents, as a UNet takes them: the mean, or a sample where noise is given.

        They are in x's type, computed as `wide_enough` says.
        """

        floating("pictures, in [-1, 1],", x)

        def run() -> Tensor:
            moments = self.encode(x.to(next(self.parameters())), ops, checked=True)
            return self.cfg.scaling * (moments.mean if noise is None else moments.sample(noise.to(moments.mean)))

        return self.wide_enough(run).to(x.dtype)

    def pictures(self, latents: Tensor, ops: Ops = TORCH) -> Tensor:
        """Scaled latents -> pictures about [-1, 1], not clamped, in the latents' type, as `wide_enough` says."""

        def run() -> Tensor:
            return self.decode(self.unscaled(latents), ops, checked=True)

        return self.wide_enough(run).to(latents.dtype)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Scaled latents -> what `decode` takes, in the parameters' type and place."""
        floating("latents", latents)
        p = next(self.parameters())
        return (latents.to(p.device, torch.promote_types(latents.dtype, p.dtype)) / self.cfg.scaling).to(p)

    def wide_enough(self, run: Callable[[], T]) -> T:
        """`run()`, in float32 instead of float16 where that is too narrow for the activations.

        It is where the configuration says so (`upcast`); else float16 is tried, and where `run` raises NonFiniteError a
        warning names the place and float32 is taken.  In any other type `run` is called as it is.  The parameters
        are float32 copies meanwhile, which take 4 bytes each.
        """
        if next(self.parameters()).dtype != torch.float16:
            return run()
        if not self.cfg.upcast:
            try:
                return run()
            except NonFiniteError as e:
                warnings.warn(f"{e}; float32 is taken", stacklevel=3)
        with swapped(Tensor.float, self):
            return run()


def named(side: str, stages: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """The modules of a list's stages under their names: "dec.3.1"."""
    return [(f"{side}.{i}.{j}", module) for i, stage in enumerate(stages) for j, module in enumerate(stage)]  # type: ignore[arg-type]


def through(modules: Sequence[tuple[str, nn.Module]], x: Tensor, ops: Ops, name: str | None) -> Tensor:
    """x through modules, one after the other.

    If it has a name, NaN and infinity in what comes out are an error that names where they came up: NaN stays NaN
    behind a norm, so that one look at the end is enough, and only then is every module looked at.
    """
    y = x
    for _, module in modules:
        y = module(y, ops)
    if name is not None and not bool(torch.isfinite(y).all()):
        finite(name, x)
        for at, module in modules:
            x = module(x, ops)
            finite(at, x)
    return y


def floating(name: str, x: Tensor) -> None:
    """Raises ValueError for what is no tensor of a floating type."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} are a tensor of a floating type, not {kind}")


def finite(name: str, x: Tensor) -> None:
    """Raises NonFiniteError that names x, if NaN or infinity is in it."""
    if not bool((good := torch.isfinite(x)).all()):
        bad, kind = x.numel() - int(good.sum()), str(x.dtype).removeprefix("torch.")
        cure = "compute it in bfloat16 or float32" if x.dtype == torch.float16 else "its input or weights are at fault"
        raise NonFiniteError(f"{bad} of {x.numel()} values of {name} are not finite in {kind}: {cure}")

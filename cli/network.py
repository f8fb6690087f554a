"""From --model and its companions to a network that runs."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..methods.taps import Embed
from ..model import load as model_load
from ..model.blocks import Cond, ThreeLists, denoiser
from ..model.ops import TORCH, Ops
from ..samplers.parameterisation import Denoise
from ..samplers.schedule import Schedule, cosine, linear
from ..weights import load as weights_load
from .errors import CommandError


class Cast(ThreeLists):
    """A network that computes in its own dtype between float32 pictures and float32 eps."""

    def __init__(self, unet: ThreeLists):
        super().__init__()
        self.unet, self.cfg, self.dtype = unet, unet.cfg, next(unet.parameters()).dtype
        self.in_channels, self.multiple = unet.in_channels, unet.multiple

    def embed(self, t: Tensor, label: Tensor | None = None) -> Cond:
        return self.unet.embed(t) if label is None else self.unet.embed(t, label)  # type: ignore[call-arg]

    def encode(self, x: Tensor, c: Cond, ops: Ops = TORCH) -> tuple[Tensor, list[Tensor]]:
        return self.unet.encode(x.to(self.dtype), c, ops)

    def middle(self, h: Tensor, c: Cond, ops: Ops = TORCH) -> Tensor:
        return self.unet.middle(h, c, ops)

    def decode(self, h: Tensor, skips: list[Tensor], c: Cond, ops: Ops = TORCH) -> Tensor:
        return self.unet.decode(h, skips, c, ops).float()


@dataclass(frozen=True)
class Loaded:
    """A network on its device, and who it is."""

    unet: ThreeLists
    weights: dict[str, str]  # what the records of pictures say of it
    side: int
    channels: int
    learned_sigma: bool
    schedule: Schedule
    embed: Embed
    device: torch.device
    dtype: torch.dtype  # of pictures and walks

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x."""
        return self.channels, self.side, self.side

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> x_0, of which walks are."""
        return pictures

    def decode(self, x: Tensor) -> Tensor:
        """x_0 -> pictures."""
        return x

    @property
    def unguided(self) -> tuple[ThreeLists, Embed]:
        """The network without guidance, and what conditions it."""
        return self.unet, self.embed

    def denoise(self, *, variance: bool = False) -> Denoise:
        """The network as samplers see it."""
        return denoiser(self.unet, self.embed, variance=variance)


def device_of(name: str) -> torch.device:
    """A device by name, if it is there.  Raises CommandError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        raise CommandError(f"there is no device {name!r} here: try cpu") from None
    if device.type == "meta":
        raise CommandError("a meta device computes nothing: try cpu")
    return device


def loaded(args: argparse.Namespace) -> Loaded:
    """The network that the options name, in evaluation mode and without gradients."""
    device, dtype = device_of(args.device), getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {"resolution": args.resolution} if args.resolution else {}
    network = weights_load.load(args.model, file=args.file, config=args.config, **given)
    unet = model_load.build(network.family, network.config, network.tensors, dtype=dtype, device=device)
    cfg: Any = unet.cfg
    embed: Embed = unet.embed
    if args.label is not None:
        if getattr(cfg, "classes", None) is None:
            raise CommandError(f"{args.model} has no classes: leave out --label")
        if args.label >= cfg.classes:
            raise CommandError(f"{args.model} has classes 0 ... {cfg.classes - 1}; got --label {args.label}")
        embed = partial(labelled, unet, args.label)
    return Loaded(
        unet=unet if dtype in (torch.float32, torch.float64) else Cast(unet),
        weights={
            "model": args.model, "file": network.path.name, "layout": network.layout, "family": network.family,
            "sha256": network.sha256,
        },
        side=cfg.resolution,
        channels=cfg.in_channels,
        learned_sigma=cfg.out_channels == 2 * cfg.in_channels,
        schedule=(cosine if args.schedule == "cosine" else linear)(),
        embed=embed,
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip


def labelled(unet: ThreeLists, label: int, t: Tensor) -> Cond:
    """The conditioning of one class."""
    return unet.embed(t, torch.full((len(t),), label, device=t.device))  # type: ignore[call-arg]

"""A latent, text-conditioned model as the network of the h-space commands, which are those of pixel networks."""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..methods import text_to_image as t2i
from ..methods.guided import Guided
from ..methods.prompt import encode, score_ids, size_ids
from ..methods.taps import Embed
from ..model.blocks import ThreeLists
from ..model.components import Components
from ..weights.load import embedded
from . import latents, network
from . import options as shared
from .errors import CommandError


@dataclass(frozen=True)
class Loaded(network.Loaded):
    """Pictures are walked with as latents, h is that of a UNet which one prompt conditions."""

    parts: Components
    latents: latents.Loaded
    plain: Guided  # at guidance 1

    @property
    def unguided(self) -> tuple[ThreeLists, Embed]:
        return self.plain, self.plain.embed

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.side // self.parts.factor
        return self.parts.vae.cfg.latent_channels, side, side

    def encode(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.latents.encoded(one).to(pictures) for one in pictures.split(1)])

    def decode(self, x: Tensor) -> Tensor:
        return self.latents.pictures(x)


def options(p: argparse.ArgumentParser) -> None:
    """The options of text-conditioned models, in a command that takes pixel networks too."""
    text = p.add_argument_group("Stable Diffusion XL, 1 and 2")
    text.add_argument("--prompt", help="what the pictures show (default: nothing; needed for repositories)")
    text.add_argument("--negative", help="what guidance leads away from (default: nothing)")
    text.add_argument("--guidance", type=shared.real(0, 100), default=1.0,
                      help="of every walk, up and down; 1 is none, and comes back best (default: 1)")  # fmt: skip
    latents.parts(text)


def loaded(args: argparse.Namespace) -> network.Loaded:
    """The network that the options name, of either kind."""
    if args.prompt is None and not latents.reads_text(args):
        for name in ("negative", "variant", "tokenizer", "vae", "lora", "prediction", "tile", "literal"):
            if getattr(args, name):
                raise CommandError(f"--{name} is for models that read text: give --prompt, which may be empty")
        return network.loaded(args)
    if args.model in embedded():
        raise CommandError(f"--prompt is for models that read text; {args.model} draws without: leave it out")
    for name in ("label", "config"):
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} is for pixel networks; {args.model} reads text")
    found = latents.loaded(argparse.Namespace(**vars(args) | {"low_vram": False, "control_model": None}))
    parts, side = found.parts, args.resolution or found.says.side
    if parts.unet.in_channels != parts.vae.cfg.latent_channels:
        raise CommandError(f"{args.model} is for inpainting: h-space walks take a model of text to image")
    t2i.latent_size(parts, (side, side))
    positive = encode(parts, args.prompt or "")
    zero = args.negative is None and found.says.zero_negative
    negative = positive.zeros() if zero else encode(parts, args.negative or "")
    ids = partial(score_ids if found.says.aesthetic else size_ids, (side, side))
    low = score_ids((side, side), score=2.5) if parts.xl and found.says.aesthetic else None
    unet, plain = (
        Guided(
            parts.unet, positive, negative, schedule=found.schedule, ids=ids() if parts.xl else None,
            negative_ids=low, prediction=found.says.prediction or "eps",  # type: ignore[arg-type]
            guidance=guidance,
        )
        for guidance in (args.guidance, 1.0)
    )  # fmt: skip
    return Loaded(
        unet=unet,
        weights=found.weights | {"layout": "latent", "family": "unet"},
        side=side,
        channels=3,
        learned_sigma=False,
        schedule=found.schedule,
        embed=unet.embed,
        device=found.device,
        dtype=torch.float64 if args.dtype == "float64" else torch.float32,
        parts=parts,
        latents=found,
        plain=plain,
    )

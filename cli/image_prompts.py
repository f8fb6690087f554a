"""From the options of image prompts to adapters, what they see of pictures, and what the UNet speaks."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.controlnet import between
from ..methods.instant_style import (
    ImagePrompt,
    Pictures,
    averaged,
    content,
    features,
    image_prompt,
    ranged,
    subtracted,
)
from ..methods.prompt import encode
from ..methods.scales import Scales
from ..model.clip import VisionTower
from ..model.image_prompt import IPAdapter
from ..model.latent import build
from ..model.ops import TORCH, Ops
from ..model.pixels import clip_pixels
from ..samplers.parameterisation import Denoise
from ..weights import ip_adapter, latent
from ..weights.hub import is_repo
from ..weights.load import Network, find
from . import images, latents
from .draw import Around
from .errors import CommandError
from .image_options import H, check, pairs, placed, shared, weighed
from .session import Session

ENCODERS = {1280: "ip-adapter-encoder-bigg", 1024: "ip-adapter-encoder-h"}  # of the catalogue, by what is read


@dataclass(frozen=True)
class Loaded(latents.Loaded):
    """A model with adapters, an image encoder for each, and a text tower of one's own for --subtract."""

    adapters: tuple[IPAdapter, ...]
    encoders: tuple[Network, ...]
    text: Network | None


@dataclass(frozen=True)
class Shown:
    """One adapter, what it makes of its pictures, where and how much, and masks (1, n, H, W) of the pictures.

    With --each there is a row for each picture, (n, 1, ...), and what is drawn takes them one after the other.
    """

    adapter: IPAdapter
    pictures: Pictures
    scale: Scales
    masks: Tensor | None
    steps: tuple[float, float] | None  # fractions of the path

    def prompt(
        self,
        net: Loaded,
        size: tuple[int, int],
        rows: Sequence[int],
        path: Sequence[float],
        strength: Tensor | None = None,
    ) -> ImagePrompt:
        """For some of the pictures that are drawn, of a size in pixels; `path` is the timesteps that run."""
        at = torch.tensor([i % len(self.pictures.tokens) for i in rows], device=self.pictures.tokens.device)
        masks = self.masks if self.masks is None or len(self.masks) == 1 else self.masks[at]
        first, last = (None, None) if self.steps is None else between(path, *self.steps)
        latents = (size[0] // net.parts.factor, size[1] // net.parts.factor)
        made = image_prompt(self.adapter, net.parts.unet.cfg, Pictures(*(t[at] for t in self.pictures)), self.scale,
                            strength=strength, masks=masks, size=latents, first=first, last=last)  # fmt: skip
        if not all(bool(torch.isfinite(t).all()) for term in made.terms.values() for t in (term.k, term.v)):
            raise CommandError("what the adapter makes of the pictures is not finite: its weights or its encoder's are "
                               "damaged, or --dtype is too narrow for them")  # fmt: skip
        return made


def loaded(args: argparse.Namespace) -> Loaded:
    """The model, the adapters and the encoders that the options name, each checked against the others."""
    check(args)
    if not args.adapter:
        return Loaded(**vars(latents.loaded(args)), adapters=(), encoders=(), text=None)
    nets = [ip_adapter.load(source, file=file) for source, file in map(in_repo, args.adapter)]
    eyes = args.image_encoder or [published(net) for net in nets]
    towers = [part(eye, "image_encoder") for eye in eyes]
    towers = towers * len(nets) if len(towers) == 1 else towers
    text = part(args.subtract_encoder, "text_encoder") if args.subtract_encoder else None
    base = latents.loaded(args)
    kind = next(base.parts.unet.parameters())
    adapters, files = [], dict[str, str]()
    for i, (net, tower) in enumerate(zip(nets, towers, strict=True)):
        mixed = len({t.dtype for t in net.tensors.values()}) > 1
        adapter = build(net.family, net.config, net.tensors, dtype=kind.dtype if mixed else None)
        fits(adapter, tower, base, args.adapter[i])
        adapter.proj.to(device=kind.device, dtype=kind.dtype)  # the rest stays in its file
        adapters.append(adapter)
        files |= {f"adapter {i + 1}": net.sha256, f"image encoder {i + 1}": tower.sha256}
    if text is not None:
        files["text encoder of --subtract"] = text.sha256
    digests = base.weights["parts"] | files
    whole = hashlib.sha256("".join([base.weights["sha256"], *files.values()]).encode()).hexdigest()
    fields: dict[str, Any] = vars(base) | {"weights": base.weights | {"parts": digests, "sha256": whole}}
    return Loaded(**fields, adapters=tuple(adapters), encoders=tuple(towers), text=text)


def fits(adapter: IPAdapter, tower: Network, base: latents.Loaded, name: str) -> None:
    """Raises CommandError for a model or an image encoder that an adapter was not trained with."""
    meta = {key: torch.empty_like(t, device="meta") for key, t in tower.tensors.items()}
    try:
        adapter.fits(base.parts.unet.cfg)
    except ValueError as e:
        raise CommandError(f"{name}: {e}") from e
    try:
        adapter.fits(base.parts.unet.cfg, build(tower.family, tower.config, meta))
    except ValueError as e:
        raise CommandError(f"{name} and {tower.path}: {e}") from e


def in_repo(name: str) -> tuple[str, str | None]:
    """OWNER/NAME:FILE of the Hub -> both; anything else as it is."""
    repo, colon, file = name.partition(":")
    return (repo, file) if colon and file and is_repo(repo) and not Path(name).exists() else (name, None)


def published(net: Network) -> str:
    """The catalogue's name of the image encoder that an adapter reads.  Raises CommandError for others."""
    reads = net.config["reads"]
    reads = 1024 if net.config["kind"] != "linear" and reads == 1280 else reads  # ViT-H's states are so wide
    if reads not in ENCODERS:
        raise CommandError(f"no published image encoder gives {reads} numbers: name one with --image-encoder")
    return ENCODERS[reads]


def part(source: str, what: str) -> Network:
    """A tower of CLIP's from a file, a folder, a name of the catalogue or a repository."""
    path = Path(source).expanduser()
    net = latent.load(path, what) if path.exists() else latent.read(find(*in_repo(source)), what)
    if net.family != {"image_encoder": "clip_vision", "text_encoder": "clip_text"}[what]:
        raise CommandError(f"{source} is of the kind {net.family}: a tower of CLIP's for "
                           f"{'pictures' if what == 'image_encoder' else 'text'} fits there")  # fmt: skip
    return net


def shown(args: argparse.Namespace, session: Session, net: Loaded, size: tuple[int, int]) -> list[Shown]:
    """What every adapter sees, computed once.  Raises ValueError for what does not fit the model."""
    k = len(net.adapters)
    if not k:
        return []
    shares = shared(args, k)
    masks = masked(args, session, size)
    spans = [None] * k if not args.range else pairs(args.range, k)
    out: list[Shown] = []
    for i, (adapter, encoder, mine) in enumerate(zip(net.adapters, net.encoders, shares, strict=True)):
        many = 1 if args.average is not None or args.each else len(mine)
        here = None if masks is None else masks[:, mine]
        scale = placed(args, net.parts.unet.cfg, i, k, many if here is not None else None)
        kind, at = next(net.parts.unet.parameters()).dtype, next(net.parts.unet.parameters()).device
        tower = build(encoder.family, encoder.config, encoder.tensors, dtype=kind, device=at)
        with net.on(tower, adapter.proj):
            states = features(adapter, tower, pixels(session, [args.style_image[j] for j in mine], tower, args, net))
            if args.average is not None:
                states = averaged(states, args.average or None)
            states = subtracted(adapter, states, contents(args, net))
            nothing = adapter.nothing(tower)
            if args.negative_image:
                nothing = features(adapter, tower, pixels(session, [args.negative_image], tower, args, net))
            tokens, none = adapter(states), adapter(nothing)[None]
            pictures = Pictures(tokens[None], none)
            if args.each:
                pictures = Pictures(tokens[:, None], none.expand(len(tokens), -1, -1, -1))
                here = None if here is None else here.transpose(0, 1)
        out.append(Shown(adapter, pictures, scale, None if here is None else here.to(net.device), spans[i]))
    return out


def pixels(session: Session, names: Sequence[str], tower: VisionTower, args: argparse.Namespace, net: Loaded) -> Tensor:
    """Picture files as the encoder takes them, (n, 3, side, side)."""
    pictures = [images.decoded(session.read(name), name) for name in names]
    return torch.cat([clip_pixels(p, tower.cfg.size, squash=args.squash) for p in pictures]).to(net.device)


def contents(args: argparse.Namespace, net: Loaded) -> list[tuple[Tensor, float]]:
    """The embeddings of the texts of --subtract, each with its weight."""
    found = []
    for said in args.subtract or ():
        text, weight = weighed(said)
        if net.text is not None:
            kind = next(net.parts.unet.parameters())
            tower = build(net.text.family, net.text.config, net.text.tensors, dtype=kind.dtype, device=kind.device)
            tokens = next((t for t in net.parts.tokenizers if t.size == tower.cfg.vocabulary), None)
            if tokens is None:
                raise CommandError(f"{args.subtract_encoder} has {tower.cfg.vocabulary} tokens, the model's tokenisers "
                                   "have others: it is no tower of theirs")  # fmt: skip
            with net.on(tower):
                found.append((content(tower, tokens, text), weight))
            continue
        with net.on(*net.parts.towers):
            pooled = encode(net.parts, text).pooled
        if pooled is None:
            raise CommandError("--subtract: the model's own text tower does not share a space with pictures: give "
                               f"--subtract-encoder, the text tower of the encoder's CLIP (for ViT-H {H})")  # fmt: skip
        found.append((pooled, weight))
    return found


def masked(args: argparse.Namespace, session: Session, size: tuple[int, int]) -> Tensor | None:
    """The masks of the pictures, (1, n, H, W), 0 or 1."""
    if not args.style_mask:
        return None
    rows = [images.filled(images.decoded(session.read(name), name), size) for name in args.style_mask]
    found = torch.cat([(images.to_mask(row) >= 0.5).float() for row in rows])[None]
    for name, mask in zip(args.style_mask, found[0], strict=True):
        if not bool(mask.any()):
            raise CommandError(f"{name} is black everywhere: its picture would be seen nowhere")
    return found


def around(net: Loaded, seen: Sequence[Shown], size: tuple[int, int], amounts: Sequence[float] | None = None) -> Around:
    """What image prompts make of a batch; picture i has the amount i of `amounts`, over and over."""

    def made(speaking: Callable[[Ops], Denoise], path: list[float], rows: range) -> Denoise:
        strength = None if amounts is None else torch.tensor([amounts[i % len(amounts)] for i in rows])
        return ranged(speaking, TORCH, [one.prompt(net, size, rows, path, strength) for one in seen])

    return made

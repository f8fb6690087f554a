"""What commands of StyleAligned share: options, the model with LoRA for targets, and references from pictures."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..methods import style_reference
from ..methods import text_to_image as t2i
from ..methods.lora import beside, with_lora
from ..methods.prompt import Prompt, score_ids, size_ids
from ..methods.style_aligned import PRESETS, Preset, Sharing, Sites, style_aligned
from ..methods.style_layers import by_level, by_name
from ..methods.style_targets import weights
from ..model.components import Components
from ..model.ops import TORCH, Ops
from ..model.unet import UNet
from ..samplers.noise import seeded
from ..samplers.parameterisation import Denoise
from ..samplers.schedule import Schedule
from ..weights import lora as weights_lora
from ..weights.files import sha256
from . import image_options, image_prompts, latents, options
from .draw import inpaints, picture, said
from .errors import CommandError
from .session import Session

ON = ("on", "off")


@dataclass(frozen=True)
class Loaded(image_prompts.Loaded):
    """A model, adapters if there are any, and LoRA that only targets are drawn with."""

    changed: Components  # with their text towers; the UNet is the model's
    factors: tuple[tuple[Mapping[str, Any], float], ...]  # for the UNet, each with its weight

    @property
    def for_targets(self) -> "Loaded":
        """The model whose towers encode the targets' texts."""
        return replace(self, parts=self.changed)

    def unet(self, refs: Sequence[int]) -> UNet:
        """The UNet of a batch: base weights for references, with the LoRA for the others."""
        unet = self.parts.unet
        for factors, weight in self.factors:
            unet = beside(unet, factors, weights(refs, weight).to(self.device))
        return unet


def options_of(p: options.Parser) -> None:
    """The options of what is shared, and of references that are pictures."""
    group = p.add_argument_group("style")
    group.add_argument("--preset", choices=tuple(PRESETS), help="settings of one of the authors' notebooks (default: "
                       "sdxl; with --reference transfer)")  # fmt: skip
    group.add_argument("--scale", type=options.real(0, 100), help="of scores of the reference's keys; below 1 against "
                       "copies of famous pictures (default: 1)")  # fmt: skip
    group.add_argument("--shift", type=options.real(-20, 20), help="added to them, in nats; 0.69 doubles the weight of "
                       "the reference (default: 0; transfer 0.69)")  # fmt: skip
    group.add_argument("--adain", nargs="+", choices=("q", "k", "v", "none"), help="what takes the reference's "
                       "statistics (default: q k)")  # fmt: skip
    group.add_argument("--norms", choices=ON, help="group norms take both pictures' statistics (default: off; transfer "
                       "on)")  # fmt: skip
    group.add_argument("--attention", choices=ON, help="off: only statistics are shared (default: on)")
    group.add_argument("--all-see-all", action="store_true", help="the paper's ablation: everything sees everything, "
                       "without statistics, scale, shift")  # fmt: skip
    group.add_argument("--level", type=options.real(0, 1), help="the share of self-attentions that stay plain, by the "
                       "authors' rule: less style (default: 0)")  # fmt: skip
    group.add_argument("--sites", nargs="+", metavar="NAME", help="in place of it, which self-attentions share: dec.1, "
                       "up_blocks.0.attentions.1, output_blocks.1.1.3.self ...")  # fmt: skip
    group.add_argument("--lora-targets", nargs="+", metavar="NAME[:WEIGHT]", help="LoRA that targets are drawn with, "
                       "and references are not")  # fmt: skip
    group.add_argument("--noised", action="store_true", help="noise added to a reference picture outright, in place of "
                       "DDIM inversion: no time, less faithful")  # fmt: skip
    group.add_argument("--invert-guidance", type=options.real(0, 100), help="while it is inverted (default: 2)")
    group.add_argument("--offset", type=options.whole(0, 999), help="how many steps less noisy the picture begins "
                       "(default: 0; transfer a tenth of them)")  # fmt: skip
    image_options.options(p, image_options.ADAPTER)


def loaded(args: argparse.Namespace) -> Loaded:
    """The model that the options name."""
    base = image_prompts.loaded(image_options.own(args))
    if inpaints(base):
        raise CommandError("the model is one for inpainting: its UNet takes nine channels; name an ordinary one")
    changed, factors, files, lines = base.parts, [], dict[str, str](), list(base.loras)
    whole = latents.found(args).parts if args.lora_targets else {}
    for text in args.lora_targets or ():
        source, weight = latents.weighted(text)
        lora = weights_lora.load(source, whole)
        inner = {part: rows for part, rows in lora.factors.items() if part != "unet"}
        changed = with_lora(changed, inner, weight)
        factors += [(lora.factors["unet"], weight)] if "unet" in lora.factors else []
        files[f"lora of targets {text}"] = sha256(tuple(lora.paths))
        counts = ", ".join(f"{len(rows)} of {part}" for part, rows in lora.factors.items())
        lines.append(f"{source} at {weight:g}, targets only: {counts}")
    told = base.weights
    if files:
        digest = hashlib.sha256("".join([told["sha256"], *files.values()]).encode()).hexdigest()
        told = told | {"parts": told["parts"] | files, "sha256": digest}
    fields: dict[str, Any] = vars(base) | {"weights": told, "loras": tuple(lines)}
    return Loaded(**fields, changed=changed, factors=tuple(factors))


@dataclass(frozen=True)
class Style:
    """What the options come to."""

    sharing: Sharing
    sites: Sites | None
    guidance: float
    invert_guidance: float
    offset: int

    def ops(self, refs: Sequence[int], device: torch.device, ops: Ops = TORCH) -> Ops:
        """The verbs of a batch."""
        return style_aligned(ops, refs, self.sharing, sites=self.sites, device=device)


def style_of(args: argparse.Namespace, net: Loaded, pictures: bool) -> Style:
    """The options over those of a preset.  Raises CommandError for options that do not go together."""
    preset = PRESETS[args.preset or ("transfer" if pictures else "sdxl")]
    if not pictures:
        for name, value in (("--noised", args.noised), ("--invert-guidance", args.invert_guidance),
                            ("--offset", args.offset)):  # fmt: skip
            if value is not None and value is not False:
                raise CommandError(f"{name} says what becomes of a reference picture: give --reference")
    if args.eta and args.sampler != "ddim":
        raise CommandError("--eta is DDIM's fresh noise: give --sampler ddim")
    if args.level is not None and args.sites:
        raise CommandError("--level and --sites both say which self-attentions share: give one")
    if args.adain and "none" in args.adain and len(args.adain) > 1:
        raise CommandError(f"--adain is none, or some of q k v; got {' '.join(args.adain)}")
    cfg = net.parts.unet.cfg
    sites = by_name(cfg, args.sites) if args.sites else by_level(cfg, args.level) if args.level else None
    offset = args.offset if args.offset is not None else scaled(preset, args.steps) if pictures else 0
    if offset >= args.steps:
        raise CommandError(f"--offset {offset} leaves nothing of {args.steps} steps: it is 0 ... {args.steps - 1}")
    return Style(
        shared(args, preset.sharing),
        sites,
        preset.guidance if args.guidance is None else args.guidance,
        preset.invert_guidance if args.invert_guidance is None else args.invert_guidance,
        offset,
    )


def scaled(preset: Preset, steps: int) -> int:
    """A preset's offset for another number of steps."""
    return round(preset.offset * steps / preset.steps)


def shared(args: argparse.Namespace, sharing: Sharing) -> Sharing:
    """What is shared, with the options in place of the preset's.  Raises CommandError for those that say nothing."""
    idle = ("scale", "shift", "adain", "attention") if args.all_see_all else ()
    idle = ("scale", "shift") if not idle and args.attention == "off" else idle
    for name in idle:
        if getattr(args, name) is not None:
            other = "--all-see-all" if args.all_see_all else "--attention off"
            raise CommandError(f"--{name} says nothing with {other}: leave one of the two out")
    given: dict[str, Any] = {
        name: value == "on" for name in ("norms", "attention") if (value := getattr(args, name)) is not None
    }
    given |= {name: value for name in ("scale", "shift") if (value := getattr(args, name)) is not None}
    if args.adain:
        given |= {f"adain_{part}": part in args.adain for part in "qkv"}
    return replace(sharing, **given, all_see_all=args.all_see_all)


def conditions(net: latents.Loaded, size: tuple[int, int], n: int) -> tuple[Tensor | None, Tensor | None]:
    """Size ids for n pictures, and those of their negative texts where they are others."""
    if not net.parts.xl:
        return None, None
    if net.says.aesthetic:
        return score_ids(size, n), score_ids(size, n, score=2.5)
    return size_ids(size, n), None


def denoiser(
    args: argparse.Namespace,
    net: latents.Loaded,
    unet: UNet,
    prompts: tuple[Prompt, Prompt],
    size: tuple[int, int],
    guidance: float,
    schedule: Schedule | None = None,
    **more: Any,
) -> Denoise:
    """The network of a batch: texts and negative texts, at a size in pixels; `schedule` is the model's or `trained`."""
    ids, other = conditions(net, size, len(prompts[0].context))
    return t2i.denoiser(unet, *prompts, schedule=schedule or net.schedule, ids=ids, negative_ids=other,
                        prediction=net.says.prediction or "eps",  # type: ignore[arg-type]
                        guidance=guidance, rescale=args.rescale,
                        whole_times=args.sampler == "dpmpp", **more)  # fmt: skip


def pictured(
    args: argparse.Namespace,
    session: Session,
    net: Loaded,
    style: Style,
    name: str,
    text: str,
    path: Sequence[float],
    size: tuple[int, int],
) -> Tensor:
    """The trajectory of a reference picture at a size in pixels, (n + 1, 1, 4, H / 8, W / 8)."""
    unet, x0 = net.parts.unet, net.encoded(picture(session, name, size)).float()
    if args.noised:
        return style_reference.noised_outright(x0, seeded([args.seed])(x0), net.schedule, path)
    prompts = said(argparse.Namespace(**vars(args) | {"negative": None}), net, [text])  # a picture avoids nothing
    with net.on(unet):
        denoise = denoiser(args, net, unet, prompts, size, style.invert_guidance)
        reached = style_reference.inverted(denoise, x0, net.schedule, path)
        return style_reference.trajectory(x0, session.progress(reached, len(path) - 1, f"invert {name}"), path)

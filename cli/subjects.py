"""What `diaphane consistory` is made of: the model, the set that the options ask for, its batches, and its sheet."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import text_to_image as t2i
from ..methods.anchors import Kept
from ..methods.consistory import places
from ..methods.controlnet import Control
from ..methods.instant_style import instant_style
from ..methods.prompt import Prompt, beside
from ..methods.real_subject import beside_real, inverted
from ..methods.scene import Scene, Settings, by_steps
from ..methods.story import Story, told
from ..methods.subject_masks import Seeded
from ..methods.subject_words import places_of
from ..model.ops import TORCH
from ..samplers.edit_friendly import NoiseMaps
from ..samplers.noise import seeded
from ..weights.files import opened, sha256, write
from . import generate, image_options, image_prompts, latents
from .draw import carried, check, inpaints, picture, said, trained, walk_of
from .errors import CommandError
from .freed import factors, freed
from .session import Session
from .styles import conditions
from .subject_sheet import Drawn

DROPOUT_SEEDS = 1 << 63  # what is dropped is drawn from a picture's seed and this: apart from its noise


@dataclass(frozen=True)
class Loaded(image_prompts.Loaded):
    """A model, adapters if there are any, and anchors that were kept."""

    kept: Kept | None


def loaded(args: argparse.Namespace) -> Loaded:
    """The model that the options name, and the anchors of --cache-in."""
    if args.range:
        raise CommandError("--range: consistory walks twice, with the pictures at every step: leave it out")
    base = image_prompts.loaded(image_options.own(args))
    if inpaints(base):
        raise CommandError("the model is one for inpainting: its UNet takes nine channels; name an ordinary one")
    if not args.cache_in:
        return Loaded(**vars(base), kept=None)
    path = Path(args.cache_in)
    file = opened(path)
    kept = Kept.unpacked(file.content if isinstance(file.content, dict) else {}, file.metadata)
    digests = base.weights["parts"] | {"anchors": sha256(path)}
    whole = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    fields: dict[str, Any] = vars(base) | {"weights": base.weights | {"parts": digests, "sha256": whole}}
    return Loaded(**fields, kept=kept)


@dataclass(frozen=True)
class Plan:
    """What is to be drawn, with names and seeds; everything that can be wrong has been found."""

    texts: list[str]
    names: list[str]
    seeds: list[int]
    tokens: Tensor  # (B, words)
    size: tuple[int, int]
    settings: Settings
    anchors: int
    kept: Kept | None
    real: list[Tensor]  # (1, 3, H, W) each
    real_text: str
    hint: Tensor | None
    shown: list[image_prompts.Shown]

    def batches(self, batch: int) -> Iterator[range]:
        """All at once if they fit; else the anchors, then the others, `batch` at a time."""
        n = len(self.texts)
        alone = bool(self.kept or self.real)
        start = 0
        if not alone and n > batch:
            yield range(self.anchors)
            start = self.anchors
        for i in range(start, n, max(batch, 1)):
            yield range(i, min(n, i + batch))


def planned(args: argparse.Namespace, session: Session, net: Loaded) -> Plan:
    """The set that the options ask for.  Raises CommandError, or another ValueError, for what cannot be drawn."""
    if bool(args.prompt) == bool(args.prompts):
        raise CommandError("give prompts, or --prompts FILE, and not both")
    if args.steps is None:
        args.steps = 100 if args.real else 50
    if args.eta is None:
        args.eta = 1.0 if args.real else 0.0
    check(argparse.Namespace(**vars(args) | {"init": None, "mask": None, "strength": None}), net)
    said_so = args.prompt or generate.prompts(argparse.Namespace(prompt=None, prompts=args.prompts), session)
    texts = [f"{args.style} {text}" if args.style else text for text in said_so for _ in range(args.n)]
    if not net.parts.tokenizers:
        raise CommandError("the model came without a vocabulary: give --tokenizer")
    tokens, size, n = places_of(net.parts.tokenizers[0], texts, args.subject), generate.sizes(args, net), len(texts)
    places(net.parts.unet.cfg)
    if (args.real or net.kept) and args.cache_out:
        raise CommandError("--cache-out keeps anchors that are drawn: leave out --cache-in and --real")
    if args.real and net.kept:
        raise CommandError("--real and --cache-in both give the anchors: give one")
    if args.real and (args.sampler != "ddim" or args.eta == 0):
        raise CommandError("--real walks with the noise of DDPM: leave out --sampler and --eta")
    if args.real_prompt is not None and not args.real:
        raise CommandError("--real-prompt says what --real shows: give --real")
    if not (args.real or net.kept) and n < 2 and not args.cache_out:
        raise CommandError("one picture has no other to be like: give a second prompt, --n, --cache-in or --real")
    if not (args.real or net.kept) and not 1 <= args.anchors <= n:
        raise CommandError(f"--anchors {args.anchors}: there are {n} pictures, and the first ones are the anchors")
    if args.cache_out and Path(args.cache_out).exists() and session.wanted is None:
        raise CommandError(f"{args.cache_out} exists: name another file for --cache-out")
    if args.cache_out and not Path(args.cache_out).absolute().parent.is_dir():
        raise CommandError(f"--cache-out {args.cache_out}: there is no folder {Path(args.cache_out).absolute().parent}")
    _, path = walk_of(args, net, seeded([0]))
    settings = settings_of(args, path)
    if net.kept:
        net.kept.fits(path, latent_size(net, size), said_of(args, net, settings))
    first = args.seed + (net.kept.images if net.kept else 0)
    real_text = args.real_prompt or " ".join([*([args.style] if args.style else []), *args.subject])
    if args.real:
        places_of(net.parts.tokenizers[0], [real_text], args.subject)
    return Plan(
        texts,
        [f"{i + 1:04d}.png" for i in range(n)],
        [first + i for i in range(n)],
        tokens,
        size,
        settings,
        min(args.anchors, n),
        net.kept,
        [picture(session, name, size) for name in args.real or ()],
        real_text,
        (picture(session, args.control, size) + 1) / 2 if args.control else None,
        image_prompts.shown(image_options.own(args), session, net, size),
    )


def settings_of(args: argparse.Namespace, path: Sequence[float]) -> Settings:
    """The method's settings for a walk."""
    made = Settings(
        dropout=args.dropout,
        window=args.window or None,
        alpha=args.alpha,
        attend="attention" not in (args.without or ()),
        sequential=not args.simultaneous,
        early=args.early_stop,
    )
    if "blending" in (args.without or ()):
        made = replace(made, blend=None)
    if "injection" in (args.without or ()):
        made = replace(made, inject=None)
    return by_steps(made, path) if args.by_steps else made


def latent_size(net: latents.Loaded, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in latents."""
    return t2i.latent_size(net.parts, size)


def said_of(args: argparse.Namespace, net: Loaded, settings: Settings) -> dict[str, str]:
    """What further pictures have to have in common with their anchors."""
    found = factors(args.freeu)
    said = {"FreeU": "none" if found is None else ",".join(f"{f:g}" for f in found)}
    return told(net.parts.unet, settings) | said | {"model": net.weights["parts"]["unet"][:16]}


def drawn(
    args: argparse.Namespace,
    session: Session,
    net: Loaded,
    plan: Plan,
    rows: list[int],
    kept: Kept | None,
    *,
    keep: bool,
) -> Drawn:
    """One batch: its walk and its pictures."""
    n, real = len(rows), len(plan.real)
    seeds = [plan.seeds[i] for i in rows]
    prompts = said(args, net, [plan.texts[i] for i in rows])
    tokens = plan.tokens[rows]
    _, path = walk_of(args, net, seeded(seeds))
    schedule = trained(args, net)
    noise = seeded(seeds)
    more: dict[str, Any] = {"anchors": kept if kept is not None else min(plan.anchors, n)}
    with net.on(net.parts.unet, net.control):
        z = t2i.pure_noise(net.parts, noise, plan.size, n).to(net.device)
        x = carried(z, net, schedule)
        if real:
            maps, both, words = inverted_real(args, session, net, plan, path)
            prompts = (beside(both[0], prompts[0]), beside(both[1], prompts[1]))
            tokens, seeds = torch.cat([words, tokens]), [*[args.seed] * real, *seeds]
            x, pinned = beside_real(maps, x)
            more = dict(pinned)
        controls = []
        if net.control is not None and plan.hint is not None:
            controls = [Control(net=net.control, hint=plan.hint, scale=args.control_scale)]
        ids, other = conditions(net, plan.size, len(x))
        strength = torch.tensor([0.0] * real + [1.0] * n) if real else None  # real ones are pinned, without adapters
        seers = [*[0] * real, *rows]
        pictures = [one.prompt(net, plan.size, seers, path, strength) for one in plan.shown]
        scene = Scene(
            unet=net.parts.unet, positive=prompts[0], negative=prompts[1], tokens=tokens.to(net.device),
            schedule=schedule, ids=ids, negative_ids=other,
            prediction=net.says.prediction or "eps",  # type: ignore[arg-type]
            guidance=args.guidance, rescale=args.rescale, controls=controls, whole_times=args.sampler == "dpmpp",
            ops=freed(args, net, instant_style(TORCH, pictures)),
        )  # fmt: skip

        def walks() -> t2i.Walk:
            anew = seeded(seeds)
            anew(x)  # x_T
            return walk_of(args, net, anew)[0]

        story = Story(scene, walks, x, path, plan.settings, draws=Seeded([seed + DROPOUT_SEEDS for seed in seeds]),
                      keep=keep, shelf=torch.device("cpu") if args.low_vram else None,
                      said=said_of(args, net, plan.settings), **more)  # fmt: skip
        total = (len(path) - 1) * (2 if story.two else 1)
        walk = (step for _, step in story.steps())
        for _ in session.progress(walk, total, f"picture {rows[0] + 1} ... {rows[-1] + 1}"):
            pass
    made = net.pictures(story.x[real:].to(z))
    where = places(net.parts.unet.cfg)
    chosen = None if story.plan is None else story.plan.chosen
    sizes = where.sizes((x.shape[2], x.shape[3]))
    return Drawn(made, rows, story.masks, story.matches, chosen, story.sources, bool(real or kept), where.fine,
                 sizes, story.tally, len(x), story.kept)  # fmt: skip


def inverted_real(
    args: argparse.Namespace, session: Session, net: Loaded, plan: Plan, path: Sequence[float]
) -> tuple[NoiseMaps, tuple[Prompt, Prompt], Tensor]:
    """The real pictures at every timestep, their texts, and where these say the subject."""
    x0 = net.encoded(torch.cat(plan.real)).float()
    texts = [plan.real_text] * len(plan.real)
    prompts = said(args, net, texts)
    ids, other = conditions(net, plan.size, len(texts))
    schedule = trained(args, net)
    denoise = t2i.denoiser(net.parts.unet, *prompts, schedule=schedule, ids=ids, negative_ids=other,
                           prediction=net.says.prediction or "eps",  # type: ignore[arg-type]
                           guidance=args.real_guidance, rescale=args.rescale,
                           whole_times=args.sampler == "dpmpp")  # fmt: skip
    noise = seeded([args.seed + i for i in range(len(texts))])
    maps = inverted(denoise, x0, schedule, path, noise)
    return maps, prompts, places_of(net.parts.tokenizers[0], texts, args.subject)


def saved(kept: Kept, name: str) -> int:
    """Anchors as a file; its bytes."""
    tensors, header = kept.packed()
    return write(Path(name), tensors, header).stat().st_size

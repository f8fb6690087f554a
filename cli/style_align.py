"""`diaphane style-align`: pictures of several texts in one style, the first's or a given picture's."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..methods import text_to_image as t2i
from ..methods.instant_style import ranged
from ..methods.prompt import Prompt, beside
from ..methods.style_chunks import chunked
from ..methods.style_reference import Trajectory, transferred
from ..methods.style_targets import TargetControl
from ..model.ops import Ops
from ..samplers.inversion import last
from ..samplers.noise import seeded
from ..samplers.parameterisation import Denoise
from . import generate, image_options, image_prompts, latents, options, styles
from .draw import carried, cut_off, picture, said, trained, walk_of
from .errors import CommandError
from .freed import freed
from .images import to_picture
from .session import Made, Session, produce
from .sheet import grid
from .trajectory import Trajectory as Inverted
from .trajectory import unpacked

LOAD = styles.loaded
SHEET = 64  # pictures on the sheet; of a larger set no more are held
ABOUT = """\
Draw several texts in one style (StyleAligned, Hertz et al. 2024).

The pictures are drawn together.  In every self-attention each sees the keys and values of the first, the reference,
besides its own, and its queries and keys take the reference's statistics (AdaIN): equations 4 and 5.  The reference
is the first text's picture, or --reference PICTURE, which is inverted first and shown to the others at every step.
It does not depend on the others, so that any number of them is drawn, --batch at a time beside it.
"""
EXAMPLES = """\
examples:
  diaphane style-align "a toy train" "a toy aeroplane" "a toy boat" --style "macro photo, 3d game asset" --model FOLDER
  diaphane style-align "a cat" "a piano" --style "medieval painting" --model FOLDER \\
      --reference painting.jpg --reference-prompt "a man lying in a bed, medieval painting"
  diaphane style-align "a house" "a tree" --style "in pencil" --model FOLDER --control d.png --control-model DEPTH
  diaphane style-align --prompts lines.txt --n 4 --model FOLDER --batch 2 --out out/set --resume
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser("style-align", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("prompt", nargs="*", help="what to draw; the first is the reference, unless --reference is given")
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line, in place of prompts; empty lines are left out")
    p.add_argument("--style", help='told after every prompt: "PROMPT, STYLE."')
    p.add_argument("--n", type=options.whole(1, 100_000), default=1, help="pictures of each prompt (default: 1)")
    p.add_argument("--reference", metavar="PICTURE", help="whose style; cropped and resized to the size")
    p.add_argument("--reference-trajectory", metavar="FILE", help="the same, inverted already by `diaphane invert`: "
                   "its size and timesteps")  # fmt: skip
    p.add_argument("--reference-prompt", metavar="TEXT", help="what the picture shows, and its style")
    styles.options_of(p)
    p.add_argument("--keep", action="store_true", help="draw the reference once for all batches, which go along with "
                   "it step by step, and keep what they see of it: less time; all latents are held")  # fmt: skip
    generate.sampling(p, steps=50, sampler="ddim", guidance=None)
    p.add_argument("--control", nargs="+", metavar="PICTURE", help="hints of --control-model, for the targets: one for "
                   "all or one for each")  # fmt: skip
    p.add_argument("--control-scale", type=options.real(0, 10), default=1.0, help="(default: 1)")
    latents.options(p)
    generate.running(p, "style-align", batch=3)
    return p


@dataclass(frozen=True)
class Set:
    """What is to be drawn: the reference's text, then the targets', with names, and what they have in common."""

    texts: list[str]
    names: list[str]
    size: tuple[int, int]
    style: styles.Style
    path: list[float]
    references: Trajectory | None
    shown: list[image_prompts.Shown]


def given(args: argparse.Namespace) -> str | None:
    """The file of the reference, where it is not drawn."""
    return args.reference or args.reference_trajectory


def texts_of(args: argparse.Namespace, session: Session) -> list[str]:
    """The reference's text, then the targets'.  Raises CommandError where there are none."""
    if bool(args.prompt) == bool(args.prompts):
        raise CommandError("give prompts, or --prompts FILE, and not both")
    if args.reference and args.reference_trajectory:
        raise CommandError("--reference and --reference-trajectory are two references: give one")
    if args.reference_prompt is not None and not given(args):
        raise CommandError("--reference-prompt says what --reference shows: give --reference")
    one = argparse.Namespace(prompt=None, prompts=args.prompts)
    texts = args.prompt or generate.prompts(one, session)
    texts = [f"{text}, {args.style}." if args.style else text for text in texts]
    if given(args):
        return [args.reference_prompt or "", *(text for text in texts for _ in range(args.n))]
    if len(texts) * args.n < 2:
        raise CommandError("one picture has no other to be like: give a second prompt, --n, or --reference PICTURE")
    return [text for text in texts for _ in range(args.n)]


def planned(args: argparse.Namespace, session: Session, net: styles.Loaded) -> Set:
    """Everything that can be wrong, found before any picture is begun."""
    texts, found = texts_of(args, session), inverted_before(args, session, net)
    size, style = generate.sizes(args, net), styles.style_of(args, net, bool(given(args)))
    if bool(args.control) != bool(net.control):
        raise CommandError("--control is a hint of --control-model: give both")
    if args.control and len(args.control) not in (1, len(texts) - 1):
        raise CommandError(f"--control: one for all, or one for each of {len(texts) - 1} targets; got "
                           f"{len(args.control)}")  # fmt: skip
    if args.all_see_all and args.batch < len(texts) - 1:
        raise CommandError("where all see all, no part of a set can be drawn without the rest: give --batch "
                           f"{len(texts) - 1}")  # fmt: skip
    if args.all_see_all and args.keep:
        raise CommandError("where all see all, the reference sees its targets: leave --keep out")
    shown = image_prompts.shown(image_options.own(args), session, net, size)
    for name in args.control or ():
        hint(session, name, size)  # they are decoded again where they are used, so that only a batch's are held
    _, path = walk_of(args, net, seeded([args.seed]))
    references = None
    if found is not None:
        path, references = found.path, Trajectory(found.xs.to(net.device), found.path, style.offset)
    elif args.reference:
        zts = styles.pictured(args, session, net, style, args.reference, texts[0], path, size)
        references = Trajectory(zts, path, style.offset)
    names = ["reference.png", *(f"{i:04d}.png" for i in range(1, len(texts)))]
    return Set(texts, names, size, style, path, references, shown)


def hint(session: Session, name: str, size: tuple[int, int]) -> Tensor:
    """A picture for the ControlNet, (1, 3, H, W) in [0, 1]."""
    return (picture(session, name, size) + 1) / 2


def inverted_before(args: argparse.Namespace, session: Session, net: styles.Loaded) -> Inverted | None:
    """The trajectory of --reference-trajectory, whose size and steps become those of the options."""
    name = args.reference_trajectory
    if name is None:
        return None
    if args.noised or args.invert_guidance is not None:
        raise CommandError("--noised and --invert-guidance are of a picture that is not inverted yet: give --reference")
    found, _ = unpacked(session.read(name), name)
    rows, channels, height, width = found.xs.shape[1:]
    if (rows, channels) != (1, net.parts.vae.cfg.latent_channels):
        raise CommandError(
            f"{name} is of {rows} pictures in latents of {channels} channels: one of this model is taken"
        )
    own = f"{width * net.parts.factor}x{height * net.parts.factor}"
    if args.size not in (None, own):
        raise CommandError(f"--size {args.size}: {name} is of {own}")
    args.size, args.steps = own, len(found.path) - 1
    return found


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The reference and the targets, then a sheet of all of them."""
    net: Any = session.net
    plan = planned(args, session, net)
    for line in (*net.loras, *cut_off(net, [*plan.texts, args.negative or ""])) if session.wanted is None else ():
        session.say(line)
    drawn: list[Image.Image] = []
    told = argparse.Namespace(**vars(args) | {"guidance": plan.style.guidance, "init": None})
    count = len(plan.texts)

    def finished(i: int) -> Image.Image | None:
        return generate.finished(args, net, (plan.names[i], plan.texts[i]), args.seed + i) if args.resume else None

    parts = [list(range(i, min(i + args.batch, count))) for i in range(1, count, args.batch)]
    parts[0] = [0, *parts[0]]
    parts = [part for part in parts if session.wants("sheet.png", *(plan.names[i] for i in part))]
    whole: dict[int, Tensor] = {}  # with --keep, the latents of all that is drawn
    for mine in parts:
        rows = [i for i in mine if i]
        kept = {i: finished(i) for i in mine}
        if all(kept.values()):
            drawn += [one for one in kept.values() if one][: SHEET - len(drawn)]
            continue
        if args.keep and not whole:
            every = [i for part in parts if not all(map(finished, part)) for i in part if i]
            whole = dict(zip([0, *every], walked(args, session, net, plan, every), strict=True))
        x = torch.stack([whole[i] for i in [0, *rows]]) if args.keep else walked(args, session, net, plan, rows)
        pictures = net.pictures(x[-len(mine) :])
        for i, row in zip(mine, pictures, strict=True):
            one = kept[i] or to_picture(row)
            drawn += [one] if len(drawn) < SHEET else []
            if kept[i] is None:
                words = generate.parameters(told, net, plan.texts[i], args.seed + i, plan.size)
                yield session.made(plan.names[i], one, seed=args.seed + i, prompt=plan.texts[i], parameters=words)
    if session.wants("sheet.png"):
        way = f"reference: {given(args)}" if given(args) else "first: the reference"
        title = f"StyleAligned, {count - 1} targets, {args.steps} steps, guidance {plan.style.guidance:g}; {way}"
        yield session.made("sheet.png", grid(drawn, title=title))


def walked(args: argparse.Namespace, session: Session, net: styles.Loaded, plan: Set, rows: list[int]) -> Tensor:
    """The latents of the reference and of some targets, all together, or with --keep --batch at a time."""
    refs = [0] * (1 + len(rows))
    texts = [[plan.texts[i] for i in rows[start : start + args.batch]] for start in range(0, len(rows), args.batch)]
    prompts = together(said(args, net, plan.texts[:1]), *(said(args, net.for_targets, some) for some in texts))
    noise = seeded([args.seed, *(args.seed + i for i in rows)])
    walk, path, schedule = walk_of(args, net, noise)[0], plan.path, trained(args, net)
    with net.on(net.parts.unet, net.control):

        def made(some: list[int], ops: Ops) -> Denoise:
            """The network of some of those rows."""
            who = [[0, *rows][i] for i in some]
            heads = [0] * len(some) if 0 in some else list(range(len(some)))
            unet, controls = net.parts.unet, []
            if any(who):
                unet = net.unet(heads)
                controls = controlled(args, session, net, plan, [i for i in who if i], heads)

            def speaking(ops: Ops) -> Denoise:
                return styles.denoiser(args, net, unet, picked(prompts, some), plan.size, plan.style.guidance, schedule,
                                       controls=controls, ops=freed(args, net, ops))  # fmt: skip

            seers, strength = whose(args, who)
            return ranged(speaking, ops, [one.prompt(net, plan.size, seers, path, strength) for one in plan.shown])

        if args.keep:
            denoise = chunked(made, refs, plan.style.sharing, size=args.batch, kept=True, sites=plan.style.sites,
                              device=net.device)  # fmt: skip
        else:
            denoise = made(list(range(len(refs))), plan.style.ops(refs, net.device))
        z = t2i.pure_noise(net.parts, noise, plan.size, len(refs))
        x = carried(z, net, schedule)
        if plan.references is None:
            steps = walk(denoise, x, schedule, path)
        else:
            steps = transferred(walk, denoise, x, schedule, path, plan.references)
        return last(session.progress(steps, len(path) - 1, f"picture {rows[0]} ... {rows[-1]}")).x.to(z)


def controlled(
    args: argparse.Namespace, session: Session, net: styles.Loaded, plan: Set, targets: list[int], refs: list[int]
) -> list[TargetControl]:
    """The ControlNet of some targets, with their hints; `refs` are those of the rows of the batch."""
    if net.control is None:
        return []
    mine = args.control if len(args.control) == 1 else [args.control[i - 1] for i in targets]
    hints = torch.cat([hint(session, name, plan.size) for name in mine])
    return [TargetControl(net=net.control, hint=hints, scale=args.control_scale, refs=refs)]


def whose(args: argparse.Namespace, who: list[int]) -> tuple[list[int], Tensor | None]:
    """What --style-image shows to the reference, 0, and to targets: which of --each, and how much.

    A reference that is a picture sees none, as when it was inverted.
    """
    if not given(args):
        return who, None
    return [max(i - 1, 0) for i in who], torch.tensor([float(i > 0) for i in who])


def picked(prompts: tuple[Prompt, Prompt], rows: list[int]) -> tuple[Prompt, Prompt]:
    """Some rows of texts and negative texts."""
    first, second = (Prompt(p.context[rows], None if p.pooled is None else p.pooled[rows]) for p in prompts)
    return first, second


def together(*pairs: tuple[Prompt, Prompt]) -> tuple[Prompt, Prompt]:
    """Texts and negative texts of several sets of rows as those of one."""
    return beside(*(positive for positive, _ in pairs)), beside(*(negative for _, negative in pairs))


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("style-align", parser(), make, argv, load=LOAD)

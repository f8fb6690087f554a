"""`diaphane panorama`: pictures wider or taller than the model's own, and styles across them."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..methods import style_reference
from ..methods import text_to_image as t2i
from ..methods.instant_style import ranged
from ..methods.multidiffusion import Batch, View, multidiffusion, nearest, spread, windows
from ..methods.style_reference import Trajectory
from ..model.ops import TORCH, Ops
from ..samplers.inversion import last
from ..samplers.noise import seeded
from ..samplers.parameterisation import Denoise
from . import generate, image_options, image_prompts, latents, options, styles
from .draw import carried, cut_off, said, trained, walk_of
from .errors import CommandError
from .freed import freed
from .images import to_picture
from .session import Made, Session, produce
from .sheet import stacked
from .style_align import together

LOAD = styles.loaded
TILE = 128  # latents
ABOUT = """\
Draw a picture of any size by overlapping windows of the model's own (MultiDiffusion, Bar-Tal et al. 2023).

Each window is denoised by itself, and where windows overlap their predictions are averaged at every step.  With
--styles, texts, or --reference, pictures, every window is drawn in the style of the nearest of them (StyleAligned,
Hertz et al. 2024, figure 12): they stand side by side along the width, or at --at.
"""
EXAMPLES = """\
examples:
  diaphane panorama "a mountain range" --size 2048x512 --window 512 --model stabilityai/stable-diffusion-2-base
  diaphane panorama "a street" --size 3072x1024 --model FOLDER --styles "a street, in pencil" "a street, cubism"
  diaphane panorama "mountains" --size 3072x1024 --model FOLDER --reference a.jpg b.jpg --at 0 1 \\
      --reference-prompt "a vase, cubism" "a bridge, ukiyo-e"
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser("panorama", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("prompt", nargs="?", help="what to draw")
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line, in place of the prompt; empty lines are left "
                   "out")  # fmt: skip
    p.add_argument("--n", type=options.whole(1, 100_000), default=1, help="pictures of each prompt (default: 1)")
    p.add_argument("--window", type=options.whole(8, 8192), help="side of windows in pixels (default: the model's own)")
    p.add_argument("--stride", type=options.whole(8, 8192), help="from one to the next, in pixels (default: an eighth "
                   "of a window)")  # fmt: skip
    p.add_argument("--circular", action="store_true", help="the right end goes on at the left")
    p.add_argument("--styles", nargs="+", metavar="TEXT", help="references that are drawn: what, in which style")
    p.add_argument("--reference", nargs="+", metavar="PICTURE", help="references that are pictures")
    p.add_argument("--reference-prompt", nargs="+", metavar="TEXT", help="what each --reference shows, and its style")
    p.add_argument("--at", nargs="+", type=options.real(0, 1), metavar="X", help="where each style is, 0 the left end, "
                   "1 the right; --styles first (default: side by side)")  # fmt: skip
    styles.options_of(p)
    generate.sampling(p, steps=50, sampler="ddim", guidance=None)
    latents.options(p)
    generate.running(p, "panorama", batch=4)
    return p


def check(args: argparse.Namespace) -> None:
    """Raises CommandError for options that do not go together."""
    count = len(args.styles or ()) + len(args.reference or ())
    if len(args.reference_prompt or ()) not in (0, len(args.reference or ())):
        raise CommandError(f"--reference-prompt: one for each of {len(args.reference or ())} --reference; got "
                           f"{len(args.reference_prompt)}")  # fmt: skip
    if args.at and len(args.at) != count:
        raise CommandError(f"--at: one place for each of {count} styles; got {len(args.at)}")
    for name in ("style_mask", "each"):
        if getattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is of whole pictures, not of windows: leave it out")
    if args.control_model:
        raise CommandError("--control-model goes with generate and style-align, not with windows")


def grid(args: argparse.Namespace, net: latents.Loaded, size: tuple[int, int]) -> tuple[list[View], tuple[int, int]]:
    """The windows of a picture of `size` in pixels, in latents, and the size of a window in pixels."""
    factor, side = net.parts.factor, args.window or net.says.side
    stride = args.stride or max(side // 8 // net.parts.factor, 1) * net.parts.factor
    for name, value in (("--window", side), ("--stride", stride)):
        if value % factor:
            raise CommandError(f"{name} is a multiple of {factor}; got {value}")
    if stride > side:
        raise CommandError(f"--stride {stride} would leave gaps between windows of {side}")
    height, width = size[0] // factor, size[1] // factor
    whole = min(side, size[0]), min(side, size[1])
    return windows(height, width, side // factor, stride // factor, circular=args.circular), whole


def referred(
    args: argparse.Namespace, session: Session, net: styles.Loaded, style: styles.Style, size: tuple[int, int]
) -> tuple[list[str], Trajectory | None]:
    """The texts of the references, and where they are at each step; `size` is a window's."""
    texts: list[str] = list(args.styles or ())
    shown: list[Tensor] = []
    for i, text in enumerate(texts):
        noise = seeded([args.seed + i])
        (walk, path), schedule = walk_of(args, net, noise), trained(args, net)
        prompts = said(args, net, [text])
        with net.on(net.parts.unet):
            z = t2i.pure_noise(net.parts, noise, size, 1)
            x = carried(z, net, schedule)
            denoise = styles.denoiser(args, net, net.parts.unet, prompts, size, style.guidance, schedule,
                                      ops=freed(args, net))  # fmt: skip
            steps = session.progress(walk(denoise, x, schedule, path), len(path) - 1, f"style {i + 1}")
            shown.append(style_reference.drawn(steps, x).to(z))
    _, path = walk_of(args, net, seeded([args.seed]))
    for i, name in enumerate(args.reference or ()):
        texts.append(args.reference_prompt[i] if args.reference_prompt else "")
        shown.append(styles.pictured(args, session, net, style, name, texts[-1], path, size))
    if not shown:
        return [], None
    whole = torch.cat([one.to(shown[0]) for one in shown], dim=1)
    return texts, Trajectory(whole, path, style.offset)


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The references, if there are any, and the pictures, then a sheet of all of them."""
    net: Any = session.net
    check(args)
    texts = [text for text in generate.prompts(args, session) for _ in range(args.n)]
    size, style = generate.sizes(args, net), styles.style_of(args, net, bool(args.reference))
    views, small = grid(args, net, size)
    told = [*texts, args.negative or "", *(args.styles or ()), *(args.reference_prompt or ())]
    for line in (*net.loras, *cut_off(net, told)) if session.wanted is None else ():
        session.say(line)
    shown = image_prompts.shown(image_options.own(args), session, net, small)
    about, references = referred(args, session, net, style, small)
    words_of = argparse.Namespace(**vars(args) | {"guidance": style.guidance, "init": None})
    drawn: list[Image.Image] = []
    if references is not None:
        for i, row in enumerate(net.pictures(references.latents[-1]), 1):
            drawn.append(to_picture(row))
            yield session.made(f"style-{i}.png", drawn[-1], seed=args.seed + i - 1, prompt=about[i - 1])
    for i, text in enumerate(texts):
        name = f"{i + 1:04d}.png"
        if not session.wants("sheet.png", name):
            continue
        kept = generate.finished(args, net, (name, text), args.seed + i) if args.resume else None
        if kept is None:
            x = walked(args, session, net, style, text, i, size, small, views, about, references, shown)
            drawn.append(to_picture(decoded(args, net, x)))
            words = generate.parameters(words_of, net, text, args.seed + i, size)
            yield session.made(name, drawn[-1], seed=args.seed + i, prompt=text, parameters=words)
        else:
            drawn.append(kept)
    if len(drawn) > 1 and session.wants("sheet.png"):
        yield session.made("sheet.png", stacked(drawn[:32]))


def walked(
    args: argparse.Namespace,
    session: Session,
    net: styles.Loaded,
    style: styles.Style,
    text: str,
    i: int,
    size: tuple[int, int],
    small: tuple[int, int],
    views: list[View],
    about: list[str],
    references: Trajectory | None,
    shown: list[image_prompts.Shown],
) -> Tensor:
    """The latents of one picture, (1, 4, H / 8, W / 8)."""
    noise = seeded([args.seed + len(about) + i])
    (walk, path), schedule = walk_of(args, net, noise), trained(args, net)
    own, others = said(args, net.for_targets, [text]), [said(args, net, [one]) for one in about]
    width = size[1] // net.parts.factor
    assigned = nearest(views, args.at or spread(len(about)), width, circular=args.circular) if about else None
    with net.on(net.parts.unet):

        def make_batch(batch: Batch) -> Denoise:
            prompts = together(*(others[j] for j in batch.references), *(own for _ in batch.views))
            rows, ahead = [0] * len(batch.refs), len(batch.references)  # references are drawn without adapters
            strength = torch.tensor([0.0] * ahead + [1.0] * (len(rows) - ahead)) if ahead else None

            def speaking(ops: Ops) -> Denoise:
                ops = style.ops(batch.refs, net.device, freed(args, net, ops))
                return styles.denoiser(
                    args, net, net.unet(batch.refs), prompts, small, style.guidance, schedule, ops=ops
                )

            return ranged(speaking, TORCH, [one.prompt(net, small, rows, path, strength) for one in shown])

        denoise = multidiffusion(make_batch, views, batch=args.batch, references=references, assigned=assigned)
        z = t2i.pure_noise(net.parts, noise, size, 1)
        x = carried(z, net, schedule)
        steps = session.progress(walk(denoise, x, schedule, path), len(path) - 1, f"picture {i + 1}")
        return last(steps).x.to(z)


def decoded(args: argparse.Namespace, net: latents.Loaded, x: Tensor) -> Tensor:
    """The picture of latents (1, 4, h, w), (3, H, W); in tiles where it is larger than 2048 x 2048."""
    factor, wide = net.parts.factor, x.shape[3]
    if net.tile is None and x[0, 0].numel() > 4 * TILE**2:
        net = replace(net, tile=TILE * factor)
    if not args.circular:
        return net.pictures(x)[0]
    around = torch.arange(-8, wide + 8, device=x.device) % wide  # so that the ends meet in the picture too
    return net.pictures(x.index_select(3, around))[0, :, :, 8 * factor : -8 * factor]


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("panorama", parser(), make, argv, load=LOAD)

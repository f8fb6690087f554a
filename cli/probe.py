"""`diaphane probe`: which block of a UNet does what with a picture; InstantStyle's figure 7 for any model."""

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from PIL import Image
from torch import Tensor

from ..methods.instant_style import instant_style
from ..methods.probe import Effect, blocks, looking, relative, spread
from ..methods.scales import Scales, scales
from ..model.ops import TORCH, Ops
from ..model.sites import Place
from ..samplers.parameterisation import Denoise
from . import generate, image_options, image_prompts, options
from .draw import check, prepared, walked
from .errors import CommandError
from .images import to_picture
from .session import Made, Session, produce
from .sheet import headed, sheet, stacked

LOAD = image_prompts.loaded
COLUMNS = 4
ABOUT = """\
Draw the same noise and text once without a picture, once with an IP-Adapter everywhere, and once for each block of the
UNet with the adapter in that block alone (InstantStyle, Wang et al. 2024, figure 7); and measure what each does: the
relative change |with - without| / |without| of eps at the same x, of the latents at the end, and of the pixels.
The blocks that repaint the style and leave what is drawn are the ones to name with `instant-style --sites`.
"""
EXAMPLES = """\
examples:
  diaphane probe "a cat" --model FOLDER --adapter ip-adapter_sdxl --style-image painting.png
  diaphane probe "a cat" --model FOLDER --adapter mine.safetensors --image-encoder ENCODER --style-image a.png --scale 2
"""


def parser() -> options.Parser:
    """The command's options."""
    p = generate.arguments(options.Parser("probe", description=ABOUT, epilog=EXAMPLES), "probe")
    image_options.options(p)
    p.add_argument("--looks", type=options.whole(1, 1000), default=4, help="at how many steps to compare eps "
                   "(default: 4)")  # fmt: skip
    p.add_argument("--blocks", nargs="+", metavar="NAME", help="only these, in any spelling (default: all that attend "
                   "to text)")  # fmt: skip
    return p


def chosen(args: argparse.Namespace, net: image_prompts.Loaded) -> dict[str, tuple[Place, Scales]]:
    """The blocks by our names, each with the attentions in it.  Raises SiteError for a block that is none."""
    cfg, wanted = net.parts.unet.cfg, None
    if args.blocks:
        wanted = {at.stage for name in args.blocks for at in scales(cfg, {name: 1.0})}
    found = {place.stage: (place, scales(cfg, {place.ours: 1.0})) for place in blocks(cfg)}
    return {stage: both for stage, both in found.items() if wanted is None or stage in wanted}


def refuse(args: argparse.Namespace) -> None:
    """Raises CommandError for options that make no sense here."""
    if args.preset or args.sites:
        raise CommandError("probe goes through the places itself: --blocks chooses some of them")
    if args.prompts or args.n != 1 or args.resume:
        raise CommandError("probe draws one text from one seed: give a prompt, and no --prompts, --n or --resume")
    if args.each:
        raise CommandError("probe draws one picture a block: leave --each out")
    if args.range:
        raise CommandError("probe shows the picture at every step: leave --range out")


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """One picture a block, the sheet, and the table."""
    image_options.check(args)
    refuse(args)
    text = generate.prompts(args, session)[0]
    net = cast(image_prompts.Loaded, session.net)
    check(args, net)
    size = generate.sizes(args, net)
    places = chosen(args, net)
    seen = image_prompts.shown(args, session, net, size)
    scene = prepared(args, session, net, size)
    numbers: dict[str, list] = {}

    def speaks(where: Scales, path: Sequence[float]) -> Ops:
        """The adapters at some of the places alone."""
        prompts = []
        for i, one in enumerate(seen):
            much = args.scale[min(i, len(args.scale) - 1)]
            here = replace(one, scale={at: much * float(cast(float, n)) for at, n in where.items()})
            prompts.append(here.prompt(net, size, range(1), path))
        return instant_style(TORCH, prompts)

    def drawn(around: Callable[[Callable[[Ops], Denoise], list[float], range], Denoise]) -> tuple[Tensor, Tensor]:
        x = walked(args, session, net, [text], range(1), size, scene, around)
        return x, net.pictures(x)

    def plain(speaking: Callable[[Ops], Denoise], path: list[float], rows: range) -> Denoise:
        others = {stage: speaks(where, path) for stage, (_, where) in places.items()}
        others["all"] = speaks(scales(net.parts.unet.cfg, "all"), path)
        return looking(speaking, TORCH, others, set(spread(path, args.looks)), numbers)

    def only(where: Scales) -> Callable[[Callable[[Ops], Denoise], list[float], range], Denoise]:
        return lambda speaking, path, rows: speaking(speaks(where, path))

    base = drawn(plain)
    about: dict[str, Any] = {"seed": args.seed, "prompt": text}
    shown = [to_picture(base[1][0])]
    yield session.made("0001-none.png", shown[0], **about)
    everywhere = {"all": (None, scales(net.parts.unet.cfg, "all"))} | places
    effects: dict[str, Effect] = {}
    for i, (stage, (_, where)) in enumerate(everywhere.items(), 2):
        if not session.wants(f"{i:04d}-{stage}.png", "sheet.png"):
            continue
        x, picture = drawn(only(where))
        eps = numbers[stage]
        effects[stage] = Effect(sum(eps) / len(eps), relative(x, base[0]), relative(picture, base[1]))
        shown.append(to_picture(picture[0]))
        told = {"block": stage, "effect": effects[stage]._asdict()}
        yield session.made(f"{i:04d}-{stage}.png", shown[-1], **about, **told)
    if not session.wants("sheet.png"):
        return
    captions = ["without", *(caption(stage, everywhere[stage][0], effects[stage]) for stage in everywhere)]
    yield session.made("sheet.png", labelled(shown, captions, text), **about)
    yield Made("probe.csv", data=table(everywhere, effects))
    for stage, effect in sorted(effects.items(), key=lambda row: -row[1].eps):
        session.say(f"{stage:8} eps {effect.eps:.3f}  latents {effect.latents:.3f}  picture {effect.picture:.3f}")


def caption(stage: str, place: Place | None, effect: Effect) -> str:
    """What stands above a picture."""
    name = (
        "every block" if place is None else place.diffusers.replace(".attentions.", " att. ").replace("_blocks.", " ")
    )
    return f"{stage} {name}\neps {effect.eps:.3f}, picture {effect.picture:.3f}"


def labelled(shown: list[Image.Image], captions: list[str], text: str) -> Image.Image:
    """The sheet: every row of pictures under its captions."""
    starts = range(0, len(shown), COLUMNS)
    parts = [sheet([shown[i : i + COLUMNS]], columns=captions[i : i + COLUMNS], edge=256) for i in starts]
    return headed(stacked(parts, 4), f"One block at a time: {text[:60]}", "relative change against no picture")


def table(everywhere: dict, effects: dict[str, Effect]) -> bytes:
    """The numbers as csv, with every name of each block."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["block", "single files", "diffusers", *Effect._fields])
    for stage, effect in effects.items():
        place = everywhere[stage][0]
        names = ["", ""] if place is None else [place.ldm, place.diffusers]
        writer.writerow([stage, *names, *(f"{n:.6g}" for n in effect)])
    return out.getvalue().encode()


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("probe", parser(), make, argv, load=LOAD)

"""`diaphane demo`: everything, on the embedded model, into one folder and onto one sheet."""

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from PIL import Image

from ..weights.load import EMBEDDED
from . import options
from .images import decoded, fitted
from .session import Made, Session, produce
from .sheet import headed, sheet, side_by_side, stacked

ABOUT = """\
Run every command on the embedded model, in about two minutes on two cores, and put what they made onto one
sheet that says what is to be seen.

The embedded model is a small DDPM of a world of shapes, 32 x 32 pixels.  Its pictures have content (the kind
and place of an object, the pattern of the ground) and style (palette, texture, light), all known.
"""
STRONG = ("--omega", "0", "--t-edit", "200", "--t-boost", "0")  # injection that is to be seen
EXAMPLES = """\
example:
  diaphane demo
  diaphane redo out/demo/diffstyle/c01-s02.png
"""
PICTURES = EMBEDDED / "shapes" / "pictures"
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Part(NamedTuple):
    """One command of the demo."""

    folder: str
    command: str
    words: tuple[str, ...]
    title: str
    text: str


def named(kind: str, *numbers: int) -> list[str]:
    """Pictures that ship with the package."""
    return [str(PICTURES / f"{kind}-{i}.png") for i in numbers]


def parts() -> list[Part]:
    """What is run, and how it is explained."""
    contents, styles = named("content", *range(1, 7)), named("style", *range(1, 7))
    masks = [str(PICTURES / f"mask-{side}.png") for side in ("left", "right")]
    return [
        Part("sample", "sample", ("--n", "16"), "1  Pictures from noise",
             "DDIM, from x_T down to x_0."),
        Part("invert", "invert", ("--", *contents[:4]), "2  Pictures to noise, and back",
             "The same steps walked upward find a picture's x_T; walked down again they give the picture back."),
        Part("diffstyle", "diffstyle", ("--content", *contents, "--style", *styles, "--gamma", "0.9", *STRONG),
             "4  Content through h-space (DiffStyle)",
             "Each picture: the style above it is regenerated from its x_T, its h turned towards the content's.\n"
             "Texture stays, colours lie between; the ground's pattern, at times the object, comes from the left."),
        Part("mixing", "diffstyle", ("--content", contents[0], contents[2], "--mask", *masks, "--style", *styles[:4],
                                     "--gamma", "0.9", *STRONG),
             "5  Two contents in one style, each in its half (local mixing)",
             "The first content's h goes into the left half of the map, the second's into the right half."),
        Part("sets", "asyrp", ("--set-a", *styles, "--set-b", *contents, "--image", *styles[:3]),
             "6  A direction from two sets of pictures (Asyrp)",
             "Mean h of the six contents (patterned grounds) minus mean h of the six styles (plain grounds),\n"
             "added to h in the predicted-picture half of each step, so many times."),
        Part("pca", "asyrp", ("--pca", "3", "--image", contents[0], styles[1], "--strip", "-2", "-1", "0", "1", "2"),
             "7  Directions nobody chose: principal components of h",
             "The three directions along which h varies most over samples, in standard deviations."),
        Part("jacobian", "asyrp", ("--jacobian", "2", "--image", contents[0], styles[1]),
             "8  Directions of one picture: singular vectors of d eps / d h",
             "What of h changes the prediction at t = 600 most; a step of 1 is as long as h."),
        Part("correlation", "correlation", ("--n", "32"), "9  How h and its skip go together",
             "r_homo is what the decoder learned; slerp at equal norm keeps it, which is why DiffStyle uses it."),
    ]  # fmt: skip


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("demo", ABOUT, EXAMPLES)
    options.steps(p, what="steps of every walk; fewer are quicker and come back worse", low=2)
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The files of every part, each in a folder of its own, then the sheet."""
    panels = []
    for part in parts():
        last = None
        for made in ran(part.command, part.words, args, session):
            last = made.picture or last
            yield made._replace(name=f"{part.folder}/{made.name}")
        assert last is not None
        panels.append(headed(last, part.title, part.text))
        if part.folder == "invert":
            yield from gammas(args, session, panels)
        tell(part, args, session)
    left, right = panels[:4], panels[4:]
    yield session.made("sheet.png", side_by_side([stacked(left), stacked(right)]))


def gammas(args: argparse.Namespace, session: Session, panels: list[Image.Image]) -> Iterator[Made]:
    """Rows of pictures over gamma for three contents in one style; their panel is added to `panels`."""
    contents, style = named("content", 1, 3, 5), named("style", 2)
    tops = [fitted(decoded(session.read(path), path), session.net.side, path) for path in contents]
    rows: list[list[Image.Image]] = [[top] for top in tops]
    half = argparse.Namespace(**{**vars(args), "steps": max(2, args.steps // 2)})
    for gamma in GAMMAS:
        words = ("--content", *contents, "--style", *style, "--gamma", str(gamma), *STRONG)
        for i, made in enumerate(ran("diffstyle", words, half, session)):
            if i < len(rows) and made.picture is not None:
                rows[i].append(made.picture)
                yield made._replace(name=f"gamma/{gamma:g}/{made.name}")
    panel = sheet(rows, columns=["content", *(f"{gamma:g}" for gamma in GAMMAS)])
    yield session.made("gamma/sheet.png", panel)
    text = "From the style picture come back (0) to as much of the content's h as there is (1); half the steps."
    panels.append(headed(panel, "3  From a style to other pictures' content: gamma", text))


def ran(command: str, words: Sequence[str], args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """What a command makes with these words and the demo's own options."""
    module = import_module(f".{command}", __package__)
    parser = module.parser()
    walks = {"n_inv": args.steps, "n_gen": args.steps} if command == "diffstyle" else {"steps": args.steps}
    own = {name: value for name, value in options.settings(args).items() if name != "steps"}
    common = options.words(parser, {**own, **walks, "out": args.out, "quiet": args.quiet})
    beside = session.beside(command, parser.parse_args([*common, *words]))
    yield from module.make(beside.args, beside)
    session.inputs.update(beside.inputs)


def tell(part: Part, args: argparse.Namespace, session: Session) -> None:
    """What has been made, unless --quiet."""
    if not args.quiet and session.wanted is None:
        session.say(f"{part.folder + '/':14}{part.title.partition('  ')[2]}")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("demo", parser(), make, argv)

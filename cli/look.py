"""`diaphane look`: pictures, and what the network held while it drew them."""

import argparse
import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from ..methods.attention_maps import colours, picture
from ..methods.inside import Inside
from ..methods.instant_style import ranged
from ..methods.probe import spread
from ..methods.style_aligned import grouped
from ..methods.subject_words import places_of
from ..model.ops import Ops
from ..samplers.noise import seeded
from ..samplers.parameterisation import Denoise
from . import generate, image_options, image_prompts, latents, options
from .draw import inpaints, walk_of, walked
from .errors import CommandError
from .images import to_picture
from .marked import matched, overlaid
from .page import Section, page
from .plot import plot
from .session import Made, Session, produce
from .sheet import sheet, stacked

MOST = 8  # pictures at once, and words
NAMES = ("words.png", "masks.png", "layout.png", "gaze.png", "matches.png", "statistics.png")
ABOUT = """\
Draw pictures and show what the network held meanwhile:
  words.png       where it looked for each word: attention to the text, at some steps and on average
  masks.png       where Otsu's threshold sees the words, from all steps so far (ConsiStory's subject masks)
  layout.png      the three largest principal components of self-attention's mean map as red, green, blue
  gaze.png        where one point of a picture looks: in the picture, with --share in the reference too
                  (StyleAligned, figures 10 and 11)
  matches.png     the points of the other pictures that look alike to it (DIFT), from the step nearest t = 261
  statistics.png  how large h and each skip are at every step, with statistics.csv
and index.html, one page of all of it.  Looking changes nothing: the pictures are those of `diaphane generate`, or with
--share those of `diaphane style-align`; with --adapter those of `diaphane instant-style`.
"""
EXAMPLES = """\
examples:
  diaphane look "a cat on a mat" --words cat mat --model FOLDER
  diaphane look "a toy train, origami" "a toy boat, origami" --words toy --share --at 0.4,0.6 --model FOLDER
  diaphane look "a cat" --adapter ip-adapter_sdxl --style-image painting.png --model FOLDER
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser("look", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("prompt", nargs="+", help=f"what to draw, 1 ... {MOST} texts; the first is the reference")
    p.add_argument(
        "--words",
        nargs="+",
        metavar="WORD",
        help="of the prompts (default: the first prompt's, or where another has none of these, some of each)",
    )
    p.add_argument("--looks", type=options.whole(1, 16), default=4, help="at how many steps (default: 4)")
    p.add_argument("--share", action="store_true", help="the others share the first one's attention (StyleAligned)")
    p.add_argument("--at", type=point, default="0.5,0.5", metavar="X,Y", help="whose gaze, from the upper left corner "
                   "in shares of width and height (default: 0.5,0.5)")  # fmt: skip
    image_options.options(p, image_options.ADAPTER, image_options.ADAPTER + "share")
    generate.sampling(p)
    latents.options(p)
    generate.running(p, "look")
    return p


def loaded(args: argparse.Namespace) -> image_prompts.Loaded:
    """The model, and adapters if there are any."""
    return image_prompts.loaded(image_options.own(args))


LOAD = loaded


def point(text: str) -> str:
    """X,Y in 0 ... 1, as it is said."""
    share = r"(0?\.\d+|[01](\.0*)?)"
    if re.fullmatch(f"{share},{share}", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no point: say 0.25,0.75")
    return text


def words_of(args: argparse.Namespace) -> list[str]:
    """--words, or the prompts' own.  Raises CommandError for too many, and for a prompt without any."""
    if args.words and len(args.words) > MOST:
        raise CommandError(f"--words are 1 ... {MOST} words of the prompts; got {len(args.words)}")
    if args.words:
        return args.words
    each = [list(dict.fromkeys(re.findall(r"[^\W_]+", text.lower()))) for text in args.prompt]
    each = [[word for word in said if len(word) > 2] or said for said in each]  # without the shortest
    for text, said in zip(args.prompt, each, strict=True):
        if not said:
            raise CommandError(f"the prompt {text[:80]!r} has no words to look for: name some with --words")
    first = each[0][:MOST]
    if all(set(first) & set(said) for said in each):
        return first
    turns = (word for words in zip_longest(*each) for word in words if word)  # everyone's first, everyone's second ...
    return list(dict.fromkeys(turns))[:MOST]


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The pictures, what was held, and the page."""
    n = len(args.prompt)
    if n > MOST or args.batch != 1 or args.resume:
        raise CommandError(f"look draws 1 ... {MOST} texts together: leave --batch and --resume out")
    if args.share and n < 2:
        raise CommandError("one picture has none to share with: give --share a second prompt")
    if args.control_model:
        raise CommandError("look draws without ControlNets: leave --control-model out")
    if args.eta and args.sampler != "ddim":
        raise CommandError("--eta is DDIM's fresh noise: give --sampler ddim")
    words = words_of(args)
    net: Any = session.net
    size = generate.sizes(args, net)
    if inpaints(net):
        raise CommandError("the model is one for inpainting; name an ordinary one")
    tokens = places_of(net.parts.tokenizers[-1], args.prompt, words)
    path = walk_of(args, net, seeded([args.seed]))[1]
    steps = sorted(spread(path, args.looks), reverse=True)
    feature_at = min(path[:-1], key=lambda t: abs(t - 261))
    refs = grouped([range(n)]) if args.share else None
    inside = Inside(net.parts.unet.cfg, tokens, path, set(steps), feature_at, refs)
    seen = image_prompts.shown(image_options.own(args), session, net, size)

    def around(speaking: Callable[[Ops], Denoise], path: list[float], rows: range) -> Denoise:
        pictures = [one.prompt(net, size, rows, path) for one in seen]
        return inside.around(lambda ops: ranged(speaking, ops, pictures))

    told = argparse.Namespace(**vars(args) | {"init": None, "mask": None, "control_scale": 1.0})
    x = walked(told, session, net, args.prompt, range(n), size, {}, around)
    drawn = [to_picture(row) for row in net.pictures(x)]
    for i, (text, one) in enumerate(zip(args.prompt, drawn, strict=True)):
        yield session.made(f"{i + 1:04d}.png", one, seed=args.seed + i, prompt=text)
    sections = [Section("The pictures", "; ".join(args.prompt), sheet([drawn]))]
    for name, section in shown(args, inside, drawn, words, steps):
        sections.append(section)
        yield session.made(name, section.picture, seed=args.seed)
    if session.wanted is None:
        yield Made("statistics.csv", data=table(inside).encode())
        facts = {"prompts": "; ".join(args.prompt), "words": ", ".join(words), "model": net.weights["file"],
                 "size": f"{size[1]} x {size[0]}", "steps": args.steps, "sampler": args.sampler, "seed": args.seed,
                 "guidance": args.guidance}  # fmt: skip
        yield Made("index.html", data=page("diaphane look", facts, sections))


def shown(
    args: argparse.Namespace, inside: Inside, drawn: list[Image.Image], words: list[str], steps: Sequence[float]
) -> Iterator[tuple[str, Section]]:
    """The pictures of what was held, by name."""
    grid, n = inside.grid, len(drawn)
    columns = ["picture", *(f"t = {t:g}" for t in steps)]
    rows, labels = [], []
    for i, one in enumerate(drawn):
        for j, word in enumerate(words):
            if int(inside.tokens[i, j]) >= 0:
                maps = [inside.words[t][i, :, j] for t in steps] + [inside.mean_words()[i, :, j]]
                rows.append([one, *(heat(one, found.unflatten(0, grid)) for found in maps)])
                labels.append(f"{i + 1}: {word}")
    text = "Attention to each word, mean over heads and layers of the coarsest level, each map over its own range."
    yield "words.png", Section("Where the words are", text, sheet(rows, columns=[*columns, "all steps"], labels=labels))

    rows = [[one, *(overlaid(one, inside.masks(t)[i], grid) for t in steps)] for i, one in enumerate(drawn)]
    text = f"Above Otsu's threshold for any of {', '.join(words)}, from the mean map of all steps so far."
    yield "masks.png", Section("Masks", text, sheet(rows, columns=columns))

    count = grid[0] * grid[1]
    means = [inside.shared.mean(i, count) for i in range(n)]
    rows = [[one, enlarged(colours(mean, grid), one)] for one, mean in zip(drawn, means, strict=True)]
    text = "What attends alike has one colour: the principal components of the mean self-attention map."
    yield "layout.png", Section("Layout", text, sheet(rows, columns=["picture", "components"]))

    yield "gaze.png", gaze(args, inside, drawn, means)

    if n > 1:
        found, masks = inside.matched(), inside.masks()
        pairs = [matched(drawn[i], drawn[0], found.pixel[i, 0], masks[i], grid) for i in range(1, n)]
        text = "From points of the mask to the nearest ones, by the cosine of a feature, in the first picture's mask."
        labels = [f"{i + 1} and 1" for i in range(1, n)]
        yield "matches.png", Section("Matches", text, beneath(pairs, labels))

    norms = {name: rows[:, :, 0].mean(1).tolist() for name, rows in inside.statistics.table().items()}
    skips = [name for name in norms if name != "h"]
    few = {name: norms[name] for name in ("h", *skips[:4], skips[-1])}
    top = max(max(line) for line in few.values())
    chart = plot(inside.calls, few, title="Size of h and of skips (root mean square)", across="t", along="", low=0.0,
                 high=top * 1.05 or 1.0)  # fmt: skip
    text = "Mean over the pictures, at every call; all skips, means and deviations are in statistics.csv."
    yield "statistics.png", Section("h and the skips", text, chart)


def gaze(args: argparse.Namespace, inside: Inside, drawn: list[Image.Image], means: list[Tensor]) -> Section:
    """Where the token at --at looks in its own picture, and in its reference."""
    grid, count = inside.grid, inside.grid[0] * inside.grid[1]
    across, down = (float(part) for part in args.at.split(","))
    row, column = (min(int(share * side), side - 1) for share, side in zip((down, across), grid, strict=True))
    rows = []
    for i, one in enumerate(drawn):
        mean = means[i][row * grid[1] + column]
        parts = [pointed(one, across, down), heat(one, mean[:count].unflatten(0, grid))]
        if inside.refs is not None and len(mean) == 2 * count:
            parts.append(heat(drawn[inside.refs[i]], mean[count:].unflatten(0, grid)))
        rows.append(parts)
    columns = ["from", "in the picture", *(["in the reference"] if inside.refs is not None else [])]
    text = "Self-attention from one point, mean over heads, layers of the coarsest level and the steps looked at."
    return Section("Gaze", text, sheet(rows, columns=columns))


def heat(one: Image.Image, found: Tensor) -> Image.Image:
    """A picture under a map (h, w)."""
    return Image.blend(one.convert("RGB"), to_picture(picture(found, (one.height, one.width))), 0.65)


def enlarged(found: Tensor, one: Image.Image) -> Image.Image:
    """Colours (3, h, w) in 0 ... 1 at the size of a picture."""
    return to_picture(picture(found, (one.height, one.width)))


def pointed(one: Image.Image, across: float, down: float) -> Image.Image:
    """A picture with a ring about a point."""
    marked, radius = one.convert("RGB"), max(2, one.width // 32)
    x, y = across * one.width, down * one.height
    for colour, r in (("white", radius + 1), ("black", radius)):
        ImageDraw.Draw(marked).ellipse([x - r, y - r, x + r, y + r], outline=colour, width=max(1, one.width // 256))
    return marked


def beneath(pairs: list[Image.Image], labels: list[str]) -> Image.Image:
    """Pairs of pictures one below the other."""
    parts = [sheet([[pair]], labels=[label], edge=pair.height) for pair, label in zip(pairs, labels, strict=True)]
    return stacked(parts)


def table(inside: Inside) -> str:
    """Every number of the statistics, one row a call, tensor and picture."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["t", "tensor", "picture", "rms", "mean", "std"])
    for name, rows in inside.statistics.table().items():
        for t, call in zip(inside.calls, rows, strict=True):
            for i, numbers in enumerate(call.tolist()):
                writer.writerow([f"{t:g}", name, i + 1, *(f"{number:.6g}" for number in numbers)])
    return text.getvalue()


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("look", parser(), make, argv, load=LOAD)

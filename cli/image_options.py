"""The options of image prompts, and what they say of pictures' shares, of places and of steps."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..methods.scales import PRESETS, Scales, scales
from ..model.unet import UNetConfig
from .errors import CommandError
from .options import real, whole

ADAPTER, RENAMED = "adapter-", ("scale", "preset", "sites")  # names that StyleAligned has too
SHOWN = ("style_image", "share", "image_encoder", *RENAMED, "each", "average", "squash", "subtract",
         "subtract_encoder", "negative_image", "style_mask", "range")  # fmt: skip
H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def options(p: argparse.ArgumentParser, prefix: str = "", share: str = "share") -> None:
    """The options that say which adapters, and what they are shown.

    With a prefix, before names that other options have, no adapter is needed.  `share` is what --share is called.
    """
    g, needed = p.add_argument_group("image prompt"), not prefix
    g.add_argument("--adapter", nargs="+", required=needed, metavar="NAME", help="IP-Adapters: files, OWNER/REPO:FILE, "
                   "or names of `diaphane fetch` (ip-adapter_sdxl ...)")  # fmt: skip
    g.add_argument("--style-image", nargs="+", required=needed, metavar="PICTURE", help="what the adapter is shown; "
                   f"with several adapters one each, or as --{share} says")  # fmt: skip
    g.add_argument(f"--{share}", nargs="+", type=whole(1, 10_000), metavar="N", help="how many of the pictures each "
                   "adapter has")  # fmt: skip
    g.add_argument("--image-encoder", nargs="+", metavar="NAME", help="CLIP's vision tower for each adapter, or one "
                   "for all: a file, a folder, or a name (default: the published one, from the Hub)")  # fmt: skip
    g.add_argument(f"--{prefix}scale", nargs="+", type=real(-100, 100), default=[1.0], help="how much of each adapter, "
                   f"at the places of --{prefix}preset or --{prefix}sites (default: 1)")  # fmt: skip
    g.add_argument(f"--{prefix}preset", nargs="+", choices=PRESETS, help="InstantStyle's blocks, or all as IP-Adapter "
                   "(one, or one an adapter; default: style)")  # fmt: skip
    g.add_argument(f"--{prefix}sites", nargs="+", metavar="NAME=NUMBER", help="places in place of a preset: dec.1=1 "
                   "enc.8=0.5, in any spelling; a comma list for pictures with masks; @2 at the end for the second "
                   "adapter alone; or diffusers' nested form as one word of json for each adapter")  # fmt: skip
    g.add_argument("--each", action="store_true", help="one picture at a time: what is drawn i-th sees the i-th, over "
                   "and over (default: all of them at once)")  # fmt: skip
    g.add_argument("--average", nargs="*", type=real(-1e3, 1e3), metavar="W", help="several pictures as their mean, "
                   "perhaps weighted (default: all their tokens side by side)")  # fmt: skip
    g.add_argument("--squash", action="store_true", help="squash pictures to the encoder's square (default: crop it "
                   "from the middle)")  # fmt: skip
    g.add_argument("--subtract", nargs="+", metavar="TEXT[:WEIGHT]", help="leave what a text says out of the pictures' "
                   "embeddings; linear adapters only (default weight: 1; in the authors' example 0.5)")  # fmt: skip
    g.add_argument("--subtract-encoder", metavar="NAME", help="the text tower of the image encoder's own CLIP, for "
                   f"ViT-H (a file or folder of {H}); SDXL has that of bigG")  # fmt: skip
    g.add_argument("--negative-image", metavar="PICTURE", help="guidance leads away from it (default: from no picture)")
    g.add_argument("--style-mask", nargs="+", metavar="PICTURE", help="each picture is seen where its mask is white")
    g.add_argument("--range", nargs="+", type=real(0, 1), metavar="FRACTION", help="the steps that see the pictures, "
                   "from START to END in 0 ... 1; one pair, or one an adapter (default: 0 1)")  # fmt: skip


def own(args: argparse.Namespace) -> argparse.Namespace:
    """The options of a command that has them with the prefix ADAPTER, as those of one that has them without."""
    before = ADAPTER.replace("-", "_")
    mine = {name: getattr(args, before + name) for name in (*RENAMED, "share") if hasattr(args, before + name)}
    return argparse.Namespace(**vars(args) | mine | {"prefix": ADAPTER, "renamed": tuple(mine)})


def flag(args: argparse.Namespace, name: str) -> str:
    """What an option is called."""
    return f"--{args.prefix if name in getattr(args, 'renamed', ()) else ''}{name.replace('_', '-')}"


def check(args: argparse.Namespace) -> None:
    """Raises CommandError for options that do not go together, before any file of weights is opened."""
    if not args.adapter:
        for name in SHOWN:
            if getattr(args, name) not in (None, False, [1.0]):
                raise CommandError(f"{flag(args, name)} is about --adapter: give an adapter too")
        return
    if not args.style_image:
        raise CommandError("--adapter is shown pictures: give --style-image")
    k, n = len(args.adapter), len(args.style_image)
    for name in ("image_encoder", "scale", "preset"):
        if (count := len(getattr(args, name) or [0])) not in (1, k):
            raise CommandError(f"{flag(args, name)}: one for all, or one for each of {k} adapters; got {count}")
    shares = shared(args, k)
    if args.preset and args.sites:
        raise CommandError(f"{flag(args, 'preset')} and {flag(args, 'sites')} both say where: give one of them")
    for i in range(k) if args.sites else ():
        said(args, i, k)
    if args.range:
        pairs(args.range, k)
    if args.style_mask and len(args.style_mask) != n:
        raise CommandError(f"--style-mask: one for each of {n} pictures; got {len(args.style_mask)}")
    if args.style_mask and args.average is not None:
        raise CommandError("--average makes one picture of all: leave --style-mask out")
    if args.each and args.average is not None:
        raise CommandError("--average makes one picture of all, --each shows one after the other: give one of them")
    if args.average and any(len(args.average) != len(mine) for mine in shares):
        raise CommandError(f"--average: one weight for each of {len(shares[0])} pictures; got {len(args.average)}")
    if args.average and not sum(args.average):
        raise CommandError("--average: the weights' sum is 0")
    if args.subtract_encoder and not args.subtract:
        raise CommandError("--subtract-encoder reads the text of --subtract: give both")
    for text in args.subtract or ():
        weighed(text)


def shared(args: argparse.Namespace, k: int) -> list[list[int]]:
    """Which pictures each of k adapters is shown.  Raises CommandError where that is not said."""
    n, name = len(args.style_image), flag(args, "share")
    if args.share is None and k > 1 and n != k:
        raise CommandError(f"{n} pictures for {k} adapters: say how many each is shown, as in {name} 2 1")
    counts = args.share or ([n] if k == 1 else [1] * k)
    if len(counts) != k or any(c < 1 for c in counts) or sum(counts) != n:
        raise CommandError(f"{name} says for each of {k} adapters how many of the {n} pictures are its own; got "
                           f"{' '.join(map(str, counts))}")  # fmt: skip
    starts = [sum(counts[:i]) for i in range(k)]
    return [list(range(start, start + c)) for start, c in zip(starts, counts, strict=True)]


def pairs(numbers: Sequence[float], k: int) -> list[tuple[float, float]]:
    """START and END for each of k adapters."""
    if len(numbers) not in (2, 2 * k):
        raise CommandError(f"--range is START END, once or for each of {k} adapters; got {len(numbers)} numbers")
    found = [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
    if any(a >= b for a, b in found):
        raise CommandError("--range: START is before END")
    return found * (k if len(found) == 1 else 1)


def placed(args: argparse.Namespace, cfg: UNetConfig, i: int, k: int, several: int | None) -> Scales:
    """How much of adapter i of k where: --scale times --preset or --sites; `several`: how many masks it has."""
    if args.sites:
        found = scales(cfg, said(args, i, k))
    else:
        found = scales(cfg, args.preset[min(i, len(args.preset) - 1)] if args.preset else "style")
    much = args.scale[min(i, len(args.scale) - 1)]
    if any(isinstance(v, tuple) and len(v) != several for v in found.values()):
        raise CommandError(f"{flag(args, 'sites')}: a list is for pictures with --style-mask, one number for each of "
                           "the adapter's")  # fmt: skip
    return {at: tuple(much * n for n in v) if isinstance(v, tuple) else much * v for at, v in found.items() if much}


def said(args: argparse.Namespace, i: int, k: int) -> Mapping[str, Any] | float:
    """What --sites says of adapter i of k.  Raises CommandError."""
    words: Sequence[str] = args.sites
    name_of = flag(args, "sites")
    if any(word.lstrip().startswith(("{", "[")) for word in words):
        if len(words) not in (1, k):
            raise CommandError(f"{name_of}: one word of json for all, or one for each of {k} adapters")
        try:
            value = json.loads(words[min(i, len(words) - 1)])
        except (ValueError, RecursionError) as e:
            raise CommandError(f"{name_of}: {words[min(i, len(words) - 1)][:60]!r} is not json: {e}") from e
        return value
    found: dict[str, Any] = {}
    for word in words:
        text, at, which = word.partition("@")
        name, equals, number = text.partition("=")
        if not name or (at and (not which.isdecimal() or not 1 <= int(which) <= k)):
            raise CommandError(f"{name_of} {word}: it is NAME=NUMBER, with @1 ... @{k} for one adapter")
        try:
            values = [float(v) for v in number.split(",")] if equals else [1.0]
        except ValueError:
            raise CommandError(f"{name_of} {word}: {number!r} is not a number") from None
        if not at or int(which) == i + 1:
            found[name] = values if len(values) > 1 else values[0]
    return found


def weighed(text: str) -> tuple[str, float]:
    """TEXT:WEIGHT of --subtract -> both; a text without a weight has 1.  Raises CommandError."""
    words, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        words, weight = text, 1.0
    if not words.strip():
        raise CommandError(f"--subtract {text!r}: it is TEXT or TEXT:WEIGHT")
    if not -100 <= weight <= 100:
        raise CommandError(f"--subtract {text!r}: the weight is a number in -100 ... 100")
    return words, weight

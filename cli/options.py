"""The options that commands share, and what each accepts."""

import argparse
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NoReturn

from .errors import CommandError

DTYPES = ("float32", "float64", "bfloat16", "float16")
MAX_SEED = 2**62
PLACES = (
    "out",
    "quiet",
    "overwrite",
    "resume",
    "save_direction",
)  # where a picture goes, not what it is: left out of its record


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def __init__(self, command: str, **kwargs: Any):
        super().__init__(
            prog=f"diaphane {command}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} ({self.prog} --help says more)")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An integer in low ... high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not in {low} ... {high}")
        return value

    return parse


def real(low: float = -1e4, high: float = 1e4) -> Callable[[str], float]:
    """A finite number in low ... high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text[:40]} is not a number in {low:g} ... {high:g}")
        return value

    return parse


def parser(command: str, description: str, epilog: str) -> Parser:
    """A parser with the options of every command that runs a network."""
    p = Parser(command, description=description, epilog=epilog)
    net = p.add_argument_group("network")
    net.add_argument("--model", default="shapes", help="an embedded or catalogued name, a weight file or folder, or a "
                     "repository on the Hub (default: shapes, which ships with the package)")  # fmt: skip
    net.add_argument("--file", help="which file of a folder or repository")
    net.add_argument("--config", help="a json file of the network's settings, in place of the one beside the weights")
    net.add_argument(
        "--resolution", type=whole(1, 4096), help="side of the pictures in pixels, where weights cannot say"
    )
    net.add_argument("--label", type=whole(0, 10**6), help="class of a class-conditional network (default: none)")
    net.add_argument("--schedule", choices=("linear", "cosine"), default="linear",
                     help="noise schedule it was trained with (default: linear)")  # fmt: skip
    run = p.add_argument_group("run")
    run.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="picture i is drawn from seed + i (default: 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    run.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)"
    )
    run.add_argument("--threads", type=whole(1, 256), help="of the CPU (default: torch's own choice)")
    run.add_argument("--batch", type=whole(1, 65536), default=16, help="pictures at a time (default: 16)")
    out = p.add_argument_group("output")
    out.add_argument("--out", default=f"out/{command}", help=f"folder for what is made; a numbered one beside it if it "
                     f"is not empty (default: out/{command})")  # fmt: skip
    out.add_argument("--overwrite", action="store_true", help="write into the folder even if it is not empty")
    out.add_argument("--quiet", action="store_true", help="no progress bars, no lines about files")
    return p


def steps(p: argparse.ArgumentParser, name: str = "--steps", *, what: str, low: int = 1, default: int = 50) -> None:
    """An option for a number of steps."""
    p.add_argument(name, type=whole(low, 1000), default=default, help=f"{what} (default: {default})")


def timestep(p: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
    """An option for a timestep 0 ... 1000."""
    p.add_argument(name, type=whole(0, 1000), default=default, help=f"{what} (default: {default})")


def pictures(p: argparse.ArgumentParser) -> None:
    """What becomes of pictures that are not of the network's size."""
    p.add_argument("--no-resize", action="store_true",
                   help="refuse pictures of another size (else: centre-cropped, resized, bilinear)")  # fmt: skip


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a picture is, as plain values."""
    return {name: value for name, value in vars(args).items() if name not in PLACES}


def words(p: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """A command line that says `values`, option by option.  Raises CommandError for what is no option of the parser."""
    actions = {action.dest: action for action in p._actions if action.dest != "help"}
    argv: list[str] = []
    last: list[str] = []
    for name, value in values.items():
        if name not in actions:
            raise CommandError(f"{p.prog} has no setting {name!r}: the picture is of another version")
        many = value if isinstance(value, list) else [value]
        if value is None or value is False:
            continue
        if not actions[name].option_strings:
            last = ["--", *map(say, many)]
        elif actions[name].nargs == 0:
            argv += actions[name].option_strings[:1]
        elif actions[name].nargs is None:
            argv.append(f"{actions[name].option_strings[0]}={say(value)}")
        else:
            argv += [actions[name].option_strings[0], *map(say, many)]
    return argv + last


def say(value: object) -> str:
    """A value as a word of a command line; numbers without an exponent, which argparse would take for an option."""
    return format(Decimal(str(value)), "f") if isinstance(value, float) else str(value)

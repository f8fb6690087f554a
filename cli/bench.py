"""`diaphane bench`: the kernels against everything else that computes the same."""

import argparse
import csv
import gc
import importlib.util
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels.contests import OURS, Contest, Entry, Refused, Row, compete
from ..kernels.entries import ENTRIES
from ..kernels.timing import Ceilings, Spread, ceilings
from . import roofline
from .conditions import conditions
from .errors import CommandError, line
from .network import device_of
from .options import Parser, whole
from .output import replace

ABOUT = """\
Time the kernels against their rivals, on this machine, in one process.

Every way is first checked against float64: a wrong answer gets a line on standard error, no row, and exit code 1.
The rest take turns, in an order that is reversed every other round; a row has the median and the 20th and 80th
percentiles, and how long ours took in parts of it, round by round.  Rates and shares of the floor count the least
work of the case, the same for every way; the floor is what the ceilings measured in this run allow.  A rival that
cannot run here is listed with the reason.  On a CPU the ratios are the result, and the milliseconds show the scale.
"""
EXAMPLES = """\
example:
  diaphane bench --list
  diaphane bench --kernel source_attention --case style-4096 --csv style.csv --plot style.png
  diaphane bench --case cpu-style --way concatenated --threads 1
"""
FORMATS = (".png", ".svg", ".pdf")


def parser() -> Parser:
    """The command's options."""
    p = Parser("bench", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("--kernel", nargs="+", metavar="NAME", help="which kernels (default: all)")
    p.add_argument("--case", nargs="+", metavar="NAME", help="which cases (default: the usual ones of the device)")
    p.add_argument("--way", nargs="+", metavar="WORD", help="only rivals with one of these words in their names")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    p.add_argument("--dtype", choices=("float16", "bfloat16", "float32"),
                   help="(default: float16 on cuda, float32 on cpu)")  # fmt: skip
    p.add_argument("--rounds", type=whole(1, 100_000), help="turns of each way (default: 50 on cuda, 15 on cpu)")
    p.add_argument("--threads", type=whole(1, 256), help="of the CPU (default: torch's own choice)")
    p.add_argument("--csv", metavar="FILE", help="write the rows, each as soon as it is finished")
    p.add_argument("--plot", metavar="FILE", help="draw a roofline: png, svg or pdf (needs matplotlib)")
    p.add_argument("--overwrite", action="store_true", help="write over the files of --csv and --plot")
    p.add_argument("--list", action="store_true", help="only say which kernels and cases there are, and why")
    return p


@dataclass
class Record:
    """The rows of one run, as they are written."""

    ceilings: Ceilings
    about: dict[str, str]
    dtype: str
    rounds: int
    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row) -> dict[str, Any]:
        """Note a row, and write the file anew, whole or not at all."""
        cells = written(row, self.ceilings) | {"dtype": self.dtype, "rounds": self.rounds} | self.about
        self.rows.append(cells)
        if self.file:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(cells), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            replace(self.file, text.getvalue().encode())
        return cells


def written(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    """A row's cells: times in ms, rates per second, memory in MiB; empty where there is nothing to say."""
    work, ms = row.work, row.time.median if row.time else math.nan
    floor, bound = work.floor(ceilings)
    cells: dict[str, Any] = {"kernel": row.kernel, "case": row.case, "way": row.way}
    for name, of in (("ms", row.time), ("ratio", row.ratio), ("setup_ms", row.setup)):
        cells |= {name: _n(of and of.median), f"{name}_p20": _n(of and of.low), f"{name}_p80": _n(of and of.high)}
    return cells | {
        "tflops": _n(work.flops / ms / 1e9),
        "gbps": _n(work.bytes / ms / 1e6),
        "share": _n(floor / ms),
        "bound": bound,
        "mib": _n(row.memory and row.memory / 2**20),
        "error": _n(row.error),
        "error_most": _n(row.most),
        "note": row.note,
        "gflop": _n(work.flops / 1e9),
        "gexp": _n(work.exps / 1e9),
        "gb": _n(work.bytes / 1e9),
        "ceiling_tflops": _n(ceilings.flops / 1e12),
        "ceiling_texps": _n(ceilings.exps / 1e12),
        "ceiling_gbps": _n(ceilings.bytes / 1e9),
    }


def _n(value: float | None) -> float | str:
    return "" if value is None or math.isnan(value) else float(f"{value:.5g}")


def chosen(args: argparse.Namespace, kind: str) -> list[tuple[Entry, str]]:
    """The kernels and cases that are asked for.  Raises CommandError for names that there are not."""
    names = [e.kernel for e in ENTRIES]
    for name in args.kernel or []:
        if name not in names:
            raise CommandError(f"--kernel {name}: there are {', '.join(names)}")
    entries = [e for e in ENTRIES if not args.kernel or e.kernel in args.kernel]
    for name in args.case or []:
        if not any(name in e.cases for e in entries):
            of = ", ".join(dict.fromkeys(c for e in entries for c in e.cases))
            raise CommandError(f"--case {name}: there are {of}")
    if not args.case:
        return [(e, c) for e in entries for c in e.usual[kind]]
    return [(e, c) for e in entries for c in e.cases if c in args.case]


def listed() -> None:
    """Every kernel and case, and why it is there."""
    for entry in ENTRIES:
        print(entry.kernel)
        for name, case in entry.cases.items():
            usual = ", ".join(kind for kind, names in entry.usual.items() if name in names)
            print(f"  {name:20} {f'({usual})' if usual else '':12} {case.why}")


def ready(name: str | None, option: str, overwrite: bool) -> Path | None:
    """A file that can be written.  Raises CommandError."""
    if name is None:
        return None
    path = Path(name)
    if not path.name:
        raise CommandError(f"{option} {name!r} names no file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {name}: {path.parent} is no folder that can be written to")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CommandError(f"{option} {name} is there already: name another, or give --overwrite")
    return path


def contests(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    """One after the other, with what the one before held given back.

    Raises CommandError, at the end, for a word of `--way` that no rival had in its name.
    """
    met: set[str] = set()
    for entry, case in chosen(args, device.type):
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        contest = entry.contest(entry.cases[case], dtype, device)
        ways = {n: w for n, w in contest.ways.items() if not args.way or n == OURS or any(x in n for x in args.way)}
        met |= set(contest.ways)
        yield contest._replace(ways=ways)
    for word in args.way or []:
        if not any(word in name for name in met):
            raise CommandError(
                f"--way {word}: no rival has it in its name; there are {', '.join(sorted(met - {OURS}))}"
            )


def run(argv: Sequence[str]) -> int:
    """Run the command.  Returns 1 where an answer was wrong."""
    args = parser().parse_args(argv)
    if args.list:
        listed()
        return 0
    device = device_of(args.device)
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {args.device}: kernels are timed on cpu and cuda")
    chosen(args, device.type)
    file, plot = ready(args.csv, "--csv", args.overwrite), ready(args.plot, "--plot", args.overwrite)
    if file and plot and file.absolute() == plot.absolute():
        raise CommandError(f"--csv and --plot name the same file, {plot}")
    if plot and plot.suffix not in FORMATS:
        raise CommandError(f"--plot {plot}: a picture ends in {', '.join(FORMATS)}")
    if plot and not importlib.util.find_spec("matplotlib"):
        raise CommandError("--plot needs matplotlib: pip install 'diaphane[plot]'")
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.dtype or ("float16" if device.type == "cuda" else "float32")
    dtype: torch.dtype = getattr(torch, name)
    rounds = args.rounds or (50 if device.type == "cuda" else 15)
    best, about = ceilings(device, dtype), conditions(device)
    record, refused = Record(best, about, name, rounds, file), 0
    print(line(f"{about['device']}, {name}, torch {about['torch']}, triton {about['triton'] or 'none'}"))
    print(f"measured: {_rate(best.flops)}FLOP/s, {_rate(best.exps)}exp/s, {_rate(best.bytes)}B/s")
    for contest in contests(args, device, dtype):
        print(head(contest, best))
        for row in compete(contest, device, rounds):
            sys.stdout.flush()
            if isinstance(row, Refused):
                refused += 1
                print(line(f"diaphane bench: {row}"), file=sys.stderr)
            else:
                print(shown(record.add(row), row))
    if file and record.rows:
        print(line(f"wrote {file}"))
    if plot and roofline.points(record.rows):
        replace(plot, roofline.drawn(record.rows, plot.suffix[1:]))
        print(line(f"wrote {plot}"))
    return 1 if refused else 0


def head(contest: Contest, best: Ceilings) -> str:
    """What stands above the rows of a case."""
    work = contest.work
    floor, unit = work.floor(best)
    amounts = f"{_rate(work.flops)}FLOP, " + (f"{_rate(work.exps)}exp, " if work.exps else "") + f"{_rate(work.bytes)}B"
    columns = f"  {'way':38}{'ms (p20 - p80)':>26}{'ours / it (p20 - p80)':>25}{'rate':>15}{'floor':>7}"
    return (
        f"\n{contest.kernel} {contest.case}: {contest.why}\n  {amounts}; at least {floor:.3g} ms, bound by {unit}\n"
        f"{columns}{'MiB':>8}{'setup ms':>10}{'error':>9}"
    )


def shown(cells: dict[str, Any], row: Row) -> str:
    """A row as a line of the table."""
    if row.time is None:
        return line(f"  {row.way:38}not here: {row.note}")
    dense = row.work.flops > 16 * row.work.bytes
    amount, unit = (row.work.flops, "FLOP/s") if dense else (row.work.bytes, "B/s")
    rate = _rate(1e3 * amount / row.time.median) + unit
    return (
        f"  {row.way:38}{_spread(row.time):>26}{_spread(row.ratio):>25}{rate:>15}{cells['share']:>7.0%}"
        f"{(row.memory or 0) / 2**20:>8.1f}{f'{row.setup.median:.3g}' if row.setup else '':>10}{row.error:>9.1e}"
    )


def _spread(of: Spread | None) -> str:
    return f"{of.median:.3g} ({of.low:.3g} - {of.high:.3g})" if of else ""


def _rate(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "

"""A kernel against its rivals on one case: checked against float64, then timed in turn, then written as rows.

A row of a way whose answer is wrong does not exist: `compete` yields a `Refused` in its place.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .timing import LEAST, Ceilings, Once, Spread, Way, clock, interleaved, peak, ratios, spread

OURS = "diaphane"
LENIENCE = 2  # how much more a rival may err than ours: it has to be right, not as exact as it was promised to be


class Unavailable(RuntimeError):
    """A way that cannot run here; its message says why."""


class Work(NamedTuple):
    """The least that a case needs: the same for every way, so that shares of a ceiling compare times."""

    flops: float  # of products and sums
    exps: float
    bytes: float  # read and written

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Milliseconds below which the machine cannot do it, its units working side by side, and the unit that binds.

        Elementwise FLOP are free beside the bytes that they touch: only work with exponentials or more than 64 FLOP a
        byte is measured by products.
        """
        times = {"copy": 1e3 * self.bytes / ceilings.bytes}
        if self.flops > 64 * self.bytes or self.exps:
            times["products"] = 1e3 * self.flops / ceilings.flops
        if self.exps and ceilings.exps == ceilings.exps:
            times["exponentials"] = 1e3 * self.exps / ceilings.exps
        unit = max(times, key=lambda name: times[name])
        return times[unit], unit


class Contest(NamedTuple):
    """One case: its work, the ways to do it, and who says whether an answer is right.

    `ways` are made when their turn comes, and may raise: then they are a row that says why.  The first is ours.
    `judge` takes what a way returned, and gives its error against float64 and the most that it may be.
    """

    kernel: str
    case: str
    why: str
    work: Work
    ways: Mapping[str, Callable[[], Way]]
    judge: Callable[[Any], tuple[float, float]]


class Entry(NamedTuple):
    """A kernel of the benchmark: its cases by name, those that run unasked on each device, and its contests."""

    kernel: str
    cases: Mapping[str, Any]
    usual: Mapping[str, tuple[str, ...]]  # "cpu", "cuda"
    contest: Callable[[Any, torch.dtype, torch.device], Contest]


def entry(
    kernel: str, cuda: Sequence[Any], cpu: Sequence[Any], edges: Sequence[Any], contest: Callable[..., Contest]
) -> Entry:
    """An entry whose usual cases are those of a GPU's and of a CPU's list, and which has the edges where asked."""
    cases = {case.name: case for case in [*cuda, *cpu, *edges]}
    return Entry(kernel, cases, {"cuda": tuple(c.name for c in cuda), "cpu": tuple(c.name for c in cpu)}, contest)


@dataclass(frozen=True)
class Row:
    """One way on one case; times in ms, memory in bytes.  Without times `note` says why."""

    kernel: str
    case: str
    way: str
    work: Work
    time: Spread | None = None
    ratio: Spread | None = None  # ours / this way's, round by round
    setup: Spread | None = None
    memory: int | None = None
    error: float | None = None
    most: float | None = None
    note: str = ""


class Refused(NamedTuple):
    """A way whose answer is wrong, or ours where it gave none."""

    kernel: str
    case: str
    way: str
    why: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.case}, {self.way}: {self.why}; it gets no row"


def compete(contest: Contest, device: torch.device, rounds: int, once: Once | None = None) -> Iterator[Row | Refused]:
    """Every way of a contest: what cannot run and what is wrong first, then the rest, ours before the others.

    What keeps a rival from running is its row's note.
    """
    once = once or clock(device)
    ways: dict[str, Way] = {}
    rows: dict[str, Row] = {}
    for name, offer in contest.ways.items():
        row, said = Row(contest.kernel, contest.case, name, contest.work), []
        try:
            way = offer()
            if way.setup:
                way.setup()
            with heard(said), torch.no_grad(), way.within():
                error, most = contest.judge(way.run())
        except Exception as e:
            if name == OURS:
                yield Refused(contest.kernel, contest.case, name, f"it raised {why_not(e, said)}")
                continue
            yield replace(row, note=why_not(e, said))
            continue
        most = most if name == OURS else LENIENCE * most
        if not error <= most:
            why = f"its error against float64 is {error:.2e}, more than {most:.2e}"
            yield Refused(contest.kernel, contest.case, name, why)
            continue
        with torch.no_grad():
            rows[name] = replace(row, error=error, most=most, memory=peak(way, device))
        ways[name] = way
    with torch.no_grad():
        samples = interleaved(ways, rounds, once, LEAST[device.type])
        for name, way in ways.items():
            setup = None
            if way.setup:
                setup = spread(interleaved({name: Way(way.setup)}, min(rounds, 5), once, LEAST[device.type])[name])
            ratio = ratios(samples[OURS], samples[name]) if OURS in samples and name != OURS else None
            yield replace(rows[name], time=spread(samples[name]), ratio=ratio, setup=setup)


@contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """What torch warns of goes to `said`: while it looks for a backend, that is why it found none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            said += [str(w.message).split(" (Triggered")[0] for w in caught]


def why_not(error: Exception, said: list[str]) -> str:
    """An error as a line: its first, or, where no backend took the call, what torch warned of before it."""
    backend = "No available kernel" in str(error)
    given = [text for text in said if backend and not ("disabled" in text or "not used because" in text)]
    lines = given or [str(error)]
    first = next((line.strip() for line in lines[0].splitlines() if line.strip()), type(error).__name__)
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return f"{name}{first}"[:200]


def distance(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference in units of the truth's; infinite for NaN or another shape."""
    if found.shape != true.shape:
        return float("inf")
    worst = ((found.double() - true).norm() / true.norm().clamp_min(1e-300)).item()
    return worst if worst == worst else float("inf")


def limit(plain: Tensor, true: Tensor) -> float:
    """The most that an answer may err: twice what the definition errs in the same type, or twice that type's precision.

    `true` is in float64, `plain` the definition in the type of the case; four times the precision where that overflows.
    """
    precision, errs = torch.finfo(plain.dtype).eps, distance(plain, true)
    return max(2 * errs, 2 * precision) if errs < float("inf") else 8 * precision


def judged(
    definition: Callable[[torch.dtype], tuple[Tensor, ...]], dtype: torch.dtype, least: float = 0.0
) -> Callable[[Any], tuple[float, float]]:
    """A judge of outputs by a definition, which it asks once, in float64 and in the type of the case.

    `least` is an error that is allowed however exact the definition is.  Of several outputs the one counts that is
    nearest to the most it may err, or furthest beyond.
    """

    @cache
    def truth() -> list[tuple[Tensor, float]]:
        true, plain = definition(torch.float64), definition(dtype)
        return [(x, max(limit(y, x), least)) for x, y in zip(true, plain, strict=True)]

    def judge(found: Tensor | tuple[Tensor, ...]) -> tuple[float, float]:
        outputs = (found,) if isinstance(found, Tensor) else found
        errors = [(distance(x, true), most) for x, (true, most) in zip(outputs, truth(), strict=True)]
        return max(errors, key=lambda e: e[0] / e[1])

    return judge


def compiled(definition: Callable[..., Any]) -> Any:
    """A function as torch compiles it for the shapes of the case, whole."""
    return torch.compile(definition, dynamic=False, fullgraph=True)

"""The tables of configurations that the Triton kernels are launched with, by timing every candidate on a GPU.

python benchmarks/tune.py --out out/tune.csv            # what is quickest, and by how much
python benchmarks/tune.py --out out/tune.csv --write    # into the tables in kernels/*_triton.py, for the commit

Every candidate is first checked against float64 on ragged shapes: some configurations compile and compute wrongly.
Those that are right are timed in turn at every length, and the one is chosen that is least behind the best of each,
as a geometric mean.  Where a length would gain more than 3 % by a configuration of its own, it is said.
tests/test_kernels_aot.py has to pass afterwards: it refuses what spills or asks for too much shared memory.
"""

import argparse
import csv
import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diaphane.cli.conditions import conditions
from diaphane.kernels import reference
from diaphane.kernels.builds import Config, architecture
from diaphane.kernels.cases import Case, inputs, sources
from diaphane.kernels.contests import judged
from diaphane.kernels.masked_maps import masked_maps
from diaphane.kernels.match import match
from diaphane.kernels.source_attention import source_attention
from diaphane.kernels.timing import Once, Spread, Way, clock, interleaved, spread
from torch import Tensor

LENGTHS = (256, 1024, 4096)  # tokens
CHANNELS = {64: 64, 128: 80, 256: 160}  # of a head, by the tile that holds it: SDXL's, Stable Diffusion 1.5's
GAIN = 1.03
Check = Callable[[], tuple[float, float]]


class Problem(NamedTuple):
    """A row of a table, the candidates for it, makers of what is timed by length, and the error of one call with the
    most."""

    kernel: str
    table: dict[Any, Any]
    key: Hashable
    file: str
    candidates: Sequence[Any]
    calls: Mapping[str, Callable[[], Callable[[], object]]]
    check: Check


@dataclass(frozen=True)
class Timed:
    """A candidate: its times by length, or why it has none."""

    config: Any
    times: Mapping[str, Spread]
    why: str = ""


@contextmanager
def using(table: dict[Any, Any], key: Hashable, config: Any) -> Iterator[None]:
    """One row of a table changed for a while."""
    kept = table[key]
    table[key] = config
    try:
        yield
    finally:
        table[key] = kept


def timed(problem: Problem, rounds: int, once: Once) -> list[Timed]:
    """Every candidate, checked, and those that are right timed in turn at every length."""
    right, found = [], []
    calls = {length: make() for length, make in problem.calls.items()}
    for config in problem.candidates:
        try:
            with using(problem.table, problem.key, config):
                error, most = problem.check()
                for call in calls.values():
                    call()
        except Exception as e:  # out of shared memory, or a compiler's failure: not a candidate here
            why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
            if "illegal" in why or "CUDA error" in why:  # nothing runs on the device after that
                raise SystemExit(f"{problem.kernel} {problem.key}, {config}: {why}; leave it out") from None
            found.append(Timed(config, {}, why))
            continue
        if error <= most:
            right.append(config)
        else:
            found.append(Timed(config, {}, f"wrong: its error is {error:.2e}, more than {most:.2e}"))
    times: dict[Any, dict[str, Spread]] = {config: {} for config in right}
    for length, call in calls.items():
        within = {c: partial(using, problem.table, problem.key, c) for c in right}
        samples = interleaved({str(c): Way(call, within=within[c]) for c in right}, rounds, once)
        for c in right:
            times[c][length] = spread(samples[str(c)])
    return [*(Timed(config, times[config]) for config in right), *found]


def behind(candidate: Timed, best: Mapping[str, float]) -> float:
    """How far a candidate is behind the best of every length: a geometric mean of ratios, 1 at the least."""
    return math.exp(sum(math.log(candidate.times[n].median / best[n]) for n in best) / len(best))


def chosen(found: Sequence[Timed]) -> tuple[Timed, list[str]]:
    """The candidate for a row, and what is to be said of it.  ValueError: none is right."""
    right = [each for each in found if each.times]
    if not right:
        raise ValueError("no candidate is right: " + "; ".join(f"{each.config} {each.why}" for each in found[:3]))
    best = {n: min(each.times[n].median for each in right) for n in right[0].times}
    choice = min(right, key=lambda each: behind(each, best))
    said = []
    for length, least in best.items():
        gain = choice.times[length].median / least
        if gain > GAIN:
            own = next(each.config for each in right if each.times[length].median == least)
            said.append(f"{length}: {own} would be {gain:.2f} x as fast")
    return choice, said


def rewritten(source: str, key: Hashable, config: Any) -> str:
    """A file with one row of its TABLE changed.  ValueError: the row is not there, or there twice."""
    row = str(key).replace("'", '"')
    text = f"    {row}: {type(config).__name__}({', '.join(map(str, config))}),"
    changed, count = re.subn(rf"^    {re.escape(row)}: \w+\([^()]*\),", text, source, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"a table has one row {row}; found {count}")
    return changed


def attention(arch: int, kernel: str, tile: int, device: torch.device) -> Problem:
    """A row of source attention's table: one of its three kernels and a tile of channels."""
    from diaphane.kernels import source_attention_triton as module

    dim, dtype, forward = CHANNELS[tile], torch.float16, kernel == "forward"
    few = (0, 0, 0, 0, 4, 4, 4, 4)
    ways = {"style": {"sees": "shared", "refs": few, "adain": forward}} | ({"own": {}} if tile < 256 else {})
    cases = {f"{n} {w}": Case(w, "", 8, 10 if n > 1024 else 20, n, dim, **ways[w]) for n in LENGTHS for w in ways}
    ragged = Case("ragged", "", 2, 3, 333, dim, sees="shared", refs=(0, 0), adain=forward, shift=0.5)

    def call(case: Case) -> Callable[[], object]:
        made, seen = inputs(case, dtype, device), sources(case, device)
        q, k, v = (made[n].requires_grad_(not forward) for n in ("q", "k", "v"))
        if forward:
            return lambda: source_attention(q, k, v, seen, ref=made.get("ref"))
        out, _ = source_attention(q, k, v, seen)
        g = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

    made, seen = inputs(ragged, dtype, device), sources(ragged, device)

    def results(run: Callable[..., Any], kind: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (made[n].to(kind).requires_grad_(not forward) for n in ("q", "k", "v"))
        out, lse = run(q, k, v, seen, ref=made.get("ref"))
        return (out, lse) if forward else torch.autograd.grad(out.square().sum(), (q, k, v))

    judge = judged(lambda kind: results(reference.source_attention, kind), dtype)
    sides = product((32, 64, 128), (16, 32, 64, 128))
    candidates = [Config(*side, *how) for side, how in product(sides, product((4, 8), (1, 2, 3, 4)))]
    calls = {name: partial(call, case) for name, case in cases.items()}
    return Problem(
        f"source_attention {kernel}", module.TABLE, (arch, kernel, tile), module.__file__, candidates, calls,
        lambda: judge(results(source_attention, dtype)),
    )  # fmt: skip


def maps(arch: int, kernel: str, tile: int, device: torch.device) -> Problem:
    """A row of masked maps' table: one of its three kernels and a tile of channels."""
    from diaphane.kernels import masked_maps_triton as module

    forward = kernel == "maps"

    def drawn(b: int, h: int, n: int, m: int = 77) -> tuple[tuple[Tensor, ...], Tensor]:
        made = (torch.randn(b, rows, h, CHANNELS[tile], device=device).half().transpose(1, 2) for rows in (n, m, m))
        return tuple(made), torch.tensor([3, 1, m - 1], device=device)

    def results(run: Callable[..., Any], made: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_(not forward) for x in made)
        out, found = run(*leaves, tokens)
        if forward:
            return out, found
        return torch.autograd.grad(out.float().square().sum() + found.square().sum(), leaves)

    def call(n: int) -> Callable[[], object]:
        made, tokens = drawn(8, 10 if n > 1024 else 20, n)
        return lambda: results(masked_maps, made, tokens)

    ragged, some = drawn(2, 3, 333)

    def exact(kind: torch.dtype) -> tuple[Tensor, ...]:
        return results(reference.masked_maps, tuple(x.to(kind) for x in ragged), some)

    judge = judged(exact, torch.float16)
    candidates = [Config(*each) for each in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))]
    return Problem(
        f"masked_maps {kernel}", module.TABLE, (arch, kernel, tile), module.__file__, candidates,
        {str(n): partial(call, n) for n in LENGTHS}, lambda: judge(results(masked_maps, ragged, some)),
    )  # fmt: skip


def matches(arch: int, precision: str, device: torch.device) -> Problem:
    """A row of the match's table, judged by how much worse than the best a match is."""
    from diaphane.kernels import match_triton as module

    dtype = torch.float16 if precision == "half" else torch.float32

    def drawn(n: int) -> tuple[Tensor, Tensor, Tensor]:
        src, tgt = (torch.randn(2, n, 640, device=device).to(dtype) for _ in range(2))
        return src, tgt, torch.rand(2, n, device=device) < 0.3

    def call(n: int) -> Callable[[], object]:
        return partial(match, *drawn(n))

    src, tgt, mask = drawn(333)

    def check() -> tuple[float, float]:
        (index, said), (_, true) = match(src, tgt, mask), reference.match(src.double(), tgt.double(), mask)
        unit, sought = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (src, tgt))
        got = (sought[:, None] * unit[torch.arange(2, device=device)[None, :, None], index]).sum(-1)
        return max((true - got).max().item(), (said - true).abs().max().item()), 64 * torch.finfo(torch.float32).eps

    candidates = [module.Tile(*each) for each in product((64, 128), (64, 128), (32, 64), (4, 8), (1, 2, 3, 4))]
    return Problem(
        f"match {precision}", module.TABLE, (arch, precision), module.__file__, candidates,
        {str(n): partial(call, n) for n in LENGTHS[1:]}, check,
    )  # fmt: skip


def problems(device: torch.device, arch: int) -> Iterator[Problem]:
    """Every row of every table for an architecture."""
    from diaphane.kernels import masked_maps_triton, match_triton, source_attention_triton

    for module, made in ((source_attention_triton, attention), (masked_maps_triton, maps), (match_triton, matches)):
        for row in list(module.TABLE):
            if row[0] == arch:
                yield made(*row, device)


def tune(each: Iterator[Problem], rounds: int, once: Once, write: bool) -> Iterator[dict[str, Any]]:
    """Choose for every problem, say so, and, with `write`, change the tables.  Rows of every candidate."""
    for problem in each:
        found = timed(problem, rounds, once)
        choice, said = chosen(found)
        print(f"{problem.kernel} {problem.key}: {choice.config}, now {problem.table[problem.key]}")
        print("".join(f"  {text}\n" for text in said), end="", flush=True)
        if write:
            file = Path(problem.file)
            file.write_text(rewritten(file.read_text(), problem.key, choice.config))
        for candidate in found:
            row = {"kernel": problem.kernel, "row": str(problem.key), "config": str(tuple(candidate.config))}
            row |= {"chosen": candidate is choice, "why not": candidate.why}
            for length, (ms, low, high) in candidate.times.items() or [("", ("", "", ""))]:
                yield row | {"length": length, "ms": ms, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tune.csv"), help="every timing (default: out/tune.csv)")
    parser.add_argument("--kernel", help="only kernels with this word in their names")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="change the tables in the sources")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py times on a GPU, and there is none here: the tables stay as they are")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(torch.cuda.get_device_capability(device))
    each = (p for p in problems(device, arch) if not args.kernel or args.kernel in p.kernel)
    about = conditions(device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = None
        for row in tune(each, args.rounds, clock(device), args.write):
            if writer is None:
                writer = csv.DictWriter(file, [*row, *about])
                writer.writeheader()
            writer.writerow(row | about)
            file.flush()
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

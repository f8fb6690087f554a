"""Tests of the scripts beside `diaphane bench`: the CPU's targets, tables of configurations, rooflines from a file."""

import ast
import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.kernels.entries import ENTRIES
from diaphane.kernels.timing import Way

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TABLES = [path for path in (ROOT / "kernels").glob("*_triton.py") if "\nTABLE = {" in path.read_text()]


def once(way: Way, calls: int) -> float:
    """A clock on which every call takes a millisecond."""
    with way.within():
        way.run()
    return 1.0


def script(name: str):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_targets_are_read_from_the_rows(tmp_path: Path):
    file = tmp_path / "rows.csv"
    head = "kernel,case,way,ratio,ratio_p20,ratio_p80\n"
    kept = "source_attention,cpu-kept,{},{},0.4,0.6\n"
    file.write_text(head + kept.format('"masked, flash"', 0.45) + kept.format("gather per image", 2))
    assert script("kernels").verdicts(file) == ["cpu-kept: 0.450 (0.400 - 0.600) of masked, flash, at most 0.5: kept"]
    file.write_text(head + kept.format('"masked, flash"', 0.55))
    assert script("kernels").verdicts(file)[0].endswith("at most 0.5: missed")


def test_the_targets_are_of_cases_and_ways_that_there_are():
    cases = {(e.kernel, name): (e, case) for e in ENTRIES for name, case in e.cases.items()}
    for kernel, name, way in script("kernels").TARGETS:
        entry, case = cases[kernel, name]
        assert name in entry.usual["cpu"]
        assert way in entry.contest(case, torch.float32, CPU).ways


@pytest.fixture
def problem():
    """A table of one row, and four candidates for it: two that are right, one that is wrong, one that fails."""
    tune, table = script("tune"), {"row": "old"}

    def check() -> tuple[float, float]:
        if table["row"] == "greedy":
            raise RuntimeError("out of resource: shared memory\nand more")
        return (1.0 if table["row"] == "wrong" else 0.0), 0.5

    calls = {"short": lambda: lambda: "short", "long": lambda: lambda: "long"}
    names = ["wide", "wrong", "greedy", "narrow"]
    return tune, tune.Problem("kernel", table, "row", "file", names, calls, check)


def test_candidates_are_timed_in_their_turn_with_the_table_changed_and_put_back(problem):
    tune, given = problem
    speed = {("wide", "short"): 2.0, ("wide", "long"): 10.0, ("narrow", "short"): 1.0, ("narrow", "long"): 30.0}

    def clock(way: Way, calls: int) -> float:
        with way.within():
            return speed[given.table["row"], way.run()]

    found = {each.config: each for each in tune.timed(given, 3, clock)}
    assert given.table == {"row": "old"}
    assert {c: {n: t.median for n, t in each.times.items()} for c, each in found.items()} == {
        "wide": {"short": 2.0, "long": 10.0}, "narrow": {"short": 1.0, "long": 30.0}, "wrong": {}, "greedy": {},
    }  # fmt: skip
    assert found["wrong"].why == "wrong: its error is 1.00e+00, more than 5.00e-01"
    assert found["greedy"].why == "RuntimeError: out of resource: shared memory"
    choice, said = tune.chosen(list(found.values()))
    assert choice.config == "wide"  # behind by 2 x 1, not by 1 x 3
    assert said == ["short: narrow would be 2.00 x as fast"]


def test_no_right_candidate_is_an_error_that_says_why(problem):
    tune, given = problem
    wrong = tune.timed(given._replace(candidates=["wrong"]), 1, once)
    with pytest.raises(ValueError, match=r"no candidate is right: wrong wrong: its error is 1\.00e"):
        tune.chosen(wrong)


def test_a_lost_device_ends_the_search_and_names_the_candidate(problem):
    tune, given = problem

    def check() -> tuple[float, float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit, match="kernel row, wide: RuntimeError: CUDA error"):
        tune.timed(given._replace(check=check), 1, once)
    assert given.table == {"row": "old"}


def table_of(source: str) -> list[ast.expr | None]:
    """The keys of a file's TABLE."""
    named = {ast.unparse(n.targets[0]): n.value for n in ast.parse(source).body if isinstance(n, ast.Assign)}
    table = named["TABLE"]
    assert isinstance(table, ast.Dict)
    return table.keys


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_of_every_table_can_be_written(path: Path):
    tune, source = script("tune"), path.read_text()
    for key in table_of(source):
        assert key
        row = ast.literal_eval(key)
        changed = tune.rewritten(source, row, tune.Config(1, 2, 3, 4)).splitlines()
        assert [line for line in changed if line not in source.splitlines()] == [
            f"    {str(row).replace(chr(39), chr(34))}: Config(1, 2, 3, 4),"
        ]
    with pytest.raises(ValueError, match="a table has one row"):
        tune.rewritten(source, (70, "forward", 64), tune.Config(1, 2, 3, 4))


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_row_of_every_table_has_candidates_and_a_check(arch: int):
    tune = script("tune")
    rows = [ast.literal_eval(key) for path in TABLES for key in table_of(path.read_text()) if key]
    found = list(tune.problems(CPU, arch))
    assert sorted(map(str, (p.key for p in found))) == sorted(str(row) for row in rows if row[0] == arch)
    for problem in found:
        assert problem.table[problem.key] in problem.candidates
        assert len(problem.calls) >= 2
    for problem in (p for p in found if p.kernel in ("masked_maps maps", "match single") and p.key[-1] != 128):
        error, most = problem.check()  # of what runs on a CPU, which asks no table
        assert 0 < error <= most


def test_what_was_timed_is_said_chosen_and_written(problem, tmp_path: Path, capsys):
    tune, given = problem
    file = tmp_path / "kernel_triton.py"
    file.write_text('TABLE = {\n    (90, "a"): Config(1, 1, 1, 1),\n    (80, "a"): Config(1, 1, 1, 1),\n}\n')
    table, fast = {(90, "a"): tune.Config(1, 1, 1, 1)}, tune.Config(64, 64, 4, 2)
    given = given._replace(table=table, key=(90, "a"), file=str(file), candidates=[fast], check=lambda: (0.0, 1.0))
    rows = list(tune.tune(iter([given]), 2, once, write=True))
    assert [(row["config"], row["chosen"], row["length"], row["ms"]) for row in rows] == [
        ("(64, 64, 4, 2)", True, "short", 1.0), ("(64, 64, 4, 2)", True, "long", 1.0),
    ]  # fmt: skip
    assert '    (90, "a"): Config(64, 64, 4, 2),\n    (80, "a"): Config(1, 1, 1, 1),\n' in file.read_text()
    assert "kernel (90, 'a'): Config(block_m=64" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit, match=r"^tune.py times on a GPU, and there is none here: the tables stay"):
        script("tune").main()


def test_a_roofline_is_drawn_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = {"kernel": "a", "case": "b", "way": "diaphane", "ms": 1, "gflop": 2, "gexp": 1, "gb": 1, "tflops": 2}
    cells |= {"ceiling_tflops": 10, "ceiling_texps": 1, "ceiling_gbps": 1000, "device": "d", "dtype": "e", "date": "f"}
    file, plot = tmp_path / "rows.csv", tmp_path / "roof.svg"
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    roofline = script("roofline")
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(file), str(plot)])
    roofline.main()
    assert "<svg" in plot.read_text()
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(file), str(plot), "--kernel", "c"])
    with pytest.raises(SystemExit, match="no row of those kernels and cases was timed"):
        roofline.main()

"""Tests of `diaphane bench`: what is timed is right, what is wrong has no row, and what was finished stays."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diaphane.cli import bench, conditions, roofline
from diaphane.cli.main import main
from diaphane.kernels import contests, rivals_attention, timing
from diaphane.kernels.cases import EDGES
from diaphane.kernels.contests import OURS, Contest, Refused, Row, Unavailable, Work, compete
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.kernels.entries import ENTRIES
from diaphane.kernels.timing import Ceilings, Way, interleaved, peak, ratios, spread

CPU = torch.device("cpu")


def once(way: Way, calls: int) -> float:
    """A clock on which every call takes a millisecond."""
    with way.within():
        way.run()
    return 1.0


def rows(contest: Contest, without: tuple[str, ...] = ("FlexAttention", "compiled")) -> list[Row | Refused]:
    ways = {n: w for n, w in contest.ways.items() if not any(x in n for x in without)}
    return list(compete(contest._replace(ways=ways), CPU, 1, once))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["cross", "style-knobs", "style", "everyone", "kept", "kept-halves", "odd", "dim-80"])
def test_every_way_to_attend_that_runs_here_gives_the_definition(name: str, dtype: torch.dtype):
    found = rows(rivals_attention.contest(rivals_attention.ENTRY.cases[name], dtype, CPU))
    assert [row for row in found if isinstance(row, Refused)] == []
    timed = [row.way for row in found if isinstance(row, Row) and row.time]
    assert timed[0] == "diaphane"
    assert len(timed) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_no_case_refuses_our_answer(dtype: torch.dtype):
    for case in rivals_attention.ENTRY.cases.values():
        if case in EDGES:
            contest = rivals_attention.contest(case, dtype, CPU)
            error, most = contest.judge(contest.ways[OURS]().run())
            assert error <= most, case.name


@pytest.mark.parametrize("entry", ENTRIES[1:], ids=[e.kernel for e in ENTRIES[1:]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_way_of_the_other_kernels_gives_the_definition(entry, dtype: torch.dtype):
    usual = {name for names in entry.usual.values() for name in names}
    for name in entry.cases.keys() - usual:
        found = rows(entry.contest(entry.cases[name], dtype, CPU))
        assert len(found) >= 2
        wrong = [str(row) for row in found if isinstance(row, Refused)]
        if dtype == torch.float16 and name == "steep":  # the definition overflows there
            wrong = [text for text in wrong if "diaphane" in text]
        assert wrong == []
        assert all(row.time for row in found if isinstance(row, Row))


def test_compiled_rivals_give_the_definition_and_their_mask_is_timed_apart():
    contest = rivals_attention.contest(rivals_attention.ENTRY.cases["kept-halves"], torch.float32, CPU)
    ways = {n: w for n, w in contest.ways.items() if n in ("diaphane", "FlexAttention")}
    _, flex = compete(contest._replace(ways=ways), CPU, 1, once)
    assert isinstance(flex, Row)
    assert flex.way == "FlexAttention"
    assert flex.time
    assert flex.setup


def test_a_case_names_the_work_of_the_shortest_way():
    case = rivals_attention.ENTRY.cases["style"]  # 4 images, two of them references, 128 tokens, a head of 64
    pairs = (128 + 256) * 2 * 128
    work = rivals_attention.contest(case, torch.float32, CPU).work
    assert work == Work(4 * 64 * pairs, pairs, 4 * 4 * 128 * 64 * 4)


def test_the_floor_is_the_unit_that_takes_longest():
    ceilings = Ceilings(flops=1e12, exps=1e9, bytes=1e9)
    assert Work(5e9, 0, 1e6).floor(ceilings) == (5.0, "products")
    assert Work(5e9, 6e6, 1e6).floor(ceilings) == (6.0, "exponentials")
    assert Work(1e9, 0, 1e9).floor(ceilings) == (1000.0, "copy")
    assert Work(5e9, 6e6, 1e6).floor(ceilings._replace(exps=float("nan"))) == (5.0, "products")


def test_ways_take_turns_and_every_other_round_runs_backwards():
    order: list[str] = []
    ways = {name: Way(lambda name=name: order.append(name)) for name in "abc"}
    interleaved(ways, 3, once, least=0)
    assert "".join(order) == "aabbcc" + "cba" + "abc" + "cba"


def test_on_one_thread_only_the_process_s_own_time_counts():
    assert torch.get_num_threads() == 1
    assert timing.cpu_once(Way(lambda: time.sleep(0.05)), 1) < 50
    assert conditions.conditions(CPU)["clock"] == "process"


def test_a_quick_way_is_called_often_enough_to_be_timed():
    counts: list[int] = []

    def clock(way: Way, calls: int) -> float:
        counts.append(calls)
        return 0.5

    assert interleaved({"a": Way(lambda: None)}, 2, clock, least=5.0) == {"a": [0.5, 0.5]}
    assert counts == [1, 1, 10, 10]


def test_a_ratio_compares_each_round_with_itself():
    assert ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == (0.5, 0.5, 0.5)
    assert spread([float(x) for x in range(11)]) == (5.0, 2.0, 8.0)
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="at least one sample"):
        spread([])


def test_peak_memory_is_what_is_held_at_once():
    x = torch.ones(256, 256)

    def run() -> torch.Tensor:
        a = x + 1
        b = a + 1
        del a
        return (b + 1)[0, 0].clone()

    size = 256 * 256 * 4
    assert 2 * size <= peak(Way(run), CPU) <= 2 * size + 1024


def test_the_machine_s_ceilings_are_rates():
    found = timing.ceilings(CPU, torch.float32, size=64)
    assert all(1e6 < rate < 1e15 for rate in found)


def test_on_a_gpu_a_call_is_queued_behind_writes_and_timed_by_events(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            return 3.0

    class Dirt:
        def zero_(self) -> None:
            said.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Dirt())
    clock = timing.clock(torch.device("cuda"))
    assert clock(Way(lambda: said.append("run")), 2) == 3.0
    assert said == 2 * [*timing.FLUSHES * ["flush"], "record", "run", "record", "wait"]


def test_only_cpu_and_cuda_are_timed():
    with pytest.raises(ValueError, match="timed on cpu and cuda"):
        timing.clock(torch.device("meta"))


def made(**ways) -> Contest:
    true = torch.ones(3)
    offers = {name: way if callable(way) else (lambda way=way: Way(lambda: way)) for name, way in ways.items()}
    judge = contests.judged(lambda dtype: (true.to(dtype),), torch.float32)
    return Contest("kernel", "case", "a test", Work(1, 0, 1), offers, judge)


def missing() -> Way:
    raise Unavailable("it is not installed")


@pytest.mark.parametrize(
    "wrong", [torch.ones(3) * 1.001, torch.full((3,), torch.nan), torch.ones(4), torch.tensor([1.0, 1.0, torch.inf])]
)
def test_a_wrong_answer_has_no_row_and_is_not_timed(wrong: torch.Tensor):
    called: list[str] = []

    def clock(way: Way, calls: int) -> float:
        called.append("ours" if way.run() is right else "wrong")
        return 1.0

    right = torch.ones(3)
    refused, row = compete(made(diaphane=right, rival=wrong), CPU, 1, clock)
    assert isinstance(refused, Refused)
    assert isinstance(row, Row)
    assert str(refused).startswith("kernel case, rival: its error against float64 is ")
    assert set(called) == {"ours"}


def test_ours_wrong_or_failing_has_no_row_and_the_others_have_no_ratio():
    def failing() -> Way:
        raise RuntimeError("illegal access\nand more")

    for ours in (torch.zeros(3), failing):
        refused, row = compete(made(diaphane=ours, rival=torch.ones(3)), CPU, 1, once)
        assert isinstance(refused, Refused)
        assert isinstance(row, Row)
        assert row.time
        assert row.ratio is None
    assert "RuntimeError: illegal access" in str(refused)
    assert "\n" not in str(refused)


def test_a_rival_that_cannot_run_is_a_row_that_says_why():
    note, row = compete(made(diaphane=torch.ones(3), rival=missing), CPU, 1, once)
    assert isinstance(note, Row)
    assert (note.way, note.time, note.note) == ("rival", None, "it is not installed")
    assert isinstance(row, Row)
    assert row.way == "diaphane"


def test_a_backend_that_took_nothing_is_explained_by_what_torch_warned_of():
    said = ["Memory efficient kernel not used because:", "CuDNN attention has been runtime disabled", "Flash: no mask"]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert contests.why_not(error, said) == "RuntimeError: Flash: no mask"
    assert contests.why_not(error, []) == f"RuntimeError: {error}"
    assert contests.why_not(RuntimeError("other"), said) == "RuntimeError: other"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of a small machine, so that a command takes no time for them."""
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: Ceilings(1e12, 1e12, 1e12))


def command(*words: str) -> int:
    return main(["bench", "--device", "cpu", "--rounds", "1", *words])


@pytest.mark.usefixtures("quick")
def test_the_command_writes_rows_with_where_they_were_measured_and_a_roofline(tmp_path: Path, capsys):
    file, plot = tmp_path / "rows.csv", tmp_path / "roof.png"
    words = ("--kernel", "source_attention", "--case", "style", "--way", "concatenated")
    assert command(*words, "--csv", str(file), "--plot", str(plot)) == 0
    with file.open() as text:
        found = list(csv.DictReader(text))
    by_way = {row["way"]: row for row in found}
    assert next(iter(by_way)) == "concatenated, cuDNN"
    assert by_way["concatenated, cuDNN"]["note"]
    assert by_way["concatenated, cuDNN"]["ms"] == ""
    ours = by_way["diaphane"]
    assert float(ours["ms_p20"]) <= float(ours["ms"]) <= float(ours["ms_p80"])
    assert float(ours["error"]) <= float(ours["error_most"])
    assert float(by_way["concatenated, flash"]["ratio"]) > 0
    assert (ours["torch"], ours["dtype"], ours["rounds"]) == (torch.__version__, "float32", "1")
    assert ours["date"].startswith("20")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["roof.png", "rows.csv"]
    assert "concatenated, flash" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_wrong_kernel_is_one_line_exit_code_1_and_no_row(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    right = rivals_attention.source_attention

    def wrong(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(rivals_attention, "source_attention", wrong)
    file = tmp_path / "rows.csv"
    assert command("--case", "own", "--way", "flash", "--csv", str(file)) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("diaphane bench: source_attention own, diaphane: its error against float64 is ")
    assert "\n  diaphane " not in said.out
    assert [row["way"] for row in csv.DictReader(file.open())] == ["flash"]


@pytest.mark.usefixtures("quick")
def test_a_word_that_no_rival_has_in_its_name_is_an_error_that_names_them(capsys):
    assert command("--case", "own", "--way", "flash", "fash") == 2
    said = capsys.readouterr().err
    assert said.startswith("diaphane bench: --way fash: no rival has it in its name; there are FlexAttention, cuDNN, ")


@pytest.mark.usefixtures("quick")
def test_an_interruption_keeps_the_rows_that_were_finished(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def interrupted(contest: Contest, *args) -> Iterator[Row | Refused]:
        yield next(compete(contest, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "compete", interrupted)
    file = tmp_path / "rows.csv"
    assert command("--case", "style", "--csv", str(file)) == 130
    assert len(list(csv.DictReader(file.open()))) == 1
    assert "what was finished is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kernel", "gemm"], "--kernel gemm: there are source_attention"),
        (["--case", "nothing"], "--case nothing: there are plain-4096"),
        (["--rounds", "0"], "0 is not in 1 ... 100000"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--csv", "/nowhere/rows.csv"], "--csv /nowhere/rows.csv: /nowhere is no folder"),
        (["--plot", "rows.bmp"], "a picture ends in .png, .svg, .pdf"),
        (["--device", "meta"], "a meta device computes nothing"),
        (["--device", "nothing"], "there is no device 'nothing'"),
        (["--csv", ""], "--csv '' names no file"),
        (["--csv", "a.png", "--plot", "a.png"], "--csv and --plot name the same file, a.png"),
        (["--csv", __file__], "is there already: name another, or give --overwrite"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, capsys):
    assert main(["bench", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command("--plot", str(tmp_path / "roof.png")) == 2
    assert capsys.readouterr().err == "diaphane bench: --plot needs matplotlib: pip install 'diaphane[plot]'\n"


def test_the_list_names_every_case_and_its_reason(capsys):
    assert command("--list") == 0
    said = capsys.readouterr().out
    for entry in ENTRIES:
        assert entry.kernel in said.splitlines()
        assert all(f"  {name} " in said and case.why in said for name, case in entry.cases.items())
        assert all(set(names) <= set(entry.cases) and names for names in entry.usual.values())


def test_the_plot_refuses_rows_of_which_none_was_timed():
    with pytest.raises(ValueError, match="no row was timed"):
        roofline.drawn([{"ms": "", "gb": 1}], "png")


def test_a_file_that_git_does_not_track_has_no_commit(tmp_path: Path):
    assert conditions.commit(tmp_path / "file.py") == ""
    assert conditions.installed("no-such-package") == ""
    assert conditions.asked(["no-such-program"]) == ""


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
def test_the_exponential_unit_s_ceiling_counts_what_its_kernel_computes(tmp_path: Path):
    text = """
import torch
from diaphane.kernels.ceilings_triton import exponentials
run, count = exponentials(torch.device("cpu"), programs=2, steps=3)
x = torch.linspace(0, 1, 4096)
for _ in range(3):
    x = torch.exp2(-x)
torch.testing.assert_close(run(), x)
assert count == 3 * 4096
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-1000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["own", "style", "style-knobs", "kept-halves"])
def test_on_a_gpu_every_way_that_runs_is_right_and_fused_ones_run(name: str):
    device, entry = torch.device("cuda"), rivals_attention.ENTRY
    found = list(compete(entry.contest(entry.cases[name], torch.float16, device), device, 2))
    assert [str(row) for row in found if isinstance(row, Refused)] == []
    timed = [row.way for row in found if isinstance(row, Row) and row.time]
    assert "diaphane" in timed
    assert any("efficient" in way for way in timed)
    assert all(row.memory for row in found if isinstance(row, Row) and row.time)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_s_ceilings_are_those_of_a_gpu():
    found = timing.ceilings(torch.device("cuda"), torch.float16)
    assert found.flops > 1e13
    assert found.bytes > 1e11
    assert not found.exps <= 1e11

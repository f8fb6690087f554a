"""Interleaved timings of rivals in one process, and how they are written down."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one contestant."""

    median: float
    low: float
    high: float


def interleaved(rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds per call: one call of each in turn, `rounds` times, the order reversed every other round.

    On one thread of a CPU the clock is the process's own, which stands still while others are at work.
    """
    gpu = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not gpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for i in range(warmup + rounds):
        for name in list(rivals) if i % 2 else list(reversed(rivals)):
            start = clock()
            rivals[name]()
            if gpu:
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def timing(seconds: list[float]) -> Timing:
    """Median and range."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of ours / theirs, each round compared with itself."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def conditions() -> dict[str, str]:
    """Where a row was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "torch": torch.__version__, "commit": commit.stdout.strip() or "unknown"}


def write(rows: list[dict], file: Path) -> None:
    """Rows as CSV, and as a table on the screen."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown = [c for c in columns if c not in conditions()]
    cells = [[_text(row.get(c, "")) for c in shown] for row in rows]
    wide = [max(len(line[i]) for line in [shown, *cells]) for i in range(len(shown))]
    for line in [shown, *cells]:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, wide, strict=True)))
    print(f"wrote {file}\n")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""How a call is timed, what memory it takes, and what the machine could do at best: all in one process and one run."""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .device import TRITON_INSTALLED

LEAST = {"cpu": 5.0, "cuda": 1.0}  # milliseconds that a sample should last at least
CACHED = 1 << 16  # float32 numbers that a core's own cache holds
FLUSH, FLUSHES = 256 << 20, 8  # bytes written before each call on a GPU, more than any cache holds, and how often


class Way(NamedTuple):
    """One way to compute something."""

    run: Callable[[], Any]
    setup: Callable[[], object] | None = None  # what it needs once per step and resolution, timed apart
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered before the clock starts


class Spread(NamedTuple):
    """The median and the 20th and 80th percentiles of samples."""

    median: float
    low: float
    high: float


class Ceilings(NamedTuple):
    """What one run of this machine reached: products, exponentials and bytes copied, per second."""

    flops: float
    exps: float
    bytes: float


Once = Callable[[Way, int], float]  # (way, calls) -> milliseconds per call


def spread(samples: list[float]) -> Spread:
    """Percentiles by linear interpolation.  ValueError: no samples."""
    if not samples:
        raise ValueError("a spread is of at least one sample")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3])


def ratios(ours: list[float], theirs: list[float]) -> Spread:
    """ours / theirs, each round compared with itself.  ValueError: unlike numbers of rounds."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def cpu_once(way: Way, calls: int) -> float:
    """By the time the process had a core, where torch has one thread, which others on the machine do not lengthen; by
    the wall clock where it has more."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with way.within():
        start = now()
        for _ in range(calls):
            way.run()
        return 1e3 * (now() - start) / calls


def cuda_once(device: torch.device) -> Once:
    """By events on the device, one call at a time, from caches that hold nothing of it.

    The writes that empty them keep the device busy, for some 700 microseconds on an H100, while the host queues the
    call: it is the device's time, without gaps between launches, unless the call itself waits for the device.
    """
    dirt = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def once(way: Way, calls: int) -> float:
        total = 0.0
        with torch.cuda.device(device), way.within():
            for _ in range(calls):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(FLUSHES):
                    dirt.zero_()
                start.record()
                way.run()
                end.record()
                end.synchronize()
                total += start.elapsed_time(end)
        return total / calls

    return once


def clock(device: torch.device) -> Once:
    """The clock of a device.  ValueError: neither a CPU nor CUDA."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"kernels are timed on cpu and cuda; got {device}")
    return cuda_once(device) if device.type == "cuda" else cpu_once


def interleaved(
    ways: Mapping[str, Way], rounds: int, once: Once, least: float = LEAST["cpu"]
) -> dict[str, list[float]]:
    """Milliseconds per call: a sample of each way in turn, `rounds` times, the order reversed every other round.

    Two calls of each come first and are not counted; the second says how many calls make a sample of `least` ms.
    """
    calls = {}
    for name, way in ways.items():
        once(way, 1)
        calls[name] = max(1, math.ceil(least / max(once(way, 1), 1e-3)))
    names = list(ways)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 else names[::-1]:
            samples[name].append(once(ways[name], calls[name]))
    return samples


def peak(way: Way, device: torch.device) -> int:
    """Bytes that torch allocates at most during one call, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.cuda.device(device), way.within():
            way.run()
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder, way.within():
        file = str(Path(folder) / "trace.json")
        with _quiet(), torch.profiler.profile(profile_memory=True, activities=[_CPU]) as profile:
            way.run()
        profile.export_chrome_trace(file)
        events = json.loads(Path(file).read_text(errors="replace"))["traceEvents"]
    steps = [e for e in events if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(steps, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


_CPU = torch.profiler.ProfilerActivity.CPU


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library says of itself on standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def ceilings(device: torch.device, dtype: torch.dtype, size: int | None = None) -> Ceilings:
    """The best of several matrix products, exponentials and copies, the work of each large enough to hide its start.

    Products are of two square matrices in `dtype`, or in float32 where a CPU is quicker in that; exponentials are
    those of torch's sigmoid in float32 from cache on a CPU, its quickest, and Triton's 2^x in registers on a GPU (none,
    as nan, where there is no Triton); a copy reads and writes.  `size` in place of the matrices' side and of the square
    root of the copied elements.
    """
    once, cuda = clock(device), device.type == "cuda"
    side = size or (8192 if cuda else 1024)
    product = math.inf
    for kind in {dtype} if cuda else {dtype, torch.float32}:
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        product = min(product, _best(once, lambda a=a, b=b: a @ b))
    many = (size or (1 << 14 if cuda else 1 << 12)) ** 2
    x = torch.empty(many, dtype=torch.float32, device=device).fill_(1.0)
    y = torch.empty_like(x)
    copied = _best(once, lambda: y.copy_(x))
    exps = _exponentials(once, device)
    return Ceilings(2e3 * side**3 / product, exps, 2 * 4e3 * many / copied)


def _best(once: Once, run: Callable[[], object], tries: int = 20, within: float = 1e3) -> float:
    """Milliseconds of the quickest of some calls; no more are made when they have taken `within` ms."""
    way, times = Way(run), []
    while len(times) < tries and sum(times) < within:
        times.append(once(way, 1))
    return min(times)


def _exponentials(once: Once, device: torch.device) -> float:
    """Exponentials a second."""
    if device.type == "cpu":
        x = torch.linspace(-1, 0, CACHED * torch.get_num_threads())
        y = torch.empty_like(x)  # one call a try: of many, one would wait for a core that others have
        return 1e3 * len(x) / _best(once, lambda: torch.sigmoid(x, out=y), tries=200)
    if not (TRITON_INSTALLED and torch.version.cuda):
        return math.nan
    from .ceilings_triton import exponentials

    out, count = exponentials(device)
    return 1e3 * count / _best(once, out)

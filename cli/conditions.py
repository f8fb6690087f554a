"""Where a measurement was made: device, clocks, versions, commit and date."""

import csv
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ASKED = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")  # MHz, MHz, MHz, W


def conditions(device: torch.device) -> dict[str, str]:
    """One cell each; empty where it is not known."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if cuda else platform.machine(),
        "clocks": clocks(device) if cuda else "",
        "clock": "events" if cuda else "process" if torch.get_num_threads() == 1 else "wall",
        "threads": "" if cuda else str(torch.get_num_threads()),
        "cores": "" if cuda else str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": installed("triton"),
        "diaphane": installed("diaphane"),
        "commit": commit(Path(__file__)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line)
    return next(named, "") or platform.processor() or platform.machine()


def clocks(device: torch.device) -> str:
    """What nvidia-smi says of a GPU's clocks and limits, if it is there."""
    name = str(torch.cuda.get_device_properties(device).uuid)
    which = name if name.startswith(("GPU-", "MIG-")) else f"GPU-{name}"
    said = asked(["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", "-i", which])
    cells = next(csv.reader([said], skipinitialspace=True), [])
    return "; ".join(f"{a} {b}" for a, b in zip(ASKED, cells, strict=False)) if len(cells) == len(ASKED) else ""


def installed(name: str) -> str:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit(file: Path) -> str:
    """The commit that a tracked file is of, with + where the tree differs from it; an installed copy has none."""
    git = ["git", "-C", str(file.parent)]
    if not asked([*git, "ls-files", file.name]):
        return ""
    return asked([*git, "rev-parse", "--short", "HEAD"]) + "+" * bool(asked([*git, "diff", "HEAD", "--shortstat"]))


def asked(words: list[str]) -> str:
    """The first line that a program prints; nothing where it fails or is not there."""
    try:
        ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip().partition("\n")[0] if ran.returncode == 0 else ""

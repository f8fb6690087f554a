"""The kernels on one CPU thread against what they replace: ratios with their spread, and what they should be at most.

taskset -c 0 python benchmarks/kernels.py benchmarks/results/kernels-cpu.csv --rounds 21

The rest of it, and GPUs: diaphane bench.
"""

import argparse
import csv
import sys
from pathlib import Path

from diaphane.cli import main

TARGETS = {
    ("source_attention", "cpu-style", "concatenated, flash"): 0.85,
    ("source_attention", "cpu-style-shift", "concatenated, written out"): 0.35,
    ("source_attention", "cpu-kept", "masked, flash"): 0.5,
}


def measured(file: Path, rounds: int, overwrite: bool) -> int:
    """The usual cases of a CPU on one thread, and the command's exit code."""
    words = ["bench", "--device", "cpu", "--threads", "1", "--rounds", str(rounds), "--csv", str(file)]
    return main.main(words + ["--overwrite"] * overwrite)


def verdicts(file: Path) -> list[str]:
    """A line for each target that the file has a row of."""
    lines = []
    with file.open(newline="") as text:
        for row in csv.DictReader(text):
            most = TARGETS.get((row["kernel"], row["case"], row["way"]))
            if most is not None and row["ratio"]:
                kept = "kept" if float(row["ratio"]) <= most else "missed"
                spread = f"{float(row['ratio']):.3f} ({float(row['ratio_p20']):.3f} - {float(row['ratio_p80']):.3f})"
                lines.append(f"{row['case']}: {spread} of {row['way']}, at most {most}: {kept}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    code = measured(args.csv, args.rounds, args.overwrite)
    if code in (0, 1):
        print("\n".join(verdicts(args.csv)))
    sys.exit(code)

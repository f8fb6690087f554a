"""From process start to a ready network on the 455 MB file of the 256² DDPM, against diffusers.

python benchmarks/loading.py out/bench
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from diaphane.model.ddpm import DDPM, DDPM_256
from diaphane.weights.export import write_diffusers_ddpm
from timing import conditions, ratio, timing, write

OURS = """
import time; start = time.perf_counter()
from diaphane.weights.load import load
from diaphane.model.load import build
imported = time.perf_counter()
network = load(sys.argv[1])
net = build(network.family, network.config, network.tensors)
"""
THEIRS = """
import time; start = time.perf_counter()
from diffusers import UNet2DModel
imported = time.perf_counter()
net = UNet2DModel.from_pretrained(sys.argv[1])
"""
REPORT = """
loaded = time.perf_counter()
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous")) / 1024
import json
print(json.dumps({"load": loaded - imported, "anonymous": anonymous()}))
"""
BASELINE = {
    "ours": "import diaphane.weights.load, diaphane.model.load",
    "diffusers": "from diffusers import UNet2DModel",
}


def run(code: str, folder: Path) -> dict[str, float]:
    """One fresh process: seconds from its start to its end of loading, of the load alone, and anonymous MiB."""
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", "import sys" + code, str(folder)], capture_output=True, check=True)
    return json.loads(out.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - start}


def imports_only(name: str, folder: Path) -> float:
    """Anonymous MiB of a process that has imported everything and loaded nothing."""
    code = "\nimport time; imported = time.perf_counter()\n" + BASELINE[name] + REPORT
    return run(code, folder)["anonymous"]


def file(folder: Path) -> Path:
    """A diffusers folder with random weights, written once."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        write_diffusers_ddpm(folder, asdict(DDPM_256), DDPM(DDPM_256).state_dict(), {})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    weights = file(args.folder / "ddpm-256")
    size = (weights / "diffusion_pytorch_model.safetensors").stat().st_size / 2**20
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
    for i in range(args.rounds + 1):
        for name, code in (("ours", OURS), ("diffusers", THEIRS)):
            result = run("\n" + code + REPORT, weights)
            if i:
                runs[name].append(result)
    rows = []
    for what in ("whole", "load"):
        ours, theirs = ([r[what] for r in runs[name]] for name in ("ours", "diffusers"))
        mine, other = timing(ours), timing(theirs)
        case = "process start to ready network" if what == "whole" else "load alone"
        row = {"case": case, "ratio": ratio(ours, theirs), "seconds": mine.median, "low": mine.low, "high": mine.high}
        rows.append(row | {"theirs": other.median, "their_low": other.low, "their_high": other.high} | conditions())
    for name in ("ours", "diffusers"):
        anonymous = timing([r["anonymous"] for r in runs[name]]).median - imports_only(name, weights)
        case = f"anonymous memory of the load, {name} (share of the file)"
        rows.append({"case": case, "ratio": anonymous / size, "seconds": ""} | conditions())
    write(rows, args.folder / "loading.csv")


if __name__ == "__main__":
    main()

"""The full-size SDXL UNet with random bfloat16 weights, 5.1 GB in both layouts: loading and a step, beside diffusers.

python benchmarks/sdxl.py out/bench            # writes the files once: 10.3 GB
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diaphane.model.unet import SDXL
from diaphane.weights import lora, unet
from diaphane.weights.files import write as save
from timing import conditions, interleaved, ratio, timing, write
from torch import Tensor

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
OURS = """
import sys, time; start = time.perf_counter()
from diaphane.weights.latent import load
from diaphane.model.latent import build
imported = time.perf_counter()
found = load(sys.argv[1])
net = build(found.family, found.config, found.tensors)
"""
THEIRS = """
import sys, time; start = time.perf_counter()
import torch
from diffusers import UNet2DConditionModel
imported = time.perf_counter()
net = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
"""
REPORT = """
loaded = time.perf_counter()
import json
lines = [line.split() for line in open("/proc/self/smaps_rollup")]
private = sum(int(line[1]) for line in lines if line[0] in ("Private_Dirty:", "Private_Clean:")) / 1024
print(json.dumps({"load": loaded - imported, "private": private}))
"""
STEP = """
import resource, torch
x, t = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16), torch.tensor([500])
with torch.no_grad():
    c = net.embed(t, torch.randn(1, 77, 2048).bfloat16(), torch.randn(1, 1280).bfloat16(), torch.full((1, 6), 512.0))
    assert torch.isfinite(net(x, c)).all()
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A weight of the size that initialisation gives; norms around 1 are close enough as they are."""
    if len(shape) == 1:
        return torch.full(shape, 0.5, dtype=torch.bfloat16)
    fan = torch.Size(shape[1:]).numel()
    return (torch.randn(shape, generator=generator) / fan**0.5).bfloat16()


def files(folder: Path) -> tuple[Path, Path]:
    """The same random weights as a folder of diffusers' and as a single file, written once."""
    theirs, single = folder / "sdxl-unet", folder / "sdxl-unet-ldm.safetensors"
    if not single.exists():
        plan, generator = lora.unet_plan(asdict(SDXL)), torch.Generator().manual_seed(0)
        tensors = {name: random(shape, generator) for name, shape in unet.want(plan).items()}
        for column, path, prefix in (
            (unet.DIFFUSERS, theirs / "diffusion_pytorch_model.safetensors", ""),
            (unet.LDM, single, "model.diffusion_model."),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, {prefix + rule.key: tensors[rule.name] for rule in unet.table(plan, column)})
        (theirs / "config.json").write_text(json.dumps(CONFIG))
    return theirs, single


def run(code: str, path: Path) -> list[dict[str, float]]:
    """One fresh process: what it prints, and its seconds from start to end."""
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True, text=True)
    seconds = time.perf_counter() - start
    return [json.loads(line) | {"whole": seconds} for line in out.stdout.splitlines() if line.startswith("{")]


def loading(theirs: Path, single: Path, rounds: int) -> Iterator[dict]:
    """Process start to ready network, the load alone, and private memory beyond the imports."""
    codes = {"ours": (OURS, theirs), "ours, single file": (OURS, single), "diffusers": (THEIRS, theirs)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for i in range(rounds + 1):
        for name, (code, path) in codes.items():
            found = run(code + REPORT, path)[0]
            if i:
                runs[name].append(found)
    for name in ("ours", "ours, single file"):
        for what, case in (("whole", "process start to ready network"), ("load", "load alone")):
            mine, other = ([r[what] for r in runs[one]] for one in (name, "diffusers"))
            row = {"case": f"{case}: {name}", "ratio": ratio(mine, other), "seconds": timing(mine).median}
            yield row | {"theirs": timing(other).median} | conditions()
    size = single.stat().st_size / 2**20
    for name, (code, path) in codes.items():
        bare = code.split("imported = ")[0] + "imported = time.perf_counter()\n" + REPORT
        private = timing([r["private"] for r in runs[name]]).median - run(bare, path)[0]["private"]
        yield {"case": f"private memory of the load, share of the file: {name}", "ratio": private / size} | conditions()


def peak(single: Path) -> dict:
    """Peak resident memory of one step at 512² from the single file, in GiB."""
    found = run(OURS + REPORT + STEP, single)[1]
    return {"case": "peak resident GiB, load and one step at 512², single file", "ratio": found["peak"]} | conditions()


@torch.no_grad()
def forward(theirs: Path, side: int, rounds: int, threads: int) -> dict:
    """One forward of the same weights in one process, interleaved."""
    from diaphane.model.latent import build
    from diaphane.weights.latent import load
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(threads)
    found = load(theirs)
    ours = build(found.family, found.config, found.tensors)
    twin = UNet2DConditionModel.from_pretrained(theirs, torch_dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, side // 8, side // 8, generator=generator).bfloat16()
    context, pooled = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((1, 77, 2048), (1, 1280)))
    t, ids = torch.tensor([500]), torch.full((1, 6), float(side))
    added = {"text_embeds": pooled, "time_ids": ids.bfloat16()}
    rivals = {
        "ours": lambda: ours(x, ours.embed(t, context, pooled, ids)),
        "diffusers": lambda: twin(x, t, context, added_cond_kwargs=added).sample,
    }
    outs = [rival().float() for rival in rivals.values()]
    error = float((outs[0] - outs[1]).std() / outs[1].std())
    if not error < 0.05:
        raise SystemExit(f"the two networks differ by {error:.2e}: no timing is worth printing")
    seconds = interleaved(rivals, rounds)
    mine, other = timing(seconds["ours"]), timing(seconds["diffusers"])
    row = {
        "case": f"forward {side}², bfloat16, {threads} threads",
        "ratio": ratio(seconds["ours"], seconds["diffusers"]),
    }
    return row | {"seconds": mine.median, "theirs": other.median, "difference": error} | conditions()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    theirs, single = files(args.folder)
    rows = [*loading(theirs, single, args.rounds), peak(single), forward(theirs, args.side, args.rounds, args.threads)]
    write(rows, args.folder / "sdxl.csv")


if __name__ == "__main__":
    main()

"""One forward of the 256² DDPM against diffusers' UNet2DModel with the same weights, and Asyrp's shared encoder.

python benchmarks/forward.py out/bench
"""

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path

import torch
from diaphane.model.blocks import denoiser
from diaphane.model.ddpm import DDPM, DDPM_256
from diaphane.weights.export import diffusers_ddpm
from diffusers import UNet2DModel
from timing import conditions, interleaved, ratio, timing, write
from torch.utils.flop_counter import FlopCounterMode


def pair() -> tuple[DDPM, UNet2DModel]:
    """Our network with random weights, and theirs with the same."""
    torch.manual_seed(0)
    ours = DDPM(DDPM_256).eval().requires_grad_(False)
    config, tensors = diffusers_ddpm(asdict(DDPM_256), ours.state_dict())
    theirs = UNet2DModel.from_config(config).eval().requires_grad_(False)
    theirs.load_state_dict(tensors)
    return ours, theirs


def asyrp_step(net: DDPM, x: torch.Tensor, t: torch.Tensor) -> None:
    """Two predictions, one from an edited h, sharing the encoder."""
    c = net.embed(t)
    deep, skips = net.encode(x, c)
    h = net.middle(deep, c)
    net.decode(h, skips, c)
    net.decode(1.1 * h, skips, c)


def flops(f, *args) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = pair()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, threads in itertools.product(args.dtypes, args.threads):
        dtype = getattr(torch, name)
        torch.set_num_threads(threads)
        a, b = ours.to(device, dtype), theirs.to(device, dtype)
        x = torch.randn(1, 3, args.resolution, args.resolution, generator=torch.Generator().manual_seed(0))
        x, t = x.to(device, dtype), torch.tensor([500], device=device)
        eps = denoiser(a)
        error = (eps(x, t) - b(x, t).sample).abs().max().item()
        if error > (1e-4 if dtype == torch.float32 else 0.05):
            raise SystemExit(f"the two networks differ by {error:.2e} in {name}: no timing is worth printing")
        seconds = interleaved(
            {
                "ours": lambda eps=eps, x=x, t=t: eps(x, t),
                "diffusers": lambda b=b, x=x, t=t: b(x, t).sample,
                "asyrp": lambda a=a, x=x, t=t: asyrp_step(a, x, t),
                "two forwards": lambda eps=eps, x=x, t=t: (eps(x, t), eps(x, t)),
            },
            args.rounds,
        )
        common = {"dtype": name, "threads": threads}
        for case, us, them in (("forward", "ours", "diffusers"), ("asyrp step", "asyrp", "two forwards")):
            mine, other = timing(seconds[us]), timing(seconds[them])
            row = {"case": case, **common, "against": them, "ratio": ratio(seconds[us], seconds[them])}
            row |= {"seconds": mine.median, "low": mine.low, "high": mine.high, "theirs": other.median}
            row |= {"their_low": other.low, "their_high": other.high, "max_difference": error}
            if case == "asyrp step":
                row["flop_ratio"] = flops(asyrp_step, a, x, t) / (2 * flops(eps, x, t))
            rows.append(row | conditions())
    write(rows, args.folder / "forward.csv")


if __name__ == "__main__":
    main()

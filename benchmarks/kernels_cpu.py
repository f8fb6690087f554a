"""Source attention on one CPU thread against the formulations it replaces: ratios of times, each round with itself.

python benchmarks/kernels_cpu.py out/bench
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diaphane.kernels import reference
from diaphane.kernels.source_attention import source_attention
from diaphane.kernels.sources import compacted, shared
from timing import conditions, interleaved, ratio, timing, write
from torch import Tensor

Rivals = dict[str, Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, most, rivals in (
        ("StyleAligned", 0.85, style(4, 1024, 10, 64)),
        ("StyleAligned, 2 images", None, style(2, 1024, 10, 64)),
        ("StyleAligned with a shift", 0.35, style(4, 1024, 10, 64, shift=0.7)),
        ("ConsiStory, p 0.25", 0.5, kept(4, 1024, 10, 64, 0.25)),
    ):
        checked(name, rivals)
        seconds = interleaved(rivals, args.rounds)
        ours = seconds["diaphane"]
        for rival, theirs in seconds.items():
            row = {"case": name, "way": rival, "milliseconds": 1e3 * timing(theirs).median}
            if rival != "diaphane":
                row |= {"diaphane / way": ratio(ours, theirs), "at most": most or ""}
            rows.append(row | conditions())
    write(rows, args.out / "kernels_cpu.csv")


def style(n: int, tokens: int, heads: int, dim: int, shift: float = 0.0) -> Rivals:
    """Queries and keys normalised, the reference's keys and values beside every image's; a shift needs the logits."""
    q, k, v = (torch.randn(n, tokens, heads, dim).transpose(1, 2) for _ in range(3))
    ref = torch.zeros(n, dtype=torch.int64)
    sources = shared([0] * n, tokens, shift=shift)

    def concatenated() -> Tensor:
        a, b = reference.adain(q, ref), reference.adain(k, ref)
        keys = torch.cat([b, b[:1].expand_as(b)], -2)
        values = torch.cat([v, v[:1].expand_as(v)], -2)
        if not shift:
            return F.scaled_dot_product_attention(a, keys, values)
        logits = a @ keys.transpose(-2, -1) * dim**-0.5
        logits[..., tokens:] += shift
        return logits.softmax(-1) @ values

    return {"concatenated": concatenated, "diaphane": lambda: source_attention(q, k, v, sources, ref=ref)[0]}


def kept(n: int, tokens: int, heads: int, dim: int, share: float) -> Rivals:
    """Every image sees the kept tokens of the others: compacted, or under a mask of all tokens."""
    q, k, v = (torch.randn(n, tokens, heads, dim).transpose(1, 2) for _ in range(3))
    mask = torch.rand(n, tokens) < share
    seen = (torch.eye(n, dtype=torch.bool)[:, :, None] | mask).flatten(1)[:, None, None]
    sources = compacted(mask.sum(1).tolist(), [[True] * n] * n)
    rows = mask.flatten().nonzero()[:, 0]

    def masked() -> Tensor:
        keys, values = (x.transpose(0, 1).flatten(1, 2).expand(n, -1, -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    def ours() -> Tensor:
        pool = [x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None] for x in (k, v)]
        return source_attention(q, k, v, sources, pool=(pool[0], pool[1]))[0]

    return {"masked": masked, "diaphane": ours}


def checked(name: str, rivals: Rivals) -> None:
    """SystemExit where the ways differ: a wrong answer has no time."""
    first, *rest = (way() for way in rivals.values())
    for other in rest:
        if not torch.allclose(first, other, rtol=1e-4, atol=1e-5):
            raise SystemExit(f"{name}: the ways differ by {(first - other).abs().max().item():.1e}; nothing is timed")


if __name__ == "__main__":
    main()

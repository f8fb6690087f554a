"""The Triton kernels in Triton's interpreter, in a process of their own: one line of JSON for each case and type."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import json
import sys
import time

import torch
from diaphane.kernels import adain, builds, cases, device, reference, source_attention, source_attention_triton
from diaphane.model import ops
from kernels_world import error, errors

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PLAN = [("fp32", [c.name for c in cases.EDGES])]
PLAN += [
    ("fp16", ["style", "style-knobs", "kept", "dim-40", "dim-160", "far", "huge", "steep"]),
    ("bf16", ["style", "kept"]),
]
empty = torch.empty


def takes_triton(x: torch.Tensor, *limits: object) -> bool:
    """Every type that the kernels are written for, on any device, with heads up to 256."""
    return x.dtype in device.SINGLE


def poisoned(*args, **kwargs) -> torch.Tensor:
    """torch.empty, full of NaN: what a kernel does not write shows."""
    made = empty(*args, **kwargs)
    return made.fill_(float("nan")) if made.dtype.is_floating_point else made


def main() -> None:
    torch.set_num_threads(1)
    assert source_attention_triton.INTERPRETED
    source_attention.takes_triton = adain.takes_triton = takes_triton
    torch.empty, torch.Tensor.new_empty = poisoned, lambda x, *a, **kw: poisoned(*a, **({"dtype": x.dtype} | kw))
    torch.empty_like = lambda x, **kw: poisoned(x.shape, dtype=x.dtype)
    wanted = sys.argv[1:]
    for name, names in PLAN:
        for case in cases.EDGES:
            if case.name in names and (not wanted or case.name in wanted):
                start = time.perf_counter()
                found = errors(case, TYPES[name])
                took = round(time.perf_counter() - start, 1)
                print(json.dumps({"case": case.name, "type": name, "errors": found, "seconds": took}), flush=True)
    x = torch.randn(2, 3, 501, 40) + torch.tensor([0.0, 1e3, 1e5])[:, None, None]
    (mean, std), (true_mean, true_std) = adain.token_stats(x)[0], reference.token_stats(x.double())
    far = {"mean": ((mean - true_mean) / true_mean.abs().clamp(min=1), 1e-6), "std": (std / true_std - 1, 1e-5)}
    found = {n: (x.abs().max().item(), most) for n, (x, most) in far.items()}
    print(json.dumps({"case": "statistics", "type": "fp32", "errors": found}))
    ops.takes_triton = takes_triton
    q, k = (torch.randn(2, n, 3, 40).transpose(1, 2) for n in (70, 13))
    plain = reference.attention(q, k, k)
    launches = []
    source_attention_triton.launch = lambda *args, **kw: (launches.append(args[0]), builds.launch(*args, **kw))
    found = ops.triton().attend(ops.Site("mid", 0, "cross"), q, k, k)
    assert len(launches) == 1
    print(json.dumps({"case": "verb", "type": "fp32", "errors": {"out": (error(found, plain), 1e-6)}}))


if __name__ == "__main__":
    main()

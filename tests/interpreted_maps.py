"""The kernels of masked maps, the match and compaction in the interpreter: a line of JSON for each case and type."""

from interpreted import poisoned, takes_triton  # isort: skip  (it sets what must be set before anything imports triton)

import json
import sys
import time

import torch
from diaphane.kernels import (
    adain,
    builds,
    compact,
    compact_triton,
    device,
    masked_maps,
    masked_maps_triton,
    match,
    match_triton,
    source_attention,
)
from diaphane.kernels.cases_maps import KEPT_EDGES, MAPS_EDGES, MATCH_EDGES
from maps_world import BFLOAT, HALF, kept_errors, maps_errors, match_errors

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RUNS = ((MAPS_EDGES, maps_errors), (MATCH_EDGES, match_errors), (KEPT_EDGES, kept_errors))


def spoiled(*args, **kwargs) -> torch.Tensor:
    """`poisoned`, and integers that are no index."""
    made = poisoned(*args, **kwargs)
    return made.fill_(-12345) if made.dtype in (torch.int32, torch.int64) else made


def main() -> None:
    torch.set_num_threads(1)
    assert masked_maps_triton.INTERPRETED
    assert match_triton.INTERPRETED
    masked_maps.takes_triton = source_attention.takes_triton = adain.takes_triton = takes_triton
    compact.takes_triton = lambda x, *limits: x.dtype in (*device.SINGLE, torch.bool)
    match.on_nvidia = takes_triton
    torch.empty, torch.Tensor.new_empty = spoiled, lambda x, *a, **kw: spoiled(*a, **({"dtype": x.dtype} | kw))
    torch.empty_like = lambda x, **kw: spoiled(x.shape, dtype=x.dtype)
    launched = set()

    def launch(kernel, *args, **kwargs) -> None:
        launched.add(kernel.fn.__name__)
        builds.launch(kernel, *args, **kwargs)

    masked_maps_triton.launch = match_triton.launch = compact_triton.launch = launch
    wanted = sys.argv[1:]
    for kind, dtype in TYPES.items():
        for cases, errors in RUNS:
            for case in cases:
                if (kind == "fp32" or case.name in (HALF if kind == "fp16" else BFLOAT)) and (
                    not wanted or case.name in wanted
                ):
                    start = time.perf_counter()
                    found = errors(case, dtype)
                    took = round(time.perf_counter() - start, 1)
                    print(json.dumps({"case": case.name, "type": kind, "errors": found, "seconds": took}), flush=True)
    q = torch.randn(1, 1, 5, 16)
    outside = masked_maps.token_maps(q, q, torch.tensor([0, 5, -2, -1]))[0].isnan().any(0).tolist()
    print(json.dumps({"case": "outside", "type": "fp32", "errors": outside}))
    tgt = torch.randn(1, 4, 16)
    tgt[0, 1, 0], tgt[0, 3, 2] = float("nan"), float("inf")
    q[..., 2] = -q[..., 2].abs()  # so that no product with infinity is the largest
    shows = match.match(q[0], tgt)[1][0, 0].isnan().tolist()
    print(json.dumps({"case": "not finite", "type": "fp32", "errors": shows}))
    print(json.dumps({"case": "launches", "type": "fp32", "errors": sorted(launched)}))


if __name__ == "__main__":
    main()

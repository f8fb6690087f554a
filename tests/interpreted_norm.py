"""The kernels of GroupNorm and of the gate in Triton's interpreter: one line of JSON for each case and type."""

from interpreted import poisoned  # isort: skip  (it sets what must be set before anything imports triton)

import json
import sys
import time

import torch
from diaphane.kernels import cases, device, geglu, group_norm, group_norm_triton
from diaphane.model import ops
from norm_world import errors, gate_errors

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF = ("style", "ragged", "last-style", "far", "far-last", "huge", "one-group")
PLAN = [("fp32", [c.name for c in cases.NORM_EDGES]), ("fp16", HALF), ("bf16", ("silu", "last-style"))]


def main() -> None:
    torch.set_num_threads(1)
    group_norm.takes_kernel = lambda x, groups: x.dtype in device.SINGLE
    geglu.takes_kernel = lambda x: x.dtype in device.SINGLE
    torch.empty, torch.Tensor.new_empty = poisoned, lambda x, *a, **kw: poisoned(*a, **({"dtype": x.dtype} | kw))
    torch.empty_like = lambda x, **kw: poisoned(x.shape, dtype=x.dtype)
    wanted = sys.argv[1:]
    for name, names in PLAN:
        for case in cases.NORM_EDGES:
            if case.name in names and (not wanted or case.name in wanted):
                report(case.name, name, lambda case=case, name=name: errors(case, TYPES[name]))
    for name, dtype in TYPES.items():
        for shape in cases.GATE_EDGES if name == "fp32" else cases.GATE_EDGES[:2]:
            report(f"gate {shape}", name, lambda shape=shape, dtype=dtype: gate_errors(shape, dtype))
    launched = []
    launch = group_norm_triton.launch
    group_norm_triton.launch = lambda *args, **kw: (launched.append(args[0].fn.__name__), launch(*args, **kw))
    x, one = torch.randn(2, 8, 6, 6), torch.ones(8)
    for groups, last in ((4, False), (4, True)):
        made = x.contiguous(memory_format=torch.channels_last) if last else x
        ops.triton().group_norm(ops.Site("out", 0, "norm"), made, one, one, groups, 1e-5, True)
    print(json.dumps({"case": "launches", "type": "fp32", "errors": launched}))
    nan = []
    for made in (x, x.contiguous(memory_format=torch.channels_last)):
        y = ops.triton().group_norm(ops.Site("out", 0, "norm"), made, one, one, 4, 1e-5, True, torch.tensor([0, 9]))
        nan.append(y.isnan().flatten(1).all(1).tolist())
    print(json.dumps({"case": "outside", "type": "fp32", "errors": nan}))


def report(case: str, kind: str, run) -> None:
    start = time.perf_counter()
    found = run()
    took = round(time.perf_counter() - start, 1)
    print(json.dumps({"case": case, "type": kind, "errors": found, "seconds": took}), flush=True)


if __name__ == "__main__":
    main()

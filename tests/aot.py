"""Every shipped configuration of the Triton kernels, compiled with no GPU: one line of JSON for each."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from diaphane.kernels import (
    adain_triton,
    compact_triton,
    geglu_triton,
    group_norm_triton,
    masked_maps_triton,
    match_triton,
    source_attention_triton,
)
from diaphane.kernels.builds import SHARED, Build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (  # each has builds(architecture)
    *(adain_triton, source_attention_triton, group_norm_triton, geglu_triton),
    *(masked_maps_triton, match_triton, compact_triton),
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(build: Build, arch: int) -> dict:
    """Registers, bytes of stack and of shared memory, and tensor-core instructions of one configuration."""
    kernel, constants = build.kernel, build.constants
    types = {n: "constexpr" if n in constants else build.types[n] for n in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in build.aligned if n not in constants}
    options = {"num_warps": build.warps, "num_stages": build.stages}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = dump("--dump-resource-usage", file.name)
        instructions = dump("-sass", file.name) if build.tensor_cores else ""  # a third of a second each
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "name": build.name,
        "arch": arch,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
        "shared": made.metadata.shared,
        "limit": SHARED[arch],
        "tensor": len(re.findall(r"\bHG?MMA", instructions)),
        "wants_tensor": build.tensor_cores,
        "wide": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.\S+ \[.*\], \[.*\], 0x10", made.asm["ptx"])),
    }


def dump(*args: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    arch, *words = sys.argv[1:]
    for module in MODULES:
        for build in module.builds(int(arch)):
            if all(word in build.name for word in words):
                print(json.dumps(compiled(build, int(arch))), flush=True)

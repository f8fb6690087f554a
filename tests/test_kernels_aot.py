"""Tests of what the Triton kernels compile to, with no GPU: every shipped configuration, for A100 and for Hopper."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diaphane.kernels.cases import SDXL
from diaphane.kernels.device import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")

STREAMS = {
    *("whole_kernel", "channels_kernel", "apply_kernel", "sums_kernel", "gradient_kernel"),
    *("geglu_kernel", "geglu_gradient_kernel", "gather", "scatter"),
}


@pytest.fixture(scope="module")
def compiling(tmp_path_factory) -> Iterator[dict[int, tuple[subprocess.Popen, Path]]]:
    """The script, for both architectures at a time."""
    script, folder = Path(__file__).parent / "aot.py", tmp_path_factory.mktemp("triton")
    cache = os.environ.get("TRITON_CACHE_DIR") or str(folder)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
    started = {}
    for arch in (80, 90):
        with (folder / f"{arch}.out").open("w") as out, (folder / f"{arch}.err").open("w") as err:
            started[arch] = subprocess.Popen([sys.executable, str(script), str(arch)], stdout=out, stderr=err, env=env)
    yield {arch: (process, folder / str(arch)) for arch, process in started.items()}
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def builds(request, compiling) -> list[dict]:
    """What the script printed: registers, stack, shared memory and instructions of each configuration."""
    process, printed = compiling[request.param]
    assert process.wait() == 0, printed.with_suffix(".err").read_text()[-2000:]
    return [json.loads(line) for line in printed.with_suffix(".out").read_text().splitlines()]


def test_every_kernel_is_compiled(builds):
    kernels = {build["name"].split()[0] for build in builds}
    assert kernels == {
        *("stats_kernel", "affine_kernel", "moments_kernel", "forward", "queries", "keys"),
        *("whole_kernel", "channels_kernel", "merge_kernel", "apply_kernel", "sums_kernel", "gradient_kernel"),
        *("geglu_kernel", "geglu_gradient_kernel"),
        *("maps", "maps_queries", "maps_keys", "match", "compact", "gather", "scatter"),
    }


def test_every_head_that_the_cases_have_is_compiled(builds):
    heads = {build["name"].split()[2] for build in builds if build["name"].split()[0] in ("forward", "queries", "keys")}
    assert heads == {"40", "64", "80", "128", "160"}
    assert heads >= {str(case.dim) for case in SDXL}


def test_no_configuration_spills_registers(builds):
    assert [b for b in builds if b["stack"] or b["spills"]] == []


def test_what_only_moves_memory_moves_16_bytes_at_a_time(builds):
    moving = [b for b in builds if b["name"].split()[0] in STREAMS]
    assert len(moving) >= len(STREAMS)
    assert [b for b in moving if b["wide"] == 0] == []


def test_shared_memory_is_within_the_limit_of_every_card(builds):
    assert [b for b in builds if b["shared"] > b["limit"]] == []


def test_matrix_products_run_on_tensor_cores(builds):
    wanted = [b for b in builds if b["wants_tensor"]]
    assert len(wanted) >= 16
    assert [b for b in wanted if not b["tensor"]] == []

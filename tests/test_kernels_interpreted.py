"""Tests of the Triton kernels without a GPU, in Triton's interpreter: outputs and gradients against float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diaphane.kernels import cases
from diaphane.kernels.device import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """What the script printed: of every case and type, each error and the most it may be."""
    script = Path(__file__).parent / "interpreted.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return {(row["case"], row["type"]): row["errors"] for row in rows}


@pytest.mark.parametrize("case", [c.name for c in cases.EDGES] + ["statistics", "verb"])
def test_kernels_err_at_most_twice_as_much_as_torch_in_float32(found, case: str):
    check(found[case, "fp32"])


@pytest.mark.parametrize("case", ["style", "style-knobs", "kept", "dim-40", "dim-160", "far", "huge", "steep"])
def test_kernels_err_at_most_twice_as_much_as_torch_in_float16(found, case: str):
    check(found[case, "fp16"])


@pytest.mark.parametrize("case", ["style", "kept"])
def test_kernels_err_at_most_twice_as_much_as_torch_in_bfloat16(found, case: str):
    check(found[case, "bf16"])


def check(errors: dict[str, tuple[float, float]]) -> None:
    assert errors
    assert {name: e for name, e in errors.items() if not e[0] <= e[1]} == {}

"""Tests of the Triton kernels where there is a GPU: every case, and the shapes of real networks, against float64."""

import pytest
import torch
from diaphane.kernels import cases
from diaphane.kernels.device import takes_triton
from diaphane.kernels.source_attention import source_attention

from .kernels_world import errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EVERY = [*cases.EDGES, *cases.SDXL]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", EVERY, ids=[c.name for c in EVERY])
def test_it_errs_at_most_twice_as_much_as_the_definition_in_the_same_type(case: cases.Case, dtype: torch.dtype):
    found = errors(case, dtype, "cuda")
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


def test_it_is_one_node_of_a_compiled_graph_and_equal_to_eager():
    made = cases.inputs(cases.EDGES[1], torch.float16, "cuda")
    seen = cases.sources(cases.EDGES[1], "cuda")
    assert takes_triton(made["q"])

    def run(q, k, v):
        return source_attention(q, k, v, seen, ref=made["ref"])

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(made["q"], made["k"], made["v"]), run(made["q"], made["k"], made["v"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

"""Tests of the Triton kernels where there is a GPU: every case, and the shapes of real networks, against float64."""

import pytest
import torch
from diaphane.kernels import cases, cases_maps, geglu, group_norm, reference
from diaphane.kernels.compact import compact, gather
from diaphane.kernels.device import takes_triton
from diaphane.kernels.masked_maps import masked_maps, token_maps
from diaphane.kernels.match import match
from diaphane.kernels.source_attention import source_attention
from diaphane.model.ops import TORCH, Site, triton

from . import maps_world, norm_world
from .kernels_world import errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
EVERY = [*cases.EDGES, *cases.SDXL]
MAPS = [*cases_maps.MAPS_EDGES, *cases_maps.MAPS_SDXL]
MATCHES = [*cases_maps.MATCH_EDGES, *cases_maps.MATCH_SDXL]
KEPT = [*cases_maps.KEPT_EDGES, *cases_maps.KEPT_SDXL]
NORMS = [*cases.NORM_EDGES, *cases.NORM_SDXL]
TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])


@TYPES
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


@TYPES
@pytest.mark.parametrize("case", NORMS, ids=[c.name for c in NORMS])
def test_group_norm_errs_at_most_twice_as_much_as_torch_in_the_same_type(case: cases.NormCase, dtype: torch.dtype):
    assert group_norm.takes_kernel(cases.norm_inputs(cases.NORM_EDGES[0], dtype, "cuda")["x"], 4)
    found = norm_world.errors(case, dtype, "cuda")
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


@TYPES
@pytest.mark.parametrize("shape", [*cases.GATE_EDGES, *cases.GATES], ids=str)
def test_the_gate_errs_at_most_twice_as_much_as_torch_in_the_same_type(shape: tuple[int, ...], dtype: torch.dtype):
    assert geglu.takes_kernel(torch.empty(shape, dtype=dtype, device="cuda"))
    found = norm_world.gate_errors(shape, dtype, "cuda")
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


@pytest.mark.parametrize("case", cases.NORM_EDGES, ids=[c.name for c in cases.NORM_EDGES])
def test_group_norm_in_float64_is_the_definition_on_a_gpu_too(case: cases.NormCase):
    made = cases.norm_inputs(case, torch.float64, "cuda")
    ours = norm_world.results(group_norm.group_norm, case, made)
    true = norm_world.results(reference.group_norm, case, made)
    for name, exact in true.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-8, atol=1e-9 * (1 + exact.norm().item()))


def test_a_group_norm_and_a_gate_are_a_node_each_of_a_compiled_graph_and_equal_to_eager():
    made = cases.norm_inputs(cases.NORM_EDGES[2], torch.float16, "cuda")
    ref = made["ref"]

    def run(x, w, b):
        verbs = triton()
        return verbs.geglu(verbs.group_norm(Site("out", 0, "norm"), x, w, b, 4, 1e-5, True, ref))

    args = [made[name] for name in ("x", "weight", "bias")]
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*args), run(*args), rtol=1e-3, atol=1e-3)


def test_the_verbs_with_kernels_say_what_torch_says():
    x, (w, b) = torch.randn(2, 64, 16, 16, device="cuda"), torch.randn(2, 64, device="cuda")
    site = Site("out", 0, "norm")
    for ref in (None, torch.tensor([0, 0], device="cuda")):
        found, plain = (v.group_norm(site, x, w, b, 32, 1e-5, True, ref) for v in (triton(), TORCH))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(triton().geglu(x), TORCH.geglu(x), rtol=1e-5, atol=1e-5)


@TYPES
@pytest.mark.parametrize("case", MAPS, ids=[c.name for c in MAPS])
def test_maps_err_at_most_twice_as_much_as_the_definition_in_the_same_type(case, dtype: torch.dtype):
    found = maps_world.maps_errors(case, dtype, "cuda")
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


@TYPES
@pytest.mark.parametrize("case", MATCHES, ids=[c.name for c in MATCHES])
def test_a_match_is_the_best_row_inside_the_mask_and_the_first_of_its_equals(case, dtype: torch.dtype):
    found = maps_world.match_errors(case, dtype, "cuda")
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


@TYPES
@pytest.mark.parametrize("case", KEPT, ids=[c.name for c in KEPT])
def test_compaction_is_its_definition_to_the_bit(case, dtype: torch.dtype):
    found = maps_world.kept_errors(case, dtype, "cuda")
    assert found == dict.fromkeys(found, (0.0, 0.0))


def test_a_token_that_is_no_key_shows_in_its_map():
    q = torch.randn(1, 1, 5, 64, device="cuda", dtype=torch.float16)
    assert token_maps(q, q, torch.tensor([0, 5, -2, -1], device="cuda"))[0].isnan().any(0).tolist() == [0, 1, 1, 0]


def test_from_mask_to_output_nothing_waits_for_the_device():
    q, k, v = (torch.randn(4, 2, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    mask, tokens = torch.rand(2, 64, device="cuda") < 0.4, torch.tensor([3], device="cuda")

    def step():
        kept = compact(mask, padded=True)
        pool = gather(k, kept, 2), gather(v, kept, 2)
        out, _ = source_attention(q, k, v, kept.sources([[True, True]] * 2, 2), pool=pool)
        return out, *masked_maps(out, k, v, tokens), *match(out[:, 0], q[:, 0], mask.repeat(2, 1))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

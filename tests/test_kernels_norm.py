"""Tests of GroupNorm, pooled and plain, and of the gate: in torch, and their Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diaphane.kernels import cases, reference
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.kernels.geglu import geglu
from diaphane.kernels.group_norm import group_norm
from diaphane.model.ops import JVP, TORCH, Ops, Site, triton
from torch.library import opcheck

from .norm_world import EPS, compared, error, errors, results

NAMED = pytest.mark.parametrize("case", cases.NORM_EDGES, ids=[c.name for c in cases.NORM_EDGES])
SITE = Site("out", 0, "norm")


def op(*args):
    return torch.ops.diaphane.group_norm(*args)[0]


@NAMED
def test_the_op_is_the_definition_in_float64(case: cases.NormCase):
    made = cases.norm_inputs(case, torch.float64)
    ours, true = results(op, case, made), results(reference.group_norm, case, made)
    for name, exact in true.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-8, atol=1e-9 * (1 + exact.norm().item()))


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_it_errs_at_most_twice_as_much_as_the_definition_in_the_same_type(case: cases.NormCase, dtype: torch.dtype):
    found = errors(case, dtype)
    assert {"out", "dbias"} <= found.keys()
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_pooled_statistics_lose_few_digits_to_a_large_mean(last: bool):
    case = cases.NormCase("", "", 2, 32, (16, 16), 4, refs=(0, 0), mean=1e4, last=last)
    made = cases.norm_inputs(case, torch.float32)
    true = results(reference.group_norm, case, {n: v if n == "ref" else v.double() for n, v in made.items()})
    assert error(results(group_norm, case, made)["out"], true["out"]) < 2e-3


@pytest.mark.parametrize("silu", [False, True])
def test_it_has_the_derivatives_that_differences_show_through_the_reference_too(silu: bool):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64, generator=noise).requires_grad_()
    w, b = (torch.randn(6, dtype=torch.float64, generator=noise).requires_grad_() for _ in range(2))
    ref = torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda *leaves: group_norm(*leaves, 3, 1e-3, silu, ref), (x, w, b))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
def test_an_image_of_one_colour_takes_the_deviation_of_its_reference(eps: float, kind: torch.memory_format):
    x = torch.randn(2, 8, 5, 4)
    x[1] = 3.0
    x, one, ref = x.contiguous(memory_format=kind), torch.ones(8), torch.tensor([0, 0])
    found, true = (run(x, one, one, 4, eps, True, ref) for run in (group_norm, reference.group_norm))
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)


def test_a_reference_is_left_alone_and_alone_is_what_torch_does():
    x, (w, b) = torch.randn(3, 8, 5, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    plain = F.silu(F.group_norm(x, 4, w, b, EPS))
    assert torch.equal(group_norm(x, w, b, 4, EPS, True), plain)
    pooled = group_norm(x, w, b, 4, EPS, True, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(pooled[1], plain[1], rtol=1e-12, atol=1e-12)
    assert error(pooled[0], plain[0]) > 1e-3


@pytest.mark.parametrize("verbs", [TORCH, JVP, triton()], ids=["torch", "jvp", "triton"])
@pytest.mark.parametrize("ref", [None, torch.tensor([1, 1])], ids=["plain", "pooled"])
def test_every_set_of_verbs_says_the_same_where_there_is_no_gpu(verbs: Ops, ref):
    x, (w, b) = torch.randn(2, 8, 6, 5), torch.randn(2, 8)
    found = verbs.group_norm(SITE, x, w, b, 4, EPS, True, ref)
    torch.testing.assert_close(found, reference.group_norm(x, w, b, 4, EPS, True, ref))
    assert torch.equal(verbs.geglu(x[..., :4]), reference.geglu(x[..., :4]))


def test_forward_mode_goes_through_the_written_out_verbs():
    x, (w, b) = torch.randn(2, 8, 6, 5, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    ref, step = torch.tensor([1, 1]), torch.randn(2, 8, 6, 5, dtype=torch.float64)

    def run(x):
        return JVP.group_norm(SITE, x, w, b, 4, EPS, True, ref)

    _, slope = torch.func.jvp(run, (x,), (step,))
    torch.testing.assert_close(slope, (run(x + 1e-6 * step) - run(x - 1e-6 * step)) / 2e-6, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(run, (x.requires_grad_(),))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_the_output_and_its_gradient_lie_in_memory_as_x_does(layout: str):
    x = torch.randn(2, 8, 6, 10)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = (x[..., ::2] if layout == "strided" else x).detach().requires_grad_()
    y = group_norm(x, torch.ones(8), torch.zeros(8), 4, ref=torch.tensor([0, 0]))
    (dx,) = torch.autograd.grad(y.sum(), x)
    kind = torch.channels_last if layout == "channels last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=kind)
    assert dx.is_contiguous(memory_format=kind)


def test_no_images_give_no_images():
    x = torch.zeros(0, 8, 4, 4, requires_grad=True)
    w = torch.ones(8, requires_grad=True)
    y = group_norm(x, w, torch.zeros(8), 4, ref=torch.zeros(0, dtype=torch.long))
    y.sum().backward()
    assert y.shape == x.shape
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros(8))


def test_weights_may_be_wider_than_what_they_weigh():
    made = cases.norm_inputs(cases.NORM_EDGES[2], torch.bfloat16)
    x, g, ref = made["x"].requires_grad_(), made["g"], made["ref"]
    w, b = (made[n].float().requires_grad_() for n in ("weight", "bias"))
    y = group_norm(x, w, b, 4, EPS, True, ref)
    grads = torch.autograd.grad(y, (x, w, b), g)
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert error(y, reference.group_norm(x.double(), w.double(), b.double(), 4, EPS, True, ref)) < 4e-3


@pytest.mark.parametrize("shape", cases.GATE_EDGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_the_op_of_the_gate_is_its_definition_and_so_is_its_gradient(shape, dtype):
    noise = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)
    found = []
    for run, kind in ((torch.ops.diaphane.geglu, dtype), (reference.geglu, dtype), (reference.geglu, torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        out = run(leaf)
        found.append({"out": out.detach(), "dx": torch.autograd.grad((out * out).sum(), leaf)[0]})
    held = compared(*found, dtype)
    assert {name: e for name, e in held.items() if not e[0] <= e[1]} == {}


def test_the_ops_pass_opcheck():
    made = cases.norm_inputs(cases.NORM_EDGES[6], torch.float32)
    for ref in (None, made["ref"]):
        x, w, b = (made[n].detach().requires_grad_() for n in ("x", "weight", "bias"))
        opcheck(torch.ops.diaphane.group_norm.default, (x, w, b, 32, EPS, True, ref))
        x, w, b = (v.detach() for v in (x, w, b))
        _, stats = torch.ops.diaphane.group_norm(x, w, b, 32, EPS, True, ref)
        opcheck(torch.ops.diaphane.group_norm_backward.default, (made["g"], x, w, b, stats, 32, EPS, True, ref))
    x = torch.randn(3, 7, 10, requires_grad=True)
    opcheck(torch.ops.diaphane.geglu.default, (x,))
    opcheck(torch.ops.diaphane.geglu_backward.default, (torch.randn(3, 7, 5), x.detach()))


def test_each_is_one_node_of_a_compiled_graph_and_equal_to_eager():
    made, graphs = cases.norm_inputs(cases.NORM_EDGES[2], torch.float32), []

    def keep(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    def run(x, w, b, ref):
        return torch.ops.diaphane.geglu(group_norm(x, w, b, 4, EPS, True, ref))

    args = [made[n] for n in ("x", "weight", "bias", "ref")]
    found = torch.compile(run, backend=keep, fullgraph=True)(*args)
    assert [[name for name in names if "getitem" not in name] for names in graphs] == [
        ["diaphane.group_norm", "diaphane.geglu"]
    ]
    assert torch.equal(found, run(*args))


def test_second_derivatives_are_refused_by_name():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    norm = op(x, torch.ones(8), torch.zeros(8), 4, EPS, True, None)
    for y, name in ((norm, "group_norm"), (torch.ops.diaphane.geglu(x), "geglu")):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{name}_backward has no derivative"):
            g.sum().backward()


X, ONE = torch.zeros(2, 8, 4, 4), torch.ones(8)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((X, ONE, ONE, 3), r"\(B, C, pixels ...\) of 3 groups of channels; got \(2, 8, 4, 4\)"),
        ((X, ONE, ONE, 0), "of 0 groups"),
        ((X[:, :, 0, 0], ONE, ONE, 4), r"got \(2, 8\)"),
        ((X, ONE[:4], ONE, 4), "weight has one entry per channel, 8, on cpu; got"),
        ((X, ONE, ONE.to("meta"), 4), "bias has one entry per channel, 8, on cpu; got .* on meta"),
        ((X, ONE, ONE, 4, EPS, True, torch.tensor([0])), "ref is 2 integers on cpu; got"),
        ((X, ONE, ONE, 4, EPS, True, torch.tensor([0.0, 0.0])), "ref is 2 integers on cpu; got .* torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(args: tuple, word: str):
    with pytest.raises(ValueError, match=word) as e:
        group_norm(*args)
    assert "\n" not in str(e.value)


def test_a_gate_of_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"geglu takes x \(..., 2C\); got \(2, 5\)"):
        geglu(torch.zeros(2, 5))


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict]:
    """What the script printed: of every case and type, each error and the most it may be."""
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    script = Path(__file__).parent / "interpreted_norm.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return {(row["case"], row["type"]): row["errors"] for row in rows}


@pytest.mark.parametrize("case", [c.name for c in cases.NORM_EDGES] + [f"gate {s}" for s in cases.GATE_EDGES])
def test_kernels_err_at_most_twice_as_much_as_torch(interpreted, case: str):
    found = {kind: errors for (name, kind), errors in interpreted.items() if name == case}
    assert "fp32" in found
    assert [(k, n, e) for k, errors in found.items() for n, e in errors.items() if not e[0] <= e[1]] == []


def test_half_precision_is_among_what_the_interpreter_ran(interpreted):
    assert {"style", "last-style", "huge", "far"} <= {name for name, kind in interpreted if kind == "fp16"}
    assert {"silu", "last-style"} <= {name for name, kind in interpreted if kind == "bf16"}


def test_a_small_group_is_one_launch_and_channels_last_are_three(interpreted):
    assert interpreted["launches", "fp32"] == ["whole_kernel", "channels_kernel", "merge_kernel", "apply_kernel"]


def test_a_reference_outside_the_batch_is_nan_and_not_what_lies_there(interpreted):
    assert interpreted["outside", "fp32"] == [[False, True]] * 2

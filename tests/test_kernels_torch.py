"""Tests of source attention and AdaIN in torch: against their definitions, forward and backward, as custom ops."""

from pathlib import Path

import pytest
import torch
from diaphane.kernels import cases, reference
from diaphane.kernels.adain import adain, token_stats
from diaphane.kernels.source_attention import source_attention
from diaphane.kernels.sources import Source, Sources, shared
from diaphane.model.ops import TORCH, Site, triton
from torch.library import opcheck

from .kernels_world import error, errors, results

NAMED = pytest.mark.parametrize("case", cases.EDGES, ids=[c.name for c in cases.EDGES])


@NAMED
@pytest.mark.parametrize("use", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], ids=["output", "lse", "both"])
def test_it_is_the_definition_in_float64(case: cases.Case, use: tuple[float, float]):
    made = cases.inputs(case, torch.float64)
    ours = results(source_attention, case, made, use)
    true = results(reference.source_attention, case, made, use)
    for name in ("out", "lse"):
        torch.testing.assert_close(ours[name], true[name], rtol=1e-9, atol=1e-9)
    for name in true:
        torch.testing.assert_close(ours[name], true[name], rtol=1e-7, atol=1e-9 * (1 + true[name].norm().item()))


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_it_errs_at_most_twice_as_much_as_the_definition_in_the_same_type(case: cases.Case, dtype: torch.dtype):
    found = errors(case, dtype)
    assert {"out", "dv"} <= found.keys()
    assert {name: e for name, e in found.items() if not e[0] <= e[1]} == {}


def test_the_reference_is_left_alone():
    q, k, v = (torch.randn(3, 2, 40, 16, dtype=torch.float64) for _ in range(3))
    out, lse = source_attention(q, k, v, shared([1, 1, 1], 40, 0.5, 2.0), ref=torch.tensor([1, 1, 1]))
    alone, alone_lse = source_attention(q[1:2], k[1:2], v[1:2])
    torch.testing.assert_close(out[1:2], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[1:2], alone_lse, rtol=1e-12, atol=1e-12)


def test_no_source_is_plain_attention_bit_for_bit():
    q, k, v = (torch.randn(2, 2, 33, 8) for _ in range(3))
    assert torch.equal(source_attention(q, k, v)[0], reference.attention(q, k, v))


def test_the_verbs_with_kernels_are_the_verbs_without_where_there_is_no_gpu():
    q, k, v = (torch.randn(2, 2, 33, 8) for _ in range(3))
    site, bias = Site("mid", 0, "self"), torch.randn(33, 33)
    assert torch.equal(triton().attend(site, q, k, v), TORCH.attend(site, q, k, v))
    assert torch.equal(triton().attend(site, q, k, v, bias), TORCH.attend(site, q, k, v, bias))
    assert (triton().join, triton().add) == (TORCH.join, TORCH.add)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_the_gradient_of_statistics_errs_at_most_twice_as_much_as_torch_s_wherever_the_mean_is(mean: float):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 50, 8, generator=noise) + mean * torch.randn(2, 2, 1, 8, generator=noise)
    g = torch.randn(2, 2, 2, 8, generator=noise)

    def gradient(run, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.stack(tuple(run(x))), x, g.to(x))[0]

    true = gradient(reference.token_stats, x.double())
    ours, plain = (gradient(run, x) for run in (lambda x: token_stats(x)[0], reference.token_stats))
    assert error(ours, true) <= max(2 * error(plain, true), 2 * torch.finfo(torch.float32).eps)


def test_a_scale_and_a_shift_in_float64_are_those_that_were_given():
    q, k, v = (torch.randn(2, 1, 9, 8, dtype=torch.float64) for _ in range(3))
    out, lse = source_attention(q, k, v, shared([0, 0], 9, 0.7, 0.1))
    logits = torch.cat([q[1] @ k[1].mT, q[1] @ k[0].mT * 0.7], -1) * 8**-0.5 + torch.tensor(
        [0.0] * 9 + [0.1] * 9, dtype=torch.float64
    )
    torch.testing.assert_close(out[1], logits.softmax(-1) @ torch.cat([v[1], v[0]], 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[1], logits.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_a_shift_far_down_hides_a_source():
    q, k, v = (torch.randn(2, 1, 20, 8, dtype=torch.float64) for _ in range(3))
    out, _ = source_attention(q, k, v, shared([0, 0], 20, shift=-1e4))
    torch.testing.assert_close(out, source_attention(q, k, v)[0], rtol=1e-12, atol=1e-12)


def test_tiles_of_a_source_are_the_source():
    q, k, v = (torch.randn(2, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    whole = Sources.of([[], [Source(0, 0, 30)]])
    parts = Sources.of([[], [Source(0, 0, 11), Source(0, 11, 12), Source(0, 12, 30)]])
    for a, b in zip(source_attention(q, k, v, whole), source_attention(q, k, v, parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_key_that_hardly_varies_overflows_nothing_in_half_precision():
    q, k, v = (torch.randn(2, 1, 64, 16) for _ in range(3))
    q, k[1] = q * 30, k[1] * 1e-3 + 10
    k[0] = k[0] * 20
    q, k, v = (x.half() for x in (q, k, v))
    ref = torch.tensor([0, 0])
    out, lse = source_attention(q, k, v, shared([0, 0], 64), ref=ref)
    true, true_lse = reference.source_attention(q.double(), k.double(), v.double(), shared([0, 0], 64), ref=ref)
    assert out.isfinite().all()
    assert error(out, true) < 0.02
    assert error(lse, true_lse) < 0.001


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_statistics_lose_no_digits_to_a_large_mean(mean: float):
    x = (torch.randn(2, 3, 501, 8, dtype=torch.float64) + mean).float()
    found = token_stats(x, x[:, :, :77])
    for which, y in enumerate((x, x[:, :, :77])):
        for mine, true in zip(found[which], reference.token_stats(y.double()), strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=2e-6 * max(1.0, mean / 1e4), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adain_is_its_definition_and_so_are_its_gradients(dtype: torch.dtype):
    x = (torch.randn(3, 2, 41, 8, dtype=torch.float64) * 2 + 5).to(dtype)
    w = torch.randn(3, 2, 41, 8, dtype=torch.float64)
    ref = torch.tensor([0, 0, 2])
    grads, values = [], []
    for run, y in ((adain, x), (reference.adain, x), (reference.adain, x.double())):
        leaf = y.clone().requires_grad_()
        values.append(run(leaf, ref))
        grads.append(torch.autograd.grad((values[-1] * w.to(y.dtype)).sum(), leaf)[0])
    floor = torch.finfo(dtype).eps
    for mine, plain, true in (values, grads):
        assert error(mine, true) <= max(2 * error(plain, true), floor)


def test_adain_has_the_derivatives_that_differences_show():
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: adain(x, torch.tensor([0, 0, 2])), (x,))
    assert torch.autograd.gradcheck(lambda x: token_stats(x, x * x), (x,))


def op_inputs(grad: bool) -> tuple:
    made = cases.inputs(cases.EDGES[1], torch.float32)
    q, k, v = (made[n].requires_grad_(grad) for n in ("q", "k", "v"))
    made_sources = cases.sources(cases.EDGES[1])
    assert made_sources is not None
    stats = token_stats(q, k).detach().requires_grad_(grad)
    tables = made_sources.offsets, made_sources.segments, made_sources.gains
    return q, k, v, None, None, *tables, stats, made["ref"], 0.125


def test_the_ops_pass_opcheck():
    q, k, *_ = op_inputs(True)
    mean, std = torch.randn(2, 4, 1, 64, requires_grad=True).unbind()
    opcheck(torch.ops.diaphane.source_attention.default, op_inputs(True))
    opcheck(torch.ops.diaphane.token_stats.default, (q, k, 1e-5))
    opcheck(torch.ops.diaphane.centred_affine.default, (q, mean, std, mean))
    opcheck(torch.ops.diaphane.moments.default, (q.detach(), q.detach(), mean.detach()))
    args = op_inputs(False)
    out, lse = torch.ops.diaphane.source_attention(*args)
    opcheck(torch.ops.diaphane.source_attention_backward.default, (out, lse, out, lse, *args))


def test_it_is_one_node_of_a_compiled_graph_and_equal_to_eager():
    made = cases.inputs(cases.EDGES[1], torch.float32)
    seen, graphs = cases.sources(cases.EDGES[1]), []

    def keep(graph, _):
        graphs.append([n for n in graph.graph.nodes if n.op == "call_function" and "diaphane" in str(n.target)])
        return graph.forward

    def run(q, k, v):
        return source_attention(q, k, v, seen, ref=made["ref"], stats=stats)

    stats = token_stats(made["q"], made["k"])
    found = torch.compile(run, backend=keep, fullgraph=True)(made["q"], made["k"], made["v"])
    assert [len(g) for g in graphs] == [1]
    for a, b in zip(found, run(made["q"], made["k"], made["v"]), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_by_name():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    out, _ = source_attention(q, q, q)
    (g,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="source_attention_backward has no derivative"):
        g.sum().backward()


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"k": X[:1]}, r"takes k and v \(B, H, M, D\)"),
        ({"v": X[:, :, :4]}, r"takes k and v \(B, H, M, D\)"),
        ({"k": X[:, :, :0], "v": X[:, :, :0]}, "M > 0"),
        ({"v": X.half()}, r"v: torch.float16"),
        ({"pool": (X[:, :2], X[:, :2])}, r"takes a pool \(P, H, T, D\)"),
        ({"sources": shared([0, 0, 0], 5)}, "of 3 images, q of 2"),
        ({"sources": shared([0, 0], 6)}, "at least 1 images of 6 rows; got 2 of 5"),
        ({"ref": torch.tensor([0])}, "ref is 2 integers"),
        ({"ref": torch.tensor([0.0, 0.0])}, "ref is 2 integers"),
        ({"ref": torch.tensor([True, False])}, "ref is 2 integers"),
        ({"ref": torch.tensor([0, 2])}, r"ref\[1\] is an image of the batch, 0 to 1; got 2"),
        ({"ref": torch.tensor([-1, 0])}, r"ref\[0\] is an image of the batch, 0 to 1; got -1"),
        ({"q": X[:, :0], "k": X[:, :0], "v": X[:, :0]}, "H and D > 0"),
        ({"q": X[..., :0], "k": X[..., :0], "v": X[..., :0]}, "H and D > 0"),
        ({"q": X.long(), "k": X.long(), "v": X.long()}, "of a floating type"),
        ({"stats": torch.zeros(2, 2, 2, 3, 8)}, "stats come with ref"),
        ({"scale": 0.0}, "scale is positive"),
        ({"scale": float("inf")}, "scale is positive and finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(kwargs: dict, word: str):
    with pytest.raises(ValueError, match=word) as e:
        source_attention(**{"q": X, "k": X, "v": X, **kwargs})
    assert "\n" not in str(e.value)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="N > 0"):
        token_stats(X[:, :, :0])
    with pytest.raises(ValueError, match="takes k like q"):
        token_stats(X, X[:1])
    with pytest.raises(ValueError, match="floating"):
        token_stats(X.long())
    for ref in (torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="ref has one integer per image"):
            adain(X, ref)


def test_no_queries_have_no_output_and_gradients_of_zero():
    q, k = torch.zeros(2, 3, 0, 8, requires_grad=True), X.clone().requires_grad_()
    out, lse = source_attention(q, k, k, shared([0, 0], 5))
    assert (out.shape, lse.shape) == ((2, 3, 0, 8), (2, 3, 0))
    (g,) = torch.autograd.grad(out.sum(), k)
    assert torch.equal(g, torch.zeros_like(k))
    assert source_attention(q[:0], k[:0], k[:0])[0].shape == (0, 3, 0, 8)


def test_the_page_about_the_kernels_runs_as_it_is_printed():
    page = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    imports, style, subject = code.split("\n\n")
    q = torch.randn(4, 1, 1024, 8)
    names: dict = {"torch": torch, "q": q, "k": q, "v": q}
    exec(imports + "\n" + style, names)
    assert names["out"].shape == q.shape
    pool = torch.randn(1, 1, 614 + 588, 8)
    names |= {"q": q[:2], "k": q[:2], "v": q[:2], "kept_k": pool, "kept_v": pool}
    exec(subject, names)
    assert names["out"].shape == (2, 1, 1024, 8)

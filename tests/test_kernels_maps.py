"""Tests of masked maps and of the match by cosine: in torch, and their Triton kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diaphane.kernels import cases_maps, match, reference
from diaphane.kernels.cases_maps import KEPT_EDGES, MAPS_EDGES, MATCH_EDGES, MapsCase, MatchCase, maps_inputs
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.kernels.masked_maps import masked_maps, token_maps
from diaphane.kernels.source_attention import source_attention
from torch.library import opcheck

from .maps_world import BFLOAT, HALF, maps_errors, match_errors

TYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
OPS = torch.ops.diaphane


def check(errors: dict[str, tuple[float, float]]) -> None:
    assert errors
    assert {name: e for name, e in errors.items() if not e[0] <= e[1]} == {}


@TYPES
@pytest.mark.parametrize("case", MAPS_EDGES, ids=[c.name for c in MAPS_EDGES])
def test_maps_err_at_most_twice_as_much_as_the_definition_in_the_same_type(case: MapsCase, dtype: torch.dtype):
    check(maps_errors(case, dtype))


@TYPES
@pytest.mark.parametrize("case", MATCH_EDGES, ids=[c.name for c in MATCH_EDGES])
def test_a_match_is_the_best_row_inside_the_mask_and_the_first_of_its_equals(case: MatchCase, dtype: torch.dtype):
    check(match_errors(case, dtype))


def test_the_maps_of_every_key_add_up_to_one_and_those_of_none_are_zero():
    made = maps_inputs(MAPS_EDGES[0], torch.float32) | {"tokens": torch.arange(-1, 77)}
    _, maps = masked_maps(**made)
    assert (maps[..., 0] == 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 130))


def test_maps_change_nothing_of_the_attention_beneath():
    made = maps_inputs(MAPS_EDGES[0], torch.float32)
    out, maps = masked_maps(**made)
    assert torch.equal(out, source_attention(made["q"], made["k"], made["v"])[0])
    assert torch.equal(maps, token_maps(made["q"], made["k"], made["tokens"]))


def test_a_scale_is_taken():
    made = maps_inputs(MAPS_EDGES[0], torch.float64)
    for mine, true in zip(masked_maps(**made, scale=0.3), reference.masked_maps(**made, scale=0.3), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def test_maps_have_the_derivatives_that_differences_show():
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 3, generator=noise, dtype=torch.float64).requires_grad_() for n in (3, 4, 4))
    tokens = torch.tensor([[1, 3, 1], [-1, 0, 2]])
    assert torch.autograd.gradcheck(lambda *x: masked_maps(*x, tokens), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: token_maps(*x, tokens), (q, k))


def test_a_gradient_through_maps_alone_survives_float16_however_small():
    made = maps_inputs(MAPS_EDGES[0], torch.float16)
    q = made["q"].requires_grad_()
    (small,) = torch.autograd.grad(token_maps(q, made["k"], made["tokens"]).sum() * 1e-3, q)
    (large,) = torch.autograd.grad(token_maps(q, made["k"], made["tokens"]).sum(), q)
    assert small.float().norm() > 0.9e-3 * large.float().norm() > 0


def test_a_match_does_not_depend_on_how_much_is_held_at_a_time(monkeypatch):
    src, tgt = torch.randn(2, 50, 8, dtype=torch.float64), torch.randn(3, 41, 8, dtype=torch.float64)
    mask = torch.rand(2, 50) < 0.5
    whole = match.match(src, tgt, mask)
    monkeypatch.setattr(match, "CHUNK", 60)
    for a, b in zip(whole, match.match(src, tgt, mask), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_of_two_copies_of_a_source_the_first_is_matched_wherever_a_product_sums_them(layout: str):
    half, tgt = (torch.randn(2, n, 16, dtype=torch.float64) for n in (25, 40))
    src = torch.cat([half, half], 1)
    src = src.mT.contiguous().mT if layout == "columns" else src
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 3:20] = False
    index, similarity = match.match(src, tgt, mask)
    assert (index[:, 0] < 25).all()
    assert torch.isin(index[:, 1], torch.tensor([*range(3), *range(20, 25), *range(28, 45)])).all()
    cosine = torch.einsum("smc,bnc->bsnm", match.unit(src), match.unit(tgt)).masked_fill(~mask[:, None], -1)
    torch.testing.assert_close(similarity, cosine.max(-1).values)


def test_an_empty_mask_matches_at_a_distance_of_two():
    index, similarity = match.match(torch.randn(1, 5, 3), torch.randn(2, 4, 3), torch.zeros(1, 5, dtype=torch.bool))
    assert torch.equal(index, torch.zeros(2, 1, 4, dtype=torch.int64))
    assert torch.equal(1 - similarity, torch.full((2, 1, 4), 2.0))


def test_a_target_that_is_not_finite_shows_and_the_others_are_as_they_were():
    src, tgt = torch.randn(1, 5, 3), torch.randn(1, 4, 3)
    broken = tgt.clone()
    broken[0, 1, 0], broken[0, 3, 2] = float("nan"), float("inf")
    similarity, whole = match.match(src, broken)[1][0, 0], match.match(src, tgt)[1][0, 0]
    assert similarity.isnan().tolist() == [False, True, False, True]
    assert torch.equal(similarity[::2], whole[::2])


def test_cosines_that_half_precision_would_round_to_the_same_are_told_apart():
    src = torch.tensor([[[1.0, 0.021], [1.0, 0.020]]]).half()
    index, _ = match.match(src, torch.tensor([[[1.0, 0.0]]]).half())
    assert index.item() == 1
    rounded = (src / src.norm(dim=-1, keepdim=True)).half()
    assert rounded[0, 0, 0] == rounded[0, 1, 0]


def test_a_match_is_not_differentiated_in_silence():
    src = torch.randn(1, 5, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="match has no derivative: the cosine of the rows that its index"):
        match.match(src, src)[1].sum().backward()


def test_the_ops_pass_opcheck():
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=noise).requires_grad_() for n in (6, 5, 5))
    tokens = torch.tensor([[1, -1], [0, 4]], dtype=torch.int32)
    opcheck(OPS.masked_maps.default, (q, k, v, tokens, 0.3))
    opcheck(OPS.masked_maps.default, (q, k, None, tokens, 0.3))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, maps = OPS.masked_maps(q, k, v, tokens, 0.3)
    opcheck(OPS.masked_maps_backward.default, (out, lse, maps, out, lse, q, k, v, tokens, 0.3))
    opcheck(OPS.masked_maps_backward.default, (out, None, maps, out, lse, q, k, None, tokens, 0.3))
    opcheck(OPS.match.default, (q[0], k[0], torch.rand(2, 6, generator=noise) < 0.5))
    opcheck(OPS.match.default, (q[0], k[0], None))


@pytest.mark.parametrize("op", ["masked_maps", "match"])
def test_each_is_one_node_of_a_compiled_graph_and_equal_to_eager(op: str):
    graphs = []

    def keep(graph, _):
        graphs.append([n for n in graph.graph.nodes if n.op == "call_function" and "diaphane" in str(n.target)])
        return graph.forward

    made = maps_inputs(MAPS_EDGES[0], torch.float32)
    if op == "masked_maps":
        run, args = masked_maps, tuple(made.values())
    else:
        run, args = match.match, (made["q"][0], made["k"][0], torch.rand(3, 130) < 0.5)
    found = torch.compile(run, backend=keep, fullgraph=True)(*args)
    assert [len(g) for g in graphs] == [1]
    for a, b in zip(found, run(*args), strict=True):
        assert torch.equal(a, b)


X = torch.zeros(2, 3, 5, 8)
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"q": X[0]}, r"takes q \(B, H, N, D\)"),
        ({"k": X[:1]}, r"takes k and v \(B, H, M, D\)"),
        ({"v": X[:, :, :4]}, r"takes k and v \(B, H, M, D\)"),
        ({"k": X[:, :, :0], "v": X[:, :, :0]}, "M > 0"),
        ({"v": X.half()}, "v: torch.float16"),
        ({"tokens": T.float()}, r"tokens are integers, \(T,\) or \(2, T\)"),
        ({"tokens": T > 0}, "got .* torch.bool"),
        ({"tokens": torch.zeros(3, 1, dtype=torch.int64)}, r"got \(3, 1\)"),
        ({"tokens": torch.tensor([5])}, "0 to 4, or -1 for none; got 5"),
        ({"tokens": torch.tensor([[0], [-2]])}, "got -2"),
        ({"scale": 0.0}, "scale is positive"),
    ],
)
def test_maps_of_inputs_that_do_not_fit_are_refused_in_one_line(kwargs: dict, word: str):
    with pytest.raises(ValueError, match=word) as e:
        masked_maps(**{"q": X, "k": X, "v": X, "tokens": T, **kwargs})
    assert "\n" not in str(e.value)


Y = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((Y, Y[..., :7], None), r"takes \(S, M, C\) and \(B, N, C\)"),
        ((Y[0], Y, None), r"takes \(S, M, C\) and \(B, N, C\)"),
        ((Y[:, :0], Y, None), "none of them 0"),
        ((Y, Y.half(), None), "of one floating type"),
        ((Y.int(), Y.int(), None), "of one floating type"),
        ((Y, Y, torch.zeros(2, 5)), r"the mask is bool \(2, 5\)"),
        ((Y, Y, torch.zeros(2, 4, dtype=torch.bool)), r"got torch.bool \(2, 4\)"),
    ],
)
def test_a_match_of_inputs_that_do_not_fit_is_refused_in_one_line(args: tuple, word: str):
    with pytest.raises(ValueError, match=word) as e:
        match.match(*args)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("heads", [10, 20, 7, 1])
@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
def test_heads_are_parted_evenly_and_no_more_than_the_card_needs(heads: int):
    from diaphane.kernels.masked_maps_triton import PROGRAMS, heads_of_a_program

    for programs in (1, 16, 64, 128, 512):
        each = heads_of_a_program(heads, programs)
        assert heads % each == 0
        assert each == 1 or programs * heads // each >= PROGRAMS
        assert programs < PROGRAMS or each == heads


def test_every_case_says_why_and_is_named_once():
    every = [c for n, cases in vars(cases_maps).items() if n.endswith(("_SDXL", "_EDGES")) for c in cases]
    assert len({c.name for c in every}) == len(every) > 30
    assert all(c.why for c in every)


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """What the script printed: of every case and type, each error and the most it may be."""
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    script = Path(__file__).parent / "interpreted_maps.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return {(row["case"], row["type"]): row["errors"] for row in rows}


PLAN = [(c.name, "fp32") for c in (*MAPS_EDGES, *MATCH_EDGES, *KEPT_EDGES)]
PLAN += [(name, kind) for kind, names in (("fp16", HALF), ("bf16", BFLOAT)) for name in names]


@pytest.mark.parametrize(("case", "kind"), PLAN, ids=[f"{case} {kind}" for case, kind in PLAN])
def test_kernels_keep_to_the_same_rules(interpreted, case: str, kind: str):
    check(interpreted[case, kind])


def test_every_kernel_was_launched_and_a_token_that_is_no_key_shows(interpreted):
    kernels = ["compact_kernel", "gather_kernel", "maps_kernel", "maps_keys_kernel", "maps_queries_kernel"]
    assert interpreted["launches", "fp32"] == [*kernels, "match_kernel", "scatter_kernel"]
    assert interpreted["outside", "fp32"] == [False, True, True, False]
    assert interpreted["not finite", "fp32"] == [False, True, False, True]

"""Tests of compaction: lists of kept tokens, the rows they pick, the sources made of them, what is compiled again."""

from pathlib import Path

import pytest
import torch
from diaphane.kernels import reference
from diaphane.kernels.cases_maps import KEPT_EDGES, KeptCase
from diaphane.kernels.compact import Kept, compact, gather
from diaphane.kernels.source_attention import source_attention
from diaphane.kernels.sources import Seen, Source, SourcesError, also, compacted, everyone, shared
from diaphane.model.ops import Site, attend
from torch import Tensor
from torch.library import opcheck

from .maps_world import kept_errors

SITE = Site("dec.0", 0, "self")
ALL = [[True] * 3] * 3
SOME = [[False, True, True], [True, False, False], [False, False, False]]


def masks(*counts: int, tokens: int = 20) -> Tensor:
    """A mask for each image, of so many tokens."""
    noise = torch.Generator().manual_seed(sum(counts))
    kept = torch.zeros(len(counts), tokens, dtype=torch.bool)
    for row, count in zip(kept, counts, strict=True):
        row[torch.randperm(tokens, generator=noise)[:count]] = True
    return kept


def qkv(images: int, tokens: int = 20) -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(images, 2, tokens, 8, generator=noise, dtype=torch.float64) for _ in range(3)]


def seen(k: Tensor, v: Tensor, kept: Kept, sees: list[list[bool]], halves: int) -> Seen:
    return Seen(kept.sources(sees, halves), (gather(k, kept, halves), gather(v, kept, halves)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("case", KEPT_EDGES, ids=[c.name for c in KEPT_EDGES])
def test_lists_rows_and_gradients_are_those_of_the_definition_to_the_bit(case: KeptCase, dtype: torch.dtype):
    found = kept_errors(case, dtype)
    assert found == dict.fromkeys(found, (0.0, 0.0))
    assert len(found) == 8


@pytest.mark.parametrize("padded", [False, True], ids=["counted", "padded"])
@pytest.mark.parametrize("sees", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("counts", [(7, 0, 9), (0, 0, 0), (20, 20, 20), (0, 1, 0)], ids=str)
def test_attention_to_compacted_tokens_is_masked_attention(counts, sees, padded):
    q, k, v = qkv(6)
    mask = masks(*counts)
    these = seen(k, v, compact(mask, padded), sees, 2)
    found = attend(SITE, q, k, v, seen=these)
    eye = torch.eye(3, dtype=torch.bool)
    others = (torch.tensor(sees) & ~eye)[:, :, None] & mask[None]  # (3, 3, N)
    allowed = (others | eye[:, :, None]).flatten(1)[:, None, None]  # (3, 1, 1, 3 N)
    for half in range(2):
        rows = slice(3 * half, 3 * half + 3)
        keys, values = (x[rows].transpose(0, 1).flatten(1, 2).expand(3, -1, -1, -1) for x in (k, v))
        true = torch.nn.functional.scaled_dot_product_attention(q[rows], keys, values, attn_mask=allowed)
        torch.testing.assert_close(found[rows], true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("apart", [False, True], ids=["of the batch", "apart"])
def test_sources_made_on_the_device_are_those_made_on_the_host(apart):
    mask = masks(4, 0, 20)
    for sees in (ALL, SOME):
        host = compacted([4, 0, 20], sees, 2, apart=apart)
        there = compacted(torch.tensor([4, 0, 20]), sees, 2, apart=apart, rows=60)
        assert there.listed() == host.listed() == compact(mask).sources(sees, 2, apart).listed()
        assert (there.images, there.pool_images, there.pool_rows) == (host.images, 2, 60)


def test_images_apart_from_the_batch_are_seen_by_the_image_of_their_number_too():
    assert compacted([3, 4], [[True, True]] * 2, apart=True).listed() == [[Source(0, 0, 7)]] * 2
    assert compacted([3], [[True], [True], [False]], apart=True).listed() == [[Source(0, 0, 3)], [Source(0, 0, 3)], []]


def test_gradients_reach_keys_and_values_through_the_pool():
    q, k, v = (x.requires_grad_() for x in qkv(6))
    mask = masks(7, 0, 9)
    grads = []
    for padded in (False, True):
        out = attend(SITE, q, k, v, seen=seen(k, v, compact(mask, padded), ALL, 2))
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    index = reference.compact(mask)[0]
    pool = tuple(reference.gather(x, index, 2) for x in (k, v))
    out, _ = reference.source_attention(q, k, v, compacted([7, 0, 9], ALL, 2), pool)
    for mine, other, true in zip(*grads, torch.autograd.grad(out.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other, true, rtol=1e-9, atol=1e-9)


def test_the_ops_pass_opcheck():
    kept, x = compact(masks(3, 5), padded=True), torch.randn(4, 2, 20, 8)
    ops = torch.ops.diaphane
    opcheck(ops.compact.default, (masks(3, 5),))
    opcheck(ops.gather.default, (x.requires_grad_(), kept.index, kept.edges, 2))
    opcheck(ops.scatter.default, (gather(x, kept, 2).detach(), kept.index, kept.edges, 20))


def compilations(steps: list[Seen | None], images: int) -> int:
    """How often a compiled attention is compiled over the steps; each is checked against eager."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    q, k, v = qkv(images)
    run = torch.compile(lambda q, k, v, seen: attend(SITE, q, k, v, seen=seen), backend=keep, fullgraph=True)
    for step in steps:
        assert torch.equal(run(q, k, v, step), attend(SITE, q, k, v, seen=step))
    return len(graphs)


COUNTS = [(0, 0, 0), (1, 0, 0), (4, 0, 9), (0, 1, 0), (20, 20, 20), (1, 1, 1), (3, 0, 0)]


@pytest.mark.parametrize("order", [1, -1], ids=["from none", "from some"])
@pytest.mark.parametrize(("padded", "most"), [(True, 1), (False, 2)], ids=["padded", "counted"])
def test_a_compiled_layer_is_compiled_again_once_at_most_as_counts_change(padded, most, order):
    _, k, v = qkv(6)
    steps = [seen(k, v, compact(masks(*counts), padded), ALL, 2) for counts in COUNTS[::order]]
    assert compilations(steps, 6) <= most
    steps = [also(Seen(shared([0] * 3 + [3] * 3, 20)), step, k, v) for step in steps]
    assert compilations(steps, 6) <= most


def test_a_compiled_layer_is_compiled_once_for_every_scale_and_shift_and_again_for_other_groups():
    steps: list[Seen | None] = [Seen(shared([0, 0, 0, 0], 20, 1 + 0.1 * i, 0.3 * i)) for i in range(4)]
    assert compilations(steps, 4) == 1
    groups = ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3, 2, 1, 0]])
    assert compilations([Seen(everyone(some, 20)) for some in groups], 4) <= 2


def test_the_whole_path_from_mask_to_output_is_one_graph_where_nothing_is_counted():
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return source_attention(q, k, v, (s := seen(k, v, compact(mask, padded=True), ALL, 2)).sources, pool=s.pool)[0]

    q, k, v = qkv(6)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for counts in COUNTS:
        assert torch.equal(compiled(q, k, v, masks(*counts)), run(q, k, v, masks(*counts)))


X = torch.zeros(4, 2, 20, 8)


def test_inputs_that_do_not_fit_are_refused_in_one_line():
    kept = compact(masks(3, 5))
    for run, word in (
        (lambda: compact(torch.zeros(2, 3)), r"takes a mask bool \(B, N\)"),
        (lambda: compact(torch.zeros(6, dtype=torch.bool)), r"got torch.bool \(6,\)"),
        (lambda: compact(torch.zeros(0, 3, dtype=torch.bool)), "neither of them 0"),
        (lambda: gather(X[:3], kept, 2), r"tokens of \(4, H, 20, D\), 2 halves of 2 images; got \(3,"),
        (lambda: gather(X, kept), r"\(2, H, 20, D\), 1 halves of 2"),
        (lambda: gather(X, kept, 0), "0 halves"),
        (lambda: gather(X[:, :, :9], kept, 2), r"got \(4, 2, 9, 8\)"),
        (lambda: kept.sources([[True]]), r"sees\[0\] has one entry per image of the pool, 2; got 1"),
    ):
        with pytest.raises(ValueError, match=word) as e:
            run()
        assert "\n" not in str(e.value)
    with pytest.raises(SourcesError, match="counts are integers"):
        compacted(torch.zeros(2), [[True, True]])
    with pytest.raises(ValueError, match="at least 2 images of 8 rows"):
        source_attention(X, X, X, kept.sources([[True, True]] * 2, 2), pool=(X[:2, :, :7], X[:2, :, :7]))


def test_attention_takes_channels_that_are_not_side_by_side():
    q, k, v = qkv(3)
    mask = masks(4, 9, 1)
    kept = compact(mask)
    pool = gather(k, kept), gather(v, kept)
    far = [x.mT.contiguous().mT.requires_grad_() for x in (q, k, v, *pool)]
    near = [x.detach().requires_grad_() for x in (q, k, v, *pool)]
    assert all(x.stride(-1) > 1 for x in far)
    outs = [source_attention(*x[:3], kept.sources(ALL), pool=(x[3], x[4])) for x in (far, near)]
    assert torch.equal(outs[0][0], outs[1][0])
    weight = torch.randn(3, 2, 8, 20, dtype=torch.float64).mT
    grads = [torch.autograd.grad((out * weight).sum(), x) for (out, _), x in zip(outs, (far, near), strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_page_about_the_kernels_compacts_as_it_is_printed():
    page = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    code = next(b.split("```")[0] for b in page.split("```python\n")[1:] if "padded=True" in b)
    q, k, v = qkv(6)
    names: dict = {"q": q, "k": k, "v": v, "mask": masks(4, 0, 9), "sees": ALL}
    exec(code, names)
    these = seen(k, v, compact(masks(4, 0, 9)), ALL, 2)
    torch.testing.assert_close(names["out"], attend(SITE, q, k, v, seen=these))

"""StyleAligned: what changes nothing, its equations written out, references, layers, chunks, compiled steps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate, combinations
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from diaphane.kernels import reference
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.kernels.sources import Seen, Source, Sources, SourcesError
from diaphane.methods.style_aligned import PRESETS, Sharing, grouped, style_aligned
from diaphane.methods.style_chunks import chunked
from diaphane.methods.style_layers import by_level, by_name, layers, plain
from diaphane.model.ops import JVP, TORCH, Ops, Site
from diaphane.model.sites import SiteError
from diaphane.model.unet import SD15, SDXL
from diaphane.samplers.parameterisation import Denoise
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .style_world import CFG, F64, at, drawn, net, prompts, published, told

SELF = Site("dec.1", 0, "self")


def plainly(rows: list[int], x: Tensor, t: float = 500.0) -> Tensor:
    return told(rows)(x, at(t, x))


def test_images_without_another_reference_change_nothing():
    assert style_aligned(TORCH, [0]) is TORCH
    assert style_aligned(TORCH, [0, 1, 2], Sharing(norms=True)) is TORCH
    assert style_aligned(TORCH, [0, 1], Sharing(all_see_all=True)) is TORCH


@pytest.mark.parametrize(
    "ops",
    [
        style_aligned(TORCH, [0, 0, 0], Sharing(attention=False, adain_q=False, adain_k=False)),
        style_aligned(TORCH, [0, 0, 0], sites=frozenset()),
        style_aligned(TORCH, [0, 0, 0], sites=lambda site: False),
        style_aligned(TORCH, [0, 0, 0], sites=by_level(CFG, 1.0)),
    ],
)
def test_nothing_shared_is_the_plain_network_bit_for_bit(ops: Ops):
    x = drawn(3, 4, 8, 8)
    assert torch.equal(told([0, 1, 2], ops)(x, at(500, x)), plainly([0, 1, 2], x))


@pytest.mark.parametrize("adain", ["".join(some) for n in range(4) for some in combinations("qkv", n)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.75, -0.375), (1.0, 0.6875)])
def test_attention_is_equations_4_and_5(adain: str, scale: float, shift: float):
    q, k, v = (drawn(6, 2, 7, 8, seed=s) + drawn(6, 2, 1, 8, seed=s + 3) for s in range(3))
    flags = {f"adain_{name}": name in adain for name in "qkv"}
    for attention in (True, False):
        ops = style_aligned(TORCH, [0, 0, 2], Sharing(**flags, scale=scale, shift=shift, attention=attention))
        want = published(q, k, v, torch.tensor([0, 0, 2, 3, 3, 5]), adain, scale, shift, attention)
        assert (ops.attend(SELF, q, k, v) - want).abs().max() < 1e-9


def test_all_see_all_is_one_attention_of_all_tokens_of_a_group():
    q, k, v = (drawn(8, 2, 5, 8, seed=s) for s in range(3))
    ops = style_aligned(TORCH, [0, 0, 2, 2], Sharing(all_see_all=True, attention=False, scale=0.5, shift=1.0))
    merged = [x.unflatten(0, (4, 2)).transpose(2, 1).flatten(2, 3) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*merged).unflatten(2, (2, 5)).transpose(1, 2).flatten(0, 1)
    assert (ops.attend(SELF, q, k, v) - want).abs().max() < 1e-12


def test_cross_attention_is_never_touched():
    q, k = drawn(4, 2, 5, 8), drawn(4, 2, 7, 8, seed=1)
    ops = style_aligned(TORCH, [0, 0])
    site = Site("dec.1", 0, "cross")
    assert torch.equal(ops.attend(site, q, k, k), TORCH.attend(site, q, k, k))


@pytest.mark.parametrize("name", PRESETS)
def test_the_reference_is_left_alone(name: str):
    x = drawn(3, 4, 8, 8)
    sharing = PRESETS[name].sharing
    styled = told([0, 1, 2], style_aligned(TORCH, [0, 0, 0], sharing))(x, at(500, x))
    alone = plainly([0, 1, 2], x)
    assert (styled[0] - alone[0]).abs().max() < 1e-9
    assert (styled[1:] - alone[1:]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("norms", [False, True])
def test_groups_of_any_order_are_as_if_each_were_drawn_alone(guidance: float, norms: bool):
    x, sharing = drawn(5, 4, 8, 8), Sharing(norms=norms, shift=0.5)
    refs = grouped([[2, 0, 4], [1, 3]])
    assert refs == [2, 1, 2, 1, 2]
    whole = told(list(range(5)), style_aligned(TORCH, refs, sharing), guidance)(x, at(500, x))
    for rows in ([2, 0, 4], [1, 3]):
        some = told(rows, style_aligned(TORCH, [0] * len(rows), sharing), guidance)(x[rows], at(500, x[rows]))
        assert (whole[rows] - some).abs().max() < 1e-9


def test_shared_norms_are_those_of_both_pictures_side_by_side():
    x, w, b = drawn(4, 16, 3, 5), drawn(16, seed=1), drawn(16, seed=2)
    ops = style_aligned(TORCH, [1, 1], Sharing(norms=True))
    got = ops.group_norm(Site("mid", 0, "norm"), x, w, b, 4, 1e-5, False)
    both = torch.cat([x, x[[1, 1, 3, 3]]], -2)
    want = torch.nn.functional.group_norm(both, 4, w, b, 1e-5)[:, :, :3]
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sharing", [Sharing(norms=True, scale=0.8, shift=0.7), Sharing(adain_q=False, adain_v=True)])
def test_a_set_in_chunks_is_the_whole_set(kept: bool, guidance: float, sharing: Sharing):
    refs = [0, 0, 2, 2, 4, 0, 2]  # two references and a free image
    x, sites = drawn(7, 4, 8, 8), by_name(CFG, ["mid", "dec.1"])
    whole = told(list(range(7)), style_aligned(TORCH, refs, sharing, sites=sites), guidance)(x, at(500, x))
    for size in (1, 2, 9):
        denoise = chunked(lambda rows, ops: told(rows, ops, guidance), refs, sharing, size=size, kept=kept, sites=sites)
        assert (denoise(x, at(500, x)) - whole).abs().max() < 1e-9


def most_allocated(denoise: Denoise, n: int) -> int:
    """The most bytes at once of what the allocator gives and takes back in a step, inside operators too."""
    x = drawn(n, 4, 8, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        denoise(x, at(500, x))
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_a_set_in_chunks_takes_the_memory_of_one_chunk_and_a_few_kilobytes_of_latents_a_picture():
    def of(n: int, way: str) -> int:
        refs, sharing = [0] * n, Sharing(norms=True)
        if way == "whole":
            return most_allocated(told(list(range(n)), style_aligned(TORCH, refs, sharing), of=n), n)
        kept = way == "kept"
        return most_allocated(chunked(lambda rows, ops: told(rows, ops, of=n), refs, sharing, size=2, kept=kept), n)

    latents = drawn(1, 4, 8, 8).nbytes  # eps is there in parts, side by side, and in order
    assert of(13, "chunks") - of(3, "chunks") <= 10 * 3 * latents
    assert of(13, "kept") - of(3, "kept") <= 10 * 3 * latents
    assert of(13, "whole") - of(3, "whole") > 10 * 20 * latents


def test_chunks_refuse_what_cannot_be_split():
    with pytest.raises(SourcesError, match="without the rest"):
        chunked(lambda rows, ops: told(rows, ops), [0, 0], Sharing(all_see_all=True))
    with pytest.raises(SourcesError, match="at least one"):
        chunked(lambda rows, ops: told(rows, ops), [0, 0], size=0)
    with pytest.raises(SourcesError, match="2 images; got a batch of 3"):
        chunked(lambda rows, ops: told(rows, ops), [0, 0])(drawn(3, 4, 8, 8), torch.ones(3))


def test_what_another_method_sees_is_seen_too():
    q, k, v = (drawn(4, 2, 6, 8, seed=s) for s in range(3))
    pool = drawn(1, 2, 3, 8, seed=4), drawn(1, 2, 3, 8, seed=5)
    theirs = Sources.of([[], [Source(0, 0, 3, 0.875, 0.25)]] * 2)
    ref = torch.tensor([0, 0, 2, 2])
    for flags in ({}, {"adain_k": False}, {"adain_q": False, "adain_v": True}):
        ops, heard = style_aligned(TORCH, [0, 0], Sharing(**flags)), []
        listening = replace(TORCH, attend=lambda *args, to=heard: to.append(args) or TORCH.attend(*args))
        got = ops.attend(SELF, q, k, v, None, Seen(theirs, pool))
        style_aligned(listening, [0, 0], Sharing(**flags)).attend(SELF, q, k, v)
        _, a, b, c, bias, seen = heard[0]
        assert bias is None
        own = a[1] if seen.ref is None else published_row(q, ref)
        keys = b[1] if seen.ref is None else published_row(k, ref)
        logits = [own @ keys.mT, own @ b[0].mT, own @ pool[0][0].mT * 0.875 + 0.25 * 8**0.5]
        values = torch.cat([c[1], c[0], pool[1][0]], 1)
        want = (torch.cat(logits, -1) * 8**-0.5).softmax(-1) @ values
        assert (got[1] - want).abs().max() < 1e-9


def published_row(x: Tensor, ref: Tensor) -> Tensor:
    return reference.adain(x, ref)[1]


def test_two_methods_with_the_same_references_agree_and_with_others_do_not():
    x, ones = drawn(3, 16, 4, 4), torch.ones(16, dtype=F64)
    args = (x, ones, ones, 4, 1e-5, False)
    norm, sharing = Site("mid", 0, "norm"), Sharing(norms=True)
    twice = style_aligned(style_aligned(TORCH, [0, 0, 0], sharing), [0, 0, 0], sharing)
    assert torch.equal(twice.group_norm(norm, *args), style_aligned(TORCH, [0, 0, 0], sharing).group_norm(norm, *args))
    with pytest.raises(SourcesError, match="pool the norms"):
        style_aligned(style_aligned(TORCH, [1, 1, 1], sharing), [0, 0, 0], sharing).group_norm(norm, *args)


@pytest.mark.parametrize(
    ("refs", "words"),
    [([0, 2], "0 to 1"), ([0, -1], "0 to 1"), ([1, 2, 2], "own reference"), ([1, 0], "own reference")],
)
def test_references_outside_or_with_references_of_their_own_are_refused(refs: list[int], words: str):
    for sharing in (Sharing(), Sharing(all_see_all=True)):
        with pytest.raises(SourcesError, match=words):
            style_aligned(TORCH, refs, sharing)


def test_other_bad_settings_are_refused_by_what_they_are():
    x = drawn(3, 4, 8, 8)
    with pytest.raises(SourcesError, match="references are of 2 images, which do not go into a batch of 3 rows"):
        told([0, 1, 2], style_aligned(TORCH, [0, 0]), guidance=1.0)(x, at(500, x))
    for bad in ({"scale": -1.0}, {"scale": float("inf")}, {"shift": float("nan")}):
        with pytest.raises(ValueError, match="finite"):
            Sharing(**bad)
    for groups in ([[0, 1], [1]], [[0], []], [], [[1, 2]]):
        with pytest.raises(SourcesError, match="once"):
            grouped(groups)


def test_the_level_rule_is_coarse_and_has_no_answer_below_one_layer():
    published_counts = {0.1: 7, 0.2: 14, 0.25: 18, 0.3: 24, 0.4: 35, 0.5: 35, 0.6: 35, 0.7: 46, 0.75: 52, 0.9: 63}
    assert {share: len(plain(70, share)) for share in published_counts} == published_counts
    assert len(layers(SDXL)) == 70
    assert len(layers(SD15)) == 16
    assert len(by_level(SDXL, 0.3)) == 70 - 24
    assert by_level(SDXL, 0.0) == frozenset(layers(SDXL))
    for share in (0.01, 0.995, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            plain(70, share)
    assert len(plain(70, 0.015)) == 1
    with pytest.raises(ValueError, match=r"give 0, 0.015 ... 0.985, or 1"):
        plain(70, 0.01)


def test_layers_go_by_any_of_three_names():
    for name in ("dec.1", "dec.1.1", "output_blocks.1", "output_blocks.1.1", "up_blocks.0.attentions.1"):
        assert by_name(SDXL, [name]) == {Site("dec.1", i, "self") for i in range(10)}
    one = {Site("dec.1", 3, "self")}
    for name in ("dec.1.1.3.self", "up_blocks.0.attentions.1.transformer_blocks.3.attn1", "output_blocks.1.1.3.self"):
        assert by_name(SDXL, [name]) == one
    assert len(by_name(SDXL, ["mid", "mid_block", "enc.8"])) == 20
    assert {place.stage for place in by_name(SDXL, ["up_blocks.0"])} == {"dec.0", "dec.1", "dec.2"}
    assert {place.stage for place in by_name(SD15, ["up_blocks.1", "mid_block"])} == {"dec.3", "dec.4", "dec.5", "mid"}
    wrong = {"no self-attention": ("enc.1", "up_blocks.2", "dec.1.1.3.cross"), "no dec": ("dec.99",),
             "10 transformer blocks": ("dec.1.1.10.self",)}  # fmt: skip
    for name, words in ((name, words) for words, names in wrong.items() for name in names):
        with pytest.raises(SiteError, match=words):
            by_name(SDXL, [name])


def test_a_step_is_one_graph_for_all_timesteps():
    torch._dynamo.reset()
    unet, counter = net(torch.float32), torch._dynamo.testing.CompileCounter()
    sharing = Sharing(norms=True, shift=0.5, adain_v=True)
    ops = style_aligned(TORCH, [0, 0, 0], sharing, sites=by_name(CFG, ["mid", "dec.0"]))
    positive, _ = prompts(6, torch.float32)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, unet.embed(t, positive.context, positive.pooled, torch.ones(6, 6)), ops)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for t in (900.0, 500.0, 20.0):
        x = drawn(6, 4, 8, 8, seed=int(t), dtype=torch.float32)
        assert torch.equal(compiled(x, at(t, x)), step(x, at(t, x)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("sharing", [Sharing(norms=True, shift=0.5), Sharing(adain_q=False, adain_v=True)])
def test_gradients_reach_the_reference_through_the_targets(sharing: Sharing):
    x, ops = drawn(2, 4, 8, 8).requires_grad_(), style_aligned(TORCH, [0, 0], sharing)
    step = drawn(2, 4, 8, 8, seed=5) * torch.tensor([1.0, 0.0], dtype=F64)[:, None, None, None]
    weight = drawn(4, 8, 8, seed=6)

    def of_target(x: Tensor) -> Tensor:
        return (told([0, 1], ops)(x, at(500, x))[1] * weight).sum()

    (slope,) = torch.autograd.grad(of_target(x), x)
    assert slope[0].abs().max() > 1e-4
    want = (of_target(x + 1e-5 * step) - of_target(x - 1e-5 * step)).item() / 2e-5
    assert (slope * step).sum().item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kept", [None, False, True])
@pytest.mark.parametrize("sharing", [Sharing(shift=0.5), Sharing(adain_q=False, adain_v=True)])
def test_forward_mode_derivatives_are_difference_quotients(sharing: Sharing, kept: bool | None):
    x, along = drawn(2, 4, 8, 8), drawn(2, 4, 8, 8, seed=5)

    def eps(x: Tensor) -> Tensor:
        if kept is None:
            return told([0, 1], style_aligned(JVP, [0, 0], sharing), 1.0)(x, at(500, x))
        return chunked(lambda rows, ops: told(rows, ops, 1.0), [0, 0], sharing, kept=kept, ops=JVP)(x, at(500, x))

    _, slope = torch.func.jvp(eps, (x,), (along,))
    want = (eps(x + 1e-6 * along) - eps(x - 1e-6 * along)) / 2e-6
    assert (slope - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_lower_precision_is_near_double(dtype: torch.dtype, bound: float):
    x = drawn(3, 4, 8, 16)
    ops = style_aligned(TORCH, [0, 0, 0], PRESETS["transfer"].sharing)
    want = told([0, 1, 2], ops)(x, at(500, x))
    got = told([0, 1, 2], ops, dtype=dtype)(x.to(dtype), at(500, x))
    assert got.dtype == dtype
    assert (got.double() - want).std() < bound * want.std()


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
def test_a_styled_network_by_the_triton_kernels_errs_at_most_twice_as_much_as_by_torch():
    script, env = Path(__file__).parent / "interpreted_style.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["way"] for row in rows] == ["folded", "of q and v", "all see all"]
    for row in rows:
        assert row["launches"] == 4
        assert row["moved"] > 0.01
        assert row["triton"] <= 2 * row["torch"] + 1e-7


def test_an_image_with_several_references_sees_them_all_and_has_the_statistics_of_the_first():
    q, k, v = (
        torch.randn(4, 2, 6, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    site = Site("dec.1", 0, "self")
    ops = style_aligned(TORCH, [0, 1, (1, 0), 0], Sharing(scale=0.5, shift=0.25))
    out = ops.attend(site, q, k, v)
    for i, seen in ((0, []), (1, []), (2, [1, 0]), (3, [0])):
        ref = torch.tensor([0, 1, 1, 0])
        a, b = reference.adain(q, ref), reference.adain(k, ref)
        logits = [a[i] @ b[i].mT * 8**-0.5] + [a[i] @ k[r].mT * 0.5 * 8**-0.5 + 0.25 for r in seen]
        want = torch.cat(logits, -1).softmax(-1) @ torch.cat([v[i], *(v[r] for r in seen)], -2)
        torch.testing.assert_close(out[i], want, rtol=1e-9, atol=1e-9)
    one = style_aligned(TORCH, [0, 0, (0,), 0]).attend(site, q, k, v)
    assert torch.equal(one, style_aligned(TORCH, [0, 0, 0, 0]).attend(site, q, k, v))


@pytest.mark.parametrize("refs", [[0, (0, 0)], [0, (0, 5)], [0, ()], [0, (0, 1)]])
def test_several_references_that_cannot_be_are_an_error(refs):
    with pytest.raises(SourcesError):
        style_aligned(TORCH, refs)

"""Methods stacked: a method at the setting that changes nothing leaves every other one as it is, above and beneath it;
two at once are in each other's way nowhere; gradients pass through them, and one graph holds them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diaphane.kernels.device import TRITON_INSTALLED
from diaphane.methods.attention_maps import SharedMaps
from diaphane.methods.consistory import Heard, Told, consistory, others, places
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.instant_style import ImagePrompt, Term, instant_style
from diaphane.methods.lora import beside
from diaphane.methods.multidiffusion import multidiffusion, windows
from diaphane.methods.prompt import Prompt
from diaphane.methods.style_aligned import Sharing, style_aligned
from diaphane.methods.style_chunks import chunked
from diaphane.methods.text_to_image import denoiser
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import UNet
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from . import latent_twins as twins

N, ROWS = 3, 6  # pictures, and rows under guidance
HEIGHT, WIDTH = 16, 12
CFG = replace(twins.XL, depth=(0, 1, 1), mid_depth=1, blocks=1)
WHERE = places(CFG)
TEXT = Site("dec.1", 0, "cross")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(CFG).double().eval().requires_grad_(False)
    twins.randomised(net)
    return net


X, CONTEXT, POOLED = draw(ROWS, 4, HEIGHT, WIDTH), draw(ROWS, 7, CFG.context_dim, seed=1), draw(ROWS, 10, seed=2)
IDS, T = torch.full((ROWS, 6), 128.0), torch.full((ROWS,), 500.0, dtype=torch.float64)


def run(unet: UNet, ops: Ops, x: Tensor = X) -> Tensor:
    return unet(x, unet.embed(T, CONTEXT, POOLED, IDS), ops)


class Method(NamedTuple):
    """A method as verbs around verbs, at a setting that does something and at one that does nothing."""

    active: Callable[[Ops], Ops]
    null: Callable[[Ops], Ops]


def sharing(**settings: bool | float) -> Callable[[Ops], Ops]:
    return lambda ops: style_aligned(ops, [0, 0, 0], Sharing(**settings))  # type: ignore[arg-type]


def pictured(scale: float) -> Callable[[Ops], Ops]:
    k, v = draw(ROWS, 4, 48, seed=3), draw(ROWS, 4, 48, seed=4)
    terms = {TEXT: Term(k, v, scale)} if scale else {}
    return lambda ops: instant_style(ops, [ImagePrompt(batch=N, terms=terms)])


def subject(kept: float) -> Callable[[Ops], Ops]:
    sees, seen = [[j < 2 and i != j for j in range(N)] for i in range(N)], {}
    for level, (h, w) in WHERE.sizes((HEIGHT, WIDTH)).items():
        mask = torch.rand(N, h * w, generator=torch.Generator().manual_seed(level)) < kept
        seen[level] = others(mask, sees, 2)
    told = Told(images=N, tokens=torch.full((N, 1), 2), seen=seen if kept else {})
    return lambda ops: consistory(ops, WHERE, told, Heard(keep_maps=False))


def freed(*factors: float) -> Callable[[Ops], Ops]:
    return lambda ops: freeu(ops, CFG, FreeU(*factors))


def looking(ops: Ops) -> Ops:
    return SharedMaps([1], N, sites=[Site("mid", 0, "self")]).watching(ops)


METHODS = {
    "attention shared": Method(sharing(), sharing(attention=False, adain_q=False, adain_k=False)),
    "norms shared": Method(
        sharing(attention=False, adain_q=False, adain_k=False, norms=True),
        lambda ops: style_aligned(ops, range(N), Sharing(norms=True)),
    ),
    "all see all": Method(sharing(all_see_all=True), lambda ops: style_aligned(ops, [0, 1, 2])),
    "image prompt": Method(pictured(0.8), pictured(0.0)),
    "subject shared": Method(subject(0.4), subject(0.0)),
    "FreeU": Method(
        lambda ops: freeu(ops, CFG, FreeU(1.3, 1.4, 0.9, 0.2)), lambda ops: freeu(ops, CFG, FreeU(1, 1, 1, 1))
    ),
    "maps": Method(looking, looking),
}
PAIRS = list(permutations(METHODS, 2))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changes_something_and_at_its_null_setting_nothing(unet: UNet, name: str):
    plain = run(unet, TORCH)
    assert torch.equal(run(unet, METHODS[name].null(TORCH)), plain)
    assert torch.allclose(run(unet, METHODS[name].active(TORCH)), plain, atol=1e-3) == (name == "maps")


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[f"{a} - {b}" for a, b in PAIRS])
def test_a_method_that_does_nothing_leaves_another_as_it_is(unet: UNet, one: str, other: str):
    alone = run(unet, METHODS[one].active(TORCH))
    assert torch.equal(run(unet, METHODS[other].null(METHODS[one].active(TORCH))), alone)
    assert torch.equal(run(unet, METHODS[one].active(METHODS[other].null(TORCH))), alone)


COMMUTE = [(a, b) for a, b in PAIRS if a < b]


@pytest.mark.parametrize(("one", "other"), COMMUTE, ids=[f"{a} - {b}" for a, b in COMMUTE])
def test_two_methods_are_the_same_whichever_is_wrapped_around_the_other(unet: UNet, one: str, other: str):
    if {one, other} == {"attention shared", "all see all"}:
        pytest.skip("two ways of the same sharing: AdaIN is with the one, not with the other")
    a, b = METHODS[one].active, METHODS[other].active
    inside, around = run(unet, a(b(TORCH))), run(unet, b(a(TORCH)))
    torch.testing.assert_close(inside, around, rtol=1e-9, atol=1e-9)
    if "maps" not in (one, other):
        for alone in (a, b):
            assert not torch.allclose(inside, run(unet, alone(TORCH)), atol=1e-3)


def test_maps_of_layers_that_see_different_keys_are_an_error_that_says_what_to_do(unet: UNet):
    everywhere = SharedMaps([1], N).watching(TORCH)
    with pytest.raises(ValueError, match="name sites= that see the same"):
        run(unet, METHODS["subject shared"].active(everywhere))


def test_everything_at_once_leaves_the_reference_row_to_itself(unet: UNet):
    refs = style_aligned(
        freeu(METHODS["image prompt"].active(TORCH), CFG, FreeU(1.1, 1.2, 0.6, 0.4)), [0, 0, 0], Sharing(norms=True)
    )
    without = freeu(METHODS["image prompt"].active(TORCH), CFG, FreeU(1.1, 1.2, 0.6, 0.4))
    shared, alone = run(unet, refs), run(unet, without)
    for row in (0, N):
        torch.testing.assert_close(shared[row], alone[row], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(shared[1], alone[1], atol=1e-3)


def test_a_lora_for_targets_only_leaves_a_shared_reference_alone(unet: UNet):
    class Thin(NamedTuple):
        down: Tensor
        up: Tensor
        scale: float

    name = "dec.1.1.blocks.0.self_attn.k.weight"
    wide = unet.get_parameter(name).shape
    factors = {name: Thin(draw(2, wide[1], seed=8), draw(wide[0], 2, seed=9), 0.5)}
    net = beside(unet, factors, torch.tensor([0.0, 1.0, 1.0]))
    ops = METHODS["attention shared"].active(TORCH)
    plain, taught = run(unet, ops), run(net, ops)
    for row in (0, N):
        torch.testing.assert_close(taught[row], plain[row], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(taught[1], plain[1], atol=1e-4)
    assert torch.equal(run(beside(unet, factors, torch.zeros(N)), ops), plain)


def everything(ops: Ops) -> Ops:
    for name in ("attention shared", "norms shared", "image prompt", "FreeU"):
        ops = METHODS[name].active(ops)
    return ops


def test_gradients_pass_through_everything_at_once(unet: UNet):
    x = X.clone().requires_grad_()
    ops, way = METHODS["subject shared"].active(everything(TORCH)), draw(ROWS, 4, HEIGHT, WIDTH, seed=11)
    (grad,) = torch.autograd.grad((run(unet, ops, x) * way).sum(), x)
    step = draw(ROWS, 4, HEIGHT, WIDTH, seed=12)
    with torch.no_grad():
        moved = (run(unet, ops, X + 1e-5 * step) - run(unet, ops, X - 1e-5 * step)) / 2e-5
    torch.testing.assert_close((grad * step).sum(), (moved * way).sum(), rtol=1e-5, atol=1e-6)


def test_everything_at_once_is_one_graph_that_is_compiled_once(unet: UNet):
    torch._dynamo.reset()
    compiled = CompileCounter()
    ops = everything(TORCH)

    def call(x: Tensor, t: Tensor) -> Tensor:
        verbs = METHODS["subject shared"].active(ops)  # what is heard is of one call
        return unet(x, unet.embed(t, CONTEXT, POOLED, IDS), verbs)

    whole = torch.compile(call, backend=compiled, fullgraph=True)
    for t in (900.0, 500.0, 100.0):
        times = torch.full((ROWS,), t, dtype=torch.float64)
        torch.testing.assert_close(whole(X, times), call(X, times), rtol=1e-9, atol=1e-9)
    assert compiled.frame_count == 1


@pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")
def test_the_triton_kernels_draw_a_subject_and_an_image_prompt_as_exactly_as_torch():
    script, env = Path(__file__).parent / "interpreted_story.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["way"] for row in rows] == ["alone", "image prompt"]
    for row in rows:
        assert row["launched"] == [f"{name}_kernel" for name in ("compact", "forward", "gather", "maps", "match")]
        assert row["moved"] > 0.01
        assert row["triton"] <= 2 * row["torch"] + 1e-6


def test_a_step_over_windows_and_a_step_in_chunks_are_one_graph_that_is_compiled_at_most_twice(unet: UNet):
    text, ids = Prompt(CONTEXT[:N], POOLED[:N]), IDS[:N]

    def some(rows: list[int], ops: Ops) -> Denoise:
        own = Prompt(text.context[rows], text.pooled[rows] if text.pooled is not None else None)
        return denoiser(unet, own, own.zeros(), schedule=scaled_linear(), ids=ids[rows], guidance=3.0, ops=ops)

    wide = multidiffusion(lambda about: some([0] * len(about.views), TORCH), windows(16, 20, 12, 8), batch=3)
    steps = {"windows": (wide, draw(1, 4, 16, 20))}
    steps |= {f"chunks, kept {kept}": (chunked(some, [0, 0, 0], size=1, kept=kept), X[:N]) for kept in (False, True)}
    for name, (step, x) in steps.items():
        torch._dynamo.reset()
        compiled = CompileCounter()
        whole = torch.compile(step, backend=compiled, fullgraph=True)
        for t in (900.0, 500.0, 100.0):
            times = torch.full((len(x),), t, dtype=torch.float64)
            torch.testing.assert_close(whole(x, times), step(x, times), rtol=1e-9, atol=1e-9)
        assert compiled.frame_count <= 2, name

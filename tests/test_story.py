"""ConsiStory's two stages: the published pictures in fewer passes, anchors and further pictures, refusals."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.methods.anchors import Kept
from diaphane.methods.cast import Tally
from diaphane.methods.consistory import Heard, Told, consistory, others, places
from diaphane.methods.controlnet import Control
from diaphane.methods.dift import Plan, matches, plan, smoothed, waves
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.prompt import Prompt, beside, conditioning
from diaphane.methods.scene import SceneError, Settings, anchored, by_steps
from diaphane.methods.subject_masks import Together, dropped, masks
from diaphane.model.controlnet import ControlNet, ControlNetConfig
from diaphane.model.ops import TORCH
from diaphane.samplers.ddim import ddim, step
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.euler import euler_ancestral
from diaphane.samplers.guidance import guide, halves
from diaphane.samplers.heun import heun
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import karras
from torch import Tensor

from . import latent_twins as twins
from . import story_world as world
from .story_world import PATH, SCHEDULE, SETTINGS, UNET, scene, story, walked


def published(sees: list[list[bool]], settings: Settings = SETTINGS) -> Tensor:
    """Two complete walks, a plain pass in each of the first steps, nothing shared: the schedule as it was published."""
    told, where, n = scene(), places(UNET.cfg), 3
    assert told.negative is not None
    assert told.ids is not None
    embed = conditioning(UNET, beside(told.negative, told.positive), torch.cat([told.ids, told.ids]))
    sizes = where.sizes(world.SIZE)
    first, last = len(PATH) // 10, len(PATH) // 3
    carried: Plan | None = None
    x = found = feature = None
    for stage in (1, 2):
        x, history, seen, draws = world.noise(), [], None, world.drawn()
        for i, (t, s) in enumerate(pairwise(PATH)):
            rows, c = torch.cat([x, x]), embed(torch.full((2 * n,), float(t), dtype=torch.float64))
            more: dict[str, Any] = {}
            if i <= first:
                plain = Heard(keep_queries=False)
                queries: dict[str, Tensor] = {}

                def recording(site: Any, q: Tensor, *rest: Any, queries: dict[str, Tensor] = queries) -> Tensor:
                    if site.kind == "self":
                        queries[f"{site.stage}.{site.depth}"] = q
                    return TORCH.attend(site, q, *rest)

                UNET(rows, c, replace(TORCH, attend=recording))
                assert not plain.queries
                if seen:
                    v = settings.blends(t, PATH[0])
                    more = {"plain": queries, "share": torch.tensor(v, dtype=torch.float64)}
            if stage == 2 and first <= i <= last:
                more |= {"carried": carried, "order": tuple(waves(sees)), "alpha": settings.alpha}
            heard = Heard()
            what = Told(images=n, tokens=told.tokens, seen=seen or {}, **more)
            u, e = halves(UNET(rows, c, consistory(TORCH, where, what, heard)))
            if t == settings.feature_at(PATH) and stage == 1:
                feature = heard.feature[0][-n:]
            x, _ = step(x, guide(u, e, 3.0), SCHEDULE(t), SCHEDULE(s))
            history.append(torch.stack(heard.maps).mean(0))
            found = masks(torch.stack(history[-20:]).mean(0), told.tokens, sizes[where.maps], sizes)
            uniform = draws(i, [found[level].shape[1] for level in where.shared])
            pairs = zip(where.shared, uniform, strict=True)
            seen = {level: others(dropped(found[level], u, settings.dropout), sees, 2) for level, u in pairs}
        if stage == 1:
            assert found is not None
            assert feature is not None
            mask, smooth = found[where.fine], smoothed(feature)
            near = matches(smooth, mask, smooth, sizes[where.fine], torch.tensor(sees))
            carried = plan(near, mask)
    assert x is not None
    return x


def test_the_second_stage_begins_where_injection_does_and_the_pictures_are_those_of_two_complete_walks():
    made = story()
    with torch.no_grad():
        ours, theirs = walked(made), published(anchored(3, 2))
    assert float((ours - theirs).abs().max()) <= 1e-9 * float(theirs.abs().max())
    assert made.plan is not None
    assert bool(made.plan.chosen.any())
    n, k = world.STEPS, 1  # calls that blend, one of them where the second stage begins
    assert made.tally == Tally(encoders=n - 1 + n - k, decoders=n - 1.5 + n - k, queries=k, maps=0.5)


def test_at_fifty_steps_less_than_97_and_a_half_of_112_passes_are_left_and_with_an_early_end_84_and_a_half():
    shares = Tally(0.4338, 0.5662, 0.4862, 0.3344, 0.3587)  # of SDXL at 1024², by methods.cost
    path = world.leading(50, offset=1, end=0)
    few = {"rows": slice(0, 2), "x": world.noise(slice(0, 2), (4, 4)), "path": path}
    exact = story(settings=Settings(), **few)
    early = story(settings=Settings(early=True), **few)
    with torch.no_grad():
        for one in (exact, early):
            walked(one)
    assert exact.tally == Tally(94, 93.5, 5, 0.5, 0)
    assert early.tally == Tally(81, 80.5, 5, 0, 0.5)
    assert exact.tally.passes(shares) <= 97.5
    assert early.tally.passes(shares) <= 84.5


SAMPLERS: dict[str, Callable[[], Any]] = {
    "ancestral": lambda: partial(euler_ancestral, noise=seeded([5, 6, 7])),
    "dpmpp": lambda: dpmpp,
    "heun": lambda: heun,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_any_sampler_the_second_stage_repeats_the_first_up_to_injection(name: str):
    path = karras(SCHEDULE, 7)
    settings = replace(by_steps(SETTINGS, path), inject=(path[2], path[4]), blend_until=path[2])
    made = story(settings=settings, path=path, walks=SAMPLERS[name])
    with torch.no_grad():
        xs = {1: [], 2: []}
        for number, at in made.steps():
            xs[number].append(at.x)
    assert len(xs[1]) == len(path) - 2
    same = 1 if name == "heun" else 2  # whose second look is at the timestep where injection begins
    assert all(torch.equal(a, b) for a, b in zip(xs[1][:same], xs[2][:same], strict=True))
    assert not torch.equal(xs[1][3], xs[2][3])
    assert bool(made.x.isfinite().all())


def test_timesteps_between_whole_ones_may_come_in_rounded():
    path = karras(SCHEDULE, 6)
    made = story(settings=by_steps(SETTINGS, path), path=path, x=world.noise().float())
    with torch.no_grad():
        walked(made)
    assert made.plan is not None
    assert made.tally.decoders == 4.5 + len(path) - 1 - (len(path) - 1) // 10


def plain() -> Tensor:
    with torch.no_grad():
        still = replace(SETTINGS, attend=False, inject=None)
        return walked(story(settings=still))


def test_without_attention_and_injection_it_is_a_plain_walk():
    from diaphane.methods.text_to_image import denoiser

    told = scene()
    denoise = denoiser(UNET, told.positive, told.negative, schedule=SCHEDULE, ids=told.ids, guidance=3.0)
    with torch.no_grad():
        *_, last = ddim(denoise, world.noise(), SCHEDULE, PATH)
    assert torch.equal(plain(), last.x)


def test_text_is_read_once_and_a_negative_one_of_zeros_not_at_all():
    told = scene()
    assert told.negative is not None
    said = replace(told, negative=told.negative._replace(context=told.negative.context + 1e-300))
    read: list[int] = []

    def listening(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        read.append(len(inputs[0]))

    made = []
    hooks = [block.cross_attn.k.register_forward_hook(listening) for block in UNET.mid[1].blocks]  # pyright: ignore
    try:
        with torch.no_grad():
            for one in (told, said, replace(told, ops=replace(TORCH, attend=lambda *rest: TORCH.attend(*rest)))):
                made.append(walked(story(scene=one)))
    finally:
        for hook in hooks:
            hook.remove()
    assert read == [3, 6, 6]  # rows, once for both walks
    for x in made[1:]:
        assert float((x - made[0]).abs().max()) <= 1e-9 * float(x.abs().max())


def test_empty_masks_and_full_dropout_change_nothing_but_rounding():
    n = places(UNET.cfg)
    sizes = n.sizes(world.SIZE)
    empty = {level: torch.zeros(3, h * w, dtype=torch.bool) for level, (h, w) in sizes.items()}
    with torch.no_grad():
        none = walked(story(given=lambda stage, call, found: empty, settings=replace(SETTINGS, blend=None)))
        dropped = walked(story(settings=replace(SETTINGS, dropout=1.0, blend=None, inject=None)))
    for x in (none, dropped):
        assert float((x - plain()).abs().max()) <= 1e-9 * float(x.abs().max())


def test_one_picture_alone_is_drawn_as_ever():
    one, alone = slice(0, 1), replace(SETTINGS, blend=None)
    with torch.no_grad():
        made = story(one, anchors=1, settings=alone)
        a = walked(made)
        b = walked(story(one, anchors=1, settings=replace(SETTINGS, attend=False, inject=None)))
    assert made.tally.decoders == world.STEPS
    assert float((a - b).abs().max()) <= 1e-9 * float(b.abs().max())


@pytest.fixture(scope="module")
def kept() -> Kept:
    made = story(slice(0, 2), keep=True, said={"model": "a"})
    with torch.no_grad():
        walked(made)
    assert made.kept is not None
    return made.kept


def test_further_pictures_after_kept_anchors_are_those_of_one_batch(kept: Kept):
    with torch.no_grad():
        together = walked(story(slice(0, 5)))
        after = walked(story(slice(2, 5), anchors=kept))
        alone = walked(story(slice(3, 4), anchors=kept))
    assert float((after - together[2:]).abs().max()) <= 1e-8 * float(after.abs().max())
    assert float((alone - after[1:2]).abs().max()) <= 1e-8 * float(after.abs().max())


@pytest.mark.parametrize("anchors", [1, 2])
def test_of_pictures_drawn_together_the_anchors_are_kept_even_where_nobody_there_looks_at_them(anchors: int):
    with torch.no_grad():
        together = walked(story(slice(0, 4), anchors=anchors))
        for first in (anchors, 3):
            made = story(slice(0, first), anchors=anchors, keep=True)
            walked(made)
            assert made.kept is not None
            after = walked(story(slice(3, 4), anchors=made.kept))
            assert float((after - together[3:]).abs().max()) <= 1e-8 * float(after.abs().max())


def test_kept_anchors_come_back_from_their_tensors(kept: Kept):
    tensors, header = kept.packed()
    back = Kept.unpacked(tensors, header)
    assert (back.images, back.size, back.path, back.said, back.branch) == (2, (8, 12), tuple(PATH), kept.said, 1)
    assert back.pools.keys() == kept.pools.keys()
    with torch.no_grad():
        assert torch.equal(walked(story(slice(2, 3), anchors=back)), walked(story(slice(2, 3), anchors=kept)))
    with pytest.raises(SceneError, match="no file of ConsiStory's anchors"):
        Kept.unpacked({}, {})


def test_anchors_of_another_walk_size_model_or_setting_are_refused(kept: Kept):
    with pytest.raises(SceneError, match="12 steps from 914, these pictures in 5"):
        story(slice(2, 3), anchors=kept, path=world.leading(5, offset=1, end=0))
    with pytest.raises(SceneError, match=r"latents are \(8, 12\), these pictures' \(8, 8\)"):
        story(slice(2, 3), anchors=kept, x=world.noise(slice(2, 3), (8, 8)))
    with pytest.raises(SceneError, match="drawn with model a, these pictures with b"):
        story(slice(2, 3), anchors=kept, said={"model": "b"})
    with pytest.raises(SceneError, match=r"drawn with alpha 0\.8, these pictures with 0\.5"):
        story(slice(2, 3), anchors=kept, settings=replace(SETTINGS, alpha=0.5))


def test_an_early_end_takes_the_masks_of_the_feature_s_timestep():
    made = story(settings=replace(SETTINGS, early=True))
    with torch.no_grad():
        walked(made)
    calls = PATH.index(SETTINGS.feature_at(PATH)) + 1
    assert len(made.masks[0]) == calls
    assert made.tally.features == 0.5


def test_real_pictures_are_seen_and_do_not_see_each_other():
    known = world.random(2, 4, *world.SIZE, seed=9)
    sees = anchored(4, 2, apart=True)
    made = story(slice(0, 4), sees=sees, pinned=lambda t: known * (1 + t / 1000), align=True)
    assert [row[:2] for row in sees] == [[False, False]] * 2 + [[True, True]] * 2
    assert not any(any(row[2:]) for row in sees)
    with torch.no_grad():
        x = walked(made)
        other = walked(story(slice(0, 4), sees=sees, pinned=lambda t: known.flip(0), align=True))
    assert made.plan is not None
    assert not bool(made.plan.chosen[:2].any())
    assert not torch.allclose(x[2:], other[2:])


def test_a_controlnet_is_run_once_a_call_and_stacks_with_freeu():
    cfg = ControlNetConfig(**{f: getattr(UNET.cfg, f) for f in UNET.cfg.__dataclass_fields__ if f != "out_channels"},
                           hint=(4, 8, 8, 8))  # fmt: skip
    control = ControlNet(cfg).double().eval().requires_grad_(False)
    few = replace(SETTINGS, dift=500, early=True)
    hint = torch.rand(3, 3, 64, 96, dtype=torch.float64)
    ops = freeu(TORCH, UNET.cfg, FreeU(1.1, 1.2, 0.6, 0.4))
    plain = story(scene=scene(ops=ops), settings=few)
    made = story(scene=scene(ops=ops, controls=[Control(net=control, hint=hint)]), settings=few)
    zero = story(scene=scene(ops=ops, controls=[Control(net=control, hint=hint, scale=0.0)]), settings=few)
    with torch.no_grad():
        x = walked(plain)
        assert float((walked(zero) - x).abs().max()) <= 1e-9 * float(x.abs().max())
        assert not torch.allclose(walked(made), x)


def test_networks_of_stable_diffusion_1_and_inpainting_go_too():
    cfg = replace(twins.SD1, in_channels=9)
    told, text = scene(), world.random(3, 7, cfg.context_dim, seed=1)
    canvas = world.random(3, 5, *world.SIZE)
    other = replace(
        told, unet=world.net(cfg), positive=Prompt(text), negative=Prompt(text * 0), ids=None, canvas=canvas
    )
    made = story(scene=other, settings=replace(SETTINGS, early=True, dift=500))
    with torch.no_grad():
        assert bool(walked(made).isfinite().all())
    assert sorted(made.masks[0][-1]) == [0, 1, 2]


@pytest.mark.parametrize("more", [{"negative": None}, {"guidance": 1.0}, {"interval": (0, 600)}, {"rescale": 0.5}])
def test_guidance_may_be_off_for_all_calls_or_for_some(more: dict[str, Any]):
    with torch.no_grad():
        assert bool(walked(story(scene=scene(**more))).isfinite().all())


def test_draws_may_be_the_authors_one_generator_for_all():
    draws = Together(3)
    coarse, fine = draws(0, [4, 9])
    torch.manual_seed(0)
    assert torch.equal(coarse, torch.rand(3, 4))
    assert torch.equal(fine, torch.rand(3, 9))
    assert torch.equal(draws(0, [4, 9])[1], fine)


def test_what_does_not_fit_is_refused_in_a_line():
    with pytest.raises(SceneError, match="the prompt of picture 1 has none of the subject's words"):
        replace(scene(), tokens=torch.tensor([[1], [-1], [2]]))
    with pytest.raises(SceneError, match="among 7 tokens; got 7"):
        replace(scene(), tokens=torch.tensor([[1], [7], [2]]))
    with pytest.raises(SceneError, match=r"anchors are 1 \.\.\. 3 of 3 pictures; got 4"):
        story(anchors=4)
    with pytest.raises(SceneError, match="3 pictures"):
        story(scene=scene(slice(0, 2)))
    with pytest.raises(SceneError, match="falls"):
        story(path=[1, 5])
    for wrong in ({"dropout": 1.1}, {"window": 0}, {"alpha": 2}, {"inject": (1, 2)}, {"blend": (-1, 0)}):
        with pytest.raises(SceneError):
            Settings(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_example_of_the_docs_draws():
    text = (Path(__file__).parent.parent / "docs" / "consistory.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said = code.replace('"stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"', f'"{twins.TINY}"')
    said = said.replace("1024", "32").replace("leading(50", "leading(4")
    names: dict[str, Any] = {}
    exec(said, names)
    assert names["drawn"].shape == (3, 3, 32, 32)
    assert names["story"].masks

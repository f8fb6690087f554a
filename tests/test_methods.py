"""Asyrp and DiffStyle on tiny random networks in float64: their definitions, what they cost, what they refuse."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from diaphane.methods.asyrp import asyrp, coefficients, deltas
from diaphane.methods.blend import norm_matched_slerp
from diaphane.methods.delta import given
from diaphane.methods.diffstyle import AuthorsCode, Content, calibrated, diffstyle, inject
from diaphane.methods.taps import invert, look, tapped
from diaphane.model.adm import ADM
from diaphane.model.blocks import Cond, denoiser
from diaphane.samplers.ddim import Step, ddim, step
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import times
from diaphane.samplers.path import upward
from torch import Tensor

from .methods_world import KINDS, LABELLED, NEVER, PATH, SCHEDULE, World, push, random, same, world_of


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


def predictions(world: World, x: Tensor, t: int, edit) -> tuple[Tensor, Tensor]:
    """eps and edited eps, by two whole networks."""
    c = (world.embed or world.unet.embed)(times(t, x))
    h, skips = look(world.unet, x, t, world.embed)
    deep, _ = world.unet.encode(x, c)
    assert torch.equal(world.unet.middle(deep, c), h)
    return world.unet(x, c)[:, :3], world.unet.decode(edit(h, t, c), skips, c)[:, :3]


def test_asyrp_takes_x0_from_the_edited_and_the_direction_from_the_unedited_network(world: World):
    x = world.style.x_T
    for made in world.asyrp(push, t_edit=400):
        a, b = SCHEDULE(made.t), SCHEDULE(made.s)
        eps, edited = predictions(world, x, made.t, push)
        p = (x - (1 - a).sqrt() * (edited if made.t >= 400 else eps)) / a.sqrt()
        same(made.x0, p)
        same(made.eps, eps)
        same(made.x, b.sqrt() * p + (1 - b).sqrt() * eps)
        x = made.x


def test_diffstyle_without_calibration_is_the_asymmetric_step_with_the_nearest_content(world: World):
    def edit(h: Tensor, t: int, c: Cond) -> Tensor:
        return norm_matched_slerp(h, world.content.h[min(t, 799)], 0.6)  # the inversion never called it at 999

    assert set(world.content.h) == {0, 199, 399, 599, 799}
    for ours, want in zip(world.diffstyle(gamma=0.6), world.asyrp(edit), strict=True):
        same(ours.x, want.x)
        same(ours.x0, want.x0)


def test_diffstyle_with_calibration_moves_x_and_steps_plainly_from_there(world: World):
    x, edit = world.style.x_T, inject([Content(world.content.h, 0.6)])
    for made in world.diffstyle(gamma=0.6, omega=0.3):
        a, b = SCHEDULE(made.t), SCHEDULE(made.s)
        eps, edited = predictions(world, x, made.t, edit)
        if made.t >= 400:
            x = calibrated(x, eps, edited, a, 0.3)
            eps, _ = predictions(world, x, made.t, edit)
        want, x0 = step(x, eps, a, b)
        same(made.x, want)
        same(made.x0, x0)
        same(made.eps, eps)
        x = made.x


def test_boosted_diffstyle_draws_once_a_step_and_not_at_the_last(world: World):
    for omega in (0.0, 0.3):
        drawn: list[int] = []

        def noise(x: Tensor, drawn: list[int] = drawn) -> Tensor:
            drawn.append(len(x))
            return random(*x.shape, seed=len(drawn))

        made = world.diffstyle(omega=omega, t_edit=150, t_boost=399, noise=noise)
        assert drawn == [2, 2]  # at 399 and 199; 0 goes to the clean image
        quiet = world.diffstyle(omega=omega, t_edit=150)
        assert [torch.equal(a.x, b.x) for a, b in zip(made, quiet, strict=True)] == [True] * 3 + [False] * 3


def test_dt_lambda_scales_the_direction_of_injected_steps_from_dt_end_on(world: World):
    made = world.diffstyle(authors=AuthorsCode(dt_lambda=0.9, dt_end=700, inject_at=[999, 599]))
    x, edit = world.style.x_T, inject([Content(world.content.h, 0.3)])
    for m in made:
        a, b = SCHEDULE(m.t), SCHEDULE(m.s)
        eps, edited = predictions(world, x, m.t, edit)
        p = (x - (1 - a).sqrt() * (edited if m.t in (999, 599) else eps)) / a.sqrt()
        same(m.x, b.sqrt() * p + (0.9 if m.t == 999 else 1.0) * (1 - b).sqrt() * eps)
        x = m.x


def test_tapped_and_look_hold_what_the_network_computes(world: World):
    x = world.style.x_T
    for tap, plain in zip(tapped(world.unet, x, SCHEDULE, PATH, embed=world.embed), world.plain(), strict=True):
        h, skips = look(world.unet, x, tap.step.t, world.embed)
        assert torch.equal(tap.h, h)
        assert all(torch.equal(a, b) for a, b in zip(tap.skips, skips, strict=True))
        assert torch.equal(tap.step.x, plain.x)
        assert tap.skips[-1].shape[-2:] == h.shape[-2:]
        x = tap.step.x


def test_inversion_keeps_h_of_every_call_and_ends_where_ddim_upward_ends(world: World):
    seen: list[int] = []

    def watch(walk):
        for tap in walk:
            seen.append(tap.step.t)
            yield tap

    x0 = random(2, 3, 8, 8).tanh()
    ours = invert(world.unet, x0, SCHEDULE, PATH, embed=world.embed, watch=watch)
    walk = list(ddim(denoiser(world.unet, world.embed), x0, SCHEDULE, upward(PATH)))
    assert torch.equal(ours.x_T, walk[-1].x)
    assert list(ours.h) == seen == [0, 199, 399, 599, 799]
    x = x0
    for made in walk:
        assert torch.equal(ours.h[made.t], look(world.unet, x, made.t, world.embed)[0])
        x = made.x


def test_the_label_is_part_of_the_walk():
    torch.manual_seed(3)
    unet = ADM(LABELLED).double().eval().requires_grad_(False)
    x = random(1, 3, 8, 8)
    ends = []
    for label in (0, 1):
        embed = partial(unet.embed, label=torch.tensor([label]))
        walk = asyrp(unet, x, SCHEDULE, PATH, push, embed=embed)
        ends.append(last(walk).x)
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)


# ---- what a step costs ---------------------------------------------------------------------------------------------


def costs(world: World, walk: Callable[[], list[Step]]) -> tuple[int, int]:
    """(encoders, decoders) that a walk ran."""
    world.calls.clear()
    walk()
    return world.calls.count("enc"), world.calls.count("dec")


def test_an_edited_step_runs_one_encoder_and_two_decoders_and_others_one_of_each(world: World):
    edited = sum(t >= 400 for t, _ in pairwise(PATH))  # 3 of 6
    assert costs(world, lambda: world.asyrp(push)) == (6, 6 + edited)
    assert costs(world, lambda: world.asyrp(push, t_edit=NEVER)) == (6, 6)
    assert costs(world, lambda: world.diffstyle()) == (6, 6 + edited)
    assert costs(world, lambda: world.diffstyle(authors=AuthorsCode(inject_at=[799]))) == (6, 7)


def test_a_calibrated_step_runs_two_encoders_and_three_decoders_and_below_t_edit_one_of_each(world: World):
    assert costs(world, lambda: world.diffstyle(omega=0.3)) == (6 + 3, 6 + 2 * 3)
    assert costs(world, lambda: world.diffstyle(omega=0.3, t_edit=NEVER)) == (6, 6)


# ---- batches, gradients, errors ------------------------------------------------------------------------------------


def test_images_of_a_batch_do_not_mix(world: World):
    def one(i: int, **settings) -> Tensor:
        contents = [Content({t: h[i : i + 1] for t, h in world.content.h.items()}, 0.6)]
        embed = world.embed and partial(world.unet.embed, label=torch.tensor([[1, 4][i]]))
        x = world.style.x_T[i : i + 1]
        noise = seeded([[8, 9][i]])
        return last(diffstyle(world.unet, x, contents, SCHEDULE, PATH, noise=noise, embed=embed, **settings)).x

    for settings in ({"omega": 0.0, "t_boost": 0}, {"omega": 0.3, "t_boost": 400}):
        both = world.diffstyle(gamma=0.6, noise=seeded([8, 9]), **settings)[-1].x
        same(both, torch.cat([one(0, **settings), one(1, **settings)]))


def test_gradients_reach_the_edit_through_the_whole_walk(world: World):
    delta = torch.zeros_like(world.content.h[0]).requires_grad_(True)
    end = world.asyrp(given(delta), t_edit=700)[-1].x
    (gradient,) = torch.autograd.grad(end.square().sum(), delta)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-8


def test_coefficients_are_scaled_as_the_authors_scale_them():
    assert coefficients([1.0], n_train=40, n_test=40) == [1.0]
    assert coefficients([1.0, -0.5], n_train=40, n_test=80, strength=1.4) == pytest.approx(
        [0.5 * 1.4 / 2**0.5, -0.25 * 1.4 / 2**0.5]
    )


def test_every_direction_sees_the_unedited_h_and_the_time_embedding():
    h, c = random(1, 4, 2, 2), Cond(random(1, 3, seed=1))
    fs = [lambda h, emb: h.square(), lambda h, emb: h * emb.sum()]
    edited = deltas(fs, [0.5, -2.0], origin=0.8)(h, 5, c)
    same(edited, 0.8 * h + 0.5 * h.square() - 2 * h * c.emb.sum(), 1e-12)


def test_wrong_settings_are_refused_in_one_line(world: World):
    wrong: dict[str, Callable[[], object]] = {
        "as many coefficients": lambda: deltas([lambda h, emb: h], [1.0, 2.0]),
        "at least one coefficient": lambda: coefficients([], n_train=40, n_test=40),
        "noise": lambda: world.diffstyle(t_boost=400),
        "a noise source": lambda: world.asyrp(push, t_boost=400),
        "nothing to inject": lambda: list(diffstyle(world.unet, world.style.x_T, [], SCHEDULE, PATH, t_boost=0)),
    }
    for says, call in wrong.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

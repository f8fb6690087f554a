"""Settings of Asyrp and DiffStyle that change nothing, on tiny random networks in float64."""

import pytest
import torch
from diaphane.methods.asyrp import deltas
from diaphane.methods.blend import BLENDS
from diaphane.methods.delta import given
from diaphane.methods.diffstyle import AuthorsCode, Content, diffstyle
from diaphane.methods.taps import tapped
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded

from .methods_world import KINDS, NEVER, PATH, SCHEDULE, World, apart, equal, push, random, same, world_of


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest) -> World:
    return world_of(request.param)


@pytest.mark.parametrize("blend", BLENDS)
def test_injecting_nothing_is_plain_ddim(world: World, blend: str):
    equal(world.diffstyle(gamma=0.0, blend=BLENDS[blend]), world.plain())


def test_injecting_above_the_top_or_through_an_empty_mask_or_nowhere_is_plain_ddim(world: World):
    equal(world.diffstyle(t_edit=NEVER), world.plain())
    equal(world.diffstyle(mask=torch.zeros(1, 1, 8, 8)), world.plain())
    equal(world.diffstyle(authors=AuthorsCode(inject_at=[])), world.plain())
    equal(world.diffstyle(t_edit=NEVER, omega=0.3), world.plain())


def test_calibrating_what_was_not_edited_is_plain_ddim(world: World):
    for ours, plain in zip(world.diffstyle(gamma=0.0, omega=0.3), world.plain(), strict=True):
        same(ours.x, plain.x, 1e-6)


def test_injecting_the_image_into_itself_is_plain_ddim(world: World):
    own = {tap.step.t: tap.h for tap in tapped(world.unet, world.style.x_T, SCHEDULE, PATH, embed=world.embed)}
    made = diffstyle(
        world.unet, world.style.x_T, [Content(own, 0.7)], SCHEDULE, PATH, omega=0.0, t_boost=0, embed=world.embed
    )
    same(last(made).x, world.plain()[-1].x, 1e-6)


def test_asyrp_without_coefficients_or_above_the_top_is_plain_ddim(world: World):
    zero, h = random(*world.content.h[0].shape), world.content.h[0]
    equal(world.asyrp(deltas([], [])), world.plain())
    equal(world.asyrp(deltas([lambda h, emb: h.cos()], [0.0])), world.plain())
    equal(world.asyrp(given(zero, 0.0)), world.plain())
    equal(world.asyrp(given(torch.zeros_like(h))), world.plain())
    equal(world.asyrp(push, t_edit=NEVER), world.plain())


def test_an_edit_in_the_range_is_felt(world: World):
    assert apart(world.diffstyle(gamma=0.5, t_edit=0), world.plain()) > 1e-4
    assert apart(world.diffstyle(gamma=0.5, t_edit=0, omega=0.3), world.diffstyle(gamma=0.5, t_edit=0)) > 1e-4
    assert apart(world.asyrp(push, t_edit=0), world.plain()) > 1e-4


def test_boosting_from_timestep_0_is_no_boosting(world: World):
    equal(world.diffstyle(t_boost=0, noise=seeded([0, 1])), world.diffstyle(t_boost=-1))
    equal(world.asyrp(push, t_boost=0, noise=seeded([0, 1])), world.asyrp(push))
    equal(world.diffstyle(t_boost=500, noise=seeded([0, 1]), eta=0.0), world.diffstyle())


def test_boosting_everywhere_without_an_edit_is_ddim_with_eta_1(world: World):
    want = world.plain(eta=1.0, noise=seeded([0, 1]))
    equal(world.asyrp(push, t_edit=NEVER, t_boost=1000, noise=seeded([0, 1])), want)
    for ours, plain in zip(world.diffstyle(t_edit=NEVER, t_boost=999, noise=seeded([0, 1])), want, strict=True):
        same(ours.x, plain.x)  # the last step adds no noise and draws none
    assert apart(want, world.plain()) > 1e-3


def test_the_authors_options_at_their_defaults_are_the_paper(world: World):
    timesteps = PATH[:-1]
    equal(world.diffstyle(authors=AuthorsCode(inject_at=timesteps, dt_lambda=1.0)), world.diffstyle())
    equal(world.diffstyle(authors=AuthorsCode(dt_lambda=0.9, dt_end=NEVER)), world.diffstyle())

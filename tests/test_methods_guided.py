"""h-space methods on a text-conditioned UNet under guidance: what must change nothing, and what doubles the rows."""

from typing import Any

import pytest
import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.asyrp import asyrp
from diaphane.methods.correlation import correlations
from diaphane.methods.delta import given
from diaphane.methods.diffstyle import Content, diffstyle
from diaphane.methods.directions import jacobian, mean_difference, pca
from diaphane.methods.guided import Guided
from diaphane.methods.prompt import Prompt, encode, size_ids
from diaphane.methods.taps import invert, tapped
from diaphane.model.components import Components, components
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.guidance import guide
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import papers
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import pipeline
from torch import Tensor

from . import latent_twins as twins

SCHEDULE, PATH, SIZE = scaled_linear(), papers(4), (64, 32)


@pytest.fixture(scope="module")
def parts() -> Components:
    found = pipeline.load(twins.TINY)
    return components(found.parts, found.words, dtype=torch.float64)


def said(parts: Components, n: int = 2) -> tuple[Prompt, Prompt, Tensor]:
    return encode(parts, ["a cat", "a dog"][:n]), encode(parts, "").repeated(n), size_ids(SIZE, n)


def lists(parts: Components, n: int = 2, **settings: Any) -> Guided:
    positive, negative, ids = said(parts, n)
    return Guided(parts.unet, positive, negative, schedule=SCHEDULE, ids=ids, **settings)


def noise(parts: Components, n: int = 2) -> Tensor:
    return t2i.pure_noise(parts, seeded(range(n)), SIZE, n).double()


def same(a: Step, b: Step):
    for name in ("x", "x0", "eps"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-10)


SETTINGS = [
    {},
    {"guidance": 1.0},
    {"guidance": torch.tensor([3.0, 7.0]), "rescale": 0.7},
    {"prediction": "v"},
    {"prediction": "x0"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "unguided", "per image, rescaled", "v", "x0"])
def test_a_tapped_walk_is_the_walk_of_the_denoiser(parts: Components, settings: dict):
    positive, negative, ids = said(parts)
    denoise = t2i.denoiser(parts.unet, positive, negative, schedule=SCHEDULE, ids=ids, **settings)
    taps = list(tapped(lists(parts, **settings), noise(parts), SCHEDULE, PATH))
    for tap, step in zip(taps, ddim(denoise, noise(parts), SCHEDULE, PATH), strict=True):
        same(tap.step, step)
    rows = 2 if settings == {"guidance": 1.0} else 4
    assert len(taps[0].h) == rows == len(taps[0].skips[-1])


def test_one_prompt_is_for_every_picture(parts: Components):
    positive, negative, ids = said(parts, 1)
    one = Guided(parts.unet, positive, negative, schedule=SCHEDULE, ids=ids)
    two = Guided(parts.unet, positive.repeated(2), negative.repeated(2), schedule=SCHEDULE, ids=size_ids(SIZE, 2))
    walks = [last(tap.step for tap in tapped(unet, noise(parts), SCHEDULE, PATH)) for unet in (one, two)]
    same(*walks)


def test_an_edit_of_nothing_and_an_injection_of_nothing_change_nothing(parts: Components):
    unet, x = lists(parts), noise(parts)
    plain = [tap.step for tap in tapped(unet, x, SCHEDULE, PATH)]
    for a, b in zip(asyrp(unet, x, SCHEDULE, PATH, lambda h, t, c: h), plain, strict=True):
        same(a, b)
    content = invert(unet, noise(parts).roll(1, 0).tanh(), SCHEDULE, PATH)
    walk = diffstyle(unet, x, [Content(content.h, 0.0)], SCHEDULE, PATH, t_boost=-1, omega=0)
    for a, b in zip(walk, plain, strict=True):
        same(a, b)


@pytest.mark.parametrize("omega", [0.0, 0.3])
def test_h_held_without_guidance_is_injected_into_both_halves(parts: Components, omega: float):
    alone = invert(lists(parts, guidance=1.0), noise(parts).tanh(), SCHEDULE, PATH)
    twice = {t: torch.cat([h, h]) for t, h in alone.h.items()}
    walks = [
        last(diffstyle(lists(parts), noise(parts), [Content(h, 0.6)], SCHEDULE, PATH, t_boost=-1, omega=omega))
        for h in (alone.h, twice)
    ]
    same(*walks)
    plain = last(tap.step for tap in tapped(lists(parts), noise(parts), SCHEDULE, PATH))
    assert not torch.allclose(walks[0].x, plain.x)


def test_masks_of_each_picture_hold_in_both_halves(parts: Components):
    content = invert(lists(parts), noise(parts).tanh(), SCHEDULE, PATH)
    nowhere_in_the_second = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 8, 4)
    mixed = last(
        diffstyle(
            lists(parts), noise(parts), [Content(content.h, 0.6, nowhere_in_the_second)], SCHEDULE, PATH,
            t_boost=-1, omega=0,
        )
    )  # fmt: skip
    plain = last(tap.step for tap in tapped(lists(parts), noise(parts), SCHEDULE, PATH))
    torch.testing.assert_close(mixed.x[1], plain.x[1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixed.x[0], plain.x[0])


def test_content_for_another_number_of_pictures_is_refused(parts: Components):
    content = invert(lists(parts), noise(parts).tanh(), SCHEDULE, PATH)
    with pytest.raises(ValueError, match="batch may differ only if 1"):
        last(diffstyle(lists(parts, 1), noise(parts, 1), [Content({0: content.h[0][:3]})], SCHEDULE, PATH, t_boost=-1))


def test_a_direction_given_for_each_picture_moves_both_halves(parts: Components):
    unet, x = lists(parts), noise(parts)
    delta = torch.randn(2, *look_h(unet, x).shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    a = last(asyrp(unet, x, SCHEDULE, PATH, given(delta)))
    b = last(asyrp(unet, x, SCHEDULE, PATH, given(torch.cat([delta, delta]))))
    same(a, b)


def look_h(unet: Guided, x: Tensor) -> Tensor:
    c = unet.embed(torch.full((len(x),), 500.0, dtype=torch.float64))
    return unet.middle(unet.encode(x, c)[0], c)


def test_the_edited_prediction_is_guided_between_two_edited_halves(parts: Components):
    unet, x, t = lists(parts, guidance=4.0), noise(parts), torch.full((2,), 500.0, dtype=torch.float64)
    c = unet.embed(t)
    deep, skips = unet.encode(x, c)
    h = unet.middle(deep, c)
    out = parts.unet.decode(1.3 * h, skips, c)
    want = guide(out[:2], out[2:], 4.0)
    torch.testing.assert_close(unet.predict(1.3 * h, skips, c, x, t), want, rtol=1e-10, atol=1e-10)


def test_directions_and_correlations_are_found_as_in_pixel_networks(parts: Components):
    unet, x = lists(parts, guidance=1.0), noise(parts)
    a, b = (invert(unet, start.tanh(), SCHEDULE, PATH) for start in (x, x.flip(2)))
    difference = mean_difference(a.h, b.h)
    torch.testing.assert_close(difference[0], b.h[0].mean(0, keepdim=True) - a.h[0].mean(0, keepdim=True))
    h = torch.cat([a.h[333], b.h[333]])
    assert pca(h, 2).directions.shape == (2, *h.shape[1:])
    c = unet.embed(torch.full((2,), 333.0, dtype=torch.float64))
    deep, skips = unet.encode(x, c)
    middle = unet.middle(deep, c)
    found = jacobian(unet, middle, skips, c, k=1, iterations=20)
    small = 1e-4 * found.directions[0]
    moved = (unet.decode(middle + small, skips, c) - unet.decode(middle - small, skips, c)) / 2e-4
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), found.values[0], rtol=1e-5, atol=1e-8)

    positive, negative, ids = encode(parts, ["a", "b", "c"]), encode(parts, "").repeated(3), size_ids(SIZE, 3)
    three = Guided(parts.unet, positive, negative, schedule=SCHEDULE, ids=ids, guidance=1.0)
    found = list(correlations(tapped(three, noise(parts, 3), SCHEDULE, PATH)))
    assert [one.t for one in found] == list(PATH[:-1])
    assert all(-1 <= one.homo <= 1 for one in found)

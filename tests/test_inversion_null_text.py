"""Null-text inversion: no iterations change nothing, the decoder's gradient by its definition, and what comes back."""

from collections.abc import Callable

import pytest
import torch
from diaphane.methods.null_text import decoder_null
from diaphane.model.blocks import Cond, denoiser
from diaphane.model.unet import UNet
from diaphane.samplers import path
from diaphane.samplers.ddim import ddim
from diaphane.samplers.guidance import apart, guided
from diaphane.samplers.inversion import invert, last, psnr
from diaphane.samplers.null_text import NullStep, distance, null_text, with_nulls
from diaphane.samplers.parameterisation import as_eps, times
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

from .latent_twins import SD1, XL, randomised
from .test_samplers import random

SD = scaled_linear()
WALK = path.leading(5, offset=1)
SCALE = 4.0


class World:
    """A small network, two texts, two pictures and their inversion."""

    def __init__(self, name: str = "sd1"):
        cfg = {"xl": XL, "sd1": SD1}[name]
        torch.manual_seed(0)
        self.unet = UNet(cfg).double().eval().requires_grad_(False)
        randomised(self.unet)
        self.texts = [random(2, 5, cfg.context_dim, seed=k) for k in range(2)]
        self.vector = (random(2, cfg.pooled_dim), torch.full((2, cfg.ids), 64.0)) if cfg.pooled_dim else ()
        self.x0 = random(2, 4, 16, 16, seed=5).tanh()
        up = invert(denoiser(self.unet, self.cond), self.x0, SD, WALK[::-1])
        self.pivots = [self.x0, *(made.x for made in up)][::-1]

    def uncond(self, t: Tensor) -> Cond:
        return self.unet.embed(t, self.texts[0], *self.vector)

    def cond(self, t: Tensor) -> Cond:
        return self.unet.embed(t, self.texts[1], *self.vector)

    def halfway(self, x: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
        return decoder_null(self.unet, self.cond, self.uncond, SCALE)(x, t)

    def walk(self, **given: object) -> list[NullStep]:
        return list(null_text(self.halfway, self.pivots, SD, WALK, self.texts[0], **given))  # pyright: ignore


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def found(world: World) -> list[NullStep]:
    return world.walk(iterations=4, rate=0.05, stop=0.0)


@pytest.mark.parametrize("name", ["xl", "sd1"])
def test_without_iterations_it_is_guidance_with_the_null_text_as_it_was(name: str):
    world = World(name)
    cond, uncond = (denoiser(world.unet, c) for c in (world.cond, world.uncond))
    plain = ddim(guided(apart(uncond, cond), cond, SCALE), world.pivots[0], SD, WALK)
    for made, want in zip(world.walk(iterations=0), plain, strict=True):
        torch.testing.assert_close(made.x, want.x, atol=1e-10, rtol=1e-10)
        assert torch.equal(made.null, world.texts[0])
        assert (made.t, made.s) == (want.t, want.s)


def test_a_loss_that_is_small_enough_leaves_the_null_text_alone(world: World):
    assert all(torch.equal(made.null, world.texts[0]) for made in world.walk(stop=1e9))


def test_the_pictures_come_back_better_than_with_guidance_alone(world: World, found: list[NullStep]):
    plain, longer = world.walk(iterations=0), world.walk(iterations=12, rate=0.05, stop=0.0)
    for none, few, many in zip(plain, found, longer, strict=True):
        assert (many.loss < few.loss).all()
        assert (few.loss < none.loss).all()
    assert (psnr(world.x0, longer[-1].x) > psnr(world.x0, plain[-1].x) + 2).all()


def test_the_gradient_reaches_the_text_through_the_decoder_and_through_nothing_else(world: World):
    x, t = world.pivots[0], times(801, world.pivots[0])
    text = world.texts[0].clone().requires_grad_(True)
    target = random(2, 4, 16, 16, seed=9)
    (ours,) = torch.autograd.grad(distance(world.halfway(x, t)(text), target).sum(), text)

    def by_parts(encoder: Tensor, decoder: Tensor) -> Tensor:
        c = world.uncond(t)
        h, skips = world.unet.encode(x, c._replace(context=encoder))
        h = world.unet.middle(h, c._replace(context=encoder))
        u = world.unet.decode(h, skips, c._replace(context=decoder))
        return distance(u + SCALE * (world.unet(x, world.cond(t)) - u), target).sum()

    encoder, decoder = (world.texts[0].clone().requires_grad_(True) for _ in range(2))
    through_encoder, through_decoder = torch.autograd.grad(by_parts(encoder, decoder), (encoder, decoder))
    torch.testing.assert_close(ours, through_decoder, atol=1e-12, rtol=1e-9)
    assert through_encoder.abs().max() > 1e-6  # there is another way, which is not taken
    direction = random(*text.shape, seed=7)
    ends = [float(by_parts(world.texts[0], world.texts[0] + e * direction)) for e in (1e-6, -1e-6)]
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((ours * direction).sum()), rel=1e-5)


def test_the_updates_are_adams(world: World):
    made = next(null_text(world.halfway, world.pivots, SD, WALK, world.texts[0], iterations=4, rate=0.03, stop=0.0))
    x = world.pivots[0]
    decode, text = world.halfway(x, times(WALK[0], x)), world.texts[0].clone().requires_grad_(True)
    adam = torch.optim.Adam([text], lr=0.03)
    for _ in range(4):
        adam.zero_grad()
        a, b, eps = SD(WALK[0]), SD(WALK[1]), decode(text)
        y = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        distance(y, world.pivots[1]).sum().backward()
        adam.step()
    torch.testing.assert_close(made.null, text.detach(), atol=1e-9, rtol=0)


def test_each_step_begins_with_the_null_text_of_the_last(world: World, found: list[NullStep]):
    given = {"iterations": 4, "rate": 0.05 * 0.99, "stop": 0.0}
    again = next(null_text(world.halfway, [found[0].x, *world.pivots[2:]], SD, WALK[1:], found[0].null, **given))
    assert not torch.equal(found[0].null, world.texts[0])
    torch.testing.assert_close(again.null, found[1].null, atol=1e-9, rtol=0)  # the rate falls by a hundredth a step


def test_an_image_keeps_its_null_text_whatever_its_batch(world: World, found: list[NullStep]):
    alone = World()
    alone.texts, alone.pivots = [text[1:] for text in world.texts], [x[1:] for x in world.pivots]
    for one, both in zip(alone.walk(iterations=4, rate=0.05, stop=0.0), found, strict=True):
        torch.testing.assert_close(one.null, both.null[1:], atol=1e-8, rtol=0)


def test_walking_again_with_the_null_texts_passes_the_same_places(world: World, found: list[NullStep]):
    nulls = [made.null for made in found]
    for made, want in zip(with_nulls(world.halfway, world.pivots[0], SD, WALK, nulls), found, strict=True):
        torch.testing.assert_close(made.x, want.x, atol=1e-10, rtol=0)
    other = decoder_null(world.unet, lambda t: world.cond(t)._replace(context=-world.texts[1]), world.uncond, SCALE)
    assert not torch.allclose(last(with_nulls(other, world.pivots[0], SD, WALK, nulls)).x, made.x, atol=1e-3)


def test_a_network_that_predicts_v_gives_the_same_as_its_eps(world: World):
    def halfway(x: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
        decode = world.halfway(x, t)
        return lambda text: as_eps(lambda x, t: decode(text), SD, "v")(x, t)

    given = (world.pivots, SD, WALK[:3] + WALK[-1:], world.texts[0])
    pivots = [*world.pivots[:3], world.pivots[-1]]
    v = list(null_text(world.halfway, pivots, *given[1:], kind="v", iterations=2))
    eps = list(null_text(halfway, pivots, *given[1:], iterations=2))
    for a, b in zip(v, eps, strict=True):
        torch.testing.assert_close((a.x, a.null), (b.x, b.null), atol=1e-8, rtol=0)
    again = list(with_nulls(world.halfway, pivots[0], SD, given[2], [a.null for a in v], kind="v"))
    torch.testing.assert_close(again[-1].x, v[-1].x, atol=1e-8, rtol=0)


def test_every_picture_is_encoded_twice_a_step_however_many_iterations(world: World, monkeypatch: pytest.MonkeyPatch):
    counts = {"encode": 0, "decode": 0}
    for name in counts:
        method = getattr(UNet, name)

        def counted(*given: object, name: str = name, method: Callable[..., object] = method) -> object:
            counts[name] += 1
            return method(*given)

        monkeypatch.setattr(UNet, name, counted)
    world.walk(iterations=3, stop=0.0)
    assert counts == {"encode": 2 * 5, "decode": (1 + 3 + 1) * 5}


def test_nothing_is_left_with_a_gradient(found: list[NullStep]):
    assert not any(made.x.requires_grad or made.null.requires_grad or made.loss.requires_grad for made in found)


WRONG: dict[str, tuple[Callable[[World], object], str]] = {
    "pivots": (lambda w: next(null_text(w.halfway, w.pivots[1:], SD, WALK, w.texts[0])), "6 timesteps"),
    "iterations": (lambda w: next(null_text(w.halfway, w.pivots, SD, WALK, w.texts[0], iterations=-1)), "got -1"),
    "null texts": (lambda w: next(with_nulls(w.halfway, w.x0, SD, WALK, [w.texts[0]])), "5 steps"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(world: World, what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call(world)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

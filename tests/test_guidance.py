"""Classifier-free guidance: settings that change nothing, definitions in float64, one batch layout, one call or two."""

from collections.abc import Callable

import pytest
import torch
from diaphane.model.blocks import denoiser
from diaphane.model.unet import UNet
from diaphane.samplers import path
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.guidance import apart, guide, guided, halves, paired
from diaphane.samplers.inversion import last
from diaphane.samplers.parameterisation import as_eps, times
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

from .latent_twins import SD1, XL, randomised
from .test_samplers import F64, random

SD = scaled_linear()
X = random(3, 4, 6, 6)
T = times(500, X)


class Network:
    """A network with a conditional and an unconditional input, which counts its calls and the rows of each."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append(len(x))
        return (1.3 * x + text[:, None, None, None] + t[:, None, None, None] / 400).sin()

    def both(self, x: Tensor, t: Tensor) -> Tensor:
        n = len(x) // 2
        return self.predict(x, t, torch.cat([torch.zeros(n), torch.ones(n)]).to(x))

    def cond(self, x: Tensor, t: Tensor) -> Tensor:
        return self.predict(x, t, torch.ones(len(x)).to(x))

    def uncond(self, x: Tensor, t: Tensor) -> Tensor:
        return self.predict(x, t, torch.zeros(len(x)).to(x))


def parts(x: Tensor = X, t: Tensor = T) -> tuple[Tensor, Tensor]:
    return Network().uncond(x, t), Network().cond(x, t)


def same(ours: Tensor, want: Tensor):
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)


# ---- settings that change nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 1.0, torch.ones(3), torch.ones((), dtype=F64)])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_scale_of_one_is_the_conditional_prediction_in_one_call(scale: float | Tensor, rescale: float):
    net = Network()
    assert torch.equal(guided(net.both, net.cond, scale, rescale=rescale)(X, T), parts()[1])
    assert net.calls == [3]


@pytest.mark.parametrize("interval", [(1, 0), (501, 999), (0, 499.5)])
def test_outside_the_interval_the_conditional_prediction_is_made_in_one_call(interval: tuple[float, float]):
    net = Network()
    assert torch.equal(guided(net.both, net.cond, 7.5, rescale=0.7, interval=interval)(X, T), parts()[1])
    assert net.calls == [3]


def test_a_rescale_of_zero_and_the_whole_interval_change_nothing():
    net = Network()
    plain = guided(net.both, net.cond, 7.5)(X, T)
    assert torch.equal(guided(net.both, net.cond, 7.5, rescale=0.0, interval=(0, 999))(X, T), plain)
    assert net.calls == [6, 6]


def test_a_scale_of_zero_is_the_unconditional_prediction():
    net = Network()
    same(guided(net.both, net.cond, 0.0)(X, T), parts()[0])


def test_where_both_predictions_agree_guidance_changes_nothing():
    c = parts()[1]
    for rescale in (0.0, 0.5, 1.0):
        same(guide(c, c, 7.5, rescale), c)


# ---- definitions ---------------------------------------------------------------------------------------------------


def test_guidance_goes_from_the_unconditional_through_the_conditional_prediction():
    net, (u, c) = Network(), parts()
    same(guided(net.both, net.cond, 7.5)(X, T), u + 7.5 * (c - u))
    assert net.calls == [6]


def test_every_image_may_have_its_own_scale():
    net, scales = Network(), torch.tensor([1.0, 3.0, -2.0])
    u, c = parts()
    out = guided(net.both, net.cond, scales)(X, T)
    for i, g in enumerate(scales.tolist()):
        same(out[i], u[i] + g * (c[i] - u[i]))
    turned = guided(net.both, net.cond, scales.flip(0), rescale=0.3)(X.flip(0), T)
    same(turned.flip(0), guided(net.both, net.cond, scales, rescale=0.3)(X, T))


def test_rescale_one_gives_each_image_the_conditional_spread_and_less_is_a_mixture():
    u, c = parts()
    plain, full, part = (guide(u, c, 7.5, r) for r in (0.0, 1.0, 0.7))
    for i in range(3):
        same(full[i].std(), c[i].std())
        same(full[i], plain[i] * (((c[i] - c[i].mean()) ** 2).sum() / ((plain[i] - plain[i].mean()) ** 2).sum()).sqrt())
    same(part, 0.7 * full + 0.3 * plain)
    assert not torch.allclose(full, plain, atol=0.1)


def test_the_ends_of_an_interval_are_in_it_and_each_row_has_its_own_timestep():
    net, x = Network(), X
    t = torch.tensor([200.0, 500.0, 501.0])
    u, c = parts(x, t)
    out = guided(net.both, net.cond, 4.0, rescale=0.5, interval=(200, 500))(x, t)
    want = guide(u, c, 4.0, 0.5)
    same(out[:2], want[:2])
    assert torch.equal(out[2], c[2])
    assert net.calls == [6]


def test_a_batch_of_several_timesteps_repeats_the_images_scales():
    net, scales = Network(), torch.tensor([2.0, 5.0, 9.0])
    predict = guided(net.both, net.cond, scales)
    t = torch.tensor([100.0, 100, 100, 700, 700, 700])
    both = predict(torch.cat([X, X]), t)
    same(both[:3], predict(X, t[:3]))
    same(both[3:], predict(X, t[3:]))


def test_two_calls_of_half_the_batch_give_the_same():
    net = Network()
    split = apart(net.uncond, net.cond)
    same(guided(split, net.cond, 7.5, rescale=0.7)(X, T), guided(net.both, net.cond, 7.5, rescale=0.7)(X, T))
    assert net.calls == [3, 3, 6]


def test_the_unconditional_half_comes_first():
    u, c = parts()
    rows = paired(u, c)
    assert torch.equal(rows[:3], u)
    assert all(torch.equal(a, b) for a, b in zip(halves(rows), (u, c), strict=True))


def test_guidance_commutes_with_the_conversion_of_a_prediction_and_rescale_does_not():
    net = Network()
    inside = as_eps(guided(net.both, net.cond, 5.0), SD, "v")
    outside = guided(as_eps(net.both, SD, "v"), as_eps(net.cond, SD, "v"), 5.0)
    same(inside(X, T), outside(X, T))
    inside = as_eps(guided(net.both, net.cond, 5.0, rescale=0.7), SD, "v")
    outside = guided(as_eps(net.both, SD, "v"), as_eps(net.cond, SD, "v"), 5.0, rescale=0.7)
    assert not torch.allclose(inside(X, T), outside(X, T), atol=1e-2)


def test_gradients_flow_through_guidance_into_both_halves_and_the_scale():
    net = Network()

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return guided(net.both, net.cond, scale, rescale=0.5, interval=(0, 600))(x, times(500, x))

    assert torch.autograd.gradcheck(run, (random(2, 1, 2, 2).requires_grad_(True), random(2, seed=1).requires_grad_()))


@pytest.mark.parametrize("name", ["xl", "sd1"])
def test_a_unet_is_guided_in_one_batch_as_in_two_through_a_whole_walk(name: str):
    cfg = {"xl": XL, "sd1": SD1}[name]
    torch.manual_seed(0)
    unet = UNet(cfg).double().eval().requires_grad_(False)
    randomised(unet)
    context = random(4, 5, cfg.context_dim)
    vector = (random(4, cfg.pooled_dim), torch.full((4, cfg.ids), 64.0, dtype=F64)) if cfg.pooled_dim else ()

    def rows(part: slice) -> Callable[[Tensor, Tensor], Tensor]:
        return denoiser(unet, lambda t: unet.embed(t, context[part], *(v[part] for v in vector)))

    x, cond = random(2, 4, 16, 16), rows(slice(2, 4))
    ends = [
        last(dpmpp(guided(both, cond, torch.tensor([2.0, 5.0]), rescale=0.3), x, SD, path.leading(3, offset=1))).x
        for both in (rows(slice(0, 4)), apart(rows(slice(0, 2)), cond))
    ]
    torch.testing.assert_close(ends[0], ends[1], atol=1e-9, rtol=1e-9)
    alone = last(dpmpp(guided(rows(slice(0, 4)), cond, 1.0), x, SD, path.leading(3, offset=1))).x
    assert torch.equal(alone, last(dpmpp(cond, x, SD, path.leading(3, offset=1))).x)
    assert not torch.allclose(alone, ends[0], atol=1e-2)


NET = Network()
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "rescale": (lambda: guided(NET.both, NET.cond, 5.0, rescale=1.5), "0 ... 1; got 1.5"),
    "rescale nan": (lambda: guided(NET.both, NET.cond, 5.0, rescale=float("nan")), "got nan"),
    "scale of two axes": (lambda: guided(NET.both, NET.cond, torch.ones(3, 1)), "(3, 1)"),
    "too few scales": (lambda: guided(NET.both, NET.cond, torch.tensor([2.0, 3.0]))(X, T), "2 scales"),
    "odd batch": (lambda: halves(X), "got 3 rows"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

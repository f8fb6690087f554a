"""Euler, Heun and DPM-Solver++ against their definitions and orders in float64; timesteps between whole ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from diaphane.model.blocks import denoiser
from diaphane.samplers import path
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.ddpm import ddpm
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.euler import euler, euler_ancestral
from diaphane.samplers.heun import heun
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import (
    as_eps,
    computed_in,
    from_sigma,
    noised,
    times,
    to_sigma,
    v_from_eps,
    whole,
    x0_from_v,
)
from diaphane.samplers.schedule import (
    Schedule,
    alpha_of,
    cosine,
    linear,
    rescale_zero_terminal_snr,
    scaled_linear,
    sigma_of,
)
from torch import Tensor

from .golden_nets import tiny
from .test_samplers import F64, LINEAR, random

SD = scaled_linear()
Sampler = Callable[..., Iterator[Step]]
WALKS: dict[str, Sampler] = {"euler": euler, "heun": heun, "2M": dpmpp}
SPREAD = 0.6  # of the images of a Gaussian world


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The perfect denoiser of x0 ~ N(0, SPREAD²)."""
    a = SD(t)[:, None, None, None]
    return (1 - a).sqrt() * x / (a * SPREAD**2 + 1 - a)


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that depends on x and t, without a meaning."""
    return (1.3 * x + t[:, None, None, None] / 400).sin()


def sigma(t: float) -> float:
    return float(sigma_of(SD(t)))


def exactly(ours: Tensor, want: Tensor, tolerance: float = 1e-11):
    torch.testing.assert_close(ours, want, atol=tolerance, rtol=tolerance)


# ---- timesteps and sigmas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, scaled_linear, cosine])
def test_timesteps_and_sigmas_give_each_other_whole_or_not(make: Callable[[], Schedule]):
    schedule = make()
    for t in (-1, 0, 0.25, 1, 399.5, 400, 998.999, 999):
        assert schedule.timestep(float(sigma_of(schedule(t)))) == pytest.approx(t, abs=1e-8)
    for s in (0.03, 0.5, 1.0, 9.0):
        assert float(sigma_of(schedule(schedule.timestep(s)))) == pytest.approx(s, rel=1e-11)


def test_between_two_timesteps_the_log_of_sigma_is_linear():
    assert sigma(7.25) == pytest.approx(sigma(7) ** 0.75 * sigma(8) ** 0.25, rel=1e-12)
    t = torch.tensor([[-1, 7.25], [8, 998.5]], dtype=F64)
    assert SD(t).tolist() == [[float(SD(u)) for u in row] for row in t.tolist()]
    for t in (0, 8, 999):
        assert torch.equal(SD(float(t)), SD.alphas[t])


def test_alpha_and_sigma_give_each_other_and_both_views_hold_one_image():
    a = SD(torch.tensor([0, 400, 999]))
    exactly(alpha_of(sigma_of(a)), a)
    x0, eps = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1)
    x = noised(x0, eps, a)
    y, sigmas = to_sigma(x, a)
    exactly(y, x0 + sigma_of(a)[:, None, None, None] * eps)
    back, alpha = from_sigma(y, sigmas)
    exactly(back, x)
    exactly(alpha, a)
    exactly(back, y / (1 + sigmas**2).sqrt()[:, None, None, None])


def test_karras_timesteps_are_equation_5():
    for n, first, low in ((2, 999, 0), (10, 901, 1), (31, 999, 0)):
        made = path.karras(SD, n, first=first, last=low)
        assert (len(made), made[0], made[-2], made[-1]) == (n + 1, first, low, -1)
        high, end = sigma(first) ** (1 / 7), sigma(low) ** (1 / 7)
        for i, t in enumerate(made[:-1]):
            assert sigma(t) == pytest.approx((high + i / (n - 1) * (end - high)) ** 7, rel=1e-9)
        assert all(t > s for t, s in pairwise(made))
    assert path.karras(SD, 1) == [999, -1]
    assert path.karras(SD, 3, end=0)[-1] == 0
    straight = [sigma(t) for t in path.karras(SD, 5, rho=1.0)[:-1]]
    gaps = [t - s for t, s in pairwise(straight)]
    assert gaps == pytest.approx([gaps[0]] * 4)


def test_fractions_are_equally_spaced_and_round_to_linspace():
    for n in (1, 2, 7, 50):
        made = path.fractions(n)
        assert [round(t) for t in made] == path.linspace(n)
        assert made[:1] + made[-1:] == [999, -1]
    assert path.fractions(5)[1] == 749.25


def test_a_path_without_its_lowest_keeps_its_end():
    assert path.without_lowest(path.leading(4, offset=1)) == [751, 501, 251, -1]
    assert path.without_lowest([999, 0, -1]) == [999, -1]


def test_a_zero_terminal_schedule_ends_in_noise_and_begins_as_before():
    rescaled = rescale_zero_terminal_snr(SD)
    assert float(rescaled(999)) == 2.0**-24
    assert float(rescaled(0)) == pytest.approx(float(SD(0)), rel=1e-12)
    first, end = math.sqrt(SD(0)), math.sqrt(SD(999))
    for t in (1, 500, 998):
        assert math.sqrt(rescaled(t)) == pytest.approx((math.sqrt(SD(t)) - end) * first / (first - end), rel=1e-12)
    assert rescaled.alphas.diff().max() < 0


def test_a_v_prediction_of_pure_noise_gives_its_image():
    schedule, x, v = rescale_zero_terminal_snr(SD), random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    step = next(euler(as_eps(lambda x, t: v, schedule, "v"), x, schedule, [999, 500]))
    exactly(step.x0, x0_from_v(x, v, schedule(999)), 1e-9)
    assert float((step.x0 + v).abs().max()) < 1e-2  # at alpha = 0 it would be -v


# ---- steps by their definitions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("walk", [[901, 650.5, 300, 0, -1], [0, 12.5, 300, 901]], ids=["down", "up"])
def test_euler_goes_along_eps_by_the_difference_of_sigmas(walk: list[float]):
    y = random(2, 3, 4, 4) / SD(walk[0]).sqrt()
    for made in euler(curved, y * SD(walk[0]).sqrt(), SD, walk):
        x = y / math.sqrt(1 + sigma(made.t) ** 2)
        eps = curved(x, times(made.t, x))
        exactly(made.eps, eps)
        exactly(made.x0, y - sigma(made.t) * eps)
        y = y + (sigma(made.s) - sigma(made.t)) * eps
        exactly(made.x, y * SD(made.s).sqrt())


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_an_ancestral_step_goes_down_further_and_comes_up_in_noise(eta: float):
    walk, noise = [901, 650.5, 300, -1], [random(2, 3, 4, 4, seed=k) for k in range(3)]
    y, drawn = random(2, 3, 4, 4) / SD(walk[0]).sqrt(), iter(noise)
    steps = euler_ancestral(curved, y * SD(walk[0]).sqrt(), SD, walk, noise=lambda x: next(drawn), eta=eta)
    for made, z in zip(steps, noise, strict=True):
        x = y / math.sqrt(1 + sigma(made.t) ** 2)
        here, there = sigma(made.t) ** 2, sigma(made.s) ** 2
        up = eta**2 * there * (here - there) / here
        y = y + (math.sqrt(there - up) - math.sqrt(here)) * curved(x, times(made.t, x)) + math.sqrt(up) * z
        exactly(made.x, y * SD(made.s).sqrt())


@pytest.mark.parametrize("walk", [path.leading(7, offset=1), path.karras(SD, 7)], ids=["leading", "Karras"])
def test_the_ancestral_sampler_is_ddpm_with_the_small_variance(walk: list[float]):
    x = random(2, 3, 4, 4)
    ours = euler_ancestral(curved, x, SD, walk, noise=seeded([1, 2]))
    for a, b in zip(ours, ddpm(curved, x, SD, walk, noise=seeded([1, 2])), strict=True):
        exactly(a.x, b.x)


@pytest.mark.parametrize("walk", [[901, 650.5, 300, 0, -1], [0, 12.5, 300, 901]], ids=["down", "up"])
def test_heun_averages_the_slopes_at_both_ends_except_towards_the_clean_image(walk: list[float]):
    y = random(2, 3, 4, 4) / SD(walk[0]).sqrt()
    for made in heun(curved, y * SD(walk[0]).sqrt(), SD, walk):
        slope = curved(y * SD(made.t).sqrt(), times(made.t, y))
        exactly(made.eps, slope)
        exactly(made.x0, y - sigma(made.t) * slope)
        tried = y + (sigma(made.s) - sigma(made.t)) * slope
        if made.s >= 0:
            slope = (slope + curved(tried * SD(made.s).sqrt(), times(made.s, y))) / 2
        y = y + (sigma(made.s) - sigma(made.t)) * slope
        exactly(made.x, y * SD(made.s).sqrt())


@pytest.mark.parametrize("end", [-1, 0])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("n", [4, 14, 15])
def test_2m_extrapolates_x0_by_the_papers_formula(n: int, final: bool, end: int):
    walk: Sequence[float] = [*path.karras(SD, n, first=951, last=20)[:-1], end]
    x, lambdas, images = random(2, 3, 4, 4), [-math.log(sigma(t)) for t in walk if t >= 0], []
    for i, made in enumerate(dpmpp(curved, x, SD, walk, lower_order_final=final)):
        a = SD(made.t)
        images.append((x - (1 - a).sqrt() * curved(x, times(made.t, x))) / a.sqrt())
        exactly(made.x0, images[i])
        mixed, decay = images[i], 0.0  # exp(-h) towards the clean image
        if made.s >= 0:
            h = lambdas[i + 1] - lambdas[i]
            decay = math.exp(-h)
            if i and not (final and n < 15 and i == n - 1):
                r = (lambdas[i] - lambdas[i - 1]) / h
                mixed = (1 + 1 / (2 * r)) * images[i] - 1 / (2 * r) * images[i - 1]
        kept = (1 - SD(made.s)).sqrt() / (1 - a).sqrt()
        x = kept * x - SD(made.s).sqrt() * (decay - 1) * mixed
        exactly(made.x, x)


def test_2m_of_order_one_is_ddim():
    x, walk = random(2, 3, 4, 4), path.leading(6, offset=1)
    for a, b in zip(dpmpp(curved, x, SD, walk, order=1), ddim(curved, x, SD, walk), strict=True):
        for one, other in zip(a, b, strict=True):
            exactly(torch.as_tensor(one), torch.as_tensor(other))


# ---- orders of convergence -----------------------------------------------------------------------------------------


def error(sampler: Sampler, n: int, upward: bool = False) -> float:
    """How far n steps through a Gaussian world end from the solution y ~ sqrt(SPREAD² + sigma²)."""
    walk = path.karras(SD, n + 1, first=700, last=200)[:-1]
    walk = walk[::-1] if upward else walk
    x = random(1, 1, 2, 2)
    (y, start), end = to_sigma(x, SD(walk[0])), sigma_of(SD(walk[-1]))
    want = y * ((SPREAD**2 + end**2) / (SPREAD**2 + start**2)).sqrt()
    return float((to_sigma(last(sampler(gaussian, x, SD, walk)).x, SD(walk[-1]))[0] - want).abs().max())


@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("2M", 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(name: str, order: int, upward: bool):
    errors = [error(WALKS[name], n, upward) for n in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_at_twenty_steps_the_second_order_is_nearer():
    euler_error = error(euler, 20)
    assert error(dpmpp, 20) < euler_error / 5
    assert error(heun, 20) < euler_error / 5


def test_on_a_pixel_network_the_second_order_is_nearer_too():
    unet = tiny("ddpm")
    x = random(1, unet.in_channels, 4 * unet.multiple, 4 * unet.multiple).float()

    def end(sampler: Sampler, n: int) -> Tensor:
        return last(sampler(denoiser(unet), x, LINEAR, path.karras(LINEAR, n, first=800, last=100, end=50))).x

    with torch.no_grad():
        truth = end(heun, 60)
        off = {name: float((end(sampler, 10) - truth).abs().max()) for name, sampler in WALKS.items()}
    assert off["heun"] < off["euler"] / 2
    assert off["2M"] < off["euler"] / 2


# ---- what every sampler keeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WALKS)
def test_two_interleaved_walks_know_nothing_of_each_other(name: str):
    walk = path.leading(5, offset=1)
    starts = [random(1, 3, 4, 4, seed=k) for k in range(2)]
    alone = [[s.x for s in WALKS[name](curved, x, SD, walk)] for x in starts]
    pairs = zip(*(WALKS[name](curved, x, SD, walk) for x in starts), strict=True)
    for i, made in enumerate(pairs):
        assert all(torch.equal(s.x, alone[k][i]) for k, s in enumerate(made))


@pytest.mark.parametrize("name", WALKS)
def test_a_sampler_is_differentiable_and_keeps_the_type_of_x(name: str):
    w, walk = torch.tensor(0.8, dtype=F64, requires_grad=True), [600, 300.5, 20, -1]

    def run(x: Tensor, w: Tensor) -> Tensor:
        return last(WALKS[name](lambda x, t: (w * x).sin(), x, SD, walk)).x

    assert torch.autograd.gradcheck(run, (random(1, 1, 2, 2).requires_grad_(True), w))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        end = last(WALKS[name](lambda x, t: (1.3 * x).sin(), random(1, 3, 4, 4).to(dtype), SD, walk))
        assert end.x.dtype == end.x0.dtype == dtype
        assert end.x.isfinite().all()


@pytest.mark.parametrize("name", WALKS)
def test_the_network_is_called_once_a_step_and_twice_by_heun(name: str):
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return curved(x, t)

    last(WALKS[name](watched, random(1, 3, 4, 4), SD, [600, 300.5, 20, -1]))
    assert seen == ([600, 300.5, 300.5, 20, 20] if name == "heun" else [600, 300.5, 20])


def test_a_network_that_is_told_whole_timesteps_converts_at_the_true_ones():
    seen: list[list[float]] = []

    def v(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.tolist())
        return v_from_eps(x, 0.3 * x, SD(t + 0.4))

    x = random(2, 3, 4, 4)
    eps = as_eps(whole(v), SD, "v")(x, times(300.4, x))
    assert seen == [[300.0, 300.0]]
    exactly(eps, 0.3 * x, 1e-6)


def test_a_network_may_compute_in_half_while_the_walk_does_not():
    seen: list[torch.dtype] = []

    def half(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        assert t.dtype == torch.float32
        return x.sin()

    x = random(1, 3, 4, 4).float()
    out = computed_in(torch.bfloat16, half)(x, times(5, x))
    assert (seen, out.dtype) == ([torch.bfloat16], torch.float32)
    assert torch.equal(out, x.bfloat16().sin().float())


X = torch.zeros(2, 3, 4, 4)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "order": (lambda: next(dpmpp(curved, X, SD, [9, 0], order=3)), "1 or 2; got 3"),  # pyright: ignore
    "between -1 and 0": (lambda: SD(-0.5), "none between -1 and 0"),
    "above the last": (lambda: SD(999.01), "-1 ... 999"),
    "not a number": (lambda: SD(float("nan")), "nan"),
    "sigma too large": (lambda: SD.timestep(15.0), "got 15"),
    "sigma too small": (lambda: SD.timestep(1e-3), "or is 0"),
    "negative sigma": (lambda: SD.timestep(-1.0), "got -1"),
    "next to alpha one": (lambda: Schedule(torch.tensor([1.0, 0.5]))(0.5), "alpha is 1"),
    "karras upward": (lambda: path.karras(SD, 5, first=0, last=999), "0 to 999"),
    "karras to the clean image": (lambda: path.karras(SD, 5, last=-1), "999 to -1"),
    "nothing above the end": (lambda: path.without_lowest([999, -1]), "one timestep above"),
    "floor": (lambda: rescale_zero_terminal_snr(SD, 0.0), "floor"),
    "floor above the last alpha": (lambda: rescale_zero_terminal_snr(SD, 0.5), "0.5"),
    "ancestral upward": (lambda: next(euler_ancestral(curved, X, SD, [0, 9], noise=seeded([0, 1]))), "way down"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

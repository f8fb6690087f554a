"""DDIM inversion: as it was without iterations, the inverse with them, guided, in float32, and its round trips."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diaphane.samplers import path
from diaphane.samplers.ddim import ddim, step
from diaphane.samplers.guidance import guided
from diaphane.samplers.inversion import RoundTrip, invert, last, psnr, round_trip, round_trips
from diaphane.samplers.parameterisation import computed_in, times
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

from .test_samplers import F64, random

SD = scaled_linear()
X0 = random(2, 3, 4, 4).tanh()


def world(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that depends on x and t, without a meaning."""
    return (0.8 * x + t[:, None, None, None] / 400).sin()


def both(x: Tensor, t: Tensor) -> Tensor:
    """The same with a conditional half, which is shifted."""
    half = len(x) // 2
    return world(x + torch.cat([torch.zeros(half), torch.full((half,), 0.3)])[:, None, None, None], t)


def shifted(x: Tensor, t: Tensor) -> Tensor:
    return world(x + 0.3, t)


def exactly(made: Tensor, want: Tensor, tolerance: float = 1e-11):
    torch.testing.assert_close(made, want, atol=tolerance, rtol=0)


def test_without_iterations_it_is_ddim_upward():
    up = path.upward(path.leading(10, offset=1, end=0))
    for made, want in zip(invert(world, X0, SD, up), ddim(world, X0, SD, up), strict=True):
        for one, other in zip(made, want, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_from_the_clean_image_the_first_eps_is_taken_at_the_timestep_reached():
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return world(x, t)

    made = next(invert(watched, X0, SD, [-1, 81, 161]))
    assert seen == [81.0]
    exactly(made.x, SD(81).sqrt() * X0 + (1 - SD(81)).sqrt() * world(X0, times(81, X0)))
    exactly(made.x0, X0)


def test_every_iteration_takes_eps_at_the_last_guess():
    t, s = 200, 400
    guess = step(X0, world(X0, times(t, X0)), SD(t), SD(s))[0]
    for k in range(3):
        made = next(invert(world, X0, SD, [t, s], iterations=k))
        exactly(made.x, guess)
        guess = step(X0, world(guess, times(s, X0)), SD(t), SD(s))[0]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_where_the_iterations_converge_every_step_down_comes_back_exactly(scale: float):
    denoise = guided(both, shifted, scale)
    x = X0
    for made in invert(denoise, X0, SD, path.leading(10, offset=1)[::-1], iterations=60):
        down = step(made.x, denoise(made.x, times(made.s, made.x)), SD(made.s), SD(made.t))[0]
        exactly(down, x, 1e-9)
        x = made.x


def test_a_refined_round_trip_is_exact_and_gets_better_with_every_iteration():
    walk = path.leading(10, offset=1)
    qualities = [float(round_trip(world, X0, SD, walk, iterations=k).psnr.min()) for k in (0, 1, 2, 5, 10, 60)]
    assert all(a < b for a, b in pairwise(qualities))
    assert qualities[0] < 30
    assert qualities[-1] > 180


@pytest.mark.parametrize("end", [-1, 0])
def test_a_round_trip_is_an_inversion_and_ddim_down_the_same_path(end: int):
    walk = path.leading(8, offset=1, end=end)
    trip = round_trip(world, X0, SD, walk)
    x_T = last(invert(world, X0, SD, path.upward(walk))).x
    back = last(ddim(world, x_T, SD, walk)).x
    assert isinstance(trip, RoundTrip)
    assert trip.steps == 8
    assert torch.equal(trip.x_T, x_T)
    assert torch.equal(trip.x0, back)
    assert trip.psnr.tolist() == psnr(X0, back).tolist()


def test_the_report_of_round_trips_takes_iterations_too():
    plain = list(round_trips(world, X0, SD, (10, 50)))
    refined = list(round_trips(world, X0, SD, (10, 50), iterations=3))
    for a, b in zip(plain, refined, strict=True):
        assert a.steps == b.steps
        assert (b.psnr > a.psnr).all()


def test_strong_guidance_is_inverted_worse_and_refinement_helps():
    walk = path.leading(50, offset=1)
    quality = {
        (g, k): float(round_trip(guided(both, shifted, g), X0, SD, walk, iterations=k).psnr.mean())
        for g in (1.0, 3.0)
        for k in (0, 5)
    }
    assert quality[3.0, 0] < quality[1.0, 0]
    assert quality[3.0, 5] > quality[3.0, 0] + 10


def test_the_walk_stays_in_float32_where_the_network_computes_in_half():
    walk = path.leading(50, offset=1)
    kinds: set[torch.dtype] = set()

    def network(x: Tensor, t: Tensor) -> Tensor:
        kinds.add(x.dtype)
        return world(x, t).to(x)

    x0 = X0.half()
    kept = last(invert(computed_in(torch.float16, network), x0, SD, path.upward(walk))).x
    assert kept.dtype == torch.float32
    assert kinds == {torch.float16}
    want = last(invert(world, x0.double(), SD, path.upward(walk))).x
    lost = last(ddim(computed_in(torch.float16, network), x0, SD, path.upward(walk))).x
    assert float((kept - want).abs().max()) < float((lost - want).abs().max()) / 2


def test_an_inversion_is_differentiable():
    def run(x: Tensor, w: Tensor) -> Tensor:
        return last(invert(lambda x, t: (w * x).sin(), x, SD, [-1, 100, 300], iterations=2)).x

    w = torch.tensor(0.8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (random(1, 1, 2, 2).requires_grad_(True), w))


def test_an_exact_round_trip_has_no_error_to_measure():
    assert psnr(X0, X0).tolist() == [math.inf, math.inf]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "downward": (lambda: next(invert(world, X0, SD, [500, 100])), "from 500 to 100"),
    "iterations": (lambda: next(invert(world, X0, SD, [100, 500], iterations=-1)), "got -1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

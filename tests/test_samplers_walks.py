"""DDIM and DDPM walks against their definitions in float64, in worlds whose perfect denoiser is known."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from diaphane.samplers import ddpm, path
from diaphane.samplers.ddim import Step, Steps, ddim, spread, step
from diaphane.samplers.heun import heun
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import times
from torch import Tensor

from .test_samplers import F64, LINEAR, gaussian, knows, random

# ---- DDIM ----------------------------------------------------------------------------------------------------------


def test_a_step_is_equation_12():
    x, eps, z = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), random(2, 3, 4, 4, seed=2)
    a, b, eta = LINEAR(600), LINEAR(400), 0.7
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    p = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    want = math.sqrt(b) * p + math.sqrt(1 - b - sigma**2) * eps + sigma * z
    ours, x0 = step(x, eps, a, b, eta=eta, noise=lambda x: z)
    torch.testing.assert_close((ours, x0), (want, p), atol=1e-12, rtol=0)
    assert float(spread(a, b, eta)) == pytest.approx(sigma)


def test_an_asymmetric_step_takes_x0_from_the_edited_and_the_direction_from_the_unedited_prediction():
    x, edited, eps, z = (random(2, 3, 4, 4, seed=k) for k in range(4))
    a, b = LINEAR(600), LINEAR(400)
    p = (x - (1 - a).sqrt() * edited) / a.sqrt()
    ours, x0 = step(x, edited, a, b, eps_dir=eps)
    torch.testing.assert_close((ours, x0), (b.sqrt() * p + (1 - b).sqrt() * eps, p), atol=1e-12, rtol=0)
    sigma = spread(a, b)
    want = b.sqrt() * p + (1 - b - sigma**2).sqrt() * eps + sigma * z
    torch.testing.assert_close(
        step(x, edited, a, b, eps_dir=eps, eta=1.0, noise=lambda x: z)[0], want, atol=1e-12, rtol=0
    )


def test_a_step_up_undoes_a_step_down_for_the_same_eps():
    x, eps = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    for t, s in ((999, 0), (500, 480), (20, 0)):
        down, _ = step(x, eps, LINEAR(t), LINEAR(s))
        torch.testing.assert_close(step(down, eps, LINEAR(s), LINEAR(t))[0], x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_with_a_perfect_denoiser_the_image_comes_back_exactly(n: int, eta: float):
    x0, x_T = random(2, 3, 4, 4).tanh(), random(2, 3, 4, 4, seed=1)
    end = last(ddim(knows(x0), x_T, LINEAR, path.papers(n), eta=eta, noise=seeded([1, 2])))
    torch.testing.assert_close(end.x, x0, atol=1e-10, rtol=0)


def test_with_a_perfect_denoiser_inversion_and_reverse_meet_where_they_began():
    x0, start = random(2, 3, 4, 4).tanh(), random(2, 3, 4, 4, seed=1).tanh()
    up = path.upward(path.papers(20))
    x_T = last(ddim(knows(x0), start, LINEAR, up)).x
    assert not torch.allclose(x_T, start, atol=0.1)
    back = last(ddim(knows(x0), x_T, LINEAR, up[::-1])).x
    torch.testing.assert_close(back, start, atol=1e-10, rtol=0)


def test_with_a_gaussian_world_sampling_gives_its_spread_at_every_step_count():
    errors = []
    for n in (50, 200, 1000):
        end = last(ddim(gaussian(0.3), torch.ones(1, 1, 1, 1, dtype=F64), LINEAR, path.papers(n)))
        errors.append(abs(float(end.x) - 0.3))  # DDIM is a deterministic scaling here: unit spread to 0.3
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.002


def test_a_walk_yields_one_step_a_pair_and_each_step_holds_what_it_says():
    x, denoise, steps = random(2, 3, 4, 4), gaussian(0.5), path.papers(5)
    for walk in (steps, path.upward(steps)):
        before = x
        made: list[Step] = list(ddim(denoise, x, LINEAR, walk))
        assert [(m.t, m.s) for m in made] == list(pairwise(walk))
        for m in made:
            assert torch.equal(m.eps, denoise(before, times(m.t, before)))
            want, x0 = step(before, m.eps, LINEAR(m.t), LINEAR(m.s))
            assert torch.equal(m.x, want)
            assert torch.equal(m.x0, x0)
            before = m.x


def test_nothing_is_computed_before_it_is_asked_for():
    calls: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return x

    x = random(1, 3, 4, 4)
    for walk in (
        ddim(denoise, x, LINEAR, [999, 500, 0, -1]),
        ddpm.ddpm(denoise, x, LINEAR, [999, 500, 0, -1], noise=seeded([0])),
    ):
        calls.clear()
        assert calls == []
        next(walk)
        assert calls == [999.0]
        next(walk)
        assert calls == [999.0, 500.0]


def test_a_walk_is_differentiable_from_end_to_start():
    w = torch.tensor(0.8, dtype=F64, requires_grad=True)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return last(ddim(lambda x, t: (w * x).sin(), x, LINEAR, [600, 300, 0, -1], eta=0.5, noise=fixed())).x

    x = random(1, 1, 2, 2).requires_grad_(True)
    assert torch.autograd.gradcheck(run, (x, w))


def fixed() -> Callable[[Tensor], Tensor]:
    return seeded([3])


def test_a_walk_keeps_the_type_of_x_while_the_schedule_stays_in_float64():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        end = last(ddim(lambda x, t: 0.1 * x, random(1, 3, 4, 4).to(dtype), LINEAR, path.papers(4)))
        assert end.x.dtype == end.x0.dtype == dtype


# ---- DDPM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), [(999, 998), (600, 400), (1, 0)])
def test_mean_and_variance_are_those_of_bayes_rule(t: int, s: int):
    x, x0, a, b = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), LINEAR(t), LINEAR(s)
    # q(x_s | x_0) = N(sqrt(b) x_0, 1 - b) and q(x_t | x_s) = N(sqrt(a / b) x_s, 1 - a / b): multiply
    precision = 1 / (1 - b) + (a / b) / (1 - a / b)
    mean = (b.sqrt() * x0 / (1 - b) + (a / b).sqrt() * x / (1 - a / b)) / precision
    torch.testing.assert_close(ddpm.posterior_mean(x, x0, LINEAR, t, s), mean, atol=1e-10, rtol=0)
    small, large = ddpm.log_variance(LINEAR, t, s, "small"), ddpm.log_variance(LINEAR, t, s, "large")
    assert float(small) == pytest.approx(float((1 / precision).log()), abs=1e-9)
    assert float(large) == pytest.approx(float((1 - a / b).log()), abs=1e-9)


def test_a_learned_variance_lies_between_the_two_fixed_ones():
    ends = [ddpm.log_variance(LINEAR, 600, 500, kind) for kind in ("small", "large")]
    for v, want in ((-1.0, ends[0]), (1.0, ends[1]), (0.0, (ends[0] + ends[1]) / 2)):
        got = ddpm.log_variance(LINEAR, 600, 500, "learned", torch.full((1, 3, 2, 2), v, dtype=F64))
        torch.testing.assert_close(got, want.expand(1, 3, 2, 2), atol=1e-12, rtol=0)


def test_ddim_with_eta_one_and_ddpm_with_small_variance_are_one_sampler():
    x = random(2, 3, 4, 4)
    for walk in (path.papers(10), path.leading(10), path.trailing(7)):
        ours = list(ddim(gaussian(0.5), x, LINEAR, walk, eta=1.0, noise=seeded([1, 2])))
        theirs = list(ddpm.ddpm(gaussian(0.5), x, LINEAR, walk, noise=seeded([1, 2])))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(tuple(a), tuple(b), atol=1e-10, rtol=0)


def test_ancestral_samples_have_the_spread_of_a_gaussian_world():
    x, generator = random(4000, 1, 1, 1), torch.Generator().manual_seed(1)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=F64, generator=generator)

    end = last(ddpm.ddpm(gaussian(0.3), x, LINEAR, path.papers(1000), noise=noise))
    assert float(end.x.std()) == pytest.approx(0.3, rel=0.05)


def test_clipping_in_ddpm_bounds_every_x0():
    x = 3 * random(2, 3, 4, 4)
    steps = list(ddpm.ddpm(lambda x, t: 0.1 * x, x, LINEAR, path.papers(5), noise=seeded([0, 1]), clip=1.0))
    assert all(s.x0.abs().max() <= 1 for s in steps)
    assert steps[-1].x.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("walk", [ddim, heun, partial(ddpm.ddpm, noise=lambda x: torch.ones_like(x))])
def test_a_walk_goes_on_from_what_is_sent_to_it(walk: Callable[..., Steps]):
    x, other = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return x.tanh()

    steps = walk(denoise, x, LINEAR, [800, 600, 400, 200])
    next(steps)
    there = list(walk(denoise, other, LINEAR, [600, 400, 200]))
    assert torch.equal(steps.send(other).x, there[0].x)
    assert torch.equal(next(steps).x, there[1].x)
    assert list(steps) == []

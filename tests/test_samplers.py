"""Schedules, paths, DDIM, DDPM and noise against their definitions in float64."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diaphane.samplers import ddpm, path
from diaphane.samplers.ddim import Step, ddim, spread, step
from diaphane.samplers.inversion import last, psnr, round_trips
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import (
    Prediction,
    as_eps,
    clipped,
    eps_from_v,
    eps_from_x0,
    times,
    v_from_eps,
    x0_from_eps,
    x0_from_v,
)
from diaphane.samplers.schedule import Schedule, cosine, from_betas, linear, scaled_linear
from torch import Tensor

F64 = torch.float64
LINEAR = linear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def knows(x0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect denoiser of a world with one image: eps = (x - sqrt(a) x0) / sqrt(1 - a)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a = LINEAR(t)[:, None, None, None]
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    return eps


def gaussian(spread: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect denoiser of x0 ~ N(0, spread²): E[eps | x] = sqrt(1 - a) x / (a spread² + 1 - a)."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        a = LINEAR(t)[:, None, None, None]
        return (1 - a).sqrt() * x / (a * spread**2 + 1 - a)

    return eps


# ---- schedules and paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, scaled_linear, cosine])
def test_alphas_fall_from_nearly_one_to_nearly_zero_in_float64_on_the_cpu(make: Callable[[], Schedule]):
    alphas = make().alphas
    assert (alphas.dtype, alphas.device.type, len(alphas)) == (F64, "cpu", 1000)
    assert alphas.diff().max() < 0
    assert 0.999 < alphas[0] < 1
    assert 0 < alphas[-1] < 0.005


def test_alphas_are_products_of_one_minus_beta():
    betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    for t in (0, 1, 500, 999):
        assert float(LINEAR(t)) == pytest.approx(math.prod(1 - b for b in betas[: t + 1]), rel=1e-12)
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999 for k in range(1000)]
    assert float(scaled_linear()(999)) == pytest.approx(math.prod(1 - r**2 for r in roots), rel=1e-12)
    assert float(cosine()(499)) == pytest.approx(
        (math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2, rel=1e-9
    )


def test_the_clean_image_has_alpha_one_and_a_schedule_keeps_the_shape_of_t():
    assert float(LINEAR(-1)) == 1
    t = torch.tensor([[-1, 0], [500, 999]])
    assert LINEAR(t).tolist() == [[float(LINEAR(int(u))) for u in row] for row in t]
    assert LINEAR(7).dtype == LINEAR(t).dtype == F64


def test_the_papers_sequences_are_theirs():
    assert path.papers(50)[::-1][:13] == [-1, 0, 20, 40, 61, 81, 101, 122, 142, 163, 183, 203, 224]
    assert path.papers(40)[::-1][:8] == [-1, 0, 25, 51, 76, 102, 128, 153]
    assert path.papers(1000) == list(range(999, -2, -1))
    assert path.papers(2) == [999, 0, -1]
    assert path.papers(1) == [999, -1]
    assert path.papers(7, 500) == [500, 416, 333, 250, 166, 83, 0, -1]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 50, 333, 1000])
@pytest.mark.parametrize("make", [path.papers, path.leading, path.trailing, path.linspace])
def test_a_path_has_n_steps_and_falls_to_the_clean_image(make: Callable[[int], list[int]], n: int):
    made = make(n)
    assert len(made) == n + 1
    assert made[0] <= 999
    assert made[-1] == -1
    assert all(t > s for t, s in pairwise(made))


def test_upward_turns_a_path_round_and_leaves_the_clean_image_out():
    assert path.upward([999, 500, 0, -1]) == [0, 500, 999]
    assert path.upward(path.leading(4, offset=1, end=0)) == [0, 1, 251, 501, 751]
    up = path.upward(path.papers(50))
    assert (up[0], up[-1], len(up)) == (0, 999, 50)


# ---- parameterisations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 250, 999])
def test_eps_x0_and_v_give_each_other(t: int):
    x0, eps, a = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), LINEAR(t)
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    v = a.sqrt() * eps - (1 - a).sqrt() * x0
    close = {"atol": 1e-9, "rtol": 0}
    torch.testing.assert_close(x0_from_eps(x, eps, a), x0, **close)
    torch.testing.assert_close(eps_from_x0(x, x0, a), eps, **close)
    torch.testing.assert_close(v_from_eps(x, eps, a), v, **close)
    torch.testing.assert_close(eps_from_v(x, v, a), eps, **close)
    torch.testing.assert_close(x0_from_v(x, v, a), x0, **close)
    for kind, value in (("eps", eps), ("x0", x0), ("v", v)):
        torch.testing.assert_close(as_eps(answering(value), LINEAR, kind)(x, times(t, x)), eps, **close)


def answering(value: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that says the same whatever it sees."""
    return lambda x, t: value


def test_coefficients_may_differ_in_a_batch():
    x, eps, t = random(3, 3, 4, 4), random(3, 3, 4, 4, seed=1), torch.tensor([0, 400, 999])
    for convert in (x0_from_eps, eps_from_x0, v_from_eps, eps_from_v, x0_from_v):
        each = torch.cat([convert(x[i : i + 1], eps[i : i + 1], LINEAR(int(t[i]))) for i in range(3)])
        torch.testing.assert_close(convert(x, eps, LINEAR(t)), each, atol=1e-12, rtol=0)
    both, x0 = step(x, eps, LINEAR(t), LINEAR(t // 2))
    for i in range(3):
        one, one_x0 = step(x[i : i + 1], eps[i : i + 1], LINEAR(int(t[i])), LINEAR(int(t[i]) // 2))
        torch.testing.assert_close((both[i : i + 1], x0[i : i + 1]), (one, one_x0), atol=1e-12, rtol=0)


def test_clipping_bounds_the_predicted_x0_and_leaves_one_that_fits_alone():
    x, t = random(2, 3, 4, 4), 600
    a = LINEAR(t)
    wild, tame = (
        3 * random(2, 3, 4, 4, seed=1),
        (x - a.sqrt() * 0.9 * random(2, 3, 4, 4, seed=2).tanh()) / (1 - a).sqrt(),
    )
    eps = clipped(answering(wild), LINEAR)(x, times(t, x))
    torch.testing.assert_close(x0_from_eps(x, eps, a), x0_from_eps(x, wild, a).clamp(-1, 1), atol=1e-10, rtol=0)
    assert x0_from_eps(x, wild, a).abs().max() > 1
    torch.testing.assert_close(clipped(answering(tame), LINEAR)(x, times(t, x)), tame, atol=1e-10, rtol=0)
    bound = clipped(answering(wild), LINEAR, limit=0.5)(x, times(t, x))
    assert x0_from_eps(x, bound, a).abs().max() <= 0.5 + 1e-9


def test_timesteps_are_floats_even_for_half_precision():
    assert times(999, torch.zeros(2, 3, 4, 4, dtype=torch.float16)).dtype == torch.float32
    assert times(999, torch.zeros(2, 3, 4, 4, dtype=F64)).tolist() == [999.0, 999.0]


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


# ---- noise, and how well an image comes back -----------------------------------------------------------------------


def test_noise_depends_on_the_image_alone_not_on_its_batch_or_place():
    x, seeds = random(3, 3, 4, 4), [5, 6, 7]

    def run(order: list[int]) -> list[Tensor]:
        noise = seeded([seeds[i] for i in order])
        return list(last(ddim(gaussian(0.5), x[order], LINEAR, path.papers(6), eta=1.0, noise=noise)).x)

    together, turned, alone = run([0, 1, 2]), run([2, 0, 1]), run([1])
    torch.testing.assert_close(together, [turned[1], turned[2], turned[0]], atol=1e-12, rtol=0)
    torch.testing.assert_close(together[1], alone[0], atol=1e-12, rtol=0)
    assert not torch.allclose(together[0], together[1])


def test_noise_goes_on_where_it_stopped_and_has_the_type_of_x():
    noise = seeded([5])
    first, second = (noise(torch.zeros(1, 3, 64, 64, dtype=F64)) for _ in range(2))
    assert first.dtype == F64
    assert not torch.allclose(first, second)
    again = seeded([5])(torch.zeros(1, 3, 64, 64, dtype=torch.float16))
    torch.testing.assert_close(again, first.half())
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.std()) - 1) < 0.05


def test_round_trips_get_better_with_more_steps_and_psnr_is_its_definition():
    a, b = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    mse = [float(((a[i] - b[i]) ** 2).mean()) for i in range(2)]
    assert psnr(a, b).tolist() == pytest.approx([10 * math.log10(4 / m) for m in mse])
    trips = list(round_trips(lambda x, t: gaussian(0.5)(x, t).tanh(), 0.5 * random(2, 3, 4, 4), LINEAR, (10, 100, 500)))
    assert [t.steps for t in trips] == [10, 100, 500]
    worst = [float(t.psnr.min()) for t in trips]
    assert worst[0] < worst[1] < worst[2]
    assert all(t.x_T.shape == t.x0.shape == (2, 3, 4, 4) for t in trips)


# ---- errors --------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 4)


def still(x: Tensor, t: Tensor) -> Tensor:
    return x


def unknown(kind: str) -> Prediction:
    return kind  # pyright: ignore[reportReturnType]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "eta without noise": (lambda: next(ddim(still, X, LINEAR, [9, 0], eta=1.0)), "noise"),
    "eta upward": (lambda: next(ddim(still, X, LINEAR, [0, 9], eta=1.0, noise=seeded([0, 1]))), "eta"),
    "ddpm upward": (lambda: next(ddpm.ddpm(still, X, LINEAR, [0, 9], noise=seeded([0, 1]))), "from 0 to 9"),
    "seeds": (lambda: seeded([0])(X), "2 seeds"),
    "empty path": (lambda: last(ddim(still, X, LINEAR, [999])), "two timesteps"),
    "timestep above": (lambda: LINEAR(1000), "-1 ... 999"),
    "timestep below": (lambda: LINEAR(torch.tensor([3, -2])), "-1 ... 999"),
    "rising alphas": (lambda: Schedule(torch.tensor([0.5, 0.6])), "never rise"),
    "nan alphas": (lambda: Schedule(torch.tensor([0.5, float("nan")])), "never rise"),
    "no alphas": (lambda: Schedule(torch.tensor([])), "never rise"),
    "beta of one": (lambda: from_betas(torch.tensor([0.1, 1.0])), "never rise"),
    "no steps": (lambda: path.papers(0), "1 ... 1000"),
    "too many steps": (lambda: path.trailing(1001), "1 ... 1000"),
    "offset": (lambda: path.leading(10, offset=100), "0 ... 99"),
    "prediction": (lambda: as_eps(still, LINEAR, unknown("score")), '"score"'),
    "variance kind": (lambda: ddpm.log_variance(LINEAR, 5, 4, "tiny"), '"tiny"'),  # pyright: ignore[reportArgumentType]
    "no variance": (lambda: ddpm.log_variance(LINEAR, 5, 4, "learned"), "variance channels"),
    "variance channels": (
        lambda: next(ddpm.ddpm(still, X, LINEAR, [9, 0], noise=seeded([0, 1]), variance="learned")),
        "6 output channels",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

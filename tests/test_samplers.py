"""Schedules, paths, parameterisations and noise against their definitions in float64; what is refused."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diaphane.samplers import ddpm, path
from diaphane.samplers.ddim import ddim, step
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

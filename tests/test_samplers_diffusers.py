"""Schedules, spacings, DDIM and DDPM against diffusers' schedulers, step by step."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diaphane.samplers import path
from diaphane.samplers.ddim import ddim
from diaphane.samplers.ddpm import Variance, ddpm
from diaphane.samplers.parameterisation import Prediction, as_eps
from diaphane.samplers.schedule import Schedule, cosine, linear, rescale_zero_terminal_snr, scaled_linear
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

SCHEDULES: dict[str, tuple[Callable[[], Schedule], dict]] = {
    "linear": (linear, {"beta_schedule": "linear"}),
    "scaled": (scaled_linear, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(40, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(x: Tensor, t: Tensor) -> Tensor:
    """Something that depends on x and t and stays bounded."""
    return (1.3 * x + t[:, None, None, None] / 400).sin() + 0.2 * x.roll(1, -1)


def drawn() -> Callable[[Tensor], Tensor]:
    """The stored noise, one entry a call."""
    values = iter(NOISE)
    return lambda x: next(values)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_diffusers(name: str):
    make, settings = SCHEDULES[name]
    ours, theirs = make().alphas, DDIMScheduler(**settings).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 10, 50, 999, 1000])
def test_spacings_are_diffusers(n: int):
    def theirs(spacing: str, offset: int = 0) -> list[int]:
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(n)
        return scheduler.timesteps.tolist()

    assert path.leading(n)[:-1] == theirs("leading")
    assert path.trailing(n)[:-1] == theirs("trailing")
    if n > 1:
        assert path.linspace(n)[:-1] == theirs("linspace")
    if n < 999:
        assert path.leading(n, offset=1, end=0) == [*theirs("leading", 1), 0]


PATHS = {
    "leading to the clean image": (path.leading(10), {"set_alpha_to_one": True}),
    "leading to timestep 0": (path.leading(10, end=0), {"set_alpha_to_one": False}),
    "leading, offset 1": (path.leading(10, offset=1, end=0), {"set_alpha_to_one": False, "steps_offset": 1}),
    "leading, offset 1, clean": (path.leading(10, offset=1), {"set_alpha_to_one": True, "steps_offset": 1}),
    "trailing": (path.trailing(8), {"set_alpha_to_one": True, "timestep_spacing": "trailing"}),
}


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", PATHS)
def test_ddim_takes_diffusers_steps(name: str, eta: float, kind: Prediction):
    walk, settings = PATHS[name]
    make, betas = SCHEDULES["scaled"]
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = DDIMScheduler(**betas, **settings, prediction_type=names[kind], clip_sample=False)
    scheduler.set_timesteps(len(walk) - 1)
    assert scheduler.timesteps.tolist() == walk[:-1]
    schedule, x = make(), X
    if eta and walk[-2] == walk[-1]:
        walk = walk[:-1]  # a step from 0 to 0: no step
    for i, step in enumerate(ddim(as_eps(network, schedule, kind), X, schedule, walk, eta=eta, noise=drawn())):
        out = scheduler.step(network(x, torch.full((2,), float(step.t))), step.t, x, eta=eta, variance_noise=NOISE[i])
        x = out.prev_sample
        close(step.x, x)
        close(step.x0, out.pred_original_sample)
    assert i >= 6


@pytest.mark.parametrize(("spacing", "clean"), [("trailing", True), ("linspace", True), ("linspace", False)])
@pytest.mark.parametrize("n", [1, 6, 7, 30])
def test_ddim_goes_as_far_as_diffusers_where_steps_do_not_divide_the_schedule(n: int, spacing: str, clean: bool):
    scheduler = DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=clean, clip_sample=False)
    scheduler.set_timesteps(n)
    walk = getattr(path, spacing)(n, end=-1 if clean else 0)
    walk = [*scheduler.timesteps.tolist(), walk[-1]]  # linspace's one step is the first timestep there
    x = X
    for step in ddim(network, X, linear(), walk, reached=path.strided(walk)):
        x = scheduler.step(network(x, torch.full((2,), float(step.t))), int(step.t), x).prev_sample
        close(step.x, x)
    with pytest.raises(ValueError, match="reaches as many timesteps"):
        next(ddim(network, X, linear(), walk, reached=[*walk, 0]))


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("n", [2, 5])
def test_from_noise_alone_ddim_and_ddpm_in_float64_take_diffusers_steps(n: int, kind: type):
    scheduler = kind(timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False,
                     rescale_betas_zero_snr=True)  # fmt: skip
    scheduler.set_timesteps(n)
    assert scheduler.alphas_cumprod[-1] == 0
    schedule = rescale_zero_terminal_snr(linear(), 2.0**-50)
    denoise, generators = as_eps(network, schedule, "v"), [torch.Generator().manual_seed(4) for _ in range(2)]
    walks = {
        DDIMScheduler: ddim,
        DDPMScheduler: partial(ddpm, noise=lambda x: torch.randn(x.shape, generator=generators[0])),
    }
    x, more = X, {"generator": generators[1]} if kind is DDPMScheduler else {}
    for step in walks[kind](denoise, X.double(), schedule, path.trailing(n)):
        out = scheduler.step(network(x, torch.full((2,), float(step.t))), step.t, x, **more)
        x = out.prev_sample
        close(step.x.float(), x, 1e-3 if more else 1e-4)
        close(step.x0.float(), out.pred_original_sample, 1e-3 if more else 1e-4)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("n", [10, 1000])
def test_ddpm_takes_diffusers_steps(n: int, variance: Variance, clip: float | None):
    names = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
    scheduler = DDPMScheduler(variance_type=names[variance], clip_sample=clip is not None)
    scheduler.set_timesteps(n)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t)
        return torch.cat([out, (2 * out).cos()], dim=1) if variance == "learned" else out

    theirs, ours = (torch.Generator().manual_seed(4) for _ in range(2))
    x, walk = X, path.leading(n)
    steps = ddpm(
        predict, X, linear(), walk, noise=lambda x: torch.randn(x.shape, generator=ours), variance=variance, clip=clip
    )
    for step, _ in zip(steps, range(20), strict=False):
        prediction = predict(x, torch.full((2,), float(step.t)))
        out = scheduler.step(prediction, step.t, x, generator=theirs)
        x = out.prev_sample
        close(step.x, x, 1e-3)  # theirs takes 1 - a_t / a_s in float32
        close(step.x0, out.pred_original_sample, 1e-3)
    assert step.t == walk[19] if n > 20 else step.s == -1

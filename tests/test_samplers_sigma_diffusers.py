"""Euler, Heun, DPM-Solver++ and DDPM against diffusers' schedulers, step by step, over every spacing."""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from diaphane.samplers import path
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.ddpm import ddpm
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.euler import euler, euler_ancestral
from diaphane.samplers.heun import heun
from diaphane.samplers.parameterisation import Prediction, as_eps, noised, to_sigma, whole
from diaphane.samplers.schedule import Schedule, rescale_zero_terminal_snr, scaled_linear
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from .test_samplers_diffusers import NOISE, X, network

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = ["leading", "leading, offset 1", "trailing", "linspace"]
STEPS = [5, 20, 50]


def settings(spacing: str, kind: Prediction) -> dict[str, Any]:
    """A spacing and a prediction in diffusers' terms, on SD's and SDXL's betas."""
    named = {"timestep_spacing": spacing.split(",")[0], "steps_offset": int(spacing.endswith("offset 1"))}
    return {**BETAS, **named, "prediction_type": NAMES[kind]}


def spaced(spacing: str, n: int) -> list[float]:
    """The same spacing as a path for Euler and Heun."""
    made = {
        "leading": lambda: path.leading(n),
        "leading, offset 1": lambda: path.leading(n, offset=1),
        "trailing": lambda: path.trailing(n),
        "linspace": lambda: path.fractions(n),
    }
    return [float(t) for t in made[spacing]()]


def theirs(scheduler: Any) -> Schedule:
    """Their own table of alphas, which is in float32: what differs then are the steps."""
    return Schedule(scheduler.alphas_cumprod.double())


def close(ours: Tensor, other: Tensor, tolerance: float):
    torch.testing.assert_close(ours, other, atol=tolerance * max(1.0, float(other.abs().max())), rtol=0)


def follow(scheduler: Any, y: Tensor, calls: int, timesteps: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The next `calls` calls of the network in diffusers' loop: their sample, and the x0 of the first."""
    images = []
    for _ in range(calls):
        t = next(timesteps)
        out = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(len(y))), t, y)
        y = out.prev_sample
        images.append(out.pred_original_sample)
    return y, images[0]


def same_walk(
    scheduler: Any, sampler: Callable[..., Iterator[Step]], schedule: Schedule, walk: list[float], kind: Prediction,
    tolerance: float,
):  # fmt: skip
    """Every step of a sampler in sigma, from diffusers' own start."""
    n = len(walk) - 1
    scheduler.set_timesteps(n)
    y, timesteps = X * scheduler.init_noise_sigma, iter(scheduler.timesteps)
    spacing = scheduler.config.timestep_spacing
    x = X if spacing == "leading" else noised(torch.zeros_like(X), X, schedule(walk[0]))
    for step in sampler(as_eps(network, schedule, kind), x, schedule, walk):
        heuns = isinstance(scheduler, HeunDiscreteScheduler) and step.s >= 0
        y, x0 = follow(scheduler, y, 2 if heuns else 1, timesteps)
        close(to_sigma(step.x, schedule(step.s))[0], y, tolerance)
        close(step.x0, x0, tolerance * 4)
    assert step.s == -1
    assert next(timesteps, None) is None


SIGMAS = {"euler": (EulerDiscreteScheduler, euler), "heun": (HeunDiscreteScheduler, heun)}


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SIGMAS)
def test_euler_and_heun_take_diffusers_steps(name: str, spacing: str, kind: Prediction, karras: bool):
    make, sampler = SIGMAS[name]
    # between whole timesteps theirs interpolates sigma, ours its logarithm as k-diffusion does
    tolerance = 5e-5 if spacing == "linspace" and not karras else 1e-5
    for n in STEPS:
        scheduler = make(**settings(spacing, kind), use_karras_sigmas=karras)
        schedule, walk = theirs(scheduler), spaced(spacing, n)
        if karras:
            walk = path.karras(schedule, n, first=walk[0], last=walk[-2])
        same_walk(scheduler, sampler, schedule, walk, kind, tolerance)


@pytest.mark.parametrize("name", SIGMAS)
def test_with_our_own_float64_schedule_the_steps_are_diffusers_too(name: str):
    make, sampler = SIGMAS[name]
    for n in STEPS:
        walk = spaced("leading, offset 1", n)
        same_walk(make(**settings("leading, offset 1", "eps")), sampler, scaled_linear(), walk, "eps", 1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_ancestral_sampler_takes_diffusers_steps_with_the_same_noise(spacing: str, kind: Prediction):
    for n in STEPS[: 2 if spacing == "linspace" else 3]:  # interpolation differs, and 50 noisy steps amplify it
        scheduler = EulerAncestralDiscreteScheduler(**settings(spacing, kind))
        scheduler.set_timesteps(n)
        schedule, walk = theirs(scheduler), spaced(spacing, n)
        ours, others = (torch.Generator().manual_seed(4) for _ in range(2))
        x, y = noised(torch.zeros_like(X), X, schedule(walk[0])), X * scheduler.sigmas[0]
        steps = euler_ancestral(
            as_eps(network, schedule, kind),
            x,
            schedule,
            walk,
            noise=lambda x, g=ours: torch.randn(x.shape, generator=g),
        )
        for step, t in zip(steps, scheduler.timesteps, strict=True):
            out = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(2)), t, y, generator=others)
            y = out.prev_sample
            close(to_sigma(step.x, schedule(step.s))[0], y, 1e-5 if spacing != "linspace" else 5e-5)


def multistep(spacing: str, n: int) -> list[float]:
    """The same spacing as DPM-Solver's path."""
    if spacing == "trailing":
        return spaced(spacing, n)
    made = {
        "leading": lambda: path.leading(n + 1),
        "leading, offset 1": lambda: path.leading(n + 1, offset=1),
        "linspace": lambda: path.linspace(n + 1),
    }
    return [float(t) for t in path.without_lowest(made[spacing]())]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
def test_dpm_solver_takes_diffusers_steps(spacing: str, kind: Prediction, order: int, final: str):
    for n in (5, 14, 15, 50):
        common = settings("leading" if spacing == "karras" else spacing, kind)
        scheduler = DPMSolverMultistepScheduler(
            **common, use_karras_sigmas=spacing == "karras", solver_order=order, final_sigmas_type=final
        )
        scheduler.set_timesteps(n)
        schedule = theirs(scheduler)
        walk = path.karras(schedule, n) if spacing == "karras" else multistep(spacing, n)
        walk[-1] = -1 if final == "zero" else 0
        assert scheduler.timesteps.tolist() == [round(t) for t in walk[:-1]]
        y = X
        steps = dpmpp(as_eps(whole(network), schedule, kind), X, schedule, walk, order=order)  # pyright: ignore
        for i, (step, t) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
            scheduler._step_index = i  # two of Karras' timesteps may round to one
            y = scheduler.step(network(y, t.expand(2).float()), t, y).prev_sample
            close(step.x, y, 1e-5)
        assert step.s == walk[-1]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_takes_diffusers_steps_over_every_spacing(spacing: str, kind: Prediction):
    for n in STEPS:
        scheduler = DDPMScheduler(**settings(spacing, kind), clip_sample=False)
        scheduler.set_timesteps(n)
        schedule, walk = theirs(scheduler), [float(round(t)) for t in spaced(spacing, n)]
        assert scheduler.timesteps.tolist() == walk[:-1]
        ours, others = (torch.Generator().manual_seed(4) for _ in range(2))
        x = X
        steps = ddpm(
            as_eps(network, schedule, kind),
            X,
            schedule,
            walk,
            noise=lambda x, g=ours: torch.randn(x.shape, generator=g),
        )
        for step, t in zip(steps, scheduler.timesteps, strict=True):
            x = scheduler.step(network(x, t.expand(2).float()), int(t), x, generator=others).prev_sample
            close(step.x, x, 1e-5 if kind != "x0" else 5e-5)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_takes_diffusers_steps_with_stable_diffusions_settings(eta: float, kind: Prediction):
    for n in STEPS:
        scheduler = DDIMScheduler(**settings("leading, offset 1", kind), set_alpha_to_one=False, clip_sample=False)
        scheduler.set_timesteps(n)
        schedule, walk, x = theirs(scheduler), path.leading(n, offset=1, end=0), X
        noises = cycle(NOISE)
        steps = ddim(as_eps(network, schedule, kind), X, schedule, walk, eta=eta, noise=lambda x, z=noises: next(z))
        for i, (step, t) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
            noise = NOISE[i % len(NOISE)] if eta else None
            x = scheduler.step(network(x, t.expand(2).float()), int(t), x, eta=eta, variance_noise=noise).prev_sample
            close(step.x, x, 1e-5 if kind != "x0" else 5e-5)


def test_a_zero_terminal_schedule_is_diffusers_and_so_are_its_steps():
    for n in STEPS:
        scheduler = EulerDiscreteScheduler(**settings("trailing", "v"), rescale_betas_zero_snr=True)
        schedule = theirs(scheduler)
        torch.testing.assert_close(
            rescale_zero_terminal_snr(scaled_linear()).alphas.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7
        )
        scheduler.set_timesteps(n)
        y, walk = X * scheduler.init_noise_sigma, spaced("trailing", n)
        x = noised(torch.zeros_like(X), X, schedule(walk[0])).double()
        for step in euler(as_eps(network, schedule, "v"), x, schedule, walk):
            y, _ = follow(scheduler, y, 1, iter(scheduler.timesteps[step.t == scheduler.timesteps]))
            # at sigma 4096 their float32 y has lost all but three decimals of x0
            close(step.x.float(), y / (1 + scheduler.sigmas[scheduler.step_index] ** 2) ** 0.5, 1e-3)

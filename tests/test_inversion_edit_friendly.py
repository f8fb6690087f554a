"""Edit-friendly DDPM inversion: the reference data, its definition in float64, one timestep at a time or many."""

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diaphane.model.blocks import denoiser
from diaphane.model.unet import UNet
from diaphane.samplers import path
from diaphane.samplers.ddim import ddim
from diaphane.samplers.edit_friendly import NoiseMaps, noise_maps
from diaphane.samplers.guidance import guided
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import replayed, seeded
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.schedule import Schedule, from_betas, scaled_linear
from diaphane.weights import unet as table
from safetensors.torch import load_file
from torch import Tensor

from .latent_twins import HERE, ours
from .test_samplers import F64, random
from .test_sdxl_unet import TINY_CFG, tiny

SD = scaled_linear()
CASE = HERE / "golden" / "consistory" / "10_edit_friendly_inversion"


def world(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that depends on x and t, without a meaning."""
    return (1.3 * x + t[:, None, None, None] / 400).sin()


def back(denoise: Denoise, maps: NoiseMaps, schedule: Schedule = SD, skip: int = 0) -> Tensor:
    """Down the path again with the stored noise."""
    noise = replayed(maps.zs[skip:])
    return last(ddim(denoise, maps.xs[skip], schedule, maps.path[skip:], eta=maps.eta, noise=noise)).x


# ---- reference data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> UNet:
    net = UNet(TINY_CFG).eval().requires_grad_(False)
    net.load_state_dict(ours(tiny(), table, table.DIFFUSERS))
    return net


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_the_maps_and_both_ways_back_are_the_reference_data(unet: UNet, chunk: int):
    said, case = json.loads(CASE.with_suffix(".json").read_text()), load_file(CASE.with_suffix(".safetensors"))
    scheduler, side = said["scheduler"], 8.0 * said["H"]
    assert (scheduler["beta_schedule"], scheduler["timestep_spacing"]) == ("scaled_linear", "leading")
    schedule = scaled_linear(scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"])
    walk = path.leading(said["n"], len(schedule), offset=scheduler["steps_offset"], end=0)
    assert walk[:-1] == case["timesteps"].tolist()

    def rows(*texts: str) -> Denoise:
        def cond(t: Tensor):
            n = len(t) // len(texts)
            context, pooled = (
                torch.cat(
                    [case[f"{text}_{part}"].repeat(n, *[1] * (case[f"{text}_{part}"].ndim - 1)) for text in texts]
                )
                for part in ("embeds", "pooled")
            )
            return unet.embed(t, context, pooled, torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(t), 1))

        return denoiser(unet, cond)

    source = guided(rows("null", "src"), rows("src"), said["cfg_src"])
    target = guided(rows("null", "tar"), rows("tar"), said["cfg_tar"])
    maps = noise_maps(
        source, case["x0"], schedule, walk, noise=replayed(case["noise"].unsqueeze(1)), eta=said["eta"], chunk=chunk
    )

    def close(name: str, made: Tensor, tolerance: float):
        torch.testing.assert_close(made, case[name], atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")

    close("xts", maps.xs.flip(0).squeeze(1), 1e-5)
    close("zs", maps.zs.flip(0).squeeze(1), 1e-3)
    reconstruction = back(source, maps, schedule)
    drift = 1 if chunk == 1 else 300  # this network amplifies rounding so much on the way down
    close("reconstruction", reconstruction, 1e-4 * drift)
    close("edited", back(target, maps, schedule, said["skip"]), 1e-3 * drift)
    worst = float((reconstruction - case["x0"]).abs().max())
    assert worst == pytest.approx(said["reconstruction_max_error"], abs=1e-4 * drift)


# ---- definitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("end", [-1, 0])
def test_every_map_is_what_leads_from_one_noisy_picture_to_the_next(eta: float, end: int):
    x0, walk = random(2, 3, 4, 4).tanh(), [*path.karras(SD, 6, first=901, last=40)[:-1], end]
    maps = noise_maps(world, x0, SD, walk, noise=seeded([3, 4]), eta=eta)
    noises = seeded([3, 4])
    for i, t in reversed(list(enumerate(walk[:-1]))):
        want = SD(t).sqrt() * x0 + (1 - SD(t)).sqrt() * noises(x0)
        torch.testing.assert_close(maps.xs[i], want, atol=1e-11, rtol=0)
    for i, (t, s) in enumerate(pairwise(walk)):
        a, b = SD(t), SD(s)
        eps = world(maps.xs[i], torch.full((2,), float(t), dtype=F64))
        sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        mean = b.sqrt() * (maps.xs[i] - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - sigma**2).sqrt() * eps
        if i < 5:
            torch.testing.assert_close(maps.zs[i], (maps.xs[i + 1] - mean) / sigma, atol=1e-9, rtol=0)
    assert not maps.zs[-1].any()
    assert torch.equal(maps.xs[-1], x0)
    assert (maps.path, maps.eta) == (tuple(walk), eta)


def test_the_way_back_passes_every_noisy_picture_and_misses_the_last_by_its_own_noise_only():
    x0, walk = random(2, 3, 4, 4).tanh(), path.leading(8, offset=1)
    maps = noise_maps(world, x0, SD, walk, noise=seeded([3, 4]))
    for skip in (0, 3):
        steps = list(ddim(world, maps.xs[skip], SD, walk[skip:], eta=1.0, noise=replayed(maps.zs[skip:])))
        for made, want in zip(steps[:-1], maps.xs[skip + 1 : -1], strict=True):
            torch.testing.assert_close(made.x, want, atol=1e-9, rtol=0)
        a = SD(1)
        want = (maps.xs[-2] - (1 - a).sqrt() * world(maps.xs[-2], torch.ones(2))) / a.sqrt()
        torch.testing.assert_close(steps[-1].x, want, atol=1e-6, rtol=0)


def test_in_float32_the_way_back_repeats_every_noisy_picture_bit_for_bit():
    def wild(x: Tensor, t: Tensor) -> Tensor:
        return (7 * x + t[:, None, None, None] / 400).sin()  # rounding grows sevenfold a step and more

    x0, walk = random(2, 3, 4, 4).float(), path.leading(20, offset=1)
    maps = noise_maps(wild, x0, SD, walk, noise=seeded([3, 4]))
    steps = ddim(wild, maps.xs[0], SD, walk, eta=1.0, noise=replayed(maps.zs))
    assert all(torch.equal(made.x, want) for made, want in zip(list(steps)[:-1], maps.xs[1:-1], strict=True))


def test_the_picture_comes_back_nearer_the_less_noise_the_last_timestep_has():
    x0, errors = random(1, 3, 8, 8).tanh(), []
    for first in (1e-2, 1e-4, 1e-6):
        schedule = from_betas(torch.linspace(first, 0.02, 100, dtype=F64))
        maps = noise_maps(world, x0, schedule, path.leading(20, 100), noise=seeded([3]))
        errors.append(float((back(world, maps, schedule) - x0).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("chunk", [2, 3, 8, 50])
def test_timesteps_may_be_batched_in_any_number_and_keep_their_image(chunk: int):
    x0, seen = random(2, 3, 4, 4), []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return world(x, t)

    walk = path.leading(8, offset=1)
    one = noise_maps(world, x0, SD, walk, noise=seeded([3, 4]))
    many = noise_maps(watched, x0, SD, walk, noise=seeded([3, 4]), chunk=chunk)
    torch.testing.assert_close(many.zs, one.zs, atol=1e-9, rtol=0)
    torch.testing.assert_close(many.xs, one.xs, atol=1e-12, rtol=0)
    assert sum(seen) == 16
    assert max(seen) == 2 * min(chunk, 8)
    alone = noise_maps(world, x0[1:], SD, walk, noise=seeded([4]), chunk=chunk)
    torch.testing.assert_close(many.zs[:, 1:], alone.zs, atol=1e-9, rtol=0)


def test_the_noise_maps_of_a_guided_network_take_each_images_own_scale():
    def both(x: Tensor, t: Tensor) -> Tensor:
        text = torch.cat([torch.zeros(len(x) // 2), torch.ones(len(x) // 2)])[:, None, None, None]
        return world(x + text, t)

    def cond(x: Tensor, t: Tensor) -> Tensor:
        return world(x + 1, t)

    x0, scales = random(2, 3, 4, 4), torch.tensor([2.0, 5.0])
    maps = noise_maps(guided(both, cond, scales), x0, SD, path.leading(5), noise=seeded([3, 4]), chunk=3)
    for i, g in enumerate(scales.tolist()):
        alone = noise_maps(guided(both, cond, g), x0[i : i + 1], SD, path.leading(5), noise=seeded([3 + i]))
        torch.testing.assert_close(maps.zs[:, i : i + 1], alone.zs, atol=1e-9, rtol=0)


def test_half_precision_pictures_are_inverted_in_float32():
    maps = noise_maps(world, random(1, 3, 4, 4).half(), SD, path.leading(4, offset=1), noise=seeded([3]))
    assert (maps.xs.dtype, maps.zs.dtype) == (torch.float32, torch.float32)


X = torch.zeros(2, 3, 4, 4)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "upward": (lambda: noise_maps(world, X, SD, [0, 500, 999], noise=seeded([0, 1])), "[0, 500, 999]"),
    "one timestep": (lambda: noise_maps(world, X, SD, [500], noise=seeded([0, 1])), "two timesteps"),
    "eta": (lambda: noise_maps(world, X, SD, [500, 0], noise=seeded([0, 1]), eta=0.0), "got 0.0"),
    "chunk": (lambda: noise_maps(world, X, SD, [500, 0], noise=seeded([0, 1]), chunk=0), "1.0 and 0"),
    "noise that ends": (lambda: replayed([])(X), "has ended"),
    "noise of another shape": (lambda: replayed([X[:1]])(X), "(1, 3, 4, 4)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_is_one_line_that_says_what_would_be_right(what: str):
    call, says = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)

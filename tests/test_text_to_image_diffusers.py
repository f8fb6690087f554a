"""Whole runs beside diffusers' pipelines: tiny random models, the same latents, every sampler both have."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.controlnet import Control, between
from diaphane.methods.prompt import Prompt, encode, score_ids, size_ids
from diaphane.model.components import Components, components
from diaphane.model.latent import build
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.ddpm import ddpm
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.euler import euler, euler_ancestral
from diaphane.samplers.heun import heun
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import noised
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import latent, pipeline
from torch import Tensor

from . import latent_twins as twins

SCHEDULE, N = scaled_linear(), 5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
         "timestep_spacing": "leading"}  # fmt: skip
TEXTS, NEGATIVE = ["a cat, best quality!", "a dog sitting on the grass"], "lowres, worst quality"
EULER = leading(N, offset=1)


def walks() -> dict[str, tuple[str, dict[str, Any], Callable[..., Iterator[Step]], list[int]]]:
    """diffusers' scheduler and its settings, our walk and its path."""
    noise, path = seeded([7]), [*EULER[:-1], 0]
    multistep = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
    cut = [*leading(N + 1, offset=1)[:-2], -1]
    return {
        "euler": ("EulerDiscreteScheduler", {}, euler, EULER),
        "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, partial(euler_ancestral, noise=noise), EULER),
        "heun": ("HeunDiscreteScheduler", {}, heun, EULER),
        "dpm++ 2m": ("DPMSolverMultistepScheduler", multistep, dpmpp, cut),
        "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}, ddim, path),
        "ddpm": ("DDPMScheduler", {"clip_sample": False}, partial(ddpm, noise=noise), EULER),
    }


def scheduler(name: str, **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**BETAS | settings)


def tiny(kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    """One of diffusers' pipelines around the tiny networks, silent, in float32."""
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(twins.TINY, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def parts() -> Components:
    found = pipeline.load(twins.TINY)
    return components(found.parts, found.words, dtype=torch.float32)


def common(width: int = 128) -> dict[str, Any]:
    """What every run of diffusers is told."""
    return {"num_inference_steps": N, "height": 128, "width": width, "output_type": "latent"}


def near(got: Tensor, want: Tensor, bound: float = 2e-4):
    assert got.shape == want.shape
    assert (got - want).abs().amax() < bound * want.std()


def run(walk: Any, denoise: Any, x: Tensor, path: Sequence[float]) -> Tensor:
    return list(walk(denoise, x, SCHEDULE, path))[-1].x


def latents(n: int = 1, size: tuple[int, int] = (16, 16), seed: int = 1) -> Tensor:
    return torch.randn(n, 4, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", walks())
def test_text_to_image_is_diffusers_with_every_sampler(theirs: Any, parts: Components, name: str):
    kind, settings, walk, path = walks()[name]
    theirs.scheduler = scheduler(kind, **settings)
    x = latents()
    want = theirs(TEXTS[0], negative_prompt=NEGATIVE, guidance_scale=5.0, latents=x,
                  generator=torch.Generator().manual_seed(7), **common()).images  # fmt: skip
    denoise = t2i.denoiser(parts.unet, encode(parts, TEXTS[0]), encode(parts, NEGATIVE), schedule=SCHEDULE,
                           ids=size_ids((128, 128)))  # fmt: skip
    near(run(walk, denoise, x, path), want)


def test_two_texts_sizes_rescale_clip_skip_and_no_negative_are_diffusers(theirs: Any, parts: Components):
    theirs.scheduler = scheduler("EulerDiscreteScheduler")
    x = latents(4, (16, 24))
    want = theirs(TEXTS, TEXTS[::-1], guidance_scale=7.0, guidance_rescale=0.7, latents=x, original_size=(300, 200),
                  crops_coords_top_left=(8, 16), target_size=(64, 96), clip_skip=1, num_images_per_prompt=2,
                  **common(192)).images  # fmt: skip
    prompt = encode(parts, TEXTS, TEXTS[::-1], clip_skip=1).repeated(2)
    ids = size_ids((128, 192), 4, original=(300, 200), crop=(8, 16), target=(64, 96))
    denoise = t2i.denoiser(parts.unet, prompt, prompt.zeros(), schedule=SCHEDULE, ids=ids, guidance=7.0, rescale=0.7)
    near(run(euler, denoise, x, EULER), want)


def test_other_sizes_for_the_negative_prompt_are_diffusers(theirs: Any, parts: Components):
    theirs.scheduler = scheduler("EulerDiscreteScheduler")
    x = latents()
    want = theirs(TEXTS[0], negative_prompt=NEGATIVE, guidance_scale=5.0, latents=x, negative_original_size=(50, 60),
                  negative_crops_coords_top_left=(3, 9), negative_target_size=(70, 80), **common()).images  # fmt: skip
    other = size_ids((128, 128), original=(50, 60), crop=(3, 9), target=(70, 80))
    denoise = t2i.denoiser(parts.unet, encode(parts, TEXTS[0]), encode(parts, NEGATIVE), schedule=SCHEDULE,
                           ids=size_ids((128, 128)), negative_ids=other)  # fmt: skip
    near(run(euler, denoise, x, EULER), want)


def test_guidance_1_is_the_positive_prompt_alone_as_in_diffusers(theirs: Any, parts: Components):
    theirs.scheduler = scheduler("EulerDiscreteScheduler")
    x = latents()
    want = theirs(TEXTS[0], guidance_scale=1.0, latents=x, **common()).images
    prompt, ids = encode(parts, TEXTS[0]), size_ids((128, 128))
    for negative in (None, encode(parts, NEGATIVE)):
        denoise = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, guidance=1.0)
        near(run(euler, denoise, x, EULER), want)


def test_a_picture_decodes_to_diffusers_picture(theirs: Any, parts: Components):
    x = latents(2)
    want = theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(t2i.pictures(parts.vae, x), want, atol=5e-5)


def after_the_first(walk: Any, x: Tensor) -> Any:
    """The walk, whose noise has drawn once: what pictures are noised with, as in diffusers' image pipelines."""
    if isinstance(walk, partial):
        walk.keywords["noise"](x)
    return walk


@pytest.mark.parametrize(("name", "strength"), [*((name, 0.61) for name in walks()), ("euler", 0.3), ("euler", 1.0)])
def test_image_to_image_is_diffusers(theirs: Any, parts: Components, name: str, strength: float):
    import diffusers

    kind, settings, walk, path = walks()[name]
    pipe: Any = diffusers.AutoPipelineForImage2Image.from_pipe(theirs)
    pipe.scheduler = scheduler(kind, **settings)
    pipe.set_progress_bar_config(disable=True)
    x0 = latents(seed=4)
    told = {name: value for name, value in common().items() if name not in ("height", "width")}
    want = pipe(TEXTS[0], image=x0, negative_prompt=NEGATIVE, strength=strength, guidance_scale=5.0,
                generator=torch.Generator().manual_seed(7), **told).images  # fmt: skip
    path = t2i.tail(path, strength)
    denoise = t2i.denoiser(parts.unet, encode(parts, TEXTS[0]), encode(parts, NEGATIVE), schedule=SCHEDULE,
                           ids=size_ids((128, 128)))  # fmt: skip
    x = noised(x0, seeded([7])(x0), SCHEDULE(path[0]))
    near(run(after_the_first(walk, x0), denoise, x, path), want)


def mask_and_latents() -> tuple[Tensor, Tensor, Tensor]:
    """A mask of pixels, latents of a picture, the noise that a generator draws first."""
    mask, x0 = torch.zeros(1, 1, 128, 128), latents(seed=4)
    mask[:, :, 30:99, 50:] = 1
    return mask, x0, seeded([7])(x0)


@pytest.mark.parametrize(("name", "strength"), [*((name, 0.7) for name in walks()), ("euler", 1.0)])
def test_inpainting_with_an_ordinary_unet_is_diffusers(theirs: Any, parts: Components, name: str, strength: float):
    import diffusers

    kind, settings, walk, path = walks()[name]
    pipe: Any = diffusers.AutoPipelineForInpainting.from_pipe(theirs)
    pipe.scheduler = scheduler(kind, **settings)
    pipe.set_progress_bar_config(disable=True)
    mask, x0, z = mask_and_latents()
    want = pipe(TEXTS[0], image=x0, mask_image=mask, negative_prompt=NEGATIVE, strength=strength, guidance_scale=5.0,
                generator=torch.Generator().manual_seed(7), **common()).images  # fmt: skip
    path = t2i.tail(path, strength)
    denoise = t2i.denoiser(parts.unet, encode(parts, TEXTS[0]), encode(parts, NEGATIVE), schedule=SCHEDULE,
                           ids=size_ids((128, 128)))  # fmt: skip
    x = z if strength == 1 else noised(x0, z, SCHEDULE(path[0]))
    steps = list(t2i.repainted(after_the_first(walk, x0), denoise, x, SCHEDULE, path, x0, z, mask))
    near(steps[-1].x, want)


def test_inpainting_with_nine_channels_is_diffusers(theirs: Any, parts: Components):
    import diffusers

    torch.manual_seed(6)
    body = diffusers.UNet2DConditionModel.from_config(theirs.unet.config, in_channels=9).eval().requires_grad_(False)
    twins.randomised(body)
    pipe: Any = diffusers.StableDiffusionXLInpaintPipeline(**{**theirs.components, "unet": body})
    pipe.scheduler = scheduler("EulerDiscreteScheduler")
    pipe.set_progress_bar_config(disable=True)
    mask, x0, z = mask_and_latents()
    masked = latents(seed=9)
    want = pipe(TEXTS[0], image=x0, mask_image=mask, masked_image_latents=masked, negative_prompt=NEGATIVE,
                strength=0.7, guidance_scale=5.0, generator=torch.Generator().manual_seed(7),
                **common()).images  # fmt: skip
    config = {**vars(parts.unet.cfg), "in_channels": 9}
    unet = build("unet", config, twins.ours(body.state_dict(), pipeline.latent.unet, pipeline.latent.unet.DIFFUSERS))
    path = t2i.tail(EULER, 0.7)
    denoise = t2i.denoiser(unet, encode(parts, TEXTS[0]), encode(parts, NEGATIVE), schedule=SCHEDULE,
                           ids=size_ids((128, 128)), canvas=t2i.canvas(mask, masked))  # fmt: skip
    near(run(euler, denoise, noised(x0, z, SCHEDULE(path[0])), path), want)


def test_controlnets_of_a_scale_and_a_range_are_diffusers(parts: Components):
    import diffusers

    folder = twins.TINY / "controlnet"
    net = diffusers.ControlNetModel.from_pretrained(folder, dtype=torch.float32)
    pipe = tiny("StableDiffusionXLControlNetPipeline", controlnet=[net, net])
    pipe.scheduler = scheduler("EulerDiscreteScheduler")
    hints = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    x = latents()
    want = pipe(TEXTS[0], image=[hints[:1], hints[1:]], negative_prompt=NEGATIVE, latents=x, guidance_scale=5.0,
                controlnet_conditioning_scale=[0.6, 0.9], control_guidance_start=[0.0, 0.4],
                control_guidance_end=[0.6, 1.0], **common()).images  # fmt: skip
    found = latent.load(folder)
    ours = build(found.family, found.config, found.tensors, dtype=torch.float32)
    spans = [between(EULER, 0.0, 0.6), between(EULER, 0.4, 1.0)]
    controls = [Control(net=ours, hint=hint, scale=scale, first=first, last=last)
                for hint, scale, (first, last) in zip(hints.split(1), (0.6, 0.9), spans, strict=True)]  # fmt: skip
    prompt, negative, ids = encode(parts, TEXTS[0]), encode(parts, NEGATIVE), size_ids((128, 128))
    denoise = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, controls=controls)
    near(run(euler, denoise, x, EULER), want)
    plain = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids)
    assert (run(euler, plain, x, EULER) - want).abs().amax() > want.std()


@pytest.mark.parametrize("way", ["text", "image", "mask", "control"])
def test_pictures_whose_sides_are_odd_multiples_of_8_are_diffusers(theirs: Any, parts: Components, way: str):
    import diffusers

    size, gen = (72, 104), torch.Generator().manual_seed(3)
    x0, hint, mask = latents(size=(9, 13), seed=4), torch.rand(1, 3, *size, generator=gen), torch.zeros(1, 1, *size)
    mask[:, :, 21:50, 40:] = 1
    told = {"num_inference_steps": N, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, "output_type": "latent"}
    prompts, ids = (encode(parts, TEXTS[0]), encode(parts, NEGATIVE)), size_ids(size)
    z, controls, path = seeded([7])(x0), [], EULER if way in ("text", "control") else t2i.tail(EULER, 0.61)
    if way == "control":
        folder = twins.TINY / "controlnet"
        net = diffusers.ControlNetModel.from_pretrained(folder, dtype=torch.float32)
        pipe = tiny("StableDiffusionXLControlNetPipeline", controlnet=net)
        more = {"image": hint, "latents": z, "height": size[0], "width": size[1]}
        found = latent.load(folder)
        controls = [Control(net=build(found.family, found.config, found.tensors, dtype=torch.float32), hint=hint)]
    elif way == "text":
        pipe, more = theirs, {"latents": z, "height": size[0], "width": size[1]}
    elif way == "image":
        pipe, more = diffusers.AutoPipelineForImage2Image.from_pipe(theirs), {"image": x0, "strength": 0.61}
    else:
        pipe = diffusers.AutoPipelineForInpainting.from_pipe(theirs)
        more = {"image": x0, "mask_image": mask, "strength": 0.61, "height": size[0], "width": size[1]}
    pipe.scheduler = scheduler("EulerDiscreteScheduler")
    pipe.set_progress_bar_config(disable=True)
    want = pipe(TEXTS[0], generator=torch.Generator().manual_seed(7), **told, **more).images

    assert t2i.latent_size(parts, size) == (9, 13)
    denoise = t2i.denoiser(parts.unet, *prompts, schedule=SCHEDULE, ids=ids, controls=controls)
    x = z if path is EULER else noised(x0, z, SCHEDULE(path[0]))
    if way == "mask":
        near(list(t2i.repainted(euler, denoise, x, SCHEDULE, path, x0, z, mask))[-1].x, want)
    else:
        near(run(euler, denoise, x, path), want)
    drawn = theirs.vae.decode(want / theirs.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(t2i.pictures(parts.vae, want), drawn, atol=5e-5)


def first(tmp_path: Path, *, v: bool) -> tuple[Any, Components, pipeline.Pipeline]:
    """A tiny model of the kind of Stable Diffusion 1 (or 2, which predicts v), diffusers' and ours from its folder."""
    import diffusers

    source = tiny()
    torch.manual_seed(6)
    cfg = replace(twins.SD2 if v else twins.SD1, in_channels=4, context_dim=24, groups=8)
    body = twins.diffusers_unet(cfg, linear=v)
    twins.randomised(body)
    schedule = scheduler("EulerDiscreteScheduler", prediction_type="v_prediction" if v else "epsilon")
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=source.vae, text_encoder=source.text_encoder, tokenizer=source.tokenizer, unet=body, scheduler=schedule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    found = pipeline.load(tmp_path, tokenizer=twins.TINY / "tokenizer")
    return pipe, components(found.parts, found.words), found


@pytest.mark.parametrize("v", [False, True], ids=["eps", "v"])
def test_stable_diffusion_1_and_2_are_diffusers_from_its_folder(tmp_path: Path, v: bool):
    pipe, parts, found = first(tmp_path, v=v)
    x = latents(2)
    want = pipe(TEXTS, negative_prompt=[NEGATIVE, ""], guidance_scale=7.5, latents=x, guidance_rescale=0.5,
                **common()).images  # fmt: skip
    assert found.says.prediction == ("v" if v else "eps")
    assert found.texts == ["text_encoder"]
    denoise = t2i.denoiser(parts.unet, encode(parts, TEXTS), encode(parts, [NEGATIVE, ""]),
                           schedule=SCHEDULE, prediction=found.says.prediction, guidance=7.5, rescale=0.5)  # fmt: skip
    near(run(euler, denoise, x, EULER), want)


def test_the_refiner_takes_over_where_diffusers_does(theirs: Any, parts: Components):
    import diffusers

    torch.manual_seed(6)
    cfg = replace(twins.REFINER, in_channels=4, context_dim=40, pooled_dim=40)
    body = twins.diffusers_unet(cfg)
    twins.randomised(body)
    kept = {name: theirs.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2")}
    refiner: Any = diffusers.StableDiffusionXLImg2ImgPipeline(
        **kept, text_encoder=None, tokenizer=None, unet=body, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False, scheduler=scheduler("EulerDiscreteScheduler"),
    )  # fmt: skip
    refiner.set_progress_bar_config(disable=True)
    theirs.scheduler = scheduler("EulerDiscreteScheduler")
    x = latents()
    both = {"negative_prompt": NEGATIVE, "num_inference_steps": N, "guidance_scale": 5.0, "output_type": "latent"}
    half = theirs(TEXTS[0], latents=x, height=128, width=128, denoising_end=0.5, **both).images
    want = refiner(TEXTS[0], image=half, denoising_start=0.5, aesthetic_score=7.0, **both).images

    high, low = t2i.handoff(EULER, 0.5)
    assert len(high) + len(low) == N + 2
    prompts = encode(parts, TEXTS[0]), encode(parts, NEGATIVE)
    base = t2i.denoiser(parts.unet, *prompts, schedule=SCHEDULE, ids=size_ids((128, 128)))
    ours = run(euler, base, x, high)
    unet = build("unet", vars(cfg), twins.ours(body.state_dict(), pipeline.latent.unet, pipeline.latent.unet.DIFFUSERS))
    one = replace(parts, unet=unet, towers=parts.towers[1:], tokenizers=parts.tokenizers[1:])
    refined: tuple[Prompt, Prompt] = encode(one, TEXTS[0]), encode(one, NEGATIVE)
    sizes = score_ids((128, 128), score=7.0), score_ids((128, 128), score=2.5)
    second = t2i.denoiser(unet, *refined, schedule=SCHEDULE, ids=sizes[0], negative_ids=sizes[1])
    near(run(euler, second, ours, low), want)

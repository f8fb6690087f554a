"""The reference runs: text, guidance, inpainting and a ControlNet, all with an image prompt that is spoken in `Ops`."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diaphane.methods import text_to_image as t2i
from diaphane.methods.controlnet import Control
from diaphane.methods.prompt import conditioning, encode, encode_ids, size_ids
from diaphane.model import sites
from diaphane.model.components import Components, components
from diaphane.model.latent import build
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.samplers.ddim import ddim
from diaphane.samplers.ddim import step as ddim_step
from diaphane.samplers.guidance import guide, halves
from diaphane.samplers.parameterisation import noised
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import latent, pipeline
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

SCHEDULE = scaled_linear()
CASES = {case["name"]: case for case in json.loads((twins.CASES / "cases.json").read_text())}


@cache
def parts() -> Components:
    found = pipeline.load(twins.TINY)
    return components(found.parts, found.words, dtype=torch.float32)


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """Settings, tensors, and the bound in units of the final latents' deviation."""
    found = CASES[name]
    return found["settings"], load_file(twins.CASES / f"{name}.safetensors"), found["tolerance"]["atol_over_std"]


def image_prompt(settings: dict[str, Any], embeds: Tensor, n: int) -> Ops:
    """The linear adapter of the reference data: attention to four tokens of a picture, added with a scale a place.

    `embeds` (2 or 1, 1, D) are of the unconditional and the conditional half, of n pictures each.
    """
    weights = load_file(twins.TINY / "ip_adapter" / settings["adapter"])
    order = json.loads((twins.TINY / "ip_adapter" / "key_order.json").read_text())
    raw = {key: t.float() for key, t in weights.items()}
    tokens = F.linear(embeds[:, 0], raw["image_proj.proj.weight"], raw["image_proj.proj.bias"]).unflatten(1, (4, -1))
    tokens = F.layer_norm(tokens, tokens.shape[-1:], raw["image_proj.norm.weight"], raw["image_proj.norm.bias"])
    tokens = tokens.repeat_interleave(n, dim=0)
    pairs: dict[Site, tuple[Tensor, Tensor, float]] = {}
    for index, row in order.items():
        module = row["processor"].removesuffix(".processor")
        k, v = (F.linear(tokens, raw[f"ip_adapter.{index}.to_{name}_ip.weight"]) for name in "kv")
        pairs[sites.site(parts().unet.cfg, module)] = (k, v, scale_at(settings["ip_adapter_scale"], module))

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        out = TORCH.attend(site, q, k, v, bias)
        if site not in pairs:
            return out
        *both, scale = pairs[site]
        own_k, own_v = (t.unflatten(-1, (q.shape[1], -1)).transpose(1, 2) for t in both)
        return out + scale * TORCH.attend(site, q, own_k, own_v)

    return replace(TORCH, attend=attend)


def scale_at(scale: Any, module: str) -> float:
    """diffusers' nested scales: a number, or by side, block and attention; what is not named is 0."""
    if isinstance(scale, int | float):
        return float(scale)
    side, block, _, i, *_ = module.replace("mid_block", "mid_blocks.0").split(".")
    found: Any = scale.get(side.removesuffix("_blocks"), 0.0)
    found = found.get(f"block_{block}", 0.0) if isinstance(found, dict) else found
    return float(found[int(i)] if isinstance(found, list) else found)


def prepared(name: str, n: int = 1, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor], float, Any]:
    """A case and its denoiser."""
    settings, tensors, bound = case(name)
    size = (settings["height"], settings["width"])
    prompt = encode(parts(), settings["prompt"]).repeated(n)
    negative = settings["negative_prompt"]
    no = prompt.zeros() if negative is None else encode(parts(), negative).repeated(n)
    ids = size_ids(size, n, original=settings.get("original_size"), target=settings.get("target_size"))
    unet = more.pop("unet", parts().unet)
    denoise = t2i.denoiser(unet, prompt, no, schedule=SCHEDULE, ids=ids, guidance=settings["guidance_scale"],
                           ops=image_prompt(settings, tensors["image_embeds_0"], n), **more)  # fmt: skip
    return settings, tensors, bound, denoise


def watched(denoise: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
    """A denoiser and the x that it is called with."""
    seen: list[Tensor] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return denoise(x, t)

    return eps, seen


def check(steps: Any, tensors: dict[str, Tensor], bound: float):
    """Every step, in the reference's terms: x / sqrt(alpha)."""
    want, std = tensors["latents_per_step"], tensors["final_latents"].std()
    steps = list(steps)
    assert [step.t for step in steps] == tensors["timesteps"].tolist()
    for step, y in zip(steps, want, strict=True):
        got = step.x / SCHEDULE(step.s).sqrt().float()
        assert (got - y).abs().amax() < bound * std
    assert (steps[-1].x - tensors["final_latents"]).abs().amax() < bound * std


def test_text_is_encoded_as_in_the_reference():
    settings, tensors = CASES["02_text_encode"]["settings"], load_file(twins.CASES / "02_text_encode.safetensors")
    bound = CASES["02_text_encode"]["tolerance"]["atol"]

    def same(prompt: Any, context: str, pooled: str):
        assert (prompt.context - tensors[context]).abs().amax() < bound
        assert (prompt.pooled - tensors[pooled]).abs().amax() < bound

    text, no = settings["prompt"], settings["negative"]
    same(encode(parts(), text), "prompt_embeds", "pooled")
    same(encode(parts(), no), "negative_prompt_embeds", "negative_pooled")
    same(encode(parts(), text, settings["prompt_2"]), "two_prompt_embeds", "two_prompt_pooled")
    same(encode(parts(), no, settings["negative_2"]), "two_prompt_negative_embeds", "two_prompt_negative_pooled")
    same(encode(parts(), text, clip_skip=1), "clip_skip1_prompt_embeds", "pooled")
    both = encode(parts(), settings["texts"])
    assert (both.context[..., :24] - tensors["clip_l_penultimate"]).abs().amax() < bound
    assert (both.context[..., 24:] - tensors["clip_g_penultimate"]).abs().amax() < bound
    assert both.pooled is not None
    assert (both.pooled - tensors["clip_g_pooled"]).abs().amax() < bound
    again = encode_ids(parts(), [tensors["input_ids_1"], tensors["input_ids_2"]])
    assert torch.equal(again.context, both.context)


@pytest.mark.parametrize(("name", "n"), [("08e_sample_euler_all_zero_negative", 2), ("08g_sample_euler_no_cfg", 1)])
def test_text_to_image_is_the_reference(name: str, n: int):
    settings, tensors, bound, denoise = prepared(name, n)
    denoise, seen = watched(denoise)
    path = leading(settings["steps"], offset=1)
    check(ddim(denoise, tensors["latents_unit"], SCHEDULE, path), tensors, bound)
    times = len(tensors["model_input_0"]) // n
    assert torch.allclose(seen[0].repeat(times, 1, 1, 1), tensors["model_input_0"], atol=1e-6)


def test_inpainting_with_nine_channels_is_the_reference():
    settings, tensors, _ = case("09a_inpaint_9ch")
    state = {**parts().unet.state_dict(), "enc.0.0.weight": tensors["conv_in_weight_9ch"]}
    unet = build("unet", {**vars(parts().unet.cfg), "in_channels": 9}, state)
    canvas = t2i.canvas(tensors["latent_mask"], tensors["masked_image_latents"])
    settings, tensors, bound, denoise = prepared("09a_inpaint_9ch", unet=unet, canvas=canvas)
    path = t2i.tail(leading(settings["steps_requested"], offset=1), settings["strength"])
    x = noised(tensors["image_latents"], tensors["noise"], SCHEDULE(path[0]))
    assert torch.allclose(torch.cat([x, canvas], 1).repeat(2, 1, 1, 1), tensors["model_input_0"], atol=1e-5)
    check(ddim(denoise, x, SCHEDULE, path), tensors, bound)


def test_inpainting_with_four_channels_is_the_reference():
    settings, tensors, bound, denoise = prepared("09b_inpaint_4ch")
    path = t2i.tail(leading(settings["steps_requested"], offset=1), settings["strength"])
    x0, z = tensors["image_latents"], tensors["noise"]
    x = noised(x0, z, SCHEDULE(path[0]))
    check(t2i.repainted(ddim, denoise, x, SCHEDULE, path, x0, z, tensors["latent_mask"]), tensors, bound)


def test_a_controlnet_beside_an_image_prompt_is_the_reference():
    found = latent.load(twins.TINY / "controlnet")
    net = build(found.family, found.config, found.tensors, dtype=torch.float32)
    settings, tensors, _ = case("10_controlnet_style")
    hint = tensors["control_image"].float().expand(-1, 3, -1, -1)
    control = Control(net=net, hint=hint, scale=settings["controlnet_conditioning_scale"])
    settings, tensors, bound, denoise = prepared("10_controlnet_style", controls=[control])
    x, path = tensors["latents_unit"], leading(settings["steps"], offset=1)
    prompt = encode(parts(), settings["prompt"])
    embed = conditioning(net, prompt, size_ids((settings["height"], settings["width"])))
    residuals = control.residuals(x, torch.tensor([path[0]]), embed)
    assert (residuals.h - tensors["mid_residual_0"]).abs().amax() < CASES["10_controlnet_style"]["tolerance"][
        "residual_atol"
    ]
    for i, skip in enumerate(residuals.skips):
        assert (skip - tensors[f"down_residual_0_{i}"]).abs().amax() < 1e-4
    check(ddim(denoise, x, SCHEDULE, path), tensors, bound)


def test_rescaled_guidance_and_a_ddim_step_of_given_predictions_are_the_reference():
    settings, tensors, bound = case("08f_sample_ddim_two_adapters_rescale")
    eps = guide(*halves(tensors["model_output_0"]), settings["guidance_scale"], settings["guidance_rescale"])
    path = leading(settings["steps"], offset=1, end=0)
    assert path[:-1] == tensors["timesteps"].tolist()
    x, _ = ddim_step(tensors["latents_unit"], eps, SCHEDULE(path[0]), SCHEDULE(path[1]))
    assert (x - tensors["latents_per_step"][0]).abs().amax() < bound * tensors["final_latents"].std()

"""Image prompts against diffusers' loader, scales and masks, on random weights in the published layout."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.methods.instant_style import ImagePrompt, Pictures, features, image_prompt, instant_style
from diaphane.methods.prompt import encode, size_ids
from diaphane.methods.scales import scales
from diaphane.methods.text_to_image import denoiser
from diaphane.model.image_prompt import IPAdapter, IPAdapterConfig, widths
from diaphane.model.latent import build
from diaphane.model.ops import TORCH
from diaphane.model.pixels import clip_pixels
from diaphane.model.unet import UNet, UNetConfig
from diaphane.samplers.ddim import ddim
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import ip_adapter
from diaphane.weights import unet as table
from diffusers.loaders import IPAdapterMixin
from PIL import Image
from torch import Tensor

from . import latent_twins as twins
from .golden_image_prompt import LINEAR, PLUS, adapter
from .golden_instantstyle import tower
from .golden_latent import parts
from .test_weights_ip_adapter import keys

READS = 18
SIZE = (8, 12)
CONFIGS = {"xl": twins.XL, "sd1": twins.SD1}
KINDS = {
    "linear": {"reads": READS, "tokens": 4},
    "plus": {"kind": "plus", "reads": READS, "tokens": 3, "width": 20, "layers": 4, "heads": 2, "mlp": 80},
    "full": {"kind": "full", "reads": READS, "mlp": READS},
}


class Scaled(IPAdapterMixin):
    """As much of a pipeline as setting scales needs."""

    unet_name = "unet"

    def __init__(self, unet: Any):
        self.unet = unet


@cache
def nets(name: str) -> tuple[Any, UNet]:
    """diffusers' UNet and ours around the same random weights."""
    cfg = CONFIGS[name]
    torch.manual_seed(1)
    twin = twins.diffusers_unet(cfg)
    with torch.no_grad():
        twins.randomised(twin)
    unet = UNet(cfg).eval().requires_grad_(False)
    unet.load_state_dict(twins.ours(twin.state_dict(), table, table.DIFFUSERS))
    return twin, unet


def drawn(cfg: UNetConfig, kind: str, seed: int) -> dict[str, Tensor]:
    """An adapter's file of random numbers."""
    g = torch.Generator().manual_seed(seed)
    whole = IPAdapterConfig(**KINDS[kind], context_dim=cfg.context_dim, sites=widths(cfg))  # type: ignore[arg-type]
    return {key: torch.randn(shape, generator=g) / max(shape[-1], 1) ** 0.5 * 2 for key, shape in keys(whole).items()}


def loaded(file: dict[str, Tensor]) -> tuple[IPAdapter, dict[str, dict[str, Tensor]]]:
    """Ours, and the nested form that diffusers takes."""
    plan, tensors = ip_adapter.renamed(file)
    nested = {
        part: {key.removeprefix(f"{part}."): t for key, t in file.items() if key.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    return build("ip_adapter", plan.config(), tensors), nested


def compared(name: str, kinds: list[str], said: list[Any], images: list[int], masks: list[Tensor] | None = None):
    """Both networks with adapters of these kinds, scales, numbers of images, and perhaps masks (1, n, H, W)."""
    twin, unet = nets(name)
    cfg = unet.cfg
    g = torch.Generator().manual_seed(2)
    pairs = [loaded(drawn(cfg, kind, i + 5)) for i, kind in enumerate(kinds)]
    twin._load_ip_adapter_weights([nested for _, nested in pairs])
    Scaled(twin).set_ip_adapter_scale(said)
    rows = 4  # of no picture, then of pictures
    states = [
        torch.randn(rows, n, *(() if kind == "linear" else (6,)), READS, generator=g)
        for kind, n in zip(kinds, images, strict=True)
    ]
    x, context = torch.randn(rows, 4, *SIZE, generator=g), torch.randn(rows, 5, cfg.context_dim, generator=g)
    pooled, ids = torch.randn(rows, cfg.pooled_dim or 1, generator=g), torch.rand(rows, 6, generator=g) * 9
    more = {"text_embeds": pooled, "time_ids": ids} if cfg.pooled_dim else {}
    theirs = twin(x, 601, context, added_cond_kwargs={**more, "image_embeds": states},
                  cross_attention_kwargs={"ip_adapter_masks": masks} if masks else None).sample  # fmt: skip
    prompts: list[ImagePrompt] = []
    for i, (net, _) in enumerate(pairs):
        made = net(states[i].flatten(0, 1)).unflatten(0, (rows, images[i]))
        scale = scales(cfg, {"all": said[i]} if isinstance(said[i], list) else said[i])
        mask = {} if masks is None else {"masks": masks[i], "size": SIZE}
        prompts.append(image_prompt(net, cfg, Pictures(made[2:], made[:2]), scale, **mask))
    c = unet.embed(torch.full((rows,), 601), context, *((pooled, ids) if cfg.pooled_dim else ()))
    ours, plain = unet(x, c, instant_style(TORCH, prompts)), unet(x, c)
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4), float((ours - theirs).abs().max())
    assert float((ours - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_any_kind_is_diffusers(name: str, kind: str):
    compared(name, [kind], [0.8], [1])


@pytest.mark.parametrize(
    "said",
    [
        {"up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_1": [0.3, 0.0], "block_2": 0.7}, "mid": 0.25, "up": {"block_1": 0.15}},
        {"down": 0.5},
        {"up": 0.4, "mid": [0.7]},
        {"down": {"block_2": [0.6]}},
    ],
)
def test_nested_scales_mean_what_they_mean_in_diffusers(said: dict):
    compared("xl", ["linear"], [said], [1])


def test_several_adapters_and_images_are_diffusers():
    compared("xl", ["linear", "plus"], [0.7, {"up": {"block_0": [0.0, 1.0, 0.0]}}], [3, 2])


def test_masks_and_numbers_of_images_are_diffusers():
    g = torch.Generator().manual_seed(7)
    high, wide = (8 * side for side in SIZE)
    masks = [torch.rand(1, n, high, wide, generator=g).round() for n in (2, 1)]
    compared("xl", ["linear", "plus"], [[1.0, 0.4], 0.8], [2, 1], masks)
    compared("sd1", ["linear"], [{"up": {"block_1": [[0.3, 1.0]] * 3}}], [2], masks[:1])


@pytest.mark.parametrize(("file", "eye"), [(LINEAR, "image_encoder"), (PLUS, "image_encoder_vit_h")])
def test_a_picture_file_is_drawn_from_as_in_diffusers_pipeline(file: str, eye: str):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    rows = np.random.default_rng(0).integers(0, 255, (90, 47, 3), dtype=np.uint8)
    picture, path = Image.fromarray(rows), leading(2, offset=1, end=0)
    encoder = CLIPVisionModelWithProjection.from_pretrained(twins.TINY / eye, dtype=torch.float32)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        twins.TINY, dtype=torch.float32, image_encoder=encoder,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(twins.TINY), subfolder="ip_adapter", weight_name=file, image_encoder_folder=None)
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 0.9, 0.0]}})
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe("a cat", negative_prompt="low", ip_adapter_image=picture, height=64, width=64, latents=x,
                  num_inference_steps=2, guidance_scale=5.0, output_type="latent").images  # fmt: skip
    unet, net, vit = parts().unet, adapter(file), tower(eye)
    with torch.no_grad():
        states = features(net, vit, clip_pixels(picture, 56))
        seen = Pictures(net(states)[None], net(net.nothing(vit))[None])
        prompt = image_prompt(net, unet.cfg, seen, scales(unet.cfg, {"style": 0.9}))
        denoise = denoiser(unet, encode(parts(), "a cat"), encode(parts(), "low"), schedule=scaled_linear(),
                           ids=size_ids((64, 64)), guidance=5.0, ops=instant_style(TORCH, [prompt]))  # fmt: skip
        *_, last = ddim(denoise, x, scaled_linear(), path)
    assert float((last.x - theirs).abs().max() / theirs.std()) < 1e-4

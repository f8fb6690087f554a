"""ControlNets: diffusers' residuals, the reference data, both layouts, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diaphane.model import controlnet, unet
from diaphane.model.latent import build
from diaphane.weights import controlnet as table
from diaphane.weights import unet as unet_table
from diaphane.weights.errors import ConfigError
from diaphane.weights.latent import load
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

F64 = torch.float64
HINT = (4, 6, 8, 10)
SMALLER = {
    "xl mid": replace(twins.XL, depth=(0, 0, 1), mid_depth=1, hollow=(1,)),
    "xl small": replace(twins.XL, depth=(0, 0, 0), mid_depth=0),
    "plain middle": replace(twins.XL, mid_depth=0, plain_mid=True),
    "nothing but convolutions": replace(twins.XL, depth=(0, 0, 0), mid_depth=0, plain_mid=True),
}
CONFIGS = SMALLER | {
    "xl": twins.XL,
    "refiner": twins.REFINER,
    "sd1": twins.SD1,
    "sd2": replace(twins.SD2, in_channels=4),
}


def config(name: str) -> controlnet.ControlNetConfig:
    return replace(controlnet.controlling(CONFIGS[name]), hint=HINT)


def base(name: str) -> unet.UNetConfig:
    """The UNet that a ControlNet is for."""
    return twins.XL if name in SMALLER else CONFIGS[name]


def inputs(
    cfg: unet.UNetConfig, dtype: torch.dtype, size: tuple[int, int] = (4, 8)
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """x, t, conditioning and a hint for two images."""
    height, width = size
    gen = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=F64).to(dtype)

    cond = {"context": draw(2, 5, cfg.context_dim)}
    if cfg.pooled_dim:
        cond |= {"pooled": draw(2, cfg.pooled_dim), "ids": (1000 * draw(2, cfg.ids)).abs().round()}
    x = draw(2, cfg.in_channels, height, width)
    return x, torch.tensor([31, 876]), cond, draw(2, 3, 8 * height, 8 * width).sigmoid()


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().amax() < bound * want.abs().amax()


@pytest.mark.parametrize("size", [(4, 8), (5, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_and_what_a_unet_makes_of_them_are_diffusers_own(name: str, size: tuple[int, int]):
    torch.manual_seed(13)
    cfg = config(name)
    control, plain = twins.diffusers_controlnet(cfg, HINT), twins.diffusers_unet(base(name))
    for twin in (control, plain):
        twins.randomised(twin)
    net, body = controlnet.ControlNet(cfg).eval(), unet.UNet(base(name)).eval()
    net.load_state_dict(twins.ours(control.state_dict(), table, table.DIFFUSERS), strict=True, assign=True)
    body.load_state_dict(twins.ours(plain.state_dict(), unet_table, unet_table.DIFFUSERS), strict=True, assign=True)
    for dtype, bound in ((torch.float32, 1e-5), (F64, 1e-10)):
        net, body = net.to(dtype), body.to(dtype)
        if dtype == F64:
            control, plain = twins.in_float64(control, cfg), twins.in_float64(plain, cfg)
        x, t, cond, hint = inputs(cfg, dtype, size)
        t = t.to(dtype) if dtype == F64 else t
        more = {"added_cond_kwargs": {"text_embeds": cond["pooled"], "time_ids": cond["ids"]}} if cfg.pooled_dim else {}
        skips, h = control(x, t, cond["context"], hint, conditioning_scale=0.7, return_dict=False, **more)
        got = net(x, net.embed(t, **cond), hint).scaled(0.7)
        close(got.h, h, bound)
        assert len(got.skips) == len(skips)
        for ours, theirs in zip(got.skips, skips, strict=True):
            close(ours, theirs, bound)

        residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": h}
        want = plain(x, t, cond["context"], **residuals, **more).sample
        c = body.embed(t, **cond)
        bottom, emitted = body.encode(x, c)
        close(body.decode(*controlnet.controlled(body.middle(bottom, c), emitted, got), c), want, bound)


def test_the_tiny_controlnet_has_the_reference_residuals():
    case = load_file(twins.CASES / "10_controlnet_style.safetensors")
    text = load_file(twins.CASES / "02_text_encode.safetensors")
    cfg = controlnet.ControlNetConfig(
        channels=(32, 64, 96), depth=(0, 2, 3), mid_depth=3, head_dim=16, context_dim=64, pooled_dim=40, id_dim=8,
        hint=(8, 8, 16, 16),
    )  # fmt: skip
    tensors = load_file(twins.TINY / "controlnet" / "diffusion_pytorch_model.safetensors")
    net = controlnet.ControlNet(cfg).eval().requires_grad_(False)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    net.load_state_dict(twins.ours(tensors, table, table.DIFFUSERS), strict=True, assign=True)
    ids = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
    c = net.embed(case["timesteps"][:1], text["prompt_embeds"], text["pooled"], ids)
    hint = case["control_image"].float().expand(-1, 3, -1, -1)  # its values are 0 and 1
    got = net(case["latents_unit"], c, hint).scaled(0.6)  # at the first step x / sqrt(sigma^2 + 1) is the unit noise
    assert (got.h - case["mid_residual_0"]).abs().amax() < 1e-4
    for i, skip in enumerate(got.skips):
        assert (skip - case[f"down_residual_0_{i}"]).abs().amax() < 1e-4, i


def as_ldm(plan: table.Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under LDM's names, projections as convolutions."""
    keys = {rule.name: rule.key for rule in table.table(plan, table.LDM)}
    conv = ("proj_in.weight", "proj_out.weight")
    return {keys[name]: t[:, :, None, None] if name.endswith(conv) else t for name, t in tensors.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_ldms_layout_is_the_same_network_and_its_plan_is_read_from_its_shapes(name: str):
    cfg = config(name)
    want = controlnet.ControlNet(cfg).state_dict()
    theirs = twins.diffusers_controlnet(cfg, HINT).state_dict()
    plan = table.plan({key: tuple(t.shape) for key, t in theirs.items()}, table.DIFFUSERS)
    ldm = as_ldm(plan, want)
    assert {"input_hint_block.0.weight", "input_hint_block.14.bias", "middle_block_out.0.weight"} <= set(ldm)
    assert table.plan({key: tuple(t.shape) for key, t in ldm.items()}, table.LDM) == plan
    got = twins.ours(ldm, table, table.LDM)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert {name: getattr(cfg, name) for name in plan.config()} == plan.config()


PUBLISHED = {
    "SDXL_CONTROL": 1_251_014_160,
    "SDXL_CONTROL_MID": 272_586_000,
    "SDXL_CONTROL_SMALL": 160_111_120,
    "SD15_CONTROL": 361_279_120,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_controlnet_has_its_parameters(name: str):
    with torch.device("meta"):
        net = controlnet.ControlNet(getattr(controlnet, name))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", SMALLER)
def test_a_smaller_controlnet_is_read_from_its_shapes_and_a_config_json_that_contradicts_them_is_an_error(
    name: str, tmp_path: Path
):
    cfg = config(name)
    twins.diffusers_controlnet(cfg, HINT).save_pretrained(tmp_path)
    found = load(tmp_path)
    net = build(found.family, found.config, found.tensors)
    said = {"depth": cfg.depth, "plain_mid": cfg.plain_mid, "hollow": cfg.hollow, "context_dim": cfg.context_dim}
    assert {key: getattr(net.cfg, key) for key in said} == said
    told = json.loads((tmp_path / "config.json").read_text())
    bare = load(tmp_path, config={}, head_dim=cfg.head_dim, groups=cfg.groups, id_dim=cfg.id_dim)
    want = cfg.context_dim if any(cfg.depth) or cfg.mid_depth else 2048
    one, two = ({**part.config, "heads": 0, "head_dim": 0} for part in (bare, found))  # where no head is, any number
    assert one == two | {"context_dim": want}
    other = "UNetMidBlock2DCrossAttn" if cfg.plain_mid else "UNetMidBlock2D"
    with pytest.raises(ConfigError, match=f"mid_block_type = {other}"):
        load(tmp_path, config=told | {"mid_block_type": other})


def test_a_hollow_level_that_is_not_empty_is_an_error():
    for hollow in ((1,), (3,), (-1,)):
        with pytest.raises(ValueError, match=rf"level {hollow[0]} is hollow where it has depth 0"):
            replace(twins.XL, hollow=hollow)


def test_shapes_that_do_not_fit_are_errors_that_say_what_does():
    cfg = config("xl")
    net = controlnet.ControlNet(cfg).double()
    x, t, cond, hint = inputs(cfg, F64)
    c = net.embed(t, **cond)
    with pytest.raises(ValueError, match=r"is \(2, 3, 32, 64\); got \(2, 3, 32, 56\)"):
        net(x, c, hint[..., 8:])
    with pytest.raises(ValueError, match=r"takes x \(B, 4, H, W\); got \(2, 3, 4, 8\)"):
        net(x[:, 1:], c, hint)
    residuals = net(x, c, hint)
    body = unet.UNet(CONFIGS["sd1"]).double()
    x, t, cond, _ = inputs(CONFIGS["sd1"], F64)
    h, skips = body.encode(x, body.embed(t, **cond))
    with pytest.raises(ValueError, match="made for another UNet"):
        controlnet.controlled(h, skips, residuals)


def test_a_residual_of_zero_changes_nothing():
    cfg = config("sd2")
    net = controlnet.ControlNet(cfg).double().requires_grad_(False)
    for p in (*net.zeros.parameters(), *net.zero_mid.parameters()):
        p.zero_()
    x, t, cond, hint = inputs(cfg, F64)
    residuals = net(x, net.embed(t, **cond), hint)
    h, skips = torch.randn_like(residuals.h), [torch.randn_like(skip) for skip in residuals.skips]
    got = controlnet.controlled(h, skips, residuals)
    assert torch.equal(got[0], h)
    assert all(torch.equal(a, b) for a, b in zip(got[1], skips, strict=True))

"""diffusers, both ways: what it saves we load, what we write it loads, and what we do not do is refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diaphane.model.load import build
from diaphane.weights.errors import ConfigError
from diaphane.weights.export import write_diffusers_ddpm
from diaphane.weights.files import read_json
from diaphane.weights.load import Network, load
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
DDPM, ADM = GOLDEN / "tiny-ddpm", GOLDEN / "tiny-adm"


def eps(net: Network, x: Tensor, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output of a loaded network."""
    unet = build(net.family, net.config, net.tensors, dtype=dtype)
    return unet(x.to(dtype), unet.embed(t))  # type: ignore[operator]


@pytest.fixture(scope="module")
def noise() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(x=torch.randn(2, 3, 32, 32, generator=generator), t=torch.tensor([7, 801]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("act_fn", "gelu"), ("flip_sin_to_cos", True), ("freq_shift", 0), ("downsample_padding", 1), ("norm_eps", 1e-5),
        ("resnet_time_scale_shift", "scale_shift"), ("class_embed_type", "timestep"), ("num_class_embeds", 10),
        ("time_embedding_type", "fourier"), ("center_input_sample", True), ("mid_block_scale_factor", 1.41),
        ("downsample_type", "resnet"), ("attention_head_dim", 8), ("attn_norm_num_groups", 16),
        ("add_attention", False),
        ("_class_name", "UNet2DConditionModel"), ("layers_per_block", 2), ("block_out_channels", [32, 64, 96]),
        ("norm_num_groups", 48), ("down_block_types", ["DownBlock2D"] * 3), ("in_channels", 4), ("sample_size", 2),
    ],
)  # fmt: skip
def test_a_diffusers_setting_that_our_network_does_not_do_is_refused_by_name(name: str, value: object):
    config = read_json(DDPM / "diffusers" / "config.json") | {name: value}
    with pytest.raises(ConfigError) as caught:
        load(DDPM / "diffusers", config=config)
    hint = {"_class_name": "UNet2DConditionModel", "layers_per_block": "blocks", "norm_num_groups": "48 groups",
            "down_block_types": "attention", "sample_size": "resolution 2"}  # fmt: skip
    assert hint.get(name, name) in str(caught.value)


def test_diffusers_defaults_hold_for_what_its_config_leaves_out():
    config = read_json(DDPM / "diffusers" / "config.json")
    del config["flip_sin_to_cos"]
    with pytest.raises(ConfigError, match="flip_sin_to_cos = True; ddpm here does False only"):
        load(DDPM / "diffusers", config=config)


UNETS = {
    "groups of 8": {"block_out_channels": (24, 48), "layers_per_block": 1, "norm_num_groups": 8, "attention": (1,)},
    "three levels": {
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention": (0, 2),
    },
    "one channel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "attention": (),
        "in_channels": 1,
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_what_diffusers_saves_we_load_to_the_same_outputs(tmp_path: Path, name: str):
    diffusers = pytest.importorskip("diffusers")
    more = {"in_channels": 3, **UNETS[name]}
    attention, levels = more.pop("attention"), len(more["block_out_channels"])
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=16, out_channels=more["in_channels"], downsample_padding=0, norm_eps=1e-6, flip_sin_to_cos=False,
        freq_shift=1, attention_head_dim=None,
        down_block_types=["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(levels)],
        up_block_types=["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(levels))], **more,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    net = load(tmp_path)
    assert net.config["groups"] == more["norm_num_groups"]
    x, t = torch.randn(2, more["in_channels"], 16, 16), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(eps(net, x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [None, 5])
def test_an_adm_that_diffusers_saves_we_load_to_the_same_outputs(tmp_path: Path, classes: int | None):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=16, out_channels=6, block_out_channels=(32, 64), layers_per_block=1, num_class_embeds=classes,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet", upsample_type="resnet",
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, attention_head_dim=16,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    net = load(tmp_path)
    assert (net.family, net.config["head_dim"], net.config["qkv"], net.config["classes"]) == ("adm", 16, "new", classes)
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), torch.tensor([0, 4])
    unet = build(net.family, net.config, net.tensors)
    with torch.no_grad():
        c = unet.embed(t, **({"label": label} if classes else {}))  # type: ignore[operator]
        torch.testing.assert_close(unet(x, c), theirs(x, t, label if classes else None).sample, rtol=1e-5, atol=1e-5)


def test_adm_thirds_in_diffusers_names_are_the_fused_tensor_again(tmp_path: Path, noise: SimpleNamespace):
    tensors, named = load_file(ADM / "model.safetensors"), {}
    blocks = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
        "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0",
    }  # fmt: skip
    whole = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "out.0": "conv_norm_out",
        "out.2": "conv_out", "input_blocks.0.0": "conv_in",
    }  # fmt: skip
    # three levels of one block: stages 1, 3, 5 are blocks, 2 and 4 halve; the decoder doubles in stages 1 and 3
    for key, tensor in tensors.items():
        module, _, p = key.rpartition(".")
        if module in whole:
            named[f"{whole[module]}.{p}"] = tensor
            continue
        side, *rest = module.split(".")
        if side == "middle_block":
            member, leaf = int(rest[0]), ".".join(rest[1:])
            at = "mid_block." + ("attentions.0" if member == 1 else f"resnets.{member // 2}")
        else:
            k, member, leaf = int(rest[0]), int(rest[1]), ".".join(rest[2:])
            k -= side == "input_blocks"
            attends = leaf in ("norm", "qkv", "proj_out")
            resamples = k % 2 == 1 and (side == "input_blocks" or (member and not attends))
            kind = "attentions" if attends else "samplers" if resamples else "resnets"
            number = "0" if resamples or side == "input_blocks" else str(k % 2)
            word = "down" if side == "input_blocks" else "up"
            at = f"{word}_blocks.{k // 2}.{word * (kind == 'samplers')}{kind}.{number}"
        if leaf == "qkv":
            named |= {f"{at}.to_{x}.{p}": t.squeeze(-1) for x, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            named[f"{at}.{blocks[leaf]}.{p}"] = tensor.squeeze(-1) if leaf == "proj_out" else tensor
    save_file({key: t.contiguous() for key, t in named.items()}, tmp_path / "model.safetensors")
    config = {
        "_class_name": "UNet2DModel", "time_embedding_type": "adm", "attention_legacy_order": True, "sample_size": 32,
        "attention_head_dim": 16, "resnet_time_scale_shift": "scale_shift", "out_channels": 6, "layers_per_block": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = load(tmp_path)
    assert torch.equal(eps(net, noise.x, noise.t), eps(load(ADM), noise.x, noise.t))


def test_what_we_write_diffusers_reads_to_the_same_outputs(tmp_path: Path, noise: SimpleNamespace):
    diffusers = pytest.importorskip("diffusers")
    net = load(DDPM)
    path = write_diffusers_ddpm(tmp_path / "out", net.config, net.tensors, {"recipe": "none"})
    back = load(tmp_path / "out")
    assert back.metadata["recipe"] == "none"
    assert back.config == net.config | {"groups": 32}
    assert all(torch.equal(t, net.tensors[name]) for name, t in back.tensors.items())
    theirs = diffusers.UNet2DModel.from_pretrained(path.parent).float().eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(noise.x, noise.t).sample, eps(net, noise.x, noise.t), rtol=1e-5, atol=1e-5)

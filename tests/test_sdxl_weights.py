"""Published key lists of latent diffusion models, their layouts, and loading one part of a file or a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.model import clip, controlnet, latent, unet, vae
from diaphane.weights import clip as clip_table
from diaphane.weights import controlnet as controlnet_table
from diaphane.weights import unet as unet_table
from diaphane.weights import vae as vae_table
from diaphane.weights.errors import ConfigError, LayoutError, MissingFileError
from diaphane.weights.latent import detect, load, parts, renamed
from diaphane.weights.latent_settings import settings
from diaphane.weights.names import transposed
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import latent_twins as twins

KEYS = Path(__file__).parent / "keys"
Shapes = dict[str, tuple[int, ...]]
SINGLE = twins.TINY / "single_file.safetensors"
TINY_UNET = {"head_dim": 16, "id_dim": 8}


def listed(name: str) -> Shapes:
    """A key list of tests/keys."""
    lines = (line.split() for line in (KEYS / f"{name}.txt").read_text().splitlines())
    return {key: tuple(int(n) for n in shape.split(",")) for key, shape in lines}


def meta(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors of these shapes that hold nothing."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


PUBLISHED: dict[str, tuple[Any, str, Any, int, dict[str, Any]]] = {
    "sdxl-unet": (unet_table, "unet", unet.SDXL, 2_567_463_684, {}),
    "sdxl-inpaint-unet": (unet_table, "unet", unet.SDXL_INPAINT, 2_567_478_084, {}),
    "sdxl-refiner-unet": (unet_table, "unet", unet.SDXL_REFINER, 2_259_526_660, {}),
    "sd15-unet": (unet_table, "unet", unet.SD15, 859_520_964, {}),
    "sd21-unet": (unet_table, "unet", unet.SD21, 865_910_724, {}),
    "sdxl-controlnet": (controlnet_table, "controlnet", controlnet.SDXL_CONTROL, 1_251_014_160, {}),
    "sdxl-controlnet-mid": (controlnet_table, "controlnet", controlnet.SDXL_CONTROL_MID, 272_586_000, {}),
    "sdxl-controlnet-small": (controlnet_table, "controlnet", controlnet.SDXL_CONTROL_SMALL, 160_111_120, {}),
    "sd15-controlnet": (controlnet_table, "controlnet", controlnet.SD15_CONTROL, 361_279_120, {}),
    "vae": (vae_table, "vae", vae.SDXL_VAE, 83_653_863, {"scaling": 0.13025}),
    "clip-l-text": (clip_table, "clip_text", clip.TEXT_L, 123_060_480, {}),
    "clip-h-text": (clip_table, "clip_text", clip.TEXT_H, 354_032_640, {}),
    "clip-g-text": (clip_table, "clip_text", clip.TEXT_G, 694_659_840, {}),
    "clip-h-vision": (clip_table, "clip_vision", clip.VISION_H, 632_076_800, {}),
    "clip-g-vision": (clip_table, "clip_vision", clip.VISION_G, 1_844_907_264, {}),
}
# besides diffusers' and transformers' of the lists: the column of the single files, where 1 x 1 convolutions are such
LDM_CONV = ("proj_in.weight", "proj_out.weight", ".q.weight", ".k.weight", ".v.weight")


def single(tables: Any, plan: Any, convolutions: bool) -> Shapes:
    """The key list of the single files' layout, from a table: our shapes as that layout stores them."""
    want, out = tables.want(plan), {}
    for rule in tables.table(plan, 1):
        shape = want[rule.name]
        if rule.view is transposed:
            shape = shape[::-1]
        elif convolutions and rule.key.endswith(LDM_CONV):
            shape = (*shape, 1, 1)
        out[rule.key] = shape
    return out


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_key_list_is_a_bijection_onto_our_network_in_both_layouts(name: str):
    tables, family, published, parameters, given = PUBLISHED[name]
    layout, plan, ours = renamed(meta(listed(name)))
    assert (layout.family, layout.tables) == (family, tables)
    assert sum(tensor.numel() for tensor in ours.values()) == parameters
    kwargs = settings(family, plan, {}, given, {})  # no config.json
    part, config = latent.PARTS[family]
    assert config(**kwargs) == published
    with torch.device("meta"):
        net = part(published)
    assert {key: tuple(t.shape) for key, t in net.state_dict().items()} == tables.want(plan)
    latent.build(family, kwargs, ours)

    other, again, theirs = renamed(meta(single(tables, plan, family != "clip_text")))
    assert (other.family, other.column, again) == (family, 1, plan)
    assert list(theirs) == list(ours)


@pytest.mark.parametrize("name", ["sdxl-unet", "sdxl-refiner-unet", "sd15-unet", "sd21-unet"])
def test_the_single_files_keys_are_those_that_diffusers_converts(name: str):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    _, plan, _ = renamed(meta(listed(name)))
    file = {f"model.diffusion_model.{k}": shape for k, shape in single(unet_table, plan, name == "sd15-unet").items()}
    config = {"layers_per_block": plan.blocks, "class_embed_type": None}
    config |= {"addition_embed_type": "text_time" if plan.vector_dim else None}
    theirs = convert_ldm_unet_checkpoint(meta(file), config)
    assert {key: tuple(t.shape) for key, t in theirs.items()} == listed(name)


def test_the_single_files_autoencoder_is_the_one_that_diffusers_converts():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    _, plan, _ = renamed(meta(listed("vae")))
    file = meta({f"first_stage_model.{k}": shape for k, shape in single(vae_table, plan, True).items()})
    config = {"down_block_types": plan.channels, "up_block_types": plan.channels}
    theirs = convert_ldm_vae_checkpoint(file, config)
    assert {key: tuple(t.shape) for key, t in theirs.items()} == listed("vae")


@pytest.mark.parametrize("name", ["sdxl-controlnet", "sd15-controlnet"])
def test_the_single_files_controlnet_is_the_one_that_diffusers_converts(name: str):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    _, plan, _ = renamed(meta(listed(name)))
    file = single(controlnet_table, plan, name == "sd15-controlnet")
    config = {"layers_per_block": plan.blocks, "class_embed_type": None}
    config |= {"addition_embed_type": "text_time" if plan.vector_dim else None}
    theirs = convert_controlnet_checkpoint(meta({f"control_model.{k}": shape for k, shape in file.items()}), config)
    want = {key: shape for key, shape in listed(name).items() if "add_embedding" not in key}  # it forgets these
    assert {key: tuple(t.shape) for key, t in theirs.items()} == want


def test_the_key_map_of_the_tiny_single_file_agrees_with_every_table():
    said = json.loads((twins.TINY / "single_file_key_map.json").read_text())
    held, implied = parts(load_file(SINGLE))
    assert list(held) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert implied == {"scaling": 0.13025}
    for part, tensors in held.items():
        layout, _, ours = renamed(tensors)
        file = "model" if "text" in part else "diffusion_pytorch_model"
        folder = renamed(load_file(twins.TINY / part / f"{file}.safetensors"))[2]
        assert layout.family in ("unet", "vae", "clip_text")
        assert all(torch.equal(ours[name], folder[name]) for name in folder)
    assert sum(len(tensors) for tensors in held.values()) + 1 == len(load_file(SINGLE))  # denoiser.sigmas
    assert {entry.get("component") for entry in said.values()} >= set(held)


FOLDERS = {
    "unet": (unet.UNet, "unet"),
    "vae": (vae.VAE, "vae"),
    "controlnet": (controlnet.ControlNet, "controlnet"),
    "text_encoder": (clip.TextTower, "clip_text"),
    "text_encoder_2": (clip.TextTower, "clip_text"),
    "image_encoder": (clip.VisionTower, "clip_vision"),
    "image_encoder_vit_h": (clip.VisionTower, "clip_vision"),
}


@pytest.mark.parametrize("part", FOLDERS)
def test_a_part_of_a_folder_is_loaded_with_its_config_and_runs(part: str):
    network, family = FOLDERS[part]
    found = load(twins.TINY, part)
    assert found.family == family
    net = latent.build(found.family, found.config, found.tensors, dtype=torch.float32)
    assert isinstance(net, network)
    assert not any(p.requires_grad for p in net.parameters())
    assert load(twins.TINY / part).config == found.config
    if family == "clip_text":
        quick = part == "text_encoder"
        assert (net.cfg.heads, net.cfg.act) == ((3, "quick_gelu") if quick else (5, "gelu"))
    if family == "unet":
        assert (net.cfg.head_dim, net.cfg.pooled_dim, net.cfg.ids, net.cfg.id_dim) == (16, 40, 6, 8)
    if family == "vae":
        assert net.cfg.scaling == 0.13025


def test_a_part_of_a_single_file_is_the_same_as_that_of_the_folder_and_shares_the_files_memory():
    given: dict[str, dict[str, Any]] = {
        "unet": TINY_UNET,
        "vae": {},
        "text_encoder": {"heads": 3, "act": "quick_gelu"},
        "text_encoder_2": {"heads": 5, "act": "gelu"},
    }
    for part, more in given.items():
        one, other = load(SINGLE, part, **more), load(twins.TINY, part)
        assert one.config | {"heads": 0} == other.config | {"heads": 0}
        net = latent.build(one.family, one.config, one.tensors)
        for name, p in net.named_parameters():
            assert p.data_ptr() == one.tensors[name].data_ptr()
            assert p.dtype == torch.float16


def test_a_file_of_several_parts_wants_one_named():
    with pytest.raises(LayoutError, match=r"it holds unet, vae, text_encoder, text_encoder_2: choose one with part="):
        load(SINGLE)
    with pytest.raises(LayoutError, match=r"it holds .*, not controlnet"):
        load(SINGLE, "controlnet")
    with pytest.raises(MissingFileError, match=r"there is no unnet in .*: it has controlnet, image_encoder"):
        load(twins.TINY, "unnet")
    with pytest.raises(MissingFileError, match="there is no /nowhere"):
        load("/nowhere", "unet")


def test_a_part_of_another_kind_is_refused():
    with pytest.raises(LayoutError, match="it is autoencoder, diffusers, which is no unet"):
        load(twins.TINY / "vae", "unet")
    with pytest.raises(LayoutError, match="it is CLIP for pictures, transformers, which is no text_encoder"):
        load(twins.TINY / "image_encoder" / "model.safetensors", "text_encoder")


def test_a_single_file_says_how_it_was_trained_and_a_stray_key_is_refused(tmp_path: Path):
    tensors = load_file(SINGLE)
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    found = load(tmp_path / "v.safetensors", "unet", **TINY_UNET)
    assert (found.metadata["prediction"], found.metadata["zero_terminal_snr"]) == ("v", "yes")
    assert "prediction" not in load(SINGLE, "unet", **TINY_UNET).metadata
    save_file(tensors | {"mystery.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(LayoutError, match=r"keys of no known part: 1 unexpected: mystery\.weight"):
        load(tmp_path / "odd.safetensors", "unet", **TINY_UNET)


@pytest.mark.parametrize(
    ("container", "scaling"), [("cond_stage_model.transformer.", 0.18215), ("conditioner.embedders.1.model.", 0.13025)]
)
def test_a_single_file_implies_its_autoencoders_scaling(container: str, scaling: float):
    held, implied = parts(meta({f"{container}x": (1,), "first_stage_model.y": (1,)}))
    assert implied["scaling"] == scaling
    assert held["vae"].keys() == {"y"}


def test_an_autoencoder_alone_wants_its_scaling(tmp_path: Path):
    shutil.copy(twins.TINY / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    with pytest.raises(ConfigError, match=r"give scaling=0\.13025 \(SDXL\) or 0\.18215"):
        load(tmp_path / "vae.safetensors")
    assert load(tmp_path / "vae.safetensors", scaling=0.5).config["scaling"] == 0.5


def test_a_whole_clip_is_two_parts_each_with_its_half_of_the_config(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(21)
    both = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "projection_dim": 6}
    text = both | {"num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 9, "eos_token_id": 59}
    vision = both | {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "hidden_act": "gelu"}
    twin = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval().requires_grad_(False)
    twin.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert "logit_scale" in load_file(file)
    with pytest.raises(LayoutError, match="it holds text_encoder, image_encoder: choose one"):
        load(tmp_path)
    one, two = load(tmp_path, "text_encoder"), load(file, "image_encoder")
    words, pictures = (latent.build(part.family, part.config, part.tensors) for part in (one, two))
    assert (words.cfg.act, words.cfg.eos, pictures.cfg.act, pictures.cfg.heads) == ("quick_gelu", 59, "gelu", 4)
    ids, pixels = torch.tensor([[1, 59, 3, 59], [4, 5, 6, 59]]), torch.randn(2, 3, 8, 8)
    want = twin.vision_model(pixels).pooler_output @ twin.visual_projection.weight.T
    assert torch.allclose(pictures(pixels).pooled, want, atol=1e-5)
    want = twin.text_model(ids).pooler_output @ twin.text_projection.weight.T
    assert torch.allclose(words(ids).pooled, want, atol=1e-5)


CONTRADICTIONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("unet", {"time_cond_proj_dim": 256}, {}, "time_cond_proj_dim = 256; unet here does None only"),
    ("unet", {"cross_attention_dim": 65}, {}, "context_dim = 65, the tensors say 64"),
    ("unet", {"transformer_layers_per_block": 2}, {}, r"transformer_layers_per_block = 2, the tensors \[0, 2, 3\]"),
    ("unet", {"attention_head_dim": [2, 4, 5]}, {}, "heads are alike in width or in number"),
    ("unet", {"attention_head_dim": "x"}, {}, "config.json is malformed"),
    ("unet", {}, {"head_dim": 7}, "64 channels do not divide into 7 channels a head"),
    ("unet", {}, {"ids": 11}, "leave 0 for the pooled text: give ids="),
    ("unet", {}, {"heads": 0}, "the caller says heads = 0"),
    ("unet", {}, {"sclaing": 1}, "unet has no setting sclaing; it has head_dim"),
    ("vae", {"scaling_factor": "big"}, {}, "scaling = 'big', which is no such number"),
    ("vae", {"shift_factor": 0.1}, {}, "shift_factor = 0.1"),
    ("text_encoder", {"layer_norm_eps": 1e-6}, {}, "layer_norm_eps = 1e-06; clip_text here does 1e-05 only"),
    ("text_encoder", {"hidden_size": 25}, {}, "width = 25, the tensors say 24"),
    ("text_encoder", {"hidden_act": "relu"}, {}, "hidden_act = 'relu'"),
    ("text_encoder", {}, {"heads": 5}, "24 channels do not divide into 5 heads"),
    ("image_encoder", {"patch_size": 7}, {}, "patch = 7, the tensors say 14"),
]


@pytest.mark.parametrize(("part", "config", "given", "what"), CONTRADICTIONS)
def test_settings_that_contradict_the_tensors_are_an_error_that_says_both(
    part: str, config: dict[str, Any], given: dict[str, Any], what: str
):
    said = json.loads((twins.TINY / part / "config.json").read_text()) | config
    with pytest.raises(ConfigError, match=what) as e:
        load(twins.TINY, part, config=said, **given)
    assert len(str(e.value).splitlines()) == 1


def test_what_no_published_network_tells_has_to_be_given():
    with pytest.raises(ConfigError, match="96 channels do not divide into 64 channels a head: give heads="):
        load(twins.TINY, "unet", config={})
    with pytest.raises(ConfigError, match="no published tower is 24 wide: give heads= and act="):
        load(twins.TINY, "text_encoder", config={})


def test_keys_of_nothing_known_are_an_error_that_shows_some():
    with pytest.raises(LayoutError, match=r"not the keys of a text-conditioned UNet.*\(lora_unet"):
        detect(["lora_unet_x.lora_down.weight"])
    with pytest.raises(LayoutError, match="there are none"):
        detect([])


def test_a_damaged_part_is_an_error_that_names_the_layout_and_the_keys(tmp_path: Path):
    tensors = load_file(twins.TINY / "unet" / "diffusion_pytorch_model.safetensors")
    tensors.pop("mid_block.resnets.1.conv2.bias")
    tensors["conv_out.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LayoutError, match=r"in the layout UNet, diffusers: 1 missing: mid_block\.resnets\.1") as e:
        load(tmp_path / "x.safetensors", **TINY_UNET)
    assert e.value.misshapen == ("conv_out.bias (5) should be (4)",)


def test_building_a_part_refuses_what_does_not_fit():
    found = load(twins.TINY, "vae")
    with pytest.raises(ValueError, match="there is no part 'vea': it is one of unet"):
        latent.build("vea", found.config, found.tensors)
    with pytest.raises(ValueError, match="VAEConfig has no colour"):
        latent.build("vae", found.config | {"colour": 1}, found.tensors)
    with pytest.raises(
        ValueError, match=r"the tensors are not this network's: quant\.bias should be \(8,\), and is absent"
    ):
        latent.build("vae", found.config, {k: t for k, t in found.tensors.items() if k != "quant.bias"})

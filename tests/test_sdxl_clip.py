"""CLIP's towers: transformers' numbers, the reference data, layouts, and what they refuse."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diaphane.model import clip
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.pixels import clip_pixels
from diaphane.model.tokenizer import Tokenizer
from diaphane.weights import clip as table
from diaphane.weights.errors import LayoutError
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

F64 = torch.float64
TEXTS = {
    "quick": clip.TextConfig(
        width=12, layers=3, heads=3, mlp=20, act="quick_gelu", projection=None, vocabulary=50, positions=9
    ),
    "exact": clip.TextConfig(width=16, layers=2, heads=4, mlp=24, projection=10, vocabulary=40, positions=7, eos=39),
}
VISION = clip.VisionConfig(width=12, layers=3, heads=3, mlp=20, projection=8, size=12, patch=4)


def transformers_text(cfg: clip.TextConfig) -> Any:
    """transformers' text tower of the same configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig(
        vocab_size=cfg.vocabulary,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp,
        projection_dim=cfg.projection or 512,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.positions,
        hidden_act=cfg.act,
        eos_token_id=2 if cfg.eos is None else cfg.eos,
        bos_token_id=0,
        pad_token_id=1,
    )
    build = CLIPTextModelWithProjection if cfg.projection else CLIPTextModel
    return build(settings).eval().requires_grad_(False)


def transformers_vision(cfg: clip.VisionConfig) -> Any:
    """transformers' vision tower of the same configuration."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings = CLIPVisionConfig(
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp,
        projection_dim=cfg.projection or 512,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        image_size=cfg.size,
        patch_size=cfg.patch,
        hidden_act=cfg.act,
    )
    return CLIPVisionModelWithProjection(settings).eval().requires_grad_(False)


def as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary of transformers, with or without the tower's name in front, under our names."""
    flat = not any(key.startswith(("text_model.", "vision_model.")) for key in tensors)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
    return twins.ours(kept, table, table.FLAT if flat else table.TRANSFORMERS)


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().amax() < bound * want.abs().amax()


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_tower_is_transformers_own(name: str):
    torch.manual_seed(4)
    cfg = TEXTS[name]
    twin = transformers_text(cfg)
    twins.randomised(twin)
    net = clip.TextTower(cfg).eval().requires_grad_(False)
    net.load_state_dict(as_ours(twin.state_dict()), strict=True, assign=True)
    ids = torch.randint(3, cfg.vocabulary - 1, (3, cfg.positions - 1))
    ids[0, 2] = ids[0, 4] = ids[1, -1] = ids[2, 0] = cfg.vocabulary - 1  # the end, twice in one text
    for dtype, bound in ((torch.float32, 1e-5), (F64, 1e-10)):
        net, twin = net.to(dtype), twin.to(dtype)
        got, want = net(ids), twin(ids, output_hidden_states=True)
        assert len(got.hidden) == len(want.hidden_states) == cfg.layers + 1
        for ours, theirs in zip(got.hidden, want.hidden_states, strict=True):
            close(ours, theirs, bound)
        close(got.last, want.last_hidden_state, bound)
        close(got.pooled, want.text_embeds if cfg.projection else want.pooler_output, bound)


def test_the_vision_tower_is_transformers_own():
    torch.manual_seed(6)
    twin = transformers_vision(VISION)
    twins.randomised(twin)
    net = clip.VisionTower(VISION).eval().requires_grad_(False)
    net.load_state_dict(as_ours(twin.state_dict()), strict=True, assign=True)
    pixels = torch.randn(2, 3, VISION.size, VISION.size, dtype=F64)
    for dtype, bound in ((torch.float32, 1e-5), (F64, 1e-10)):
        net, twin = net.to(dtype), twin.to(dtype)
        got, want = net(pixels.to(dtype)), twin(pixels.to(dtype), output_hidden_states=True)
        for ours, theirs in zip(got.hidden, want.hidden_states, strict=True):
            close(ours, theirs, bound)
        close(got.pooled, want.image_embeds, bound)


TINY_TEXT = {
    "text_encoder": clip.TextConfig(
        width=24, layers=3, heads=3, mlp=96, act="quick_gelu", projection=None, vocabulary=800
    ),
    "text_encoder_2": clip.TextConfig(width=40, layers=4, heads=5, mlp=160, projection=40, vocabulary=800),
}
TINY_VISION = {
    "image_encoder": clip.VisionConfig(width=48, layers=3, heads=3, mlp=160, projection=40, size=56),
    "image_encoder_vit_h": clip.VisionConfig(width=32, layers=3, heads=4, mlp=128, projection=24, size=56),
}


def tiny(folder: str) -> Any:
    """A tower of the tiny SDXL."""
    tensors = {key: t.float() for key, t in load_file(twins.TINY / folder / "model.safetensors").items()}
    net = clip.TextTower(TINY_TEXT[folder]) if folder in TINY_TEXT else clip.VisionTower(TINY_VISION[folder])
    net.load_state_dict(as_ours(tensors), strict=True, assign=True)
    return net.eval().requires_grad_(False)


def tokenizer(folder: str, **options: Any) -> Tokenizer:
    """A tokeniser of the tiny SDXL."""
    at = twins.TINY / folder
    pad = "!" if folder == "tokenizer_2" else "<|endoftext|>"
    return Tokenizer(at / "vocab.json", at / "merges.txt", **({"pad": pad} | options))


def settings(name: str) -> dict[str, Any]:
    cases = json.loads((twins.CASES / "cases.json").read_text())
    return next(case for case in cases if case["name"] == name)["settings"]


def test_texts_become_the_reference_ids_states_and_pooled_text():
    case, said = load_file(twins.CASES / "02_text_encode.safetensors"), settings("02_text_encode")
    small, big = tiny("text_encoder"), tiny("text_encoder_2")
    one, two = tokenizer("tokenizer"), tokenizer("tokenizer_2")
    assert torch.equal(one(said["texts"]), case["input_ids_1"])
    assert torch.equal(two(said["texts"]), case["input_ids_2"])
    close(small(case["input_ids_1"]).hidden[-2], case["clip_l_penultimate"], 2e-5)
    close(big(case["input_ids_2"]).hidden[-2], case["clip_g_penultimate"], 2e-5)
    close(big(case["input_ids_2"]).pooled, case["clip_g_pooled"], 2e-5)

    def both(first: str, second: str, skip: int = 0) -> tuple[Tensor, Tensor]:
        a, b = small(one(first)), big(two(second))
        return torch.cat([a.skipped(skip), b.skipped(skip)], dim=-1), b.pooled

    for name, got in {
        "prompt_embeds": both(said["prompt"], said["prompt"])[0],
        "pooled": both(said["prompt"], said["prompt"])[1],
        "negative_prompt_embeds": both(said["negative"], said["negative"])[0],
        "negative_pooled": both(said["negative"], said["negative"])[1],
        "clip_skip1_prompt_embeds": both(said["prompt"], said["prompt"], 1)[0],
        "two_prompt_embeds": both(said["prompt"], said["prompt_2"])[0],
        "two_prompt_pooled": both(said["prompt"], said["prompt_2"])[1],
        "two_prompt_negative_embeds": both(said["negative"], said["negative_2"])[0],
        "two_prompt_negative_pooled": both(said["negative"], said["negative_2"])[1],
    }.items():
        assert (got - case[name]).abs().amax() < 2e-5, name


def test_pictures_become_the_reference_pixels_patches_and_embeddings():
    case = load_file(twins.CASES / "03_vision.safetensors")
    pixels = [clip_pixels(Image.fromarray(case[f"image_{i}"].numpy()), 56) for i in range(3)]
    for i, got in enumerate(pixels):
        assert (got - case[f"pixel_values_{i}"]).abs().amax() < 1e-5
    for folder, prefix in (("image_encoder", ""), ("image_encoder_vit_h", "vit_h_")):
        net = tiny(folder)
        said, nothing = net(torch.cat(pixels)), net(torch.zeros(1, 3, 56, 56))
        assert (said.pooled - case[f"{prefix}image_embeds"]).abs().amax() < 2e-5
        assert (said.hidden[-2] - case[f"{prefix}penultimate"]).abs().amax() < 2e-5
        assert (nothing.hidden[-2] - case[f"{prefix}zero_penultimate"]).abs().amax() < 2e-5


def test_a_squashed_picture_keeps_its_borders():
    picture = Image.new("RGB", (80, 20), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 10, 20))  # a black border on the left
    cropped, squashed = clip_pixels(picture, 20), clip_pixels(picture, 20, squash=True)
    assert cropped.shape == squashed.shape == (1, 3, 20, 20)
    assert float(cropped.std(dim=(2, 3)).max()) < 1e-6
    assert float(squashed[..., 0].max()) < -1


def open_clip(ours: dict[str, Tensor], vision: bool) -> dict[str, Tensor]:
    """A tower in open_clip's layout, made by hand."""
    ahead, out = ("visual." if vision else ""), {}
    plain = {
        "token.weight": "token_embedding.weight",
        "position": "positional_embedding",
        "patch.weight": "conv1.weight",
        "cls": "class_embedding",
    }
    modules = {"norm_in": "ln_pre", "norm": "ln_post" if vision else "ln_final"}
    inside = {"norm1": "ln_1", "out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    for name, tensor in ours.items():
        parts = name.split(".")
        if name == "projection.weight":
            out["visual.proj" if vision else "text_projection"] = tensor.T.contiguous()
        elif name in plain:
            out[ahead + plain[name]] = tensor
        elif parts[0] in modules:
            out[f"{ahead}{modules[parts[0]]}.{parts[1]}"] = tensor
        elif parts[2] in inside:
            out[f"{ahead}transformer.resblocks.{parts[1]}.{inside[parts[2]]}.{parts[3]}"] = tensor
        elif parts[2] == "q":
            rows = [ours[name.replace(".q.", f".{p}.")] for p in "qkv"]
            out[f"{ahead}transformer.resblocks.{parts[1]}.attn.in_proj_{parts[3]}"] = torch.cat(rows)
    return out


@pytest.mark.parametrize("name", [*TEXTS, "vision"])
def test_open_clips_layout_is_the_same_tower_without_a_copy(name: str):
    torch.manual_seed(9)
    net = clip.VisionTower(VISION) if name == "vision" else clip.TextTower(TEXTS[name])
    net.requires_grad_(False)
    twins.randomised(net)
    want = net.state_dict()
    theirs = open_clip(want, name == "vision")
    got = twins.ours(table.unfused(theirs), table, table.OPEN_CLIP)
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    fused = next(t for key, t in theirs.items() if key.endswith("in_proj_weight"))
    assert got["layers.0.q.weight"].untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_the_single_file_and_the_folders_are_the_same_towers():
    single = load_file(twins.TINY / "single_file.safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in single.items() if key.startswith(prefix)}

    def with_strays(tensors: dict[str, Tensor], column: int) -> dict[str, Tensor]:
        plan = table.plan({key: tuple(t.shape) for key, t in tensors.items()}, column)
        known = table.strays(plan, column)
        assert set(known) & set(tensors)  # the file has some
        return twins.ours({key: t for key, t in tensors.items() if key not in known}, table, column)

    small = with_strays(part("conditioner.embedders.0.transformer."), table.TRANSFORMERS)
    big = with_strays(table.unfused(part("conditioner.embedders.1.model.")), table.OPEN_CLIP)
    for got, folder in ((small, "text_encoder"), (big, "text_encoder_2")):
        want = as_ours(load_file(twins.TINY / folder / "model.safetensors"))
        assert list(got) == list(want)
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_mixed_up_or_damaged_tower_is_an_error_that_lists_what_is_wrong():
    tensors = load_file(twins.TINY / "text_encoder_2" / "model.safetensors")
    with pytest.raises(LayoutError, match=r"1 missing: text_model\.final_layer_norm\.bias"):
        as_ours({key: t for key, t in tensors.items() if key != "text_model.final_layer_norm.bias"})
    with pytest.raises(LayoutError, match=r"1 unexpected: text_model\.extra"):
        as_ours(tensors | {"text_model.extra": torch.zeros(1)})
    fused = {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(7, 3)}
    assert table.unfused(fused) == fused  # no thirds: refused by its name


PUBLISHED = {
    "TEXT_L": (123_060_480, 196),
    "TEXT_H": (354_032_640, 389),
    "TEXT_G": (694_659_840, 517),
    "VISION_H": (632_076_800, 520),
    "VISION_G": (1_844_907_264, 776),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tower_has_its_parameters(name: str):
    cfg = getattr(clip, name)
    with torch.device("meta"):
        net = clip.TextTower(cfg) if isinstance(cfg, clip.TextConfig) else clip.VisionTower(cfg)
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == PUBLISHED[name]


def test_a_text_does_not_see_what_comes_after_and_every_layer_speaks_at_its_own_sites():
    torch.manual_seed(0)
    net = clip.TextTower(TEXTS["quick"]).double().eval().requires_grad_(False)
    twins.randomised(net)
    ids = torch.randint(0, 50, (2, 6))
    other = ids.clone()
    other[:, 4:] = (ids[:, 4:] + 1) % 50
    a, b = net(ids).last, net(other).last
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])
    sites = []

    def attend(site: Site, *args: Any) -> Tensor:
        sites.append(site)
        return TORCH.attend(site, *args)

    net(ids, Ops(attend=attend))
    assert sites == [Site(f"layer.{i}", 0, "self") for i in range(3)]


def test_bad_ids_and_pictures_are_errors_that_say_what_is_right():
    text, vision = clip.TextTower(TEXTS["exact"]), clip.VisionTower(VISION)
    with pytest.raises(ValueError, match=r"M in 1\.\.\.7; got \(1, 8\)"):
        text(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token ids are in 0\.\.\.39; got 0\.\.\.40"):
        text(torch.tensor([[0, 40]]))
    with pytest.raises(ValueError, match="every text has to end with the id 39"):
        text(torch.tensor([[1, 39], [1, 2]]))
    with pytest.raises(ValueError, match=r"clip skip is 0\.\.\.1 .* not 2"):
        text(torch.tensor([[1, 39]])).skipped(2)
    with pytest.raises(ValueError, match=r"pictures are \(B, 3, 12, 12\); got \(1, 3, 12, 16\)"):
        vision(torch.zeros(1, 3, 12, 16))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({"heads": 5}, "12 channels do not divide into 5 heads"), ({"act": "relu"}, "not 'relu'")],
)
def test_a_configuration_that_does_not_add_up_is_an_error(wrong: dict[str, Any], what: str):
    for cfg in (TEXTS["quick"], VISION):
        with pytest.raises(ValueError, match=what):
            replace(cfg, **wrong)
    with pytest.raises(ValueError, match="12 pixels do not divide into patches of 5"):
        replace(VISION, patch=5)

"""`diaphane inspect` on latent models, their parts, adapters and LoRA."""

import json
from pathlib import Path

import pytest
import torch
from diaphane.weights.files import write
from safetensors.torch import load_file

from . import latent_twins as twins
from .test_cli_generate import run

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a run that succeeds says."""
    code, out, error = run(capsys, "inspect", *words)
    assert (code, error) == (0, "")
    assert out.endswith("every key fits\n")
    return out


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of one module."""
    tensors = {f"{MODULE}.lora_down.weight": torch.randn(4, 64), f"{MODULE}.lora_up.weight": torch.randn(96, 4)}
    return write(tmp_path / "l.safetensors", tensors | {f"{MODULE}.alpha": torch.tensor(2.0)})


def test_a_model_is_its_parts_its_h_its_tokenisers_and_what_it_says(capsys: pytest.CaptureFixture[str]):
    lines = [" ".join(line.split()) for line in said(capsys, twins.TINY).splitlines()]
    for line in ("layout UNet, diffusers", "parameters 6,632,964 in 840 tensors, float16", "h 96 x 4 x 4 at 128 pixels",
                 "prediction eps", "scaling 0.13025", "act quick_gelu"):  # fmt: skip
        assert line in lines
    assert any(line.startswith("tokeniser of text_encoder_2") and line.endswith("up with !") for line in lines)
    assert len(next(line for line in lines if line.startswith("skips")).split()) == 10


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vae", "scaling 0.13025"),
        ("controlnet", "layout ControlNet, diffusers"),
        ("text_encoder", "family clip_text"),
        ("image_encoder", "family clip_vision"),
        ("unet", "context_dim 64"),
        ("ip_adapter/ip-adapter_sdxl.bin", "layout IP-Adapter, linear"),
        ("ip_adapter/ip-adapter-plus_sdxl_vit-h.safetensors", "layout IP-Adapter, plus"),
    ],
)
def test_a_part_is_said_to_be_what_it_is(capsys: pytest.CaptureFixture[str], name: str, line: str):
    assert line in [" ".join(row.split()) for row in said(capsys, twins.TINY / name).splitlines()]


def test_both_towers_of_a_whole_clip_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    both = {}
    for part in ("text_encoder", "image_encoder_vit_h"):
        both |= load_file(twins.TINY / part / "model.safetensors")
    (tmp_path / "clip").mkdir()
    write(tmp_path / "clip" / "model.safetensors", both)
    config = {f"{kind}_config": json.loads((twins.TINY / part / "config.json").read_text())
              for kind, part in (("text", "text_encoder"), ("vision", "image_encoder_vit_h"))}  # fmt: skip
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    out = said(capsys, tmp_path / "clip")
    assert out.count("CLIP for text") == out.count("CLIP for pictures") == 1


def test_a_lora_is_its_ranks_and_with_a_model_what_it_changes(capsys: pytest.CaptureFixture[str], lora: Path):
    alone = said(capsys, lora)
    assert "4 in 1" in alone
    assert "text tokens" in alone
    matched = said(capsys, lora, "--base", twins.TINY, "--keys")
    assert f"unet.mid.1.blocks.0.cross_attn.k.weight {MODULE}, rank 4, alpha 2" in matched


def test_what_does_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: Path):
    other = write(tmp_path / "o.safetensors", {f"{MODULE}.lora_down.weight": torch.zeros(2, 768),
                                               f"{MODULE}.lora_up.weight": torch.zeros(96, 2)})  # fmt: skip
    for words, why in {
        (other, "--base", twins.TINY): "for Stable Diffusion 1",
        (twins.TINY / "vae", "--base", twins.TINY): "is none",
        ("shapes", "--base", twins.TINY): "is none",
        (lora, "--resolution", 32): "for pixel networks",
        (twins.TINY / "single_file.safetensors",): "heads",
        (tmp_path / "nothing",): "there is no",
        (tmp_path,): "",
    }.items():
        code, out, error = run(capsys, "inspect", *words)
        assert (code, error.count("\n")) == (2, 1), words
        assert why in error, (words, out, error)

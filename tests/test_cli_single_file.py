"""Whole command lines from a single file of SDXL's kind, with CLIP's own vocabulary, beside a folder of the same."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.methods import text_to_image as t2i
from diaphane.model.clip import TextConfig, TextTower
from diaphane.model.controlnet import ControlNet, ControlNetConfig
from diaphane.model.unet import UNet, UNetConfig
from diaphane.model.vae import VAE, VAEConfig
from diaphane.weights import clip, controlnet, pipeline, unet, vae
from diaphane.weights.files import write
from PIL import Image
from torch import nn

from . import latent_twins as twins
from .test_cli_generate import pixels, record, run
from .test_pipeline import fused, ldm

ROWS = 49_408
LEVELS = {"channels": (64, 64), "depth": (0, 1), "mid_depth": 1, "blocks": 1, "context_dim": 2048}
XL = UNetConfig(**LEVELS, head_dim=64, pooled_dim=1280, id_dim=256)  # type: ignore[arg-type]
SHAPE = {**LEVELS, "vector_dim": 1280 + 6 * 256, "in_channels": 4}
SMALL = TextConfig(width=768, layers=2, heads=12, mlp=8, act="quick_gelu", projection=None)
BIG = TextConfig(width=1280, layers=2, heads=20, mlp=8, projection=1280)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """model.safetensors, vae.safetensors and control.safetensors: sgm and LDM layouts, published widths of CLIP, tiny
    but for those; and photo.png, mask.png."""
    folder = tmp_path_factory.mktemp("single")
    torch.manual_seed(0)
    coder = VAEConfig(channels=(32, 32), blocks=1)
    control = ControlNetConfig(**{**vars(XL), "hint": (8, 8)})
    nets: dict[str, nn.Module] = {"unet": UNet(XL), "vae": VAE(coder), "control": ControlNet(control)}
    nets |= {"small": TextTower(SMALL), "big": TextTower(BIG)}
    plans = {
        "unet": unet.Plan(**SHAPE, out_channels=4),  # type: ignore[arg-type]
        "vae": vae.Plan(in_channels=3, latent_channels=4, channels=(32, 32), blocks=1),
        "control": controlnet.Plan(**SHAPE, out_channels=None, hint=(8, 8), hint_channels=3),  # type: ignore[arg-type]
        "small": clip.Plan(width=768, layers=2, mlp=8, projection=None, vocabulary=ROWS, positions=77),
        "big": clip.Plan(width=1280, layers=2, mlp=8, projection=1280, vocabulary=ROWS, positions=77),
    }
    for net in nets.values():
        net.requires_grad_(False)
        for name, p in net.named_parameters():
            if name != "token.weight":
                p += 0.3 * torch.randn_like(p) / (p[0].numel() if p.ndim > 1 else 1) ** 0.5
        net.half()
    body = ldm(nets["unet"], unet, plans["unet"], unet.LDM, "model.diffusion_model.")
    pixel = ldm(nets["vae"], vae, plans["vae"], vae.LDM, "first_stage_model.")
    first = ldm(nets["small"], clip, plans["small"], clip.TRANSFORMERS, "conditioner.embedders.0.transformer.")
    second = ldm(nets["big"], clip, plans["big"], clip.OPEN_CLIP, "conditioner.embedders.1.model.")
    write(folder / "model.safetensors", {**body, **pixel, **first, **fused(second)})
    lighter = {key.removeprefix("first_stage_model."): 0.5 * t for key, t in pixel.items()}
    (folder / "vae").mkdir()
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", lighter)
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [32, 32], "scaling_factor": 0.13025}))
    held = ldm(nets["control"], controlnet, plans["control"], controlnet.LDM, "control_model.")
    write(folder / "control.safetensors", held)
    rows = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(rows).save(folder / "photo.png")
    Image.fromarray(np.repeat([[0, 255]], 16, axis=1).repeat(32, axis=0).astype(np.uint8)).save(folder / "mask.png")
    yield folder
    shutil.rmtree(folder)  # it is large


def drawn(capsys: pytest.CaptureFixture[str], made: Path, out: Path, *words: object) -> np.ndarray:
    """The first picture of a run that succeeds."""
    common = ("--model", made / "model.safetensors", "--size", 32, "--steps", 2, "--quiet", "--out", out)
    code, said, error = run(capsys, "generate", "--dtype", "float16", *common, *words)  # as stored: nothing is cast
    assert (code, said, error) == (0, "", "")
    return pixels(out / "0001.png")


def test_a_single_file_needs_no_second_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Path):
    found = pipeline.load(made / "model.safetensors")
    assert [(words.vocabulary, words.pad) for words in found.words.values()] == [(None, "<|endoftext|>"), (None, "!")]
    cat = drawn(capsys, made, tmp_path / "cat", "a cat!")
    dog = drawn(capsys, made, tmp_path / "dog", "a dog!")
    assert (cat != dog).any()
    parts = record(tmp_path / "cat" / "0001.png")["weights"]["parts"]
    assert {"tokeniser of text_encoder", "tokeniser of text_encoder_2"} < set(parts)
    code, said, _ = run(capsys, "redo", tmp_path / "cat" / "0001.png", "--quiet")
    assert (code, said.splitlines()[-1]) == (0, "the same, bit for bit")


def test_every_option_of_a_folder_works_on_a_single_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Path
):
    found = {
        "plain": drawn(capsys, made, tmp_path / "plain", "a cat"),
        "low": drawn(capsys, made, tmp_path / "low", "a cat", "--low-vram"),
        "bfloat16": drawn(capsys, made, tmp_path / "bfloat16", "a cat", "--dtype", "bfloat16", "--low-vram"),
        "vae": drawn(capsys, made, tmp_path / "vae", "a cat", "--vae", made / "vae"),
        "control": drawn(capsys, made, tmp_path / "control", "a cat", "--control", made / "photo.png",
                         "--control-model", made / "control.safetensors"),
        "mask": drawn(capsys, made, tmp_path / "mask", "a cat", "--init", made / "photo.png", "--mask",
                      made / "mask.png", "--low-vram"),
    }  # fmt: skip
    assert (found["plain"] == found["low"]).all()
    others = [name for name in found if name != "low"]
    assert all((found[a] != found[b]).any() for i, a in enumerate(others) for b in others[:i])


def test_a_single_file_is_inverted(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Path):
    words = ("--model", made / "model.safetensors", "--size", 32, "--steps", 2, "--quiet", "--out", tmp_path / "o")
    code, said, error = run(capsys, "invert", made / "photo.png", *words)
    assert (code, error) == (0, "")
    assert "dB in latents" in said
    assert (tmp_path / "o" / "0001-trajectory.safetensors").is_file()


def test_a_single_file_of_stable_diffusion_1_is_drawn_with_and_inverted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Path
):
    levels = {"channels": (64, 64), "depth": (1, 0), "mid_depth": 1, "blocks": 1, "context_dim": 768}
    config = UNetConfig(**levels, head_dim=None, pooled_dim=None)  # type: ignore[arg-type]
    nets = [UNet(config), VAE(VAEConfig(channels=(32, 32), blocks=1)), TextTower(SMALL)]
    for net in nets:
        net.requires_grad_(False).half()
    plan = unet.Plan(**levels, vector_dim=None, in_channels=4, out_channels=4)  # type: ignore[arg-type]
    pixel = vae.Plan(in_channels=3, latent_channels=4, channels=(32, 32), blocks=1)
    text = clip.Plan(width=768, layers=2, mlp=8, projection=None, vocabulary=ROWS, positions=77)
    tensors = ldm(nets[0], unet, plan, unet.LDM, "model.diffusion_model.")
    tensors |= ldm(nets[1], vae, pixel, vae.LDM, "first_stage_model.")
    tensors |= ldm(nets[2], clip, text, clip.TRANSFORMERS, "cond_stage_model.transformer.")
    model = write(tmp_path / "one.safetensors", tensors | {"alphas_cumprod": torch.zeros(1000)})
    common = ("--model", model, "--size", 32, "--steps", 2, "--quiet")
    code, said, error = run(capsys, "generate", "a cat", *common, "--out", tmp_path / "g", "--prediction", "v")
    assert (code, said, error) == (0, "", "")
    words = ("--prompt", "a cat", "--to", "a dog", "--method", "edit-friendly")
    code, said, error = run(capsys, "invert", made / "photo.png", *common, *words, "--out", tmp_path / "i")
    assert (code, error) == (0, "")
    assert (tmp_path / "i" / "0001-edited.png").is_file()
    model.unlink()


@pytest.mark.parametrize("moment", ["writing", "drawing"])
def test_an_interruption_leaves_whole_files_and_resume_makes_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
):
    (tmp_path / "lines.txt").write_text("a cat\na dog\na house\n")
    words = ["generate", "--prompts", tmp_path / "lines.txt", "--model", twins.TINY, "--size", 32, "--steps", 1]
    line = [str(word) for word in [*words, "--quiet", "--out", tmp_path / "o"]]
    replace, pictures = os.replace, t2i.pictures

    def written(part: Path, path: Path) -> None:
        if path.name == "0002.png":
            assert part.stat().st_size > 100
            raise KeyboardInterrupt
        replace(part, path)

    def drawing(*given: Any, **more: Any) -> Any:
        if (tmp_path / "o" / "0001.png").exists():
            raise KeyboardInterrupt
        return pictures(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(*(("os.replace", written) if moment == "writing" else (t2i, "pictures", drawing)))
        assert main(line) == 130
    assert capsys.readouterr().err == "diaphane generate: interrupted; what was finished is kept\n"
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["0001.png"]
    was = (tmp_path / "o" / "0001.png").read_bytes()
    assert main([*line, "--resume"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["0001.png", "0002.png", "0003.png", "sheet.png"]
    assert (tmp_path / "o" / "0001.png").read_bytes() == was

"""`diaphane generate` and `diaphane tokens` on the tiny model: what is drawn, what is recorded, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.methods import text_to_image as t2i
from diaphane.methods.prompt import encode, size_ids
from diaphane.model.components import components
from diaphane.samplers.euler import euler
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import pipeline
from diaphane.weights.files import write
from PIL import Image
from safetensors.torch import load_file

from . import latent_twins as twins

MODEL = str(twins.TINY)
CONTROL = str(twins.TINY / "controlnet")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def generate(capsys: pytest.CaptureFixture[str], out: Path, *words: object, prompt: str | None = "a cat") -> str:
    """A run that succeeds; what it says."""
    first = [] if prompt is None else [prompt]
    code, said, error = run(capsys, "generate", *first, "--model", MODEL, "--steps", 2, "--quiet", "--out", out, *words)
    assert (code, error) == (0, "")
    return said


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["diaphane"])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that is neither square nor of the model's size."""
    rows = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(rows).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White on the right."""
    rows = np.zeros((64, 64), dtype=np.uint8)
    rows[:, 32:] = 255
    Image.fromarray(rows).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_a_picture_is_what_the_functions_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate(capsys, tmp_path / "o", "--negative", "low", "--seed", 4, "--size", "96x64", "--guidance", 3)
    found = pipeline.load(twins.TINY)
    parts = components(found.parts, found.words, dtype=torch.float32)
    denoise = t2i.denoiser(parts.unet, encode(parts, "a cat"), encode(parts, "low"), schedule=scaled_linear(),
                           ids=size_ids((64, 96)), guidance=3.0)  # fmt: skip
    x = t2i.pure_noise(parts, seeded([4]), (64, 96))
    with torch.no_grad():
        want = t2i.pictures(parts.vae, list(euler(denoise, x, scaled_linear(), leading(2, offset=1)))[-1].x)
    got = pixels(tmp_path / "o" / "0001.png")
    assert got.shape == (64, 96, 3)
    assert np.abs(got - ((want[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1


def test_drawing_needs_neither_diffusers_nor_transformers(tmp_path: Path):
    code = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate", "regex"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
from diaphane.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    words = ("generate", "a cat", "--model", MODEL, "--size", "32", "--steps", "1", "--out", str(tmp_path / "o"))
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "o" / "0001.png").is_file()


def test_pictures_have_their_seeds_records_parameters_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate(capsys, tmp_path / "a", "--n", 3, "--seed", 7, "--size", 64)
    generate(capsys, tmp_path / "b", "--seed", 8, "--size", 64)
    generate(capsys, tmp_path / "c", "--n", 3, "--seed", 7, "--size", 64, "--batch", 3)
    names = [f"000{i}.png" for i in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [*names, "sheet.png"]
    assert (pixels(tmp_path / "a" / names[1]) == pixels(tmp_path / "b" / names[0])).all()
    for name in names:
        assert np.abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "c" / name)).max() <= 1
    said = record(tmp_path / "a" / names[2])
    assert (said["seed"], said["prompt"], said["settings"]["n"]) == (9, "a cat", 3)
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} <= set(said["weights"]["parts"])
    with Image.open(tmp_path / "a" / names[2]) as picture:
        told = picture.info["parameters"].splitlines()
    assert told[0] == "a cat"
    assert told[1].startswith("Steps: 2, Sampler: Euler, Schedule type: Normal, CFG scale: 5, Seed: 9, Size: 64x64, ")


def test_what_of_a_text_is_cut_off_is_said_and_a_literal_mark_is_another_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    long, few = "cat " * 75 + "ünder the 日本 moon", ("--size", 32)
    said = generate(capsys, tmp_path / "a", *few, "--n", 2, prompt=long)
    assert said.count("are cut off") == 1
    assert said.endswith(" tokens of 'cat cat cat cat cat cat cat cat cat cat ' are cut off: ünder the 日本 moon\n")
    assert generate(capsys, tmp_path / "b", *few, prompt="cat " * 75) == ""
    generate(capsys, tmp_path / "c", *few, prompt="cat!")
    generate(capsys, tmp_path / "d", *few, "--literal", prompt="cat!")
    assert (pixels(tmp_path / "c" / "0001.png") != pixels(tmp_path / "d" / "0001.png")).any()
    code, said, _ = run(capsys, "redo", tmp_path / "d" / "0001.png", "--quiet")
    assert (code, said.splitlines()[-1]) == (0, "the same, bit for bit")


def test_parameters_hold_text_in_any_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate(capsys, tmp_path / "o", "--negative", "низкий", "--size", 64, prompt="猫 🐈")
    with Image.open(tmp_path / "o" / "0001.png") as picture:
        assert picture.info["parameters"].splitlines()[:2] == ["猫 🐈", "Negative prompt: низкий"]


@pytest.mark.parametrize("sampler", ["euler", "euler-a", "heun", "dpmpp", "ddim", "ddpm"])
def test_samplers_and_spacings_draw_and_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sampler: str
):
    drawn = []
    for spacing in ("leading", "trailing", "linspace", "karras") if sampler == "euler" else ("leading", "karras"):
        out = tmp_path / spacing
        eta = ["--eta", 0.5] if sampler == "ddim" else []
        generate(capsys, out, "--sampler", sampler, "--spacing", spacing, "--size", 32, "--steps", 3, *eta)
        drawn.append(pixels(out / "0001.png"))
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])
    code, said, _ = run(capsys, "redo", tmp_path / "karras" / "0001.png", "--quiet")
    assert (code, said.splitlines()[-1]) == (0, "the same, bit for bit")


def test_init_mask_control_and_lora_are_recorded_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path, mask: Path
):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 96), f"{name}.lora_up.weight": torch.randn(96, 2)}
    lora = write(tmp_path / "l.safetensors", tensors)
    every = {
        "plain": [],
        "init": ["--init", photo, "--strength", 0.5],
        "mask": ["--init", photo, "--mask", mask],
        "control": ["--control", photo, "--control-model", CONTROL],
        "half": ["--control", photo, "--control-model", CONTROL, "--control-scale", 0.5],
        "lora": ["--lora", f"{lora}:0.5"],
        "more": ["--lora", lora, f"{lora}:0.25"],
    }
    drawn = {}
    for kind, words in every.items():
        said = generate(capsys, tmp_path / kind, "--size", 64, *words)
        assert said == "".join(
            f"{lora} at {w}: 1 of unet\n" for w in {"lora": ["0.5"], "more": ["1", "0.25"]}.get(kind, [])
        )
        drawn[kind] = pixels(tmp_path / kind / "0001.png")
        if kind in ("plain", "init", "half"):
            continue
        code, said, error = run(capsys, "redo", tmp_path / kind / "0001.png", "--quiet")
        assert (code, error, said.splitlines()[-1]) == (0, "", "the same, bit for bit")
    kinds = list(drawn)
    assert all((drawn[a] != drawn[b]).any() for i, a in enumerate(kinds) for b in kinds[:i])
    was = record(tmp_path / "lora" / "0001.png")["weights"]["sha256"][:12]
    write(lora, {key: 2 * t for key, t in tensors.items()})
    assert run(capsys, "redo", tmp_path / "lora" / "0001.png", "--quiet", "--overwrite") == (
        2,
        "",
        f"""\
diaphane redo: the weights of {MODEL} are others than the picture's (sha256 {was}...): give --model
""",
    )


def test_a_masked_picture_is_kept_where_the_mask_is_black(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path, mask: Path
):
    generate(capsys, tmp_path / "a", "--size", 128, "--init", photo, "--mask", mask, "--seed", 1)
    generate(capsys, tmp_path / "b", "--size", 128, "--init", photo, "--mask", mask, "--seed", 2, "--steps", 3)
    a, b = (pixels(tmp_path / name / "0001.png") for name in "ab")
    assert np.abs(a - b)[:, 80:].mean() > 2 * np.abs(a - b)[:, :40].mean()


def test_low_vram_and_halves_change_nothing_but_the_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generate(capsys, tmp_path / "a", "--size", 64)
    generate(capsys, tmp_path / "b", "--size", 64, "--low-vram")
    generate(capsys, tmp_path / "c", "--size", 64, "--dtype", "bfloat16")
    a, b, c = (pixels(tmp_path / name / "0001.png") for name in "abc")
    assert (a == b).all()
    assert 0 < np.abs(a - c).mean() < 40


def test_an_autoencoder_that_overflows_float16_unannounced_is_named_in_one_line_and_the_picture_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, weights = tmp_path / "vae", "diffusion_pytorch_model.safetensors"
    folder.mkdir()
    config = json.loads((twins.TINY / "vae" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    tensors = load_file(twins.TINY / "vae" / weights)
    for i in range(2):
        tensors[f"decoder.up_blocks.0.resnets.{i}.conv2.bias"] += 6e4
    write(folder / weights, tensors)
    words = ("generate", "a cat", "--model", MODEL, "--size", 64, "--steps", 2, "--vae", folder)
    code, _, error = run(capsys, *words, "--dtype", "float16", "--out", tmp_path / "half", "--quiet")
    assert (code, error.count("\n")) == (0, 1)
    assert re.fullmatch(r"diaphane generate: .* of dec\.2\.1 are not finite in float16.*; float32 is taken\n", error)
    run(capsys, *words, "--out", tmp_path / "wide", "--quiet")
    assert np.abs(pixels(tmp_path / "half" / "0001.png") - pixels(tmp_path / "wide" / "0001.png")).mean() < 4


def test_a_file_of_prompts_is_gone_on_with_and_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines, out = tmp_path / "lines.txt", tmp_path / "o"
    lines.write_text("a cat\n\n  a dog  \na house\n", encoding="utf-8")
    words = ("--prompts", lines, "--size", 32, "--n", 2)
    generate(capsys, out, *words, prompt=None)
    assert [record(out / f"000{i}.png")["prompt"] for i in range(1, 7)] == ["a cat"] * 2 + ["a dog"] * 2 + [
        "a house"
    ] * 2
    (out / "0003.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    was = pixels(out / "0004.png")
    generate(capsys, out, *words, "--resume", prompt=None)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert {name for name in after if after[name] != before.get(name)} == {"0003.png"}
    assert (pixels(out / "0004.png") == was).all()
    code, _, error = run(capsys, "generate", "--model", MODEL, *words, "--resume", "--out", out, "--steps", 3)
    assert code == 2
    assert "made with other settings" in error


def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path, mask: Path
):
    other = write(tmp_path / "other.safetensors", {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(2, 768),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.zeros(320, 2),
    })  # fmt: skip
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    wrong = {
        ("--size", "60x64"): "multiples of 8",
        ("--size", "0x64"): "no size",
        ("--size", "sixty"): "no size",
        ("--mask", mask): "give --init",
        ("--eta", "0.5"): "--sampler ddim",
        ("--strength", "0.5"): "give --init",
        ("--init", photo, "--strength", "0.1"): "leaves a step",
        ("--init", tmp_path / "nothing.png"): "cannot read",
        ("--init", MODEL): "is a folder",
        ("--control", photo): "give both",
        ("--control-model", CONTROL): "give both",
        ("--control-scale", "0.5"): "give --control and",
        ("--control", photo, "--control-model", twins.TINY / "unet"): "not a ControlNet",
        ("--lora", tmp_path / "nothing"): "there is no",
        ("--lora", f"{other}:900"): "-100 ... 100",
        ("--lora", other): "for Stable Diffusion 1",
        ("--vae", twins.TINY / "unet"): "vae is of the kind unet",
        ("--variant", "fp16"): "no fp16 weights",
        ("--tokenizer", tmp_path): "vocab.json",
        ("--prompts", photo): "not both",
        ("--guidance", "nan"): "not a number",
        ("--sampler", "magic"): "invalid choice",
        ("--clip-skip", "9"): "clip skip",
        ("--device", "moon"): "there is no device",
        ("--prediction", "x"): "invalid choice",
    }
    for words, why in wrong.items():
        code, said, error = run(
            capsys, "generate", "a cat", "--model", MODEL, "--steps", 2, "--out", tmp_path / "o", *words
        )
        assert (code, said, error.count("\n")) == (2, "", 1), words
        assert why in error, (words, error)
    for words, why in {
        (): "give a prompt",
        ("--prompts", tmp_path / "empty.txt"): "holds no prompt",
        ("--prompts", tmp_path / "binary.txt"): "not text in UTF-8",
    }.items():
        code, said, error = run(capsys, "generate", "--model", MODEL, "--out", tmp_path / "o", *words)
        assert (code, said, error.count("\n")) == (2, "", 1), words
        assert why in error, (words, error)
    code, _, error = run(capsys, "generate", "a cat")
    assert (code, "--model" in error) == (2, True)
    code, _, error = run(capsys, "generate", "a cat", "--model", twins.TINY / "single_file.safetensors")
    assert (code, "no published tower" in error or "heads" in error) == (2, True)
    assert not (tmp_path / "o").exists()


def test_tokens_shows_pieces_ids_and_what_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, said, _ = run(capsys, "tokens", "a cat!", "--tokenizer", MODEL, "--ids")
    lines = said.splitlines()
    assert code == 0
    assert lines[0] == "tokenizer: 3 of 75 tokens, filled up with <|endoftext|>"
    assert lines[1].split()[-2:] == ["cat</w>(558)", "!</w>(256)"]
    assert (lines[2], lines[3].split()[-1]) == ("tokenizer_2: 3 of 75 tokens, filled up with !", "!(0)")
    _, said, _ = run(capsys, "tokens", "a cat!", "--tokenizer", MODEL, "--ids", "--literal")
    assert said.splitlines()[3].split()[-1] == "!</w>(256)"
    _, said, _ = run(capsys, "tokens", "cat " * 77, "--tokenizer", twins.TINY / "tokenizer")
    lines = said.splitlines()
    assert lines[0] == "tokenizer: 77 of 75 tokens, 2 of them cut off, filled up with <|endoftext|>"
    assert lines[1].endswith(" | cat</w> cat</w>")
    for source in (tmp_path, tmp_path / "nothing"):
        code, said, error = run(capsys, "tokens", "a", "--tokenizer", source)
        assert (code, said, error.count("\n")) == (2, "", 1)
        assert "vocab.json" in error


@pytest.mark.parametrize("command", ["generate", "tokens"])
def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert f"diaphane {command} " in said
    assert max(map(len, said.splitlines())) <= 130

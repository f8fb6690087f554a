"""`diaphane instant-style` and `diaphane probe` on the tiny model: what is drawn, recorded, made again, and refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.methods import text_to_image as t2i
from diaphane.methods.instant_style import Pictures, image_prompt, instant_style, subtracted
from diaphane.methods.prompt import encode, size_ids
from diaphane.methods.scales import scales
from diaphane.model.ops import TORCH
from diaphane.model.pixels import clip_pixels
from diaphane.samplers.euler import euler
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights.files import write
from PIL import Image
from safetensors.torch import load_file

from . import latent_twins as twins
from .golden_image_prompt import LINEAR, adapter
from .golden_instantstyle import tower
from .golden_latent import parts

MODEL, FOLDER = str(twins.TINY), twins.TINY / "ip_adapter"
ENCODER, VIT_H = twins.TINY / "image_encoder", twins.TINY / "image_encoder_vit_h"
PLUS = FOLDER / "ip-adapter-plus_sdxl_vit-h.safetensors"
ONE = ("--adapter", FOLDER / LINEAR, "--image-encoder", ENCODER)
TWO = ("--adapter", FOLDER / LINEAR, PLUS, "--image-encoder", ENCODER, VIT_H)
BASE = ("--model", MODEL, "--steps", 2, "--quiet", "--size", 64)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def drawn(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> np.ndarray:
    """The first picture of a run that succeeds."""
    code, said, error = run(capsys, "instant-style", "a cat", *BASE, "--out", out, *words)
    assert (code, said, error) == (0, "", "")
    return pixels(out / "0001.png")


def again(capsys: pytest.CaptureFixture[str], path: Path):
    code, said, error = run(capsys, "redo", path, "--quiet")
    assert (code, error, said.splitlines()[-1]) == (0, "", "the same, bit for bit")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["diaphane"])


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Path]:
    """Two pictures, and two masks that divide a square."""
    rng = np.random.default_rng(1)
    left = np.zeros((64, 64), dtype=np.uint8)
    left[:, :32] = 255
    found = {
        "a": rng.integers(0, 255, (90, 120, 3)),
        "b": rng.integers(0, 255, (64, 64, 3)),
        "l": left,
        "r": 255 - left,
    }
    for name, rows in found.items():
        Image.fromarray(rows.astype(np.uint8)).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in found}


def test_a_picture_is_what_the_functions_make(tmp_path: Path, capsys: pytest.CaptureFixture[str], photos):
    words = (*ONE, "--style-image", photos["a"], "--subtract", "a rabbit:0.5", "--scale", 0.8, "--negative", "low")
    got = drawn(capsys, tmp_path / "o", *words, "--seed", 4, "--guidance", 3)
    net, unet = adapter(LINEAR), parts().unet
    with torch.no_grad():
        states = tower("image_encoder")(clip_pixels(Image.open(photos["a"]), 56)).pooled
        text = encode(parts(), "a rabbit").pooled
        assert text is not None
        states = subtracted(net, states, [(text, 0.5)])
        seen = Pictures(net(states)[None], net(torch.zeros_like(states))[None])
        scale = scales(unet.cfg, {"style": 0.8})
        denoise = t2i.denoiser(
            unet, encode(parts(), "a cat"), encode(parts(), "low"), schedule=scaled_linear(), ids=size_ids((64, 64)),
            guidance=3.0, ops=instant_style(TORCH, [image_prompt(net, unet.cfg, seen, scale)]),
        )  # fmt: skip
        x = t2i.pure_noise(parts(), seeded([4]), (64, 64))
        want = t2i.pictures(parts().vae, list(euler(denoise, x, scaled_linear(), leading(2, offset=1)))[-1].x)
    assert np.abs(got - ((want[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1
    again(capsys, tmp_path / "o" / "0001.png")
    said = record(tmp_path / "o" / "0001.png")
    assert (said["command"], said["settings"]["subtract"]) == ("instant-style", ["a rabbit:0.5"])
    assert {"adapter 1", "image encoder 1", "unet"} <= set(said["weights"]["parts"])
    assert str(photos["a"]) in said["inputs"]


def test_every_option_changes_the_picture_and_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], photos):
    a, b, left, right = photos.values()
    one, two = (*ONE, "--style-image", a), (*TWO, "--style-image", a, b)
    every = {
        "style": one,
        "layout": (*one, "--preset", "layout"),
        "sites": (*one, "--sites", "dec.1=0.5", "up_blocks.1.attentions.0"),
        "json": (*one, "--sites", '{"up": {"block_0": [0, 1, 0]}, "mid": 0.5}'),
        "squash": (*one, "--squash"),
        "negative": (*one, "--negative-image", b),
        "half": (*one, "--range", 0, 0.5),
        "images": (*ONE, "--style-image", a, b),
        "mean": (*ONE, "--style-image", a, b, "--average"),
        "weights": (*ONE, "--style-image", a, b, "--average", 1, 3),
        "masks": (*ONE, "--style-image", a, b, "--style-mask", left, right),
        "numbers": (*ONE, "--style-image", a, b, "--style-mask", left, right, "--sites", "dec.1=1,0.2"),
        "adapters": (*two, "--preset", "style", "layout", "--scale", 1, 0.5),
        "second": (*two, "--sites", "dec.1=1@1", "mid=1@2", "--range", 0, 1, 0.5, 1),
        "shares": (*TWO, "--style-image", a, b, b, "--share", 2, 1),
        "control": (*one, "--control", a, "--control-model", twins.TINY / "controlnet"),
        "init": (*one, "--init", b, "--strength", 0.5),
    }
    found = {name: drawn(capsys, tmp_path / name, *words) for name, words in every.items()}
    names = list(found)
    assert [(x, y) for i, x in enumerate(names) for y in names[:i] if (found[x] == found[y]).all()] == []
    for name in ("json", "numbers", "second"):
        again(capsys, tmp_path / name / "0001.png")


def test_amount_0_is_generate_and_a_strip_of_amounts_does_not_depend_on_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos
):
    words = (*ONE, "--style-image", photos["a"], "--amounts", 0, 1, "--n", 3)
    drawn(capsys, tmp_path / "a", *words)
    drawn(capsys, tmp_path / "b", *words, "--batch", 3, "--low-vram")
    for name in ("0001", "0002", "0003"):
        x, y = (pixels(tmp_path / run / f"{name}.png") for run in "ab")
        assert np.abs(x - y).max() <= 1, name
    assert (tmp_path / "a" / "sheet.png").is_file()
    code, _, _ = run(capsys, "generate", "a cat", *BASE, "--out", tmp_path / "g", "--n", 3)
    assert code == 0
    moved = [
        np.abs(pixels(tmp_path / "a" / f"000{i}.png") - pixels(tmp_path / "g" / f"000{i}.png")).max() for i in (1, 2, 3)
    ]
    assert moved[0] <= 1
    assert moved[1] > 5
    assert moved[2] <= 1
    drawn(capsys, tmp_path / "zero", *ONE, "--style-image", photos["a"], "--scale", 0)
    assert (pixels(tmp_path / "zero" / "0001.png") == pixels(tmp_path / "g" / "0001.png")).all()


def test_each_picture_that_is_drawn_sees_one_of_those_that_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos
):
    a, b, left, right = photos.values()
    words = (*ONE, "--style-image", a, b, "--style-mask", left, right, "--each", "--n", 3)
    drawn(capsys, tmp_path / "o", *words, "--batch", 2)
    for i, (picture, mask) in enumerate([(a, left), (b, right), (a, left)]):
        alone = (*ONE, "--style-image", picture, "--style-mask", mask, "--seed", i)
        want = drawn(capsys, tmp_path / str(i), *alone)
        assert np.abs(pixels(tmp_path / "o" / f"000{i + 1}.png") - want).max() <= 1
    again(capsys, tmp_path / "o" / "0002.png")


def test_vit_h_takes_a_text_tower_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], photos):
    source = twins.TINY / "text_encoder_2"
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    weight = tensors["text_projection.weight"]
    config["projection_dim"] = 24
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    write(tmp_path / "text" / "model.safetensors", tensors | {"text_projection.weight": weight[:24].contiguous()})
    one = ("--adapter", FOLDER / "ip-adapter_sdxl_vit-h.safetensors", "--image-encoder", VIT_H, "--style-image",
           photos["a"])  # fmt: skip
    with_text = drawn(capsys, tmp_path / "o", *one, "--subtract", "a rabbit", "--subtract-encoder", tmp_path / "text")
    assert (with_text != drawn(capsys, tmp_path / "p", *one)).any()
    again(capsys, tmp_path / "o" / "0001.png")
    code, _, error = run(
        capsys, "instant-style", "a cat", *BASE, "--out", tmp_path / "q", *one, "--subtract", "a rabbit"
    )
    assert (code, error.count("\n")) == (2, 1)
    assert "take the text tower of the image encoder's own CLIP" in error


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], photos):
    a, b, left, right = photos.values()
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    one = (*ONE, "--style-image", a)
    wrong = {
        (*ONE, "--style-image", tmp_path / "nothing.png"): "cannot read",
        ("--adapter", FOLDER / LINEAR, "--image-encoder", VIT_H, "--style-image", a): "the image encoder gives 24",
        ("--adapter", FOLDER / LINEAR, "--style-image", a): "no published image encoder gives 40 numbers",
        ("--adapter", FOLDER / LINEAR, "--image-encoder", twins.TINY / "vae", "--style-image", a): "image_encoder",
        ("--adapter", "nowhere", "--style-image", a): "there is no nowhere",
        ("--adapter", twins.TINY / "unet", "--style-image", a): "it is a latent diffusion UNet",
        (*one, "--image-encoder", ENCODER, ENCODER): "one for all, or one for each of 1 adapters",
        (*one, "--sites", "dec.11=1"): "there is no dec.11 in this network: the nearest is dec.1",
        (*one, "--sites", "dec.8=1"): "dec.8 has no attention to text",
        (*one, "--sites", "dec.1=much"): "'much' is not a number",
        (*one, "--sites", "dec.1=1@2"): "@1 ... @1 for one adapter",
        (*one, "--sites", "dec.1=1,2"): "a list is for pictures with --style-mask",
        (*one, "--sites", '{"up": '): "is not json",
        (*one, "--sites", '{"up": {"blok_0": 1}}'): "up has no blok_0",
        (*one, "--sites", "dec.1=1", "--preset", "style"): "both say where",
        (*one, "--preset", "mood"): "invalid choice",
        (*one, "--scale", 1, 1): "--scale: one for all",
        (*one, "--range", 0.5): "START END",
        (*one, "--range", 0.5, 0.5): "START is before END",
        (*one, "--range", 0.1, 0.2): "no step of 2 lies between",
        (*one, "--style-mask", left, right): "one for each of 1 pictures",
        (*one, "--style-mask", tmp_path / "black.png"): "black everywhere",
        (*one, "--style-mask", left, "--average"): "leave --style-mask out",
        (*one, "--average", 1, 1): "one weight for each of 1 pictures",
        (*one, "--average", 0): "sum is 0",
        (*one, "--average", "--each"): "give one of them",
        (*one, "--subtract", "a rabbit:900"): "-100 ... 100",
        (*one, "--subtract", ":0.5"): "it is TEXT or TEXT:WEIGHT",
        (*one, "--subtract-encoder", twins.TINY / "text_encoder_2"): "give both",
        (*one, "--subtract", "x", "--subtract-encoder", twins.TINY / "text_encoder"): "no projection into the space",
        (*one, "--subtract", "x", "--subtract-encoder", ENCODER): "text_encoder",
        ("--adapter", PLUS, "--image-encoder", VIT_H, "--style-image", a, "--subtract", "x"): "take a linear adapter",
        (*TWO, "--style-image", a): "1 pictures for 2 adapters: say how many",
        (*TWO, "--style-image", a, b, "--share", 2, 1): "how many of the 2 pictures",
        (*one, "--size", 60): "multiples of 8",
        (*one, "--mask", left): "give --init",
    }
    for words, why in wrong.items():
        code, said, error = run(capsys, "instant-style", "a cat", *BASE, "--out", tmp_path / "o", *words)
        assert (code, said, error.count("\n")) == (2, "", 1), (words, error)
        assert why in error, (words, error)
    for words in (("--style-image", a), ("--adapter", FOLDER / LINEAR)):
        code, _, error = run(capsys, "instant-style", "a cat", *BASE, *words)
        assert (code, "are required" in error) == (2, True)
    for words, why in {
        ("--preset", "style"): "--blocks chooses",
        ("--n", 2): "one text from one seed",
        ("--range", 0, 1): "leave --range out",
        ("--blocks", "enc.0"): "enc.0 has no attention to text",
    }.items():
        code, said, error = run(capsys, "probe", "a cat", *BASE, "--out", tmp_path / "o", *one, *words)
        assert (code, said, error.count("\n")) == (2, "", 1), words
        assert why in error, (words, error)
    assert not (tmp_path / "o").exists()


def test_probe_draws_a_picture_a_block_and_measures_what_each_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos
):
    words = ("a cat", *BASE, *ONE, "--style-image", photos["a"])
    code, said, error = run(capsys, "probe", *words, "--out", tmp_path / "o")
    assert (code, error) == (0, "")
    stages = ["all", "enc.4", "enc.5", "enc.7", "enc.8", "mid", *(f"dec.{i}" for i in range(6))]
    names = ["0001-none.png", *(f"{i:04d}-{stage}.png" for i, stage in enumerate(stages, 2)), "probe.csv", "sheet.png"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == names
    with open(tmp_path / "o" / "probe.csv", newline="") as f:
        rows = {row["block"]: row for row in csv.DictReader(f)}
    assert list(rows) == stages
    assert rows["dec.1"]["diffusers"] == "up_blocks.0.attentions.1"
    assert all(0 < float(row[name]) < 3 for row in rows.values() for name in ("eps", "latents", "picture"))
    assert float(rows["all"]["eps"]) > max(float(row["eps"]) for stage, row in rows.items() if stage != "all")
    assert [line.split()[0] for line in said.splitlines()] == sorted(stages, key=lambda s: -float(rows[s]["eps"]))
    code, _, _ = run(capsys, "generate", "a cat", *BASE, "--out", tmp_path / "g")
    assert (pixels(tmp_path / "o" / "0001-none.png") == pixels(tmp_path / "g" / "0001.png")).all()
    style = drawn(capsys, tmp_path / "s", *ONE, "--style-image", photos["a"], "--sites", "dec.1")
    assert (pixels(tmp_path / "o" / "0009-dec.1.png") == style).all()
    a = record(tmp_path / "o" / "0009-dec.1.png")
    assert a["effect"]["eps"] == pytest.approx(float(rows["dec.1"]["eps"]), rel=1e-5)
    again(capsys, tmp_path / "o" / "0009-dec.1.png")
    code, said, _ = run(
        capsys, "probe", *words, "--out", tmp_path / "p", "--blocks", "dec.1", "down_blocks.2", "--scale", 0
    )
    assert code == 0
    assert {line.split()[0] for line in said.splitlines()} == {"all", "dec.1", "enc.7", "enc.8"}
    assert all(float(n) == 0 for line in said.splitlines() for n in line.split()[2::2])


@pytest.mark.parametrize("command", ["instant-style", "probe"])
def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str], command: str):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert f"diaphane {command} " in said
    assert max(map(len, said.splitlines())) <= 130

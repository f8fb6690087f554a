"""Mutated command lines of latent models: exit code 0 or 2, one line on stderr, no traceback, nothing half written."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli import latents
from diaphane.cli.main import main
from PIL import Image
from safetensors.torch import load_file, save_file

from . import latent_twins as twins
from .golden_image_prompt import LINEAR
from .test_fuzz_cli import VALUES, run

LINES = 200
OPTIONS = ("model", "file", "variant", "tokenizer", "literal", "vae", "lora", "control_model", "prediction", "device",
           "dtype", "threads", "low_vram", "tile")  # fmt: skip
SHOWN = ["--adapter", str(twins.TINY / "ip_adapter" / LINEAR), "--image-encoder", str(twins.TINY / "image_encoder"),
         "--style-image", "{picture}"]  # fmt: skip
SIZED = ["--size", "64", "--guidance", "2", "--sampler", "ddim", "--eta", "0", "--freeu", "none", "--tile", "32"]
CONTROL = ["--control", "{picture}", "--control-model", str(twins.TINY / "controlnet")]
COMMANDS = {
    "generate": ["a cat", *SIZED, "--n", "1", "--batch", "2", "--init", "{picture}", "--strength", "1",
                 "--mask", "{picture}"],
    "instant-style": ["a cat", *SIZED, *SHOWN, "--scale", "1", "--range", "0", "1", "--preset", "style", "--amounts",
                      "1", "--subtract", "a dog:0.5"],
    "probe": ["a cat", *SIZED, *SHOWN, "--blocks", "dec.1", "--looks", "1"],
    "style-align": ["a cat", "a dog", *SIZED, *CONTROL, "--scale", "1", "--shift", "0", "--adain", "q",
                    "--level", "0.5", "--batch", "2", "--norms", "on"],
    "consistory": ["a cat", "a cat asleep", *SIZED, *CONTROL, "--subject", "cat", "--anchors", "1", "--dropout", "0.5",
                   "--window", "2", "--batch", "2"],
    "panorama": ["a street", *SIZED, "--window", "64", "--stride", "32", "--styles", "ink", "--at", "0", "--batch",
                 "2"],
    "look": ["a cat", *SIZED, "--words", "cat", "--looks", "1", "--at", "0.5,0.5"],
    "invert": ["{picture}", "--size", "64", "--prompt", "a cat", "--method", "ddim", "--guidance", "1", "--to", "a dog",
               "--tile", "32"],
    "correlation": ["--prompt", "a cat", "--n", "3", "--gamma", "0.3", "--batch", "2"],
}  # fmt: skip
ODD = [
    *("", " ", "-", "--", "-a cat", "\u202ecat", "猫 🐈 café", "cat " * 2500, "a\tcat\n", "\0", "<|endoftext|>", "!"),
    *(
        "dec.99",
        "up_blocks.9",
        "mid",
        "dec.1=nan",
        "dec.1=1e99",
        '{"up": 1}',
        "[[[[",
        "0x0",
        "8x8",
        "60",
        "64x72",
        "1x1",
    ),
    *("99999x99999", "10000000000", "all", "style", "sdxl", "1,1,1,1", "9,9,9,9", "-1,0,0,0", "{lines}", "{nothing}"),
    *("{small}", "{nan}", "{cut}", "{folder}", str(twins.TINY), str(twins.TINY / "unet"), str(twins.TINY / "vae")),
]


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch):
    """The tiny model is loaded once for all runs with the same options; nothing comes from a network."""
    load, nets = latents.loaded, dict[tuple, Any]()

    def loaded(args):
        key = tuple(str(getattr(args, name, None)) for name in OPTIONS)
        if key not in nets:
            nets[key] = load(args)
        return nets[key]

    monkeypatch.setattr(latents, "loaded", loaded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Files, good and bad."""
    found = {name: tmp_path / file for name, file in {
        "picture": "p.png", "small": "ü 图.png", "file": "f.txt", "lines": "l.txt", "nothing": "n.txt", "folder": "d",
        "missing": "m", "cut": "cut.safetensors", "nan": "nan.safetensors"}.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(found["picture"])
    Image.fromarray(rng.integers(0, 256, (1, 1), dtype=np.uint8)).save(found["small"])
    found["file"].write_bytes(b"\xff\xfe not text, and no picture")
    found["lines"].write_text("a cat\n\n  -a dog\n猫\n", encoding="utf-8")
    found["nothing"].write_text("\n \n")
    found["folder"].mkdir()
    whole = twins.TINY / "ip_adapter" / LINEAR
    found["cut"].write_bytes(whole.read_bytes()[:40])
    save_file({name: torch.full_like(t, float("nan")) for name, t in load_file(whole).items()}, found["nan"])
    return found


def filled(words: list[str], places: dict[str, Path]) -> list[str]:
    return [str(places[word[1:-1]]) if word.startswith("{") and word[1:-1] in places else word for word in words]


def test_damaged_command_lines_of_latent_models_run_or_are_refused(
    tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    rng, codes = random.Random(5), []
    for i in range(LINES):
        command = rng.choice(list(COMMANDS))
        words, out = [*COMMANDS[command]], tmp_path / "w" / f"{i}"
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(words) + 1)
            match rng.randrange(4):
                case 0 if at < len(words):
                    del words[at]
                case 1:
                    words.insert(at, rng.choice([*VALUES, *ODD, "--nonsense", "--n", "--sites", "--adapter", "-x"]))
                case _ if at < len(words):
                    words[at] = rng.choice(ODD if rng.random() < 0.6 else VALUES)
        words += ["--model", str(twins.TINY), "--steps", "2", "--quiet", "--out", str(out)]
        codes.append(run([command, *filled(words, places)], out, capsys))
        shutil.rmtree(out, ignore_errors=True)
    assert 0 < codes.count(2) < LINES


DAMAGED: dict[str, list[str]] = {
    "truncated": ["is not a whole safetensors file"],
    "empty": ["fetch it again"],
    "nan": ["not finite"],
    "no unet": ["unet"],
    "no json": ["is not json"],
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_model_is_one_line_that_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str):
    model, picture = tmp_path / "model", tmp_path / "p.png"
    shutil.copytree(twins.TINY, model)
    Image.new("RGB", (64, 64)).save(picture)
    file = next((model / "unet").glob("*.safetensors"))
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    if how == "empty":
        file.write_bytes(b"")
    if how == "nan":
        save_file({name: torch.full_like(t, float("nan")) for name, t in load_file(file).items()}, file)
    if how == "no unet":
        shutil.rmtree(model / "unet")
    if how == "no json":
        (model / "model_index.json").write_text("{")
    said = {"invert": [str(picture), "--prompt", "x"], "correlation": ["--prompt", "x", "--n", "3"],
            "consistory": ["a cat", "a cat asleep", "--subject", "cat"], "style-align": ["a cat", "a dog"]}  # fmt: skip
    for command in COMMANDS:
        words = [*said.get(command, ["a cat"]), "--resolution" if command == "correlation" else "--size", "64"]
        if command in ("instant-style", "probe"):
            words += [word.replace("{picture}", str(picture)) for word in SHOWN]
        out = tmp_path / "o"
        argv = [command, *words, "--model", str(model), "--steps", "2", "--quiet", "--out", str(out)]
        capsys.readouterr()
        assert main(argv) == 2, command
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert DAMAGED[how][0] in error, error
        assert not out.exists(), command


@pytest.mark.parametrize("name", ["cut", "nan", "nothing", "picture", "folder", "missing"])
def test_a_damaged_adapter_is_one_line_before_anything_is_drawn(
    tmp_path: Path, places: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str
):
    for command in ("instant-style", "probe", "style-align", "consistory", "panorama"):
        words = {"consistory": ["a cat", "a cat asleep", "--subject", "cat"], "style-align": ["a", "b"]}
        shown = [*filled(SHOWN, places)]
        shown[1] = str(places[name])
        argv = [command, *words.get(command, ["a cat"]), *shown, "--size", "64", "--steps", "1000", "--quiet"]
        assert run([*argv, "--model", str(twins.TINY), "--out", str(tmp_path / "o")], tmp_path / "o", capsys) == 2


TEXTS = ["", " ", "猫 🐈 " * 300, "x " * 5000, "x" * 10_000, "\u202e", "a\0b", "\ud800", "<|endoftext|>", "-a cat"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_is_drawn_but_half_a_character(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    base = ["--size", "64", "--steps", "1", "--quiet", "--model", str(twins.TINY)]
    for command, texts in {"generate": [text], "style-align": [text, text], "panorama": [text]}.items():
        out = tmp_path / command
        code = run([command, *base, "--out", str(out), "--", *texts], out, capsys)
        assert code == (2 if text == "\ud800" else 0), command
    out = tmp_path / "look"
    code = run(["look", *base, "--looks", "1", "--out", str(out), "--", text], out, capsys)
    assert code == (0 if text[:2] in ("猫 ", "x ", "-a", "a\0") else 2)  # it looks for a word of the text


def test_batches_do_not_change_pictures_by_more_than_a_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = ["a cat", "--size", "64", "--steps", "3", "--quiet", "--model", str(twins.TINY), "--n", "4"]
    picture = tmp_path / "p.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    shown = [word.replace("{picture}", str(picture)) for word in SHOWN]
    for command, more in {"generate": [], "instant-style": shown, "style-align": ["--preset", "defaults"]}.items():
        for sampler in ("euler-a", "ddpm"):
            found = []
            for batch in ("1", "4"):
                out = tmp_path / command / sampler / batch
                assert main([command, *base, *more, "--sampler", sampler, "--batch", batch, "--out", str(out)]) == 0
                found.append([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*[0-9e].png"))])
            assert len(found[0]) == 4
            assert max(int(np.abs(a - b).max()) for a, b in zip(*found, strict=True)) <= 1, (command, sampler)
    capsys.readouterr()


@pytest.mark.parametrize("command", ["generate", "style-align"])
def test_a_run_that_is_interrupted_leaves_whole_files_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
):
    out, calls = tmp_path / "o", [0]
    argv = [command, "a cat", "--n", "4", "--batch", "1", "--size", "64", "--steps", "2", "--quiet", "--resume",
            "--model", str(twins.TINY), "--out", str(out)]  # fmt: skip
    decode = latents.Loaded.pictures

    def pictures(self, x):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return decode(self, x)

    monkeypatch.setattr(latents.Loaded, "pictures", pictures)
    assert main(argv) == 130
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) == (2 if command == "generate" else 3)
    for path in out.iterdir():
        Image.open(path).load()
    assert main(argv) == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(list(out.iterdir())) == 5
    whole = tmp_path / "whole"
    assert main([*argv[:-1], str(whole)]) == 0
    for path in whole.glob("*[0-9e].png"):
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(out / path.name))).all()
    capsys.readouterr()

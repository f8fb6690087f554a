"""`diaphane consistory` on the tiny model: what is drawn, kept, recorded, and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.cli.marked import TINT, mask_picture, matched, overlaid
from PIL import Image

from . import latent_twins as twins

MODEL = str(twins.TINY)
TEXTS = ("a cat in the snow", "a cat asleep", "a cat at sea")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def consistory(capsys: pytest.CaptureFixture[str], out: Path, *words: object, texts: Any = TEXTS) -> str:
    """A run that succeeds; what it says."""
    common = ["--subject", "cat", "--model", MODEL, "--size", "64x32", "--quiet", "--out", out]
    code, said, error = run(capsys, "consistory", *texts, *common, "--steps", 5, *words)
    assert (code, error) == (0, "")
    return said


def refused(capsys: pytest.CaptureFixture[str], *words: object, texts: Any = TEXTS) -> str:
    """The line that refuses a run."""
    common = ["--model", MODEL, "--size", "64x32", "--steps", 5]
    subject = [] if "--subject" in words else ["--subject", "cat"]
    code, said, error = run(capsys, "consistory", *texts, *common, *subject, *words)
    assert (code, said) == (2, "")
    assert error.count("\n") == 1
    return error


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["diaphane"])


V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
ZERO, KARRAS = V | {"rescale_betas_zero_snr": True}, V | {"use_karras_sigmas": True}


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Two pictures, neither of the model's size."""
    names = []
    for i in range(2):
        rows = np.random.default_rng(i).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(rows).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    return names


def test_pictures_say_what_made_them_and_any_is_made_again(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    said = consistory(capsys, tmp_path / "a", "--style", "A photo of")
    assert "3 pictures in 8.8 passes each of the UNet (published: 12)" in said
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0001.png", "0002.png", "0003.png", "sheet.png"]
    about = record(tmp_path / "a" / "0002.png")
    assert (about["prompt"], about["seed"]) == ("A photo of a cat asleep", 1)
    with Image.open(tmp_path / "a" / "0002.png") as picture:
        assert picture.size == (64, 32)
        assert picture.info["parameters"].startswith("A photo of a cat asleep\n")
    for name in ("0003.png", "sheet.png"):
        code, said, _ = run(capsys, "redo", tmp_path / "a" / name, "--quiet")
        assert (code, "the same, bit for bit" in said) == (0, True)


def test_pictures_do_not_depend_on_the_batch_nor_on_whether_the_anchors_were_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "cat.safetensors"
    consistory(capsys, tmp_path / "one")
    consistory(capsys, tmp_path / "few", "--batch", 1, "--cache-out", file)
    consistory(capsys, tmp_path / "later", "--cache-in", file, texts=TEXTS[2:])
    whole = pixels(tmp_path / "one" / "0003.png")
    for again in (tmp_path / "few" / "0003.png", tmp_path / "later" / "0001.png"):
        assert np.abs(pixels(again) - whole).max() <= 2
    assert record(tmp_path / "later" / "0001.png")["seed"] == 2
    code, said, _ = run(capsys, "redo", tmp_path / "later" / "0001.png", "--quiet")
    assert (code, "the same, bit for bit" in said) == (0, True)
    error = refused(capsys, "--cache-in", file, "--alpha", 0.5, texts=TEXTS[2:])
    assert "the anchors were drawn with alpha 0.8, these pictures with 0.5" in error
    for more, said in ((("--dtype", "float64"), "dtype float32"), (("--freeu", "none"), "FreeU 1.1,1.2,0.6,0.4")):
        assert f"drawn with {said}, these" in refused(capsys, "--cache-in", file, *more, texts=TEXTS[2:])
    assert "no file of ConsiStory's anchors" in refused(
        capsys, "--cache-in", twins.TINY / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert "exists" in refused(capsys, "--cache-out", file)


@pytest.mark.parametrize(("sampler", "says"), [("ddim", ZERO), ("ddpm", ZERO), ("dpmpp", KARRAS)])
def test_without_its_parts_a_walk_is_that_of_generate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sampler: str, says: dict[str, Any]
):
    common = ["--model", twins.scheduled(tmp_path / "model", says), "--sampler", sampler]
    consistory(capsys, tmp_path / "a", *common, "--without", "attention", "injection", "--freeu", "none")
    code, _, _ = run(capsys, "generate", TEXTS[1], *common, "--size", "64x32", "--steps", 5, "--seed", 1, "--quiet",
                     "--out", tmp_path / "g")  # fmt: skip
    assert code == 0
    differ = np.abs(pixels(tmp_path / "a" / "0002.png") - pixels(tmp_path / "g" / "0001.png"))
    assert (differ.max() <= 1, (differ > 0).mean() < 0.02) == (True, True)  # by rounding, in a batch of three


def test_the_parts_of_the_method_may_be_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    plain = ["--without", "attention", "injection", "--freeu", "none"]
    consistory(capsys, tmp_path / "a", *plain)
    code, _, _ = run(capsys, "generate", TEXTS[1], "--model", MODEL, "--size", "64x32", "--steps", 5, "--seed", 1,
                     "--sampler", "ddim", "--quiet", "--out", tmp_path / "g")  # fmt: skip
    assert code == 0
    assert np.abs(pixels(tmp_path / "a" / "0002.png") - pixels(tmp_path / "g" / "0001.png")).max() <= 1
    consistory(capsys, tmp_path / "b", "--without", "blending", "--freeu", "1.1,1.2,0.6,0.4", "--early-stop",
               "--simultaneous", "--window", 0, "--by-steps", "--dropout", 0.7, texts=TEXTS[:2])  # fmt: skip
    assert np.abs(pixels(tmp_path / "b" / "0002.png") - pixels(tmp_path / "a" / "0002.png")).max() > 1


def test_real_pictures_are_looked_at_and_are_not_among_those_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: list[str]
):
    consistory(capsys, tmp_path / "a", "--real", *photos, "--real-prompt", "a cat", texts=TEXTS[:1])
    consistory(capsys, tmp_path / "b", "--real", *reversed(photos), texts=TEXTS[:1])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["0001.png", "sheet.png"]
    assert np.abs(pixels(tmp_path / "a" / "0001.png") - pixels(tmp_path / "b" / "0001.png")).max() > 1
    code, said, _ = run(capsys, "redo", tmp_path / "a" / "0001.png", "--quiet")
    assert (code, "the same, bit for bit" in said) == (0, True)


def test_it_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ("--batch", 1, "--resume")
    consistory(capsys, tmp_path / "a", *words)
    before = pixels(tmp_path / "a" / "0003.png")
    (tmp_path / "a" / "0003.png").unlink()
    consistory(capsys, tmp_path / "a", *words)
    assert np.array_equal(pixels(tmp_path / "a" / "0003.png"), before)


REFUSED: list[tuple[list[object], str]] = [
    (["--subject", "dog"], "does not name the subject 'dog': write it into the prompt"),
    (["--subject", "cat", "hat"], "no prompt has the subject's word 'hat'"),
    (["--subject", ""], "the subject is one word or more"),
    (["--anchors", 4], "--anchors 4: there are 3 pictures"),
    (["--freeu", "sd3"], "'sd3' is none of sdxl, sd15"),
    (["--freeu", "1,2"], "no b1,b2,s1,s2"),
    (["--eta", 1, "--sampler", "euler"], "--eta is DDIM's"),
    (["--real-prompt", "a cat"], "give --real"),
    (["--real", "nowhere.png"], "nowhere.png"),
    (["--cache-in", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--cache-out", "no/where/a.safetensors"], "there is no folder"),
    (["--control", "a.png"], "--control-model"),
    (["--dropout", 1.5], "not a number in 0 ... 1"),
    (["--prompts", "lines.txt"], "and not both"),
]


@pytest.mark.parametrize(("words", "why"), REFUSED, ids=[" ".join(map(str, words)) for words, _ in REFUSED])
def test_what_cannot_be_drawn_is_one_line_before_anything_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[object], why: str
):
    assert why in refused(capsys, *words, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_one_picture_alone_is_refused_unless_its_anchors_are_to_be_kept(capsys: pytest.CaptureFixture[str]):
    assert "one picture has no other" in refused(capsys, texts=TEXTS[:1])
    assert "no other to be like" in refused(capsys, "--anchors", 1, texts=TEXTS[:1])


def test_masks_and_matches_are_drawn_where_they_are():
    grey = Image.new("RGB", (8, 4), (100, 100, 100))
    laid = np.asarray(overlaid(grey, torch.tensor([True, False]), (1, 2))).astype(int)
    assert (laid[:, :4, 0] > 100).all()
    assert (laid[:, 4:] < 100).all()
    alone = np.asarray(mask_picture(torch.tensor([True, False]), (1, 2)))
    assert (tuple(alone[0, 0]), tuple(alone[0, 1])) == (TINT, (0, 0, 0))  # neither is the paper's white
    lines = matched(grey, grey, torch.tensor([1, 0]), torch.tensor([True, False]), (1, 2))
    assert lines.size == (24, 4)
    assert np.abs(np.asarray(lines).astype(int)[2, 3] - 100).max() > 50

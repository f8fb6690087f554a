"""`diaphane invert` with a latent model, and what goes on from its trajectories."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.cli.trajectory import Trajectory, packed, unpacked
from diaphane.methods import style_reference
from diaphane.methods import text_to_image as t2i
from diaphane.methods.prompt import encode, size_ids
from diaphane.samplers.inversion import invert
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import leading
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from . import latent_twins as twins
from .golden_latent import SCHEDULE, parts
from .test_cli_generate import pixels, record, run

MODEL = str(twins.TINY)
METHODS = {"ddim": set(), "edit-friendly": {"noise"}, "null-text": {"null_text"}}


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Two pictures that are neither square nor of the model's size."""
    y, x = np.mgrid[0:60, 0:80]
    rows = [np.stack([x * 3, y * 4, x + y], -1), np.stack([y * 4, 255 - x * 3, (x * y) % 255], -1)]
    for name, row in zip("ab", rows, strict=True):
        Image.fromarray(row.astype(np.uint8)).save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png"]


def inverted(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """A run that succeeds; what it says."""
    pictures = [word for word in words if isinstance(word, Path)]
    common = ("--model", MODEL, "--steps", 3, "--size", "64x32", "--out", out, "--quiet")
    code, said, error = run(capsys, "invert", *pictures, *common, *words[len(pictures) :])
    assert (code, error) == (0, ""), error
    return said


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The line of a run that fails."""
    code, _, error = run(capsys, *words)
    assert (code, error.count("\n")) == (2, 1), error
    return error


@pytest.mark.parametrize("method", METHODS)
def test_pictures_come_back_with_their_trajectories_and_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path], method: str
):
    words = (*photos, "--prompt", "a cat", "--method", method, "--to", "a dog", "--iterations", 2, "--seed", 5)
    said = inverted(capsys, tmp_path / "o", *words)
    assert said.count(" dB in latents, ") == 2
    names = ["0001-edited.png", "0001-trajectory.safetensors", "0001.png"]
    names += [name.replace("0001", "0002") for name in names]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [*names, "sheet.png"]
    held = load_file(tmp_path / "o" / "0002-trajectory.safetensors")
    assert set(held) == {"x_T", "trajectory", "timesteps"} | METHODS[method]
    assert held["trajectory"].shape == (4, 1, 4, 4, 8)
    assert torch.equal(held["x_T"], held["trajectory"][0])
    assert held["timesteps"].tolist() == [667, 334, 1, -1]
    with safe_open(tmp_path / "o" / "0002-trajectory.safetensors", "pt") as f:
        told = json.loads(f.metadata()["diaphane"])
    assert (told["method"], told["prompt"], told["size"]) == (method, "a cat", "64x32")
    assert record(tmp_path / "o" / "0002.png")["psnr"] == told["psnr"]
    assert (pixels(tmp_path / "o" / "0002.png") != pixels(tmp_path / "o" / "0002-edited.png")).any()
    inverted(capsys, tmp_path / "one", *words, "--batch", 1)
    one = load_file(tmp_path / "one" / "0002-trajectory.safetensors")
    assert all(torch.allclose(one[name], held[name], atol=2e-3) for name in held)
    for name in ("0002.png", "0001-edited.png"):
        code, said, _ = run(capsys, "redo", tmp_path / "o" / name, "--quiet")
        assert (code, said.splitlines()[-1]) == (0, "the same, bit for bit")


def test_the_trajectory_is_that_of_the_functions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    common = ("--prompt", "a cat", "--negative", "low", "--guidance", 2, "--fixed-point", 1)
    inverted(capsys, tmp_path / "o", photos[0], *common)
    xs = load_file(tmp_path / "o" / "0001-trajectory.safetensors")["trajectory"]
    texts = [encode(parts(), text) for text in ("a cat", "low")]
    denoise = t2i.denoiser(parts().unet, *texts, schedule=SCHEDULE, ids=size_ids((32, 64)), guidance=2.0)
    with torch.no_grad():
        want = list(invert(denoise, xs[-1], SCHEDULE, leading(3, offset=1)[::-1], iterations=1))
    assert torch.allclose(xs[:-1], torch.stack([step.x for step in want[::-1]]), atol=1e-5)


def test_a_refined_inversion_and_noise_maps_come_back_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    found = {}
    for name, words in {
        "plain": (), "refined": ("--fixed-point", 4), "edit": ("--method", "edit-friendly", "--guidance", 1)
    }.items():  # fmt: skip
        inverted(capsys, tmp_path / name, photos[0], "--steps", 12, *words)
        found[name] = record(tmp_path / name / "0001.png")["psnr"]["latents"]
    assert found["plain"] + 3 < found["refined"]
    assert found["plain"] + 3 < found["edit"]


def test_another_text_goes_on_from_a_file_as_it_does_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    for method in ("ddim", "edit-friendly"):
        out = tmp_path / method
        inverted(capsys, out, photos[0], "--prompt", "a cat", "--method", method, "--to", "a dog", "--skip", 1,
                 "--to-guidance", 4)  # fmt: skip
        words = ("--from", out / "0001-trajectory.safetensors", "--skip", 1, "--guidance", 4, "--model", MODEL)
        code, _, error = run(capsys, "generate", "a dog", *words, "--out", out / "g", "--quiet", "--n", 2, "--batch", 2)
        assert (code, error) == (0, "")
        for name in ("0001.png", "0002.png"):
            assert np.abs(pixels(out / "g" / name) - pixels(out / "0001-edited.png")).max() <= 1
        assert record(out / "g" / "0001.png")["settings"]["steps"] == 3
        code, said, _ = run(capsys, "redo", out / "g" / "0001.png", "--quiet")
        assert (code, said.splitlines()[-1]) == (0, "the same, bit for bit")


def test_a_trajectory_is_a_reference_of_style_aligned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    inverted(capsys, tmp_path / "o", photos[0], "--fixed-point", 1)
    name = tmp_path / "o" / "0001-trajectory.safetensors"
    found, _ = unpacked(name.read_bytes(), str(name))
    shown = style_reference.Trajectory(found.xs, found.path)
    assert torch.equal(shown.latents[-1], found.xs[-1])


@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--dtype", "float64"), ("--low-vram",),
                                   ("--spacing", "trailing"), ("--round-trips",)])  # fmt: skip
def test_types_places_and_spacings_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    photos: list[Path],
    words: tuple[str, ...],
):
    from diaphane.cli import invert as command

    monkeypatch.setattr(command, "TRIPS", (2, 3))
    said = inverted(capsys, tmp_path / "o", photos[0], *words)
    held = load_file(tmp_path / "o" / "0001-trajectory.safetensors")
    assert held["trajectory"].dtype == (torch.float64 if "float64" in words else torch.float32)
    if words == ("--round-trips",):
        rows = (tmp_path / "o" / "round-trips.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["steps", "2", "3"]
        assert "steps  mean PSNR" in said
    if words == ("--low-vram",):
        inverted(capsys, tmp_path / "p", photos[0])
        assert (pixels(tmp_path / "o" / "0001.png") == pixels(tmp_path / "p" / "0001.png")).all()


def test_bad_options_are_one_line_that_says_what_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    for words, why in {
        ("--model", MODEL, "--skip", 1): "give --to",
        ("--model", MODEL, "--to", "x", "--skip", 9, "--steps", 9): "leaves none of 9 steps",
        ("--model", MODEL, "--method", "null-text", "--dtype", "bfloat16"): "takes gradients",
        ("--model", MODEL, "--method", "edit-friendly", "--fixed-point", 2): "--fixed-point refines DDIM",
        ("--model", MODEL, "--resolution", 64): "--resolution is for pixel networks",
        ("--model", MODEL, "--no-resize"): "for pixel networks",
        ("--model", MODEL, "--size", 30): "multiples of 8",
        ("--to", "x"): "--to is for models that read text",
        ("--method", "null-text"): "--method is for models that read text",
        ("--low-vram",): "--low-vram is for models that read text",
        ("--prompt", "x"): "shapes",
    }.items():
        assert why in refused(capsys, "invert", photos[0], "--out", tmp_path / "o", *words), words
    assert "cannot read" in refused(capsys, "invert", tmp_path / "none.png", "--model", MODEL, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def changed(**changes: Any) -> bytes:
    """A file of a trajectory, with changes."""
    xs = torch.zeros(3, 1, 4, 4, 4)
    whole = Trajectory("edit-friendly", [501, 1, -1], xs, torch.zeros(2, 1, 4, 4, 4), eta=1.0)
    return packed(whole._replace(**changes), {})


def test_files_that_are_no_trajectory_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole, _ = unpacked(changed(), "whole")
    assert (whole.method, whole.path, whole.eta) == ("edit-friendly", [501, 1, -1], 1.0)
    five = {"xs": torch.zeros(3, 1, 5, 4, 4), "zs": torch.zeros(2, 1, 5, 4, 4)}
    two = {"xs": torch.zeros(3, 2, 4, 4, 4), "zs": torch.zeros(2, 2, 4, 4, 4)}
    null = {"zs": None, "eta": 0.0, "method": "null-text", "nulls": torch.zeros(2, 1, 7, 8)}
    for data, why in {
        b"": "no trajectory",
        changed()[:-9]: "no trajectory",
        changed(path=[501, 1]): "not whole",
        changed(path=[1, 501, -1]): "not whole",
        changed(zs=None): "not whole",
        changed(zs=torch.zeros(3, 1, 4, 4, 4)): "not whole",
        changed(method="magic"): "not whole",
        changed(xs=torch.full((3, 1, 4, 4, 4), torch.nan)): "not finite",
        changed(**five): "latents of 5 channels",
        changed(**two): "is of 2 pictures",
        changed(**null): "null texts",
    }.items():
        (tmp_path / "t.safetensors").write_bytes(data)
        error = refused(capsys, "generate", "x", "--model", MODEL, "--from", tmp_path / "t.safetensors")
        assert why in error
        assert "t.safetensors" in error
    (tmp_path / "t.safetensors").write_bytes(changed())
    begin = ("generate", "x", "--model", MODEL, "--from", tmp_path / "t.safetensors")
    assert "is of 32x32" in refused(capsys, *begin, "--size", 64)
    assert "leaves none of 2 steps" in refused(capsys, *begin, "--skip", 2)
    for words in (("--steps", 9), ("--sampler", "heun"), ("--spacing", "karras")):
        assert f"{words[0]} {words[1]}: " in (error := refused(capsys, *begin, *words))
        assert "has 2 steps of DDIM" in error
    assert "two places to begin" in refused(capsys, *begin, "--init", tmp_path / "a.png")
    assert "give --from" in refused(capsys, "generate", "x", "--model", MODEL, "--skip", 2)


def test_the_inversions_in_the_docs_run():
    text = (Path(__file__).parent.parent / "docs" / "text_to_image.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "noise_maps" in block)
    denoise = t2i.denoiser(parts().unet, encode(parts(), "a"), schedule=SCHEDULE, ids=size_ids((32, 32)))
    path, photo = leading(3, offset=1), torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    found: dict[str, Any] = {"parts": parts(), "denoise": denoise, "other": denoise, "schedule": SCHEDULE, "path": path}
    exec(code.replace("11", "1"), {**found, "photo": photo, "torch": torch, "seeded": seeded}, found)
    assert [len(found["xs"]), found["edited"].x.shape] == [3, (1, 4, 4, 4)]


def test_the_pixel_networks_are_inverted_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photos: list[Path]
):
    assert main(["invert", str(photos[0]), "--steps", "3", "--out", str(tmp_path / "o"), "--quiet"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["0001-x_T.safetensors", "0001.png", "sheet.png"]
    assert "3 steps up and down" in capsys.readouterr().out

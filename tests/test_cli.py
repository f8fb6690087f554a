"""Every subcommand on a tiny network, through `main(argv)` and through the installed script."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diaphane.cli.main import COMMANDS, main
from PIL import Image
from safetensors import safe_open

TINY = str(Path(__file__).parent / "golden" / "tiny-ddpm")
QUICK = ["--model", TINY, "--quiet"]


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> str:
    """A smooth colourful picture in a file."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


def record(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["diaphane"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command line is refused with."""
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("diaphane")
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_that_ends_well(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: diaphane {command}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_names_every_command_and_does_not_load_torch():
    code = "import sys; from diaphane.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert all(f"  {command} " in out for command in COMMANDS)
    assert out.splitlines()[-1] == "False"


def test_the_installed_script_runs_and_refuses_with_code_2(here: Path):
    script = Path(sys.executable).with_name("diaphane")
    good = subprocess.run([script, "inspect", TINY], capture_output=True, text=True)
    assert good.returncode == 0
    assert "Ho DDPM" in good.stdout
    bad = subprocess.run([script, "sample", "--n", "-3"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_gone_is_no_error_and_a_full_disk_is(unbuffered: str):
    script = [sys.executable, "-c", "from diaphane.cli.main import script; script()", "--help"]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(script, stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, env=env, check=False)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def test_a_pipe_that_breaks_elsewhere_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(argv: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("diaphane.cli.env.run", run)
    assert "Broken pipe" in refused(capsys, "env")


def test_an_unknown_command_is_refused_by_name(capsys: pytest.CaptureFixture[str]):
    assert "'paint'" in refused(capsys, "paint")


@pytest.mark.parametrize(
    "sampler", [["ddim"], ["ddim", "--eta", "1"], ["ddpm"], ["ddpm", "--variance", "large", "--clip"]]
)
def test_samples_carry_their_settings_and_seeds(sampler: list[str], here: Path):
    assert main(["sample", *QUICK, "--n", "3", "--steps", "3", "--seed", "7", "--sampler", *sampler]) == 0
    out = here / "out" / "sample"
    assert sorted(p.name for p in out.iterdir()) == ["0001.png", "0002.png", "0003.png", "sheet.png"]
    said = record(out / "0002.png")
    assert said["seed"] == 8
    assert said["settings"]["sampler"] == sampler[0]
    assert said["weights"]["family"] == "ddpm"
    assert len(said["weights"]["sha256"]) == 64
    assert said["versions"]["torch"] == torch.__version__


def test_samples_do_not_depend_on_the_batch(here: Path):
    for batch in ("1", "2", "5"):
        main(["sample", *QUICK, "--n", "5", "--steps", "4", "--eta", "0.5", "--batch", batch, "--out", f"b{batch}"])
    for i in range(1, 6):
        a, b, c = (pixels(here / f"b{batch}" / f"{i:04d}.png").astype(int) for batch in (1, 2, 5))
        assert max(abs(a - b).max(), abs(a - c).max()) <= 1  # of 255: a value may lie on the edge of rounding


def test_a_seed_means_the_same_picture_wherever_it_stands(here: Path):
    main(["sample", *QUICK, "--n", "4", "--steps", "3", "--batch", "1", "--seed", "0", "--out", "a"])
    main(["sample", *QUICK, "--n", "1", "--steps", "3", "--batch", "1", "--seed", "3", "--out", "b"])
    assert (pixels(here / "a" / "0004.png") == pixels(here / "b" / "0001.png")).all()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_give_nearly_the_same_picture(dtype: str, here: Path):
    main(["sample", *QUICK, "--n", "1", "--steps", "3", "--out", "a"])
    main(["sample", *QUICK, "--n", "1", "--steps", "3", "--out", "b", "--dtype", dtype])
    a, b = (pixels(here / x / "0001.png").astype(int) for x in "ab")
    assert abs(a - b).mean() < (0.1 if dtype == "float64" else 12)


def test_inversion_writes_noise_that_comes_back(here: Path, capsys: pytest.CaptureFixture[str]):
    source = picture(here / "a.png")
    assert main(["invert", *QUICK, source, source, "--steps", "5"]) == 0
    out = here / "out" / "invert"
    assert "dB after 5 steps" in capsys.readouterr().out
    with safe_open(out / "0001-x_T.safetensors", framework="pt") as f:
        x_T = f.get_tensor("x_T")
        assert json.loads(f.metadata()["diaphane"])["steps"] == 5
    assert x_T.shape == (1, 3, 32, 32)
    assert record(out / "0001.png")["psnr"] == record(out / "0002.png")["psnr"] < 100
    assert (out / "0002.png").exists()
    assert (out / "sheet.png").exists()


def test_round_trips_are_a_table_of_steps_and_pictures(here: Path, monkeypatch: pytest.MonkeyPatch):
    from diaphane.cli import invert

    monkeypatch.setattr(invert, "TRIPS", (2, 4))
    main(["invert", *QUICK, picture(here / "a.png"), picture(here / "b.png", 1), "--steps", "2", "--round-trips"])
    rows = list(csv.reader((here / "out" / "invert" / "round-trips.csv").open()))
    assert rows[0] == ["steps", "picture", "psnr_dB"]
    assert [row[0] for row in rows[1:]] == ["2", "2", "4", "4"]


def styled(here: Path, *more: str, out: str = "out") -> Path:
    """DiffStyle of two contents and one style, few steps."""
    contents, style = [picture(here / f"c{i}.png", i) for i in range(2)], picture(here / "s.png", 9)
    argv = ["diffstyle", *QUICK, "--content", *contents, "--style", style, "--n-inv", "4", "--n-gen", "4", "--out", out]
    assert main([*argv, *more]) == 0
    return here / out


def test_every_content_goes_into_every_style(here: Path):
    out = styled(here)
    assert sorted(p.name for p in out.iterdir()) == ["c01-s01.png", "c02-s01.png", "sheet.png"]
    assert (pixels(out / "c01-s01.png") != pixels(out / "c02-s01.png")).any()
    assert set(record(out / "sheet.png")["inputs"]) == {str(here / n) for n in ("c0.png", "c1.png", "s.png")}


def test_gamma_zero_forgets_the_content(here: Path):
    out = styled(here, "--gamma", "0", "--t-boost", "0", "--omega", "0", "--batch", "1")
    assert (pixels(out / "c01-s01.png") == pixels(out / "c02-s01.png")).all()


@pytest.mark.parametrize("blend", ["lerp", "addition", "replacement"])
def test_every_blend_is_another_picture(blend: str, here: Path):
    a, b = styled(here, "--t-boost", "0", out="a"), styled(here, "--t-boost", "0", "--blend", blend, out="b")
    assert (pixels(a / "c01-s01.png") != pixels(b / "c01-s01.png")).any()


def masks(here: Path) -> list[str]:
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    left.save(here / "left.png")
    left.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(here / "right.png")
    return [str(here / "left.png"), str(here / "right.png")]


def test_a_mask_for_each_content_mixes_them_into_one_picture(here: Path):
    out = styled(here, "--mask", *masks(here))
    assert sorted(p.name for p in out.iterdir()) == ["mixed-s01.png", "sheet.png"]


def test_masks_that_overlap_or_do_not_match_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    left, right = masks(here)
    argv = ["diffstyle", *QUICK, "--content", left, right, "--style", left, "--n-inv", "2", "--n-gen", "2", "--mask"]
    assert "overlap" in refused(capsys, *argv, left, left)
    assert "--mask" in refused(capsys, *argv, left, right, left)
    assert not (here / "out").exists()


def test_directions_are_found_saved_and_used_again(here: Path, capsys: pytest.CaptureFixture[str]):
    sets = []
    for name, seeds in {"a": (0, 1), "b": (2, 3)}.items():
        (here / name).mkdir()
        sets.append(str(here / name))
        for seed in seeds:
            picture(here / name / f"{seed}.png", seed)
    argv = ["asyrp", *QUICK, "--n", "2", "--steps", "4", "--strip", "-0.25", "0", "1"]
    found = ["--from-sets", *sets, "--pca", "2", "--pca-samples", "4", "--jacobian", "1", "--iterations", "2"]
    assert main([*argv, *found, "--out", "found", "--save-direction", "d.safetensors"]) == 0
    names = {p.name for p in (here / "found").iterdir()}
    assert {"strip-04.png", "sheet.png", "d04-p02-03.png"} <= names
    assert len(names) == 4 * 2 * 3 + 4 + 1
    assert main([*argv, "--delta", "d.safetensors", "--out", "again"]) == 0
    for name in names - {"sheet.png"} - {f"strip-{i:02d}.png" for i in range(1, 5)}:
        assert (pixels(here / "found" / name) == pixels(here / "again" / name)).all()
    assert main([*argv, "--delta", "d.safetensors", "--scale", "1", "0", "0.5", "0", "--out", "sum"]) == 0
    assert len(list((here / "sum").iterdir())) == 2 * 3 + 1
    assert "--scale takes one number" in refused(capsys, *argv, "--delta", "d.safetensors", "--scale", "1")


def test_a_strip_at_zero_is_the_picture_come_back(here: Path):
    source = picture(here / "a.png")
    argv = ["--steps", "6", "--out"]
    main(["invert", *QUICK, source, *argv, "back"])
    main(["asyrp", *QUICK, "--image", source, "--pca", "1", "--pca-samples", "3", "--strip", "0", *argv, "zero"])
    a, b = pixels(here / "back" / "0001.png"), pixels(here / "zero" / "d01-p01-01.png")
    assert abs(a.astype(int) - b.astype(int)).max() <= 1


def test_a_published_f_edits_pictures(here: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["asyrp", *QUICK, "--n", "1", "--steps", "4", "--strip", "0", "5"]
    assert main([*argv, "--delta", str(Path(TINY) / "delta_blocks.safetensors")]) == 0
    out = here / "out" / "asyrp"
    assert (pixels(out / "d01-p01-01.png") != pixels(out / "d01-p01-02.png")).any()
    adm = str(Path(TINY).parent / "tiny-adm" / "delta_blocks.safetensors")
    assert "another family" in refused(capsys, *argv, "--delta", adm)


def test_correlations_are_a_table_and_a_plot(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["correlation", *QUICK, "--n", "5", "--steps", "4", "--batch", "2"]) == 0
    rows = list(csv.DictReader((here / "out" / "correlation" / "correlation.csv").open()))
    assert [int(row["t"]) for row in rows] == [0, 333, 666, 999]
    for row in rows:
        assert abs(float(row["homo"]) - float(row["alt_slerp"])) < 1e-4
    assert pixels(here / "out" / "correlation" / "correlation.png").shape == (480, 860, 3)
    assert "at least 3" in refused(capsys, "correlation", *QUICK, "--image", picture(here / "a.png"))


def test_inspect_says_layout_family_and_shapes(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", TINY, "--keys"]) == 0
    out = capsys.readouterr().out
    assert "Ho DDPM" in out
    assert "64 x 8 x 8" in out
    assert "enc.0.0.weight" in out


def test_inspect_lists_the_keys_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]):
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(TINY) / "model.safetensors")
    tensors["mid.block_1.conv9.weight"] = tensors.pop("mid.block_1.conv1.weight")
    save_file(tensors, here / "odd.safetensors")
    assert main(["inspect", str(here / "odd.safetensors")]) == 2
    out, err = capsys.readouterr()
    assert "missing     mid.block_1.conv1.weight" in out
    assert "unexpected  mid.block_1.conv9.weight" in out
    assert err.count("\n") == 1


def test_fetch_lists_what_there_is_and_knows_local_files(capsys: pytest.CaptureFixture[str]):
    assert main(["fetch"]) == 0
    assert "ddpm-cifar10-32" in capsys.readouterr().out
    assert main(["fetch", TINY]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    refused(capsys, "fetch", "no-such-network")


def test_env_names_versions_and_devices(capsys: pytest.CaptureFixture[str]):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in " ".join(out.split())
    assert "embedded" in out

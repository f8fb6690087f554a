"""The h-space commands on a tiny SDXL folder: pictures, records, guidance, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from diaphane.cli.main import main
from PIL import Image
from safetensors.torch import load_file

from . import latent_twins as twins

MODEL = ["--model", str(twins.TINY), "--resolution", "64", "--quiet"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_diffstyle_without_content_is_the_style_come_back_and_with_it_is_not(pictures: list[str], tmp_path: Path):
    a, b, c = pictures
    words = [*MODEL, "--n-inv", "4", "--n-gen", "4", "--omega", "0", "--t-boost", "0", "--prompt", "a cat"]
    for name, gamma, content in (("one", "0", a), ("two", "0", c), ("three", "0.8", a)):
        files = ["--content", content, "--style", b, "--out", str(tmp_path / name)]
        argv = ["diffstyle", *words, *files, "--gamma", gamma]
        assert main(argv) == 0
    one, two, three = (pixels(tmp_path / name / "c01-s01.png") for name in ("one", "two", "three"))
    assert one.shape == (64, 64, 3)
    assert (one == two).all()
    assert not (one == three).all()


def test_a_guided_injection_is_made_again_bit_for_bit(pictures: list[str], tmp_path: Path, capfd):
    a, b, _ = pictures
    words = ["--n-inv", "3", "--n-gen", "3", "--guidance", "3", "--negative", "dull", "--prompt", "a dog"]
    assert main(["diffstyle", *MODEL, *words, "--content", a, "--style", b, "--out", str(tmp_path / "out")]) == 0
    assert main(["redo", str(tmp_path / "out" / "c01-s01.png"), "--quiet"]) == 0
    assert "bit for bit" in capfd.readouterr().out


def test_directions_of_a_text_conditioned_model_are_found_saved_and_read(pictures: list[str], tmp_path: Path):
    a, b, c = pictures
    file = tmp_path / "directions.safetensors"
    words = ["--steps", "3", "--guidance", "2", "--strip", "0", "1"]
    found = ["--set-a", a, "--set-b", b, "--pca", "1", "--pca-samples", "2", "--jacobian", "1", "--iterations", "1"]
    argv = ["asyrp", *MODEL, *words, *found, "--image", c, "--save-direction", str(file), "--out", str(tmp_path / "a")]
    assert main(argv) == 0
    held = load_file(file)
    assert {key.split(".")[1] for key in held} == {"0", "1", "2"}
    assert {len(tensor) for tensor in held.values()} == {1}
    assert main(["asyrp", *MODEL, *words, "--delta", str(file), "--image", c, "--out", str(tmp_path / "b")]) == 0
    for i in range(1, 4):
        for k in (1, 2):
            name = f"d{i:02d}-p01-{k:02d}.png"
            assert (pixels(tmp_path / "a" / name) == pixels(tmp_path / "b" / name)).all()
    plain, moved = (pixels(tmp_path / "a" / f"d01-p01-{k:02d}.png") for k in (1, 2))
    assert not (plain == moved).all()


def test_the_correlations_of_a_text_conditioned_model_are_of_the_text_s_half(tmp_path: Path):
    for guidance in ("1", "4"):
        argv = ["correlation", *MODEL, "--n", "3", "--steps", "2", "--guidance", guidance, "--prompt", ""]
        assert main([*argv, "--out", str(tmp_path / guidance)]) == 0
    tables = [np.loadtxt(tmp_path / g / "correlation.csv", delimiter=",", skiprows=1) for g in ("1", "4")]
    np.testing.assert_allclose(tables[0][-1], tables[1][-1], atol=1e-3)  # at the highest timestep both begin in noise
    assert not np.allclose(tables[0][0], tables[1][0], atol=1e-3)


WRONG = {
    "a pixel network": (["--prompt", "x"], "shapes draws without"),
    "text for none": (["--negative", "x"], "give --prompt, which may be empty"),
    "no size": ([*MODEL, "--resolution", "60"], "multiples of"),
    "a label": ([*MODEL, "--label", "3"], "--label is for pixel networks"),
    "a learned f": ([*MODEL, "--guidance", "-1"], "--guidance"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_go_together_is_one_line(what: str, pictures: list[str], tmp_path: Path, capfd):
    words, says = WRONG[what]
    argv = ["diffstyle", *words, "--content", pictures[0], "--style", pictures[1], "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()

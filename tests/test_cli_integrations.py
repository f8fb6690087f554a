"""Methods together on the command line: image prompts, FreeU and tiles with StyleAligned, ConsiStory, panoramas."""

from pathlib import Path

import numpy as np
import pytest
from diaphane.cli.main import main
from PIL import Image

from . import latent_twins as twins
from .golden_image_prompt import LINEAR

MODEL = ("--model", twins.TINY, "--steps", 2, "--quiet")
ADAPTER = ("--adapter", twins.TINY / "ip_adapter" / LINEAR, "--image-encoder", twins.TINY / "image_encoder")
STORY = ("a cat", "a cat in the snow", "a cat at sea", "--subject", "cat")
WIDE = ("a street", "--size", "96x64", "--window", 64, "--stride", 32, "--styles", "ink")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that is not square."""
    rows = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(rows).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and standard error."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


def drawn(capsys: pytest.CaptureFixture[str], out: Path, command: str, *words: object) -> dict[str, np.ndarray]:
    """The pictures of a run that succeeds."""
    size = () if "--size" in words else ("--size", 64)
    code, error = run(capsys, command, *words, *size, *MODEL, "--out", out)
    assert (code, error) == (0, "")
    return {path.stem: pixels(path) for path in out.glob("*.png") if path.stem != "sheet"}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def again(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    code = main(["redo", str(path), "--quiet"])
    assert (code, capsys.readouterr().out.splitlines()[-1]) == (0, "the same, bit for bit")


def most(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


def test_an_image_prompt_is_seen_by_a_shared_style_whatever_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    texts, seen = ("a cat", "a dog", "a cow"), (*ADAPTER, "--style-image", photo)
    plain = drawn(capsys, tmp_path / "0", "style-align", *texts)
    one = drawn(capsys, tmp_path / "1", "style-align", *texts, *seen, "--batch", 1)
    two = drawn(capsys, tmp_path / "2", "style-align", *texts, *seen, "--batch", 2)
    none = drawn(capsys, tmp_path / "3", "style-align", *texts, *seen, "--adapter-scale", 0)
    assert set(one) == {"reference", "0001", "0002"}
    for name, picture in one.items():
        assert most(picture, two[name]) <= 1
        assert most(picture, plain[name]) > 5
        assert (none[name] == plain[name]).all()
    again(capsys, tmp_path / "1" / "0002.png")


def test_a_reference_that_is_a_picture_is_drawn_without_the_image_prompt_and_targets_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    words = ("a cat", "--reference", photo, "--style", "ink")
    plain = drawn(capsys, tmp_path / "0", "style-align", *words)
    for i, more in enumerate([(), ("--range", 0, 0.5), ("--adapter-sites", "mid=0.5"), ("--guidance", 1)], 1):
        found = drawn(capsys, tmp_path / str(i), "style-align", *words, *ADAPTER, "--style-image", photo, *more)
        assert (found["reference"] == plain["reference"]).all()
        assert most(found["0001"], plain["0001"]) > 2


def test_an_image_prompt_is_seen_by_every_picture_of_a_subject(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    seen = (*ADAPTER, "--style-image", photo)
    plain = drawn(capsys, tmp_path / "0", "consistory", *STORY)
    one = drawn(capsys, tmp_path / "1", "consistory", *STORY, *seen)
    few = drawn(capsys, tmp_path / "2", "consistory", *STORY, *seen, "--batch", 1)
    for name, picture in one.items():
        assert most(picture, plain[name]) > 5
        assert most(picture, few[name]) <= 2
    again(capsys, tmp_path / "1" / "0003.png")
    real = drawn(capsys, tmp_path / "3", "consistory", *STORY[:1], *STORY[3:], "--real", photo, *seen)
    assert set(real) == {"0001"}


def test_windows_see_an_image_prompt_and_styles_that_are_drawn_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    plain = drawn(capsys, tmp_path / "0", "panorama", *WIDE)
    seen = drawn(capsys, tmp_path / "1", "panorama", *WIDE, *ADAPTER, "--style-image", photo)
    assert (seen["style-1"] == plain["style-1"]).all()
    assert most(seen["0001"], plain["0001"]) > 5
    again(capsys, tmp_path / "1" / "0001.png")


COMMANDS = {
    "generate": ("a cat",),
    "style-align": ("a cat", "a dog"),
    "consistory": STORY[1:],
    "panorama": WIDE[:1] + WIDE[1:3],
    "look": ("a cat",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_freeu_and_tiles_change_the_picture_are_recorded_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
):
    words = (*COMMANDS[command], "--looks", 1) if command == "look" else COMMANDS[command]
    ways = {"plain": (), "one": ("--freeu=1,1,1,1",), "freeu": ("--freeu", "sdxl"), "tile": ("--tile", 32)}
    if command == "consistory":
        ways["plain"] = ("--freeu", "none")
    found = {name: drawn(capsys, tmp_path / name, command, *words, *more)["0001"] for name, more in ways.items()}
    assert (found["one"] == found["plain"]).all()
    assert most(found["freeu"], found["plain"]) > 2
    assert most(found["tile"], found["plain"]) > 0
    again(capsys, tmp_path / "freeu" / "0001.png")
    again(capsys, tmp_path / "tile" / "0001.png")


def test_a_tile_of_the_whole_picture_is_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path):
    words = ("a cat", "--init", photo, "--strength", 1)
    whole = drawn(capsys, tmp_path / "a", "generate", *words)["0001"]
    assert (drawn(capsys, tmp_path / "b", "generate", *words, "--tile", 64)["0001"] == whole).all()
    assert (drawn(capsys, tmp_path / "c", "generate", *words, "--tile", 32)["0001"] != whole).any()


WRONG: list[tuple[tuple[object, ...], str]] = [
    (("generate", "a cat", "--freeu", "sd3"), "'sd3' is none of sdxl"),
    (("generate", "a cat", "--freeu", "1,2,nan,1"), "no b1,b2,s1,s2"),
    (("generate", "a cat", "--freeu", "1,2,3"), "no b1,b2,s1,s2"),
    (("generate", "a cat", "--tile", 40), "40 is no multiple of 32"),
    (("style-align", "a", "b", "--tile", 0), "0 is not in 32"),
    (("style-align", "a", "b", "--style-image", "x.png"), "--style-image is about --adapter"),
    (("style-align", "a", "b", "--adapter-scale", 2), "--adapter-scale is about --adapter"),
    (("style-align", "a", "b", *ADAPTER), "--adapter is shown pictures"),
    (("style-align", "a", "b", *ADAPTER, "--style-image", "nowhere.png"), "nowhere.png"),
    (("style-align", "a", "b", *ADAPTER, "--style-image", "PHOTO", "--adapter-sites", "dec.11"), "there is no dec.11"),
    (("style-align", "a", "b", *ADAPTER, "--style-image", "PHOTO", "--adapter-sites", "mid", "--adapter-preset",
      "style"), "--adapter-preset and --adapter-sites both say where"),
    (("consistory", *STORY, *ADAPTER, "--style-image", "PHOTO", "--range", 0, 0.5), "--range: consistory"),
    (("consistory", *STORY, "--squash"), "--squash is about --adapter"),
    (("panorama", *WIDE, *ADAPTER, "--style-image", "PHOTO", "--each"), "--each is of whole pictures"),
    (("invert", "PHOTO", "--model", "shapes", "--tile", 32), "--tile is for models that read text"),
    (("asyrp", "--image", "PHOTO", "--model", "shapes", "--tile", 32), "--tile is for models that read text"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "why"), WRONG, ids=[f"{words[0]} {why[:20]}" for words, why in WRONG])
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path, words: tuple[object, ...], why: str
):
    said = [photo if word == "PHOTO" else word for word in words]
    model = () if "--model" in words else MODEL
    code, error = run(capsys, *said, *model, "--out", tmp_path / "o")
    assert (code, error.count("\n")) == (2, 1)
    assert why in error
    assert not (tmp_path / "o").exists()

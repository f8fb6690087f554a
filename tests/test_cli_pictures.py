"""Pictures in and out: what is read, where files go, what they carry, and that redo makes them again bit for bit."""

import errno
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diaphane.cli import images, options, output, session
from diaphane.cli.errors import CommandError
from diaphane.cli.main import main
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TINY = str(Path(__file__).parent / "golden" / "tiny-ddpm")
QUICK = ["--model", TINY, "--quiet"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path: Path, seed: int = 0, side: int = 32) -> str:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return str(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def encoded(image: Image.Image, kind: str, **more: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read(kind: str):
    assert images.decoded(encoded(Image.new("RGB", (8, 6), (200, 10, 10)), kind), "x").size == (8, 6)


def test_other_formats_are_refused():
    with pytest.raises(CommandError, match="readable"):
        images.decoded(encoded(Image.new("RGB", (8, 6)), "BMP"), "x")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_grey_or_colour(mode: str):
    image = Image.new(mode, (4, 4), 1 if mode == "1" else None)
    assert images.decoded(encoded(image, "PNG"), "x").mode in ("L", "RGB")


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    read = images.decoded(encoded(image, "PNG"), "x")
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(255, 255, 255), (0, 0, 0)]


def test_sixteen_bits_of_grey_keep_their_range():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(images.decoded(encoded(deep, "PNG"), "x")).tolist() == [[0, 100, 255]]


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked():
    header = encoded(Image.new("L", (1, 1)), "PNG")
    bomb = bytearray(header)
    bomb[16:24] = (9000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(CommandError, match="megapixels"):
        images.decoded(bytes(bomb), "x")


def test_a_picture_lies_upright_as_its_camera_says():
    image = Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    assert images.decoded(encoded(image, "JPEG", exif=exif), "x").size == (2, 6)


def test_pixels_survive_the_way_to_a_tensor_and_back():
    every = Image.fromarray(np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8))
    assert images.to_picture(images.to_tensor(every, 3)).tobytes() == every.tobytes()


def test_a_wide_picture_is_cropped_in_its_centre():
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 255, 0), (24, 0, 40, 16))
    fit = images.fitted(wide, 8, "x")
    assert fit.size == (8, 8)
    assert np.unique(np.asarray(fit).reshape(-1, 3), axis=0).tolist() == [[0, 255, 0]]
    with pytest.raises(CommandError, match="64 x 16"):
        images.fitted(wide, 8, "x", resize=False)


def test_a_result_that_is_not_finite_is_no_picture():
    with pytest.raises(CommandError, match="not finite"):
        images.to_picture(torch.full((3, 2, 2), torch.nan))


def test_a_folder_that_is_not_empty_is_never_written_into(here: Path):
    argv = ["sample", *QUICK, "--n", "1", "--steps", "1"]
    for _ in range(3):
        assert main(argv) == 0
    assert sorted(p.name for p in (here / "out").iterdir()) == ["sample", "sample-2", "sample-3"]
    before = (here / "out" / "sample" / "0001.png").stat().st_mtime_ns
    assert main([*argv, "--overwrite", "--seed", "1"]) == 0
    assert (here / "out" / "sample" / "0001.png").stat().st_mtime_ns != before
    assert len(list((here / "out").iterdir())) == 3


def test_a_full_disk_leaves_nothing_half_written(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as f:
            f.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(capsys, "sample", *QUICK, "--n", "1", "--steps", "1")
    assert list((here / "out").iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_work(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (here / "file").write_text("x")
    assert "is a file" in refused(capsys, "sample", *QUICK, "--out", "file/below")
    monkeypatch.setattr(output.os, "access", lambda *_: False)
    assert "not writable" in refused(capsys, "sample", *QUICK, "--out", "elsewhere")


def test_an_interruption_keeps_what_is_finished(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write, count = output.Folder.write, []

    def interrupted(self: output.Folder, name: str, data: bytes) -> Path:
        count.append(name)
        if len(count) == 3:
            raise KeyboardInterrupt
        return write(self, name, data)

    monkeypatch.setattr(output.Folder, "write", interrupted)
    assert main(["sample", *QUICK, "--n", "4", "--steps", "1"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in (here / "out" / "sample").iterdir()) == ["0001.png", "0002.png"]


def test_settings_become_a_command_line_and_settings_again():
    from diaphane.cli import asyrp, diffstyle, invert

    for module, words in [
        (
            diffstyle,
            ["--content", "a b.png", "ü.png", "--style", "s.png", "--gamma", "0.1", "--mask", "m.png", "--no-resize"],
        ),
        (asyrp, ["--strip", "-1", "-0.0000001", "2", "--delta", "x", "y", "--scale", "0.1", "0.2"]),
        (invert, ["--steps", "3", "--", "a.png", "-b.png"]),
    ]:
        parser = module.parser()
        said = options.settings(parser.parse_args(words))
        assert options.settings(parser.parse_args(options.words(parser, json.loads(json.dumps(said))))) == said


def test_small_inputs_are_in_the_record_and_large_ones_by_their_sha256():
    inputs = {
        "a": b"x" * 10,
        "b": b"y" * (session.EMBED_EACH + 1),
        **{f"c{i}": b"z" * session.EMBED_EACH for i in range(9)},
    }
    rows = session.recorded(inputs)
    assert "base64" in rows["a"]
    assert set(rows["b"]) == {"sha256"}
    assert sum("base64" in row for row in rows.values()) == 1 + 7


def made(here: Path) -> dict[str, list[str]]:
    """Command lines of every kind of picture, and the files to be made again."""
    a, b, c = (picture(here / f"{name}.png", seed) for seed, name in enumerate("abc"))
    few = [*QUICK, "--steps", "3", "--threads", "1"]
    return {
        "sample": ["sample", *few, "--n", "5", "--batch", "2", "--eta", "0.7", "--out", "sample"],
        "invert": ["invert", *few, a, b, "--out", "invert"],
        "diffstyle": ["diffstyle", *QUICK, "--content", a, b, "--style", b, c, "--n-inv", "3", "--n-gen", "3",
                      "--batch", "3", "--threads", "1", "--out", "diffstyle"],
        "asyrp": ["asyrp", *few, "--image", a, c, "--set-a", a, "--set-b", b, "--pca", "1", "--pca-samples", "3",
                  "--jacobian", "1", "--iterations", "1", "--strip", "0", "1", "--t-boost", "500", "--out", "asyrp"],
        "correlation": ["correlation", *few, "--n", "3", "--out", "correlation"],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["sample", "invert", "diffstyle", "asyrp", "correlation"])
def test_redo_makes_every_picture_again_bit_for_bit(command: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(made(here)[command]) == 0
    for path in here.glob("?.png"):
        path.unlink()  # small inputs are in the record
    pictures = sorted((here / command).glob("*.png"))
    for path in [*pictures[:2], pictures[-1]]:
        capsys.readouterr()
        assert main(["redo", str(path), "--quiet"]) == 0, path
        assert "bit for bit" in capsys.readouterr().out
        assert (pixels(path) == pixels(path.with_name(f"{path.stem}.redo.png"))).all()


def altered(path: Path, change, keep_pixels: bool = True) -> str:
    """A copy of a picture with another record, or other pixels."""
    with Image.open(path) as image:
        record = json.loads(image.info["diaphane"])
        change(record)
        chunks = PngInfo()
        chunks.add_itxt("diaphane", json.dumps(record))
        image = image if keep_pixels else Image.new("RGB", image.size)
        image.save(path.with_name("altered.png"), pnginfo=chunks)
    return str(path.with_name("altered.png"))


def test_redo_refuses_what_it_cannot_make_again(here: Path, capsys: pytest.CaptureFixture[str]):
    plain = picture(here / "plain.png")
    assert "carries no record" in refused(capsys, "redo", plain)
    main(["invert", *QUICK, plain, "--steps", "2", "--out", "o"])
    good = here / "o" / "0001.png"

    def gone(record: dict) -> None:
        record["inputs"][str(here / "gone.png")] = {"sha256": "0" * 64}

    def changed(record: dict) -> None:
        record["inputs"][plain]["sha256"] = "0" * 64

    def others(record: dict) -> None:
        record["weights"]["sha256"] = "0" * 64

    def strange(record: dict) -> None:
        record["settings"]["colour"] = "red"

    def other_steps(record: dict) -> None:
        record["settings"]["steps"] = 1e9

    assert "gone.png" in refused(capsys, "redo", altered(good, gone))
    assert "has changed" in refused(capsys, "redo", altered(good, changed))
    assert "weights" in refused(capsys, "redo", altered(good, others))
    assert "colour" in refused(capsys, "redo", altered(good, strange))
    assert "--steps" in refused(capsys, "redo", altered(good, other_steps))
    assert "not whole" in refused(capsys, "redo", altered(good, lambda record: record.pop("settings")))
    assert not list((here / "o").glob("*.redo*"))


def test_redo_says_when_a_picture_is_not_the_same(here: Path, capsys: pytest.CaptureFixture[str]):
    main(["sample", *QUICK, "--n", "1", "--steps", "2", "--out", "o"])
    assert "differs" in refused(
        capsys, "redo", altered(here / "o" / "0001.png", lambda record: None, keep_pixels=False)
    )


def test_redo_shows_a_record_and_writes_where_it_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    main(["sample", *QUICK, "--n", "1", "--steps", "2", "--out", "o"])
    source = str(here / "o" / "0001.png")
    assert main(["redo", source, "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == "sample"
    assert main(["redo", source, "--out", "x.png"]) == 0
    assert main(["redo", str(here / "x.png"), "--out", "y.png"]) == 0  # a picture made again can be made again
    assert "exists" in refused(capsys, "redo", source, "--out", "x.png")


def test_the_demo_runs_every_method_and_its_pictures_can_be_made_again(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", *QUICK, "--steps", "2", "--batch", "36", "--out", "demo"]) == 0
    folders = {"sample", "invert", "gamma", "diffstyle", "mixing", "sets", "pca", "jacobian", "correlation"}
    assert {path.name for path in (here / "demo").iterdir()} == {*folders, "sheet.png"}
    assert len(list((here / "demo" / "diffstyle").iterdir())) == 6 * 6 + 1
    for name in ("diffstyle/c02-s03.png", "pca/strip-02.png", "gamma/sheet.png"):
        assert main(["redo", str(here / "demo" / name), "--quiet"]) == 0
        assert "bit for bit" in capsys.readouterr().out

"""Mutated pictures and command lines: exit code 0 or 2, one line on stderr, no traceback, nothing half written."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from diaphane.cli import network
from diaphane.cli.main import main
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TINY = str(Path(__file__).parent / "golden" / "tiny-ddpm")
PICTURES, LINES, RECORDS = 420, 420, 120
OPTIONS = ("model", "file", "config", "resolution", "label", "schedule", "device", "dtype", "threads")


@pytest.fixture(autouse=True)
def one_network(monkeypatch: pytest.MonkeyPatch):
    """The tiny network is loaded once for all runs with the same options."""
    load = network.loaded
    nets: dict[tuple, network.Loaded] = {}

    def loaded(args):
        key = tuple(getattr(args, name) for name in OPTIONS)
        if key not in nets:
            nets[key] = load(args)
        return nets[key]

    monkeypatch.setattr(network, "loaded", loaded)


def source(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(kind: str, seed: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(source(seed)).save(data, kind)
    return data.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The same bytes, damaged in one of eight ways."""
    raw = bytearray(data)
    match rng.randrange(8):
        case 0:
            return bytes(raw[: rng.randrange(len(raw))])
        case 1:
            for _ in range(rng.randrange(1, 8)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        case 2:
            raw[rng.randrange(min(64, len(raw)))] ^= 1 << rng.randrange(8)
        case 3:
            at = rng.randrange(len(raw))
            raw[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"])
        case 4:
            at = rng.randrange(len(raw))
            del raw[at : at + rng.randrange(1, 200)]
        case 5:
            at = rng.randrange(len(raw))
            raw[at:at] = rng.randbytes(rng.randrange(1, 50))
        case 6:
            return rng.randbytes(rng.randrange(300))
        case 7:
            at = rng.randrange(len(raw))
            raw = raw[:at] + raw[at // 2 :]
    return bytes(raw)


def run(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run one command line and hold it to what every command line is held to."""
    capsys.readouterr()
    code = main(argv)
    err = capsys.readouterr().err
    assert code in (0, 2), (argv, err)
    assert "Traceback" not in err
    if code == 2:
        assert err.count("\n") == 1, (argv, err)
        assert err.startswith("diaphane"), argv
        assert len(err) < 1500, argv
        assert not out.exists() or not any(path.is_file() for path in out.rglob("*")), argv
    assert not list(out.parent.rglob("*.part")), argv
    return code


def test_damaged_pictures_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = random.Random(1)
    whole = {kind: [encoded(kind, seed) for seed in range(3)] for kind in ("PNG", "JPEG", "WEBP")}
    codes = []
    for i in range(PICTURES):
        path, out = tmp_path / rng.choice(["a.png", "ü 图.jpg", "x"]), tmp_path / f"out{i}"
        path.write_bytes(mutated(rng.choice(whole[rng.choice(list(whole))]), rng))
        codes.append(
            run(["invert", str(path), "--model", TINY, "--steps", "2", "--quiet", "--out", str(out)], out, capsys)
        )
    assert 0 < codes.count(2) < PICTURES


VALUES = [
    *(
        "-1",
        "0",
        "1",
        "1.5",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "1e999",
        "-0",
        "0x10",
        "9" * 40,
        "-" + "9" * 40,
        "abc",
        "",
        " ",
    ),
    *("é", "\u202egnp", "a\nb", "\0", "-", "--", "None", "[]", "/", "/dev/null", "/proc/self/mem", "x" * 5000, "../.."),
    *("{missing}", "{folder}", "{file}", "{picture}"),
]
COMMANDS = {
    "sample": ["--n", "1", "--steps", "1", "--eta", "0", "--sampler", "ddim", "--spacing", "papers"],
    "invert": ["{picture}", "--steps", "2"],
    "diffstyle": ["--content", "{picture}", "--style", "{picture}", "--n-inv", "2", "--n-gen", "2", "--gamma", "0.3",
                  "--omega", "0.3", "--t-edit", "400", "--t-boost", "0", "--mask", "{picture}", "--blend", "slerp"],
    "asyrp": ["--image", "{picture}", "--set-a", "{picture}", "--set-b", "{picture}", "--steps", "2", "--strip", "1",
              "--t-edit", "0", "--n-train", "40", "--scale", "1"],
    "correlation": ["--n", "3", "--steps", "2", "--gamma", "0.3"],
    "inspect": [TINY],
    "fetch": [TINY],
    "redo": ["{picture}"],
    "env": [],
}  # fmt: skip
COMMON = [
    "--model",
    TINY,
    "--seed",
    "0",
    "--batch",
    "4",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--schedule",
    "linear",
]
RUNNING = ("sample", "invert", "diffstyle", "asyrp", "correlation")


def test_damaged_command_lines_run_or_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(2)
    places = {
        "picture": tmp_path / "p.png",
        "file": tmp_path / "f.txt",
        "folder": tmp_path / "d",
        "missing": tmp_path / "m",
    }
    places["picture"].write_bytes(encoded("PNG", 0))
    places["file"].write_text("not a picture")
    places["folder"].mkdir()
    codes = []
    for i in range(LINES):
        command = rng.choice(list(COMMANDS))
        words, out = [*COMMANDS[command]], tmp_path / "w" / f"{i}"
        if command in RUNNING:
            words += COMMON
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(words) + 1)
            match rng.randrange(4):
                case 0 if at < len(words):
                    del words[at]
                case 1:
                    words.insert(at, rng.choice([*VALUES, "--nonsense", "--n", "--gamma", "--clip", "-x"]))
                case _ if at < len(words):
                    words[at] = rng.choice(VALUES)
        argv = [command, *(word.format(**places) if word.startswith("{") else word for word in words)]
        if command in RUNNING:
            argv += ["--quiet", "--out", str(out)]
        codes.append(run(argv, out, capsys))
        places["picture"].with_name("p.redo.png").unlink(missing_ok=True)
    assert 0 < codes.count(2) < LINES


def test_damaged_records_are_made_again_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["sample", "--model", TINY, "--n", "1", "--steps", "1", "--quiet", "--out", str(tmp_path / "s")])
    with Image.open(tmp_path / "s" / "0001.png") as image:
        record, picture = json.loads(image.info["diaphane"]), image.copy()
    rng, codes = random.Random(3), []
    odd = [None, -1, 1e9, "nan", "", [], {}, [[1]], "../x", True, {"a": None}, "\0", ["--out", "y"]]
    for i in range(RECORDS):
        changed = json.loads(json.dumps(record))
        where = changed if rng.random() < 0.4 else changed["settings"]
        match rng.randrange(3):
            case 0:
                del where[rng.choice(list(where))]
            case 1:
                where[rng.choice(list(where))] = rng.choice(odd)
            case 2:
                where[rng.choice(["colour", "steps", "inputs", "device"])] = rng.choice(odd)
        text = json.dumps(changed)
        if rng.random() < 0.2:
            text = text[: rng.randrange(len(text))]
        chunks = PngInfo()
        chunks.add_itxt("diaphane", text)
        path, out = tmp_path / f"{i}.png", tmp_path / "new" / f"{i}.png"
        out.parent.mkdir(exist_ok=True)
        picture.save(path, pnginfo=chunks)
        codes.append(run(["redo", str(path), "--quiet", "--out", str(out)], out, capsys))
    assert 0 < codes.count(2) < RECORDS

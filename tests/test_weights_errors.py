"""What is wrong with a weight file, and the one line that says so."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diaphane.model.load import build
from diaphane.weights.errors import (
    CorruptFileError,
    DiskFullError,
    DtypeError,
    LayoutError,
    MissingFileError,
    NonFiniteError,
    UnsafePickleError,
    WeightsError,
)
from diaphane.weights.files import write
from diaphane.weights.load import load
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-ddpm" / "model.safetensors"


class Bomb:
    """An object whose pickle makes a file when it is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def said(kind: type[WeightsError], path: Path | str, **given: object) -> str:
    """What loading says; it is one printable line."""
    with pytest.raises(kind) as caught:
        load(path, **given)  # type: ignore[arg-type]
    line = str(caught.value)
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", ["", "x" * 5000, "~nobody-of-that-name/x", "a\0b", "\n", "/dev/null"])
def test_what_cannot_be_a_file_is_no_file(name: str):
    assert said(MissingFileError, name).startswith(("there is no ", "cannot open "))


def test_no_such_file_names_what_would_do():
    assert "there is no nowhere.safetensors: give a weight file, a folder, a repository" in said(
        MissingFileError, "nowhere.safetensors"
    )


def test_an_empty_folder_and_a_choice_are_named(tmp_path: Path):
    assert "there is no weight file in" in said(MissingFileError, tmp_path)
    for name in ("a.pt", "b.pt"):
        shutil.copy(TINY, tmp_path / name)
    assert "holds 2 weight files: choose with file=a.pt" in said(MissingFileError, tmp_path)
    assert "there is no c.pt in" in said(MissingFileError, tmp_path, file="c.pt")
    assert load(tmp_path, file="b.pt", config={}).path.name == "b.pt"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is empty: fetch it again"),
        (TINY.read_bytes()[:-1], "is not a whole safetensors file: truncated or damaged"),
        (TINY.read_bytes()[:1000], "is not a whole safetensors file: truncated or damaged"),
        (struct.pack("<Q", 1 << 62) + b'{"a": 1}', "is not a whole safetensors file: truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer: run git lfs pull, not weights"),
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"what is this\n", "is neither safetensors nor a torch file"),
        (b"PK\x03\x04 no archive", "is a damaged torch file"),
        (b"\x80\x02 no pickle", "is a damaged torch file"),
    ],
)
def test_a_file_that_is_not_whole_says_how(tmp_path: Path, content: bytes, line: str):
    (tmp_path / "x").write_bytes(content)
    assert line in said(CorruptFileError, tmp_path / "x")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, kind: str):
    path, trace = tmp_path / "x.pt", tmp_path / "ran"
    if kind == "plain":
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        torch.save({"conv_in.weight": Bomb(trace)}, path, _use_new_zipfile_serialization=kind == "zip")
    line = said(UnsafePickleError, path)
    assert "holds code (posix.mkdir), which is not run" in line
    assert not trace.exists()


def test_a_wrong_family_is_named(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight": torch.zeros(1)}, path)
    assert "is a latent diffusion UNet with text (Stable Diffusion); pixel DDPM" in (line := said(LayoutError, path))
    assert "diaphane.weights.pipeline.load and latent.load read them" in line
    for name, what in (("sdxl", "a latent diffusion model"), ("controlnet-canny-sdxl", "of the kind controlnet")):
        with pytest.raises(LayoutError, match=f"^{name} is {what}; pixel DDPM"):
            load(name)
    with pytest.raises(MissingFileError, match=r"or a name of the catalogue \(sdxl"):
        load("sdxll")
    save_file({"all_modules.0.W": torch.zeros(64), "all_modules.1.weight": torch.zeros(4, 4)}, path)
    assert "is a variance-exploding NCSN++" in said(LayoutError, path)


def test_wrong_shapes_name_the_nearest_layout_and_the_keys(tmp_path: Path):
    tensors = load_file(TINY)
    tensors["up.1.block.0.conv2.weight"] = tensors["up.1.block.0.conv2.weight"][:, :32].contiguous()
    del tensors["mid.attn_1.k.bias"]
    save_file(tensors, tmp_path / "x")
    line = said(LayoutError, tmp_path / "x")
    assert "in the layout Ho DDPM (.ckpt of SDEdit and Asyrp): 1 missing: mid.attn_1.k.bias" in line
    assert "1 misshapen: up.1.block.0.conv2.weight (64, 32, 3, 3) should be (64, 64, 3, 3)" in line
    half = {key if i % 3 == 0 else f"other.{i}": t for i, (key, t) in enumerate(load_file(TINY).items())}
    save_file(half, tmp_path / "y")
    assert "the nearest is Ho DDPM (.ckpt of SDEdit and Asyrp), with 61 of 182 keys" in said(
        LayoutError, tmp_path / "y"
    )


def test_values_that_are_not_finite_are_counted_and_named(tmp_path: Path):
    tensors = load_file(TINY)
    tensors["conv_in.weight"][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, tmp_path / "x")
    assert "2 of 864 values of enc.0.0.weight are not finite" in said(NonFiniteError, tmp_path / "x")


def test_whole_numbers_are_no_weights(tmp_path: Path):
    tensors = load_file(TINY)
    tensors["conv_in.bias"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "x")
    assert "enc.0.0.bias is int8: weights are floating-point numbers" in said(DtypeError, tmp_path / "x")


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFullError, match=r"no room for .*x.safetensors: free 16 bytes"):
        write(tmp_path / "x.safetensors", {"a": torch.zeros(4)})
    assert not list(tmp_path.iterdir())


def test_an_index_stays_in_its_folder_and_holds_its_word(tmp_path: Path):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "names ../x.safetensors, which is not a file beside it" in said(CorruptFileError, index)
    shutil.copy(TINY, tmp_path / "y.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors"}}))
    assert "names 1 tensors that its files lack, a first" in said(CorruptFileError, index)
    index.write_text("[" * 100_000)
    assert "is not json" in said(CorruptFileError, index)


def test_building_refuses_what_does_not_fit():
    net = load(TINY)
    mixed = net.tensors | {"conv_out.bias": net.tensors["conv_out.bias"].float()}
    big = {name: tensor.float() * 1e6 for name, tensor in net.tensors.items()}
    less = {name: tensor for name, tensor in net.tensors.items() if name != "conv_out.bias"}
    bent = net.tensors | {"conv_out.bias": torch.zeros(4, dtype=torch.float16)}
    for family, config, tensors, given, line in [
        ("vae", net.config, net.tensors, {}, "vae is a part of a latent diffusion model: diaphane.model.latent.build"),
        ("gan", net.config, net.tensors, {}, "there is no family 'gan'"),
        ("ddpm", net.config | {"depth": 1}, net.tensors, {}, "DDPMConfig has no depth"),
        ("ddpm", net.config, mixed, {}, "conv_out.bias is float32: give one dtype= for all"),
        ("ddpm", net.config, big, {"dtype": torch.float16}, "has values that float16 cannot hold"),
        ("ddpm", net.config, less, {}, r"conv_out.bias should be (3,), and is absent"),
        ("ddpm", net.config, bent, {}, r"conv_out.bias should be (3,), and is (4,)"),
    ]:
        with pytest.raises(ValueError) as caught:
            build(family, config, tensors, **given)
        assert line in str(caught.value)
    assert next(build("ddpm", net.config, mixed, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16

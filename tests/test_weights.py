"""Loading networks: every layout of the tiny ones, mapped tensors, shards, settings beside the file, delta blocks."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diaphane.model.load import build
from diaphane.weights.asyrp import load_delta_blocks
from diaphane.weights.errors import ConfigError, LayoutError, MissingFileError
from diaphane.weights.files import sha256, write
from diaphane.weights.load import Network, embedded, load
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
DDPM, ADM = GOLDEN / "tiny-ddpm", GOLDEN / "tiny-adm"


def eps(net: Network, x: Tensor, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output of a loaded network."""
    unet = build(net.family, net.config, net.tensors, dtype=dtype)
    return unet(x.to(dtype), unet.embed(t))  # type: ignore[operator]


@pytest.fixture(scope="module")
def noise() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(x=torch.randn(2, 3, 32, 32, generator=generator), t=torch.tensor([7, 801]))


def test_both_layouts_of_one_network_give_the_same_bits(noise: SimpleNamespace):
    ho, diffusers = load(DDPM), load(DDPM / "diffusers")
    assert ho.layout != diffusers.layout
    assert (ho.family, diffusers.family) == ("ddpm", "ddpm")
    assert torch.equal(eps(ho, noise.x, noise.t), eps(diffusers, noise.x, noise.t))


def test_attention_names_of_2022_give_the_same_bits(tmp_path: Path, noise: SimpleNamespace):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(DDPM / "diffusers" / "diffusion_pytorch_model.safetensors")
    renamed = {re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: old[m[0]], key): t for key, t in tensors.items()}
    torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
    shutil.copy(DDPM / "diffusers" / "config.json", tmp_path)
    net = load(tmp_path)
    assert "2022" in net.layout
    assert torch.equal(eps(net, noise.x, noise.t), eps(load(DDPM), noise.x, noise.t))


@pytest.mark.parametrize("legacy_pickle", [False, True])
def test_torch_files_old_and_new_hold_what_safetensors_hold(tmp_path: Path, legacy_pickle: bool):
    path = tmp_path / "any name.xyz"
    torch.save(load_file(ADM / "model.safetensors"), path, _use_new_zipfile_serialization=not legacy_pickle)
    net, same = load(path, config=ADM / "config.json"), load(ADM)
    assert net.config == same.config
    assert all(torch.equal(t, same.tensors[name]) for name, t in net.tensors.items())


def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path: Path):
    shutil.copy(DDPM / "model.safetensors", tmp_path / "model.ckpt")
    net = load(tmp_path / "model.ckpt")
    assert (net.family, net.path, net.config["resolution"]) == ("ddpm", tmp_path / "model.ckpt", 32)
    assert net.sha256 == sha256(DDPM / "model.safetensors") == load(DDPM).sha256


def test_safetensors_whose_first_byte_is_a_pickles_are_safetensors(tmp_path: Path):
    tensors = load_file(DDPM / "model.safetensors")
    lengths = set()
    for n in range(0, 264, 8):  # the header's length passes every multiple of eight
        save_file(tensors, tmp_path / "x", {"note": "." * n})
        lengths.add((tmp_path / "x").read_bytes()[0])
        assert load(tmp_path / "x").family == "ddpm"
    assert 0x80 in lengths


def test_settings_come_from_the_caller_then_config_json_then_convention():
    assert load(DDPM, config={}).config["resolution"] == 32  # attention at 16, on the second level
    assert load(DDPM, config={}, resolution=64).config["attention"] == (32,)
    assert load(ADM).config["head_dim"] == 16
    assert load(ADM, head_dim=8).config["head_dim"] == 8
    assert load(ADM, config={}, heads=4).config["head_dim"] is None
    assert load(ADM, config={}, heads=4, qkv="new").config["qkv"] == "new"
    flags = {
        "image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1,1", "learn_sigma": True,
        "attention_resolutions": "16,8", "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    assert {**load(ADM).config, **load(ADM, config=flags).config} == load(ADM).config


@pytest.mark.parametrize(
    ("config", "given", "line"),
    [
        ({}, {}, "32 channels do not divide into 64 channels a head: give heads= or head_dim="),
        ({}, {"heads": 5}, "32 channels do not divide into 5 heads"),
        ({}, {"head_dim": 16, "qkv": "old"}, "the caller says qkv = 'old'"),
        ({}, {"head_dim": 16, "base": 64}, "the caller says base = 64, the tensors say 32"),
        ({}, {"head_dim": 16, "groups": 16}, "adm has no setting groups"),
        ({}, {"head_dim": 16, "resolution": 2}, "resolution 2 cannot be halved 2 times"),
        ({"image_size": 32, "model_channels": 64}, {}, "config.json says base = 64, the tensors say 32"),
        ({"model_channels": 32, "num_heads": 4, "num_heads_upsample": 8}, {}, "num_heads_upsample = 8"),
        ({"model_channels": 32, "attention_resolutions": "a,b"}, {}, "config.json is malformed"),
        ({"model": {"ch": 32, "attn_resolutions": 16}}, {}, "config.json says attention = 16, which is no such"),
        ({"model": {"ch": 32, "ch_mult": "1,2"}}, {}, "config.json says mult = '1,2', which is no such"),
        ({"hidden_size": 768}, {}, "config.json is none of diffusers', guided-diffusion's or Asyrp's"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(config: dict, given: dict, line: str):
    with pytest.raises(ConfigError) as caught:
        load(ADM, config=config, **given)
    assert line in str(caught.value)


def mapped_from(path: Path, tensor: Tensor) -> bool:
    """Whether a tensor's first byte lies in this process's mapping of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path.resolve())):
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's mappings from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_every_parameter_stays_in_the_file_uncopied_and_uncast(tmp_path: Path, kind: str):
    path = tmp_path / "weights"
    tensors = load_file(DDPM / "model.safetensors")
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    net = load(path, config=DDPM / "config.json")
    unet = build(net.family, net.config, net.tensors)
    assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert all(mapped_from(path, p) for p in unet.parameters())


def test_shards_are_one_network(tmp_path: Path, noise: SimpleNamespace):
    tensors = list(load_file(DDPM / "model.safetensors").items())
    halves = {"a.safetensors": dict(tensors[:90]), "b.safetensors": dict(tensors[90:])}
    for name, half in halves.items():
        save_file(half, tmp_path / name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, half in halves.items() for key in half}}))
    net = load(tmp_path)
    assert [path.name for path in net.paths] == list(halves)
    assert torch.equal(eps(net, noise.x, noise.t), eps(load(DDPM), noise.x, noise.t))


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path):
    with pytest.raises(MissingFileError, match="cannot write"):
        write(tmp_path / "no folder" / "x.safetensors", {"a": torch.zeros(1)})
    (tmp_path / "x").mkdir()
    with pytest.raises(MissingFileError, match="cannot write"):
        write(tmp_path / "x", {"a": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("folder", "names"), [(DDPM, "conv1 emb norm conv2"), (ADM, "norm1 conv1 emb norm2 conv2")])
def test_delta_blocks_load_prefixed_and_as_the_authors_pickled_them(tmp_path: Path, folder: Path, names: str):
    found = load_delta_blocks(folder / "delta_blocks.safetensors")
    assert (found.family, len(found.blocks)) == (folder.name.removeprefix("tiny-"), 2)
    assert list(found.blocks[0]) == [f"{name}.{p}" for name in names.split() for p in ("weight", "bias")]
    raw = load_file(folder / "delta_blocks.safetensors")
    states = {
        str(i): {k.removeprefix(f"block{i}."): t for k, t in raw.items() if k.startswith(f"block{i}.")} for i in (0, 1)
    }
    torch.save(
        states | {"optimizer": {"state": {}, "param_groups": [{"lr": 0.5}]}, "scheduler": {}}, tmp_path / "f.pth"
    )
    pickled = load_delta_blocks(tmp_path / "f.pth")
    assert pickled.family == found.family
    for a, b in zip(pickled.blocks, found.blocks, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_delta_blocks_that_are_none_are_refused(tmp_path: Path):
    with pytest.raises(LayoutError, match=r"missing: temb_proj.weight"):
        load_delta_blocks(DDPM / "model.safetensors")
    torch.save({"0": torch.zeros(512, 8, 8)}, tmp_path / "free.pth")
    with pytest.raises(LayoutError, match="not all of it is named tensors; free delta h"):
        load_delta_blocks(tmp_path / "free.pth")
    with pytest.raises(LayoutError, match=r"is Asyrp's delta blocks; pixel DDPM"):
        load(DDPM / "delta_blocks.safetensors", config={})


def test_embedded_names_are_the_folders_that_ship():
    root = Path(__file__).parents[1] / "weights" / "embedded"
    assert set(embedded()) == {path.parent.name for path in root.glob("*/*.safetensors")}
    for name in embedded():
        assert load(name).family == "ddpm"

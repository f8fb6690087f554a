"""Damaged and hostile weight files: a network or a WeightsError of one line, and never a large allocation."""

import json
import os
import pickle
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diaphane.model.load import build
from diaphane.weights.asyrp import load_delta_blocks
from diaphane.weights.errors import WeightsError
from diaphane.weights.load import load
from safetensors.torch import save
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = {"ddpm": GOLDEN / "tiny-ddpm", "diffusers": GOLDEN / "tiny-ddpm" / "diffusers", "adm": GOLDEN / "tiny-adm"}
HALF, GIB = torch.float16, 1 << 30


def tensors_of(name: str) -> dict[str, Tensor]:
    """The names and shapes of a tiny network, its values zero."""
    header = next(CONFIGS[name].glob("*model.safetensors")).read_bytes()
    entries = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    return {key: torch.zeros(e["shape"], dtype=HALF) for key, e in entries.items() if key != "__metadata__"}


NETS = {name: tensors_of(name) for name in CONFIGS}
FILES = {name: save(tensors) for name, tensors in NETS.items()}


def saved(tensors: dict, path: Path, rng: random.Random) -> None:
    """Tensors in one of the formats."""
    if rng.random() < 0.7:
        path.write_bytes(save({key: t.contiguous() for key, t in tensors.items()}))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < 0.5)


def header_of(name: str) -> tuple[dict, bytes]:
    raw = FILES[name]
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def truncated(name: str, path: Path, rng: random.Random) -> None:
    path.write_bytes(FILES[name][: int(len(FILES[name]) * rng.random() ** 3)])


def flipped(name: str, path: Path, rng: random.Random) -> None:
    """Bytes changed in the header."""
    raw = bytearray(FILES[name])
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(rng.choice((1, 1, 3, 20))):
        raw[rng.randrange(end if rng.random() < 0.9 else 8)] = rng.randrange(256)
    path.write_bytes(raw)


def lengthened(name: str, path: Path, rng: random.Random) -> None:
    """An absurd length of the header."""
    length = rng.choice((0, 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 10**8, rng.getrandbits(64)))
    path.write_bytes(struct.pack("<Q", length) + FILES[name][8:])


def misdescribed(name: str, path: Path, rng: random.Random) -> None:
    """A well-formed header that lies about shapes, types and offsets."""
    header, body = header_of(name)
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    match rng.randrange(4):
        case 0:
            entry["shape"] = [rng.choice((0, 1, -1, 2**40, 2**63)) for _ in range(rng.randrange(5))]
        case 1:
            entry["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "C64", "XX", None, 7))
        case 2:
            entry["data_offsets"] = [rng.choice((0, 5, 2**40, -1)), rng.choice((0, 7, 2**41))]
        case _:
            entry.pop(rng.choice(list(entry)))
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def renamed(name: str, path: Path, rng: random.Random) -> None:
    """Keys renamed, dropped, doubled, swapped; prefixes on some."""
    tensors = dict(NETS[name])
    for _ in range(rng.choice((1, 1, 2, 10))):
        key, other = rng.choice(list(tensors)), rng.choice(list(tensors))
        kind = rng.randrange(6)
        if kind == 0:
            tensors[
                rng.choice(("x", key[::-1], key + "0", "down.999.block.0.x", "up.-1", "down.٣.block", "é\n", ""))
            ] = tensors.pop(key)
        elif kind == 1:
            del tensors[key]
        elif kind == 2:
            tensors[f"module.{key}"] = tensors[key].clone()
        elif kind == 3:
            tensors[key], tensors[other] = tensors[other], tensors[key].clone()
        elif kind == 4:
            tensors[key.replace("0", rng.choice("123456789"), 1)] = tensors[key].clone()
        else:
            prefix = rng.choice(("model.", "ema.", "state_dict.", "unet."))
            tensors = {prefix + k: t for k, t in tensors.items()}
    saved(tensors, path, rng)


def reshaped(name: str, path: Path, rng: random.Random) -> None:
    """Tensors of other shapes and types."""
    tensors = dict(NETS[name])
    for _ in range(rng.choice((1, 1, 2, 10))):
        key = rng.choice(list(tensors))
        shape = list(tensors[key].shape)
        kind = rng.randrange(6)
        if kind == 0:
            shape[-rng.randrange(3) :] = [rng.choice((0, 1, 2, 7, 96))]
        elif kind == 1:
            shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 1, 2)))
        elif kind == 2:
            del shape[-1:]
        elif kind == 3:
            shape.reverse()
        dtype = rng.choice((torch.int64, torch.bool, torch.float64, torch.bfloat16)) if kind == 4 else HALF
        tensors[key] = torch.full(shape, float("nan"), dtype=HALF) if kind == 5 else torch.zeros(shape, dtype=dtype)
    saved(tensors, path, rng)


class Bomb:
    """An object whose pickle makes a folder when it is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(name: str, path: Path, rng: random.Random) -> None:
    """Pickles of other things, among them code."""
    tensors, bomb = dict(NETS[name]), Bomb(path.with_name("ran"))
    content = rng.choice([
        bomb, [bomb], {"state_dict": bomb}, {"model": tensors, "optimizer": bomb}, {**tensors, "epoch": 3}, [], {},
        {"ema": {"shadow_params": list(tensors.values())}, "model": tensors}, {"ema": {"shadow_params": 3}}, {1: 2},
        {"ema": {"ema": {"ema": tensors}}}, {"state_dict": {}}, list(tensors.values()), {"0": tensors}, {"0": 1},
        None,
    ])  # fmt: skip
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content if content is bomb else {"a": bomb}, protocol=rng.choice((0, 1, 2, 4))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)


def broken_pickle(name: str, path: Path, rng: random.Random) -> None:
    """A torch file with bytes changed or cut off."""
    few = dict(rng.sample(sorted(NETS[name].items()), 4))
    torch.save(few, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((0, 1, 5, 50))):
        raw[rng.randrange(min(len(raw), 3000) if rng.random() < 0.7 else len(raw))] = rng.randrange(256)
    path.write_bytes(raw[: rng.choice((len(raw), rng.randrange(1, len(raw))))])


def noise(name: str, path: Path, rng: random.Random) -> None:
    """Random bytes, some with the beginnings of the formats."""
    start = rng.choice((b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{", b"<html>", b'{"a":'))
    path.write_bytes(start + rng.randbytes(rng.choice((0, 1, 7, 8, 9, 64, 5000))))


def reconfigured(name: str, path: Path, rng: random.Random) -> None:
    """A whole file beside a config.json with changed settings."""
    path.write_bytes(FILES[name])
    config = json.loads((CONFIGS[name] / "config.json").read_text())
    at = rng.choice([config, *(v for v in config.values() if isinstance(v, dict))])
    key = rng.choice(list(at))
    at[key] = rng.choice((None, 0, -1, 1, 7, 2**70, 0.5, float("nan"), "", "16,8", "x", [], [0], [[1]], {}, True))
    raw = json.dumps(config).encode()
    path.with_name("config.json").write_bytes(raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))])


MUTATIONS: dict[Callable[[str, Path, random.Random], None], int] = {
    truncated: 120, flipped: 200, lengthened: 60, misdescribed: 160, renamed: 200, reshaped: 160, pickled: 80,
    broken_pickle: 160, noise: 100, reconfigured: 160,
}  # fmt: skip


def test_there_are_more_than_1200_cases():
    assert sum(MUTATIONS.values()) >= 1200


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_damaged_file_is_a_network_or_one_line(mutate: Callable, tmp_path: Path):
    rng = random.Random(mutate.__name__)
    path, before = tmp_path / "weights", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines, loaded = [], 0
    for i in range(MUTATIONS[mutate]):
        name = rng.choice(list(CONFIGS))
        (tmp_path / "config.json").write_text((CONFIGS[name] / "config.json").read_text())
        mutate(name, path, rng)
        for read in (load, load_delta_blocks) if i % 5 == 0 else (load,):
            try:
                network = read(path)
                if read is load:
                    build(network.family, network.config, network.tensors, dtype=torch.float32)
                loaded += 1
            except WeightsError as e:
                lines.append(str(e))
    assert lines, "nothing was refused"
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert loaded + len(lines) >= MUTATIONS[mutate]
    assert not (tmp_path / "ran").exists(), "code in a pickle was run"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB // 2

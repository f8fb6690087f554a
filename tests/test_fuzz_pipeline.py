"""Damaged folders, single files and LoRA: a model, or an error of one line."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.model.components import components
from diaphane.weights import lora, pipeline
from diaphane.weights.errors import WeightsError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import latent_twins as twins

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    1e30,
    float("nan"),
    "",
    "x",
    "\n",
    [],
    [1],
    [0, 0, 0],
    [[]],
    {},
    {"a": 1},
    2**70,
)
FILES = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
         "text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/tokenizer_config.json",
         "tokenizer/special_tokens_map.json", "tokenizer/vocab.json", "tokenizer/merges.txt")  # fmt: skip
GIVEN = {"unet": {"head_dim": 16, "id_dim": 8}, "text_encoder": {"heads": 3, "act": "quick_gelu"},
         "text_encoder_2": {"heads": 5, "act": "gelu"}}  # fmt: skip


def outcome(run: Callable[[], object], kinds: type[Exception] | tuple[type[Exception], ...] = WeightsError) -> str:
    """ "" where it works, else the message of its error, which has to be one line."""
    said = ""
    try:
        run()
    except kinds as e:
        said = str(e) or "an error without a word\n"
    assert "\n" not in said
    return said


def changed(path: Path, rng: random.Random) -> None:
    """A json file with a value replaced, taken out or cut off; any other file cut or with bytes changed."""
    raw = path.read_bytes()
    if path.suffix == ".json" and path.stat().st_size < 5000 and rng.random() < 0.8:
        content = json.loads(raw)
        key = rng.choice(list(content))
        if rng.random() < 0.2:
            del content[key]
        else:
            content[key] = rng.choice(ODD)
        path.write_text(json.dumps(content))
    elif rng.random() < 0.5:
        path.write_bytes(raw[: rng.randrange(len(raw))])
    else:
        data = bytearray(raw)
        for _ in range(rng.choice((1, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(twins.TINY, copied, ignore=shutil.ignore_patterns("single*", "ip_adapter", "image*", "controlnet"))
    for path in copied.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copied


def whole(model: Path) -> None:
    """The networks and tokenisers too."""
    found = pipeline.load(model)
    components(found.parts, found.words)


def test_a_damaged_folder_is_a_model_or_one_line(model: Path):
    rng, errors = random.Random(1), set()
    for i in range(90):
        path = model / rng.choice(FILES)
        raw = path.read_bytes()
        changed(path, rng)

        errors.add(outcome(lambda: pipeline.load(model)) if i % 5 else outcome(partial(whole, model), ValueError))
        path.write_bytes(raw)
    assert "" in errors
    assert len(errors) > 20


def test_a_damaged_single_file_is_a_model_or_one_line(tmp_path: Path):
    rng, errors, good = random.Random(2), set(), load_file(twins.TINY / "single_file.safetensors")
    for _ in range(40):
        tensors = dict(good)
        for _ in range(rng.choice((1, 2, 5))):
            key = rng.choice(list(tensors))
            match rng.randrange(5):
                case 0:
                    del tensors[key]
                case 1:
                    tensors[f"{key}.x"] = tensors.pop(key)
                case 2:
                    tensors[key] = torch.zeros(rng.choice([(), (0,), (3,), (2, 2), (1, 2, 3, 4)]))
                case 3:
                    tensors[key] = tensors[key].to(rng.choice([torch.int64, torch.bool, torch.bfloat16]))
                case 4:
                    prefix = key.split(".")[0]
                    tensors = {k: t for k, t in tensors.items() if not k.startswith(prefix)}
                    tensors["left"] = torch.zeros(1)
        save_file(tensors, tmp_path / "f.safetensors")
        errors.add(outcome(lambda: pipeline.load(tmp_path / "f.safetensors", given=GIVEN)))
    assert len(errors) > 20


def test_a_damaged_lora_matches_or_is_one_line():
    rng, errors, parts = random.Random(3), set(), pipeline.load(twins.TINY).parts
    names = [f"lora_unet_{side}_blocks_{b}_1_transformer_blocks_0_attn1_to_{leaf}"
             for side, b in (("input", 4), ("input", 5), ("output", 0)) for leaf in "qkv"]  # fmt: skip
    for _ in range(300):
        tensors: dict[str, Tensor] = {}
        for name in names:
            width = 96 if "output" in name else 64
            tensors |= {
                f"{name}.lora_down.weight": torch.zeros(2, width),
                f"{name}.lora_up.weight": torch.zeros(width, 2),
            }
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        key = rng.choice(list(tensors))
        match rng.randrange(6):
            case 0:
                del tensors[key]
            case 1:
                tensors[key[: rng.randrange(len(key))] or "x"] = tensors.pop(key)
            case 2:
                tensors[key] = torch.zeros(rng.choice([(), (0,), (0, 64), (64, 0), (2,), (2, 2, 1, 1), (1, 1, 1)]))
            case 3:
                tensors[key] = torch.full((), rng.choice([float("nan"), float("inf"), 0.0, -3.0]))
            case 4:
                tensors[key.replace("lora", rng.choice(["lokr", "hada", "LORA", ""]))] = tensors.pop(key)
            case 5:
                tensors[key] = (
                    tensors[key].repeat(2, *[1] * (tensors[key].ndim - 1)) if tensors[key].ndim else tensors[key]
                )
        metadata = {"lora_adapter_metadata": rng.choice(["", "{}", "[]", "7", '{"unet.lora_alpha": "x"}', "{"])}
        named = {key.replace("lora_unet_", "unet."): t for key, t in tensors.items()} if rng.random() < 0.1 else tensors
        errors.add(outcome(lambda t=named, m=metadata: lora.matched(t, parts, m)))
    assert "" in errors
    assert len(errors) > 30

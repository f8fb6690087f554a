"""Damaged keys, shapes and settings of latent diffusion models: one line that says what is wrong, or a success."""

import json
import random
from collections import Counter
from typing import Any

import torch
from diaphane.weights.errors import WeightsError
from diaphane.weights.latent import parts, renamed
from diaphane.weights.latent_settings import settings
from safetensors.torch import load_file
from torch import Tensor

from .latent_twins import TINY

FOLDERS = ("unet", "vae", "controlnet", "text_encoder", "text_encoder_2", "image_encoder")
ODD = (None, 0, -1, 1, "x", [], [1], {}, 1e9, True, [None, 2], float("nan"))
GIVEN: tuple[dict[str, Any], ...] = ({}, {"heads": 3}, {"head_dim": 16, "id_dim": 8}, {"groups": 5}, {"scaling": -1})


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shells(path: Any) -> dict[str, Tensor]:
    """The tensors of a file without their numbers."""
    return {key: empty(*t.shape, dtype=t.dtype) for key, t in load_file(path).items()}


def damaged(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Tensors with one thing wrong."""
    key = draw.choice(list(tensors))
    rest = {k: t for k, t in tensors.items() if k != key}
    parts = key.split(".")
    renamed = ".".join(draw.choice(["999", "0", "x", "weight"]) if draw.random() < 0.3 else part for part in parts)
    shape = [draw.choice([0, 1, 2, 3, 7, 64]) for _ in range(draw.randint(0, 5))]
    return draw.choice(
        [
            rest,
            rest | {renamed: tensors[key]},
            tensors | {renamed: tensors[key]},
            rest | {key: empty(*shape)},
            rest | {key: empty(3, dtype=torch.int64)},
            {f"pre.{k}": t for k, t in tensors.items()},
            {k.replace("text_model.", "").replace("model.", ""): t for k, t in tensors.items()},
            {k: t for k, t in tensors.items() if draw.random() < 0.95},
            {k: t for k, t in tensors.items() if draw.random() < 0.03} | {key: tensors[key]},
        ]
    )


def test_900_damaged_files_and_settings_end_in_one_line_or_in_success():
    draw, ends, long = random.Random(31), Counter[str](), []
    files = {folder: shells(next((TINY / folder).glob("*.safetensors"))) for folder in FOLDERS}
    files["single"] = shells(TINY / "single_file.safetensors")
    configs = {folder: json.loads((TINY / folder / "config.json").read_text()) for folder in FOLDERS}
    for _ in range(900):
        source = draw.choice(list(files))
        tensors, config = dict(files[source]), dict(configs.get(source, {}))
        for _ in range(draw.choice([0, 0, 1, 2])):
            tensors = damaged(tensors, draw)
        if config and draw.random() < 0.5:
            config[draw.choice(list(config))] = draw.choice(ODD)
        try:
            held, implied = parts(tensors)
            for name, part in held.items():
                layout, plan, _ = renamed(part)
                settings(layout.family, plan, {} if name else config, draw.choice(GIVEN), implied)
            ends["success"] += 1
        except WeightsError as e:
            long += [e] if len(str(e).splitlines()) > 1 else []
            ends[type(e).__name__] += 1
    assert not long
    assert min(ends[end] for end in ("success", "LayoutError", "ConfigError")) > 50

"""Writing a DDPM of ours as a diffusers folder, which others can open too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import ddpm
from .errors import ConfigError
from .files import write
from .names import Rule, rename
from .plan import Plan


def diffusers_ddpm(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of a UNet2DModel from DDPMConfig's fields and our tensors.

    Raises ConfigError for widths that diffusers cannot express, LayoutError for tensors that are not this network's.
    """
    base, mult, resolution = config["base"], tuple(config["mult"]), config["resolution"]
    widths = tuple(int(base * m) for m in mult)
    if widths[0] != base:
        raise ConfigError(f"diffusers has a stem as wide as its first level; here they are {base} and {widths[0]}")
    attention = tuple(level for level in range(len(widths)) if resolution >> level in tuple(config["attention"]))
    plan = Plan(
        base=base,
        widths=widths,
        blocks=config["blocks"],
        attention=attention,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
    )
    table = {rule.name: rule.key for rule in reversed(ddpm.table(plan, ddpm.DIFFUSERS))}
    want = ddpm.want(plan)
    back = [Rule(name, table[name]) for name in want]
    renamed = rename(tensors, back, {table[name]: shape for name, shape in want.items()})
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": None,
        "block_out_channels": list(widths),
        "center_input_sample": False,
        "down_block_types": [f"{'Attn' * (level in attention)}DownBlock2D" for level in range(len(widths))],
        "downsample_padding": 0,
        "dropout": config.get("dropout", 0.0),
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": plan.in_channels,
        "layers_per_block": plan.blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": config.get("groups", 32),
        "out_channels": plan.out_channels,
        "sample_size": resolution,
        "time_embedding_type": "positional",
        "up_block_types": [f"{'Attn' * (level in attention)}UpBlock2D" for level in reversed(range(len(widths)))],
    }, renamed


def write_diffusers_ddpm(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A folder with config.json and diffusion_pytorch_model.safetensors; returns the path of the weights."""
    settings, renamed = diffusers_ddpm(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return write(folder / "diffusion_pytorch_model.safetensors", renamed, {"format": "pt", **(metadata or {})})

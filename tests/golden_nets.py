"""The networks that the reference data was made with: two tiny ones from files, others whose weights are a formula."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diaphane.methods.delta import ADMDeltaBlock, DeltaBlock, delta_block
from diaphane.model.blocks import ThreeLists
from diaphane.model.load import build
from diaphane.weights import adm, ddpm
from diaphane.weights.asyrp import LEAVES, load_delta_blocks
from diaphane.weights.load import load
from diaphane.weights.plan import Plan
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY = Path(__file__).parent / "golden"


def names() -> list[str]:
    """ddpm, adm: the tiny networks there are."""
    return sorted(
        path.name.removeprefix("tiny-") for path in TINY.glob("tiny-*") if (path / "model.safetensors").exists()
    )


def network(path: Path, **given: Any) -> ThreeLists:
    """A network in float32 from a public layout, without gradients."""
    found = load(path, **given)
    return build(found.family, found.config, found.tensors, dtype=torch.float32).eval().requires_grad_(False)


@cache
def tiny(name: str) -> ThreeLists:
    return network(TINY / f"tiny-{name}" / "model.safetensors")


def tiny_new_order(name: str) -> ThreeLists:
    """The tiny network with its qkv rows read in the new order."""
    return network(TINY / f"tiny-{name}" / "model.safetensors", qkv="new")


def tiny_scaled_stem(name: str, factor: float) -> ThreeLists:
    """The tiny network with its first convolution's weight and bias multiplied."""
    unet = network(TINY / f"tiny-{name}" / "model.safetensors")
    with torch.no_grad():
        for parameter in unet.enc[0].parameters():
            parameter.mul_(factor)
    return unet


def official_name(family: str, name: str) -> str:
    """A parameter of a delta block, conv1.weight and the like, as the authors call it."""
    layer, leaf = name.split(".")
    return f"{dict(LEAVES[family])[layer]}.{leaf}"


def blocks(name: str) -> list[DeltaBlock | ADMDeltaBlock]:
    """The tiny network's delta blocks, in float32, fresh ones at every call."""
    stored = load_delta_blocks(TINY / f"tiny-{name}" / "delta_blocks.safetensors")
    assert stored.family == name
    floats = [{key: tensor.float() for key, tensor in tensors.items()} for tensors in stored.blocks]
    return [delta_block(tensors).requires_grad_(False) for tensors in floats]


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Official names and shapes -> the weights of the golden sets' formula, rounded to half precision."""
    out = {}
    for p, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        z = torch.sin((i + 1) * 12.9898 + (p + 1) * 78.233) * 43758.5453
        u = (2 * (z - z.floor()) - 1).reshape(shape)
        if len(shape) > 1:
            value = u * math.sqrt(3 / math.prod(shape[1:]))
        else:
            value = 1 + 0.2 * u if name.endswith("weight") else 0.2 * u
        out[name] = value.half()
    return out


def formula_network(family: str, config: dict[str, Any], image_size: int, folder: Path) -> tuple[ThreeLists, int, int]:
    """A network by its official settings, loaded from a file in the official layout; its parameters and tensors."""
    if family == "ddpm":
        known = {"ch", "ch_mult", "num_res_blocks", "attn", "in_channels", "out_ch"}
        settings = {"in_channels": 3, "out_ch": 3} | config
        plan = Plan(
            base=settings["ch"],
            widths=tuple(int(settings["ch"] * m) for m in settings["ch_mult"]),
            blocks=settings["num_res_blocks"],
            attention=tuple(i for i in range(len(settings["ch_mult"])) if image_size >> i in settings["attn"]),
            in_channels=settings["in_channels"],
            out_channels=settings["out_ch"],
        )
        said = {"model": settings | {"attn_resolutions": settings["attn"]}, "data": {"image_size": image_size}}
        tables, column, ones = ddpm, ddpm.HO, (1, 1)
    elif family == "adm":
        known = {"model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels"}
        known |= {"use_scale_shift_norm", "resblock_updown", "num_heads", "num_heads_upsample", "conv_resample"}
        known |= {"use_new_attention_order", "num_classes", "in_channels", "out_channels", "image_size", "dropout"}
        settings = {  # the defaults of guided-diffusion's network
            "num_heads": 1, "num_head_channels": -1, "use_scale_shift_norm": False, "resblock_updown": False,
            "use_new_attention_order": False, "conv_resample": True, "num_classes": None,
            "in_channels": 3, "out_channels": 6, "image_size": image_size,
        } | config  # fmt: skip
        levels = range(len(settings["channel_mult"]))
        plan = Plan(
            base=settings["model_channels"],
            widths=tuple(int(settings["model_channels"] * m) for m in settings["channel_mult"]),
            blocks=settings["num_res_blocks"],
            attention=tuple(i for i in levels if 2**i in settings["attention_resolutions"]),
            in_channels=settings["in_channels"],
            out_channels=settings["out_channels"],
            classes=settings["num_classes"],
            scale_shift=settings["use_scale_shift_norm"],
            updown=settings["resblock_updown"],
            resample_conv=settings["conv_resample"],
        )
        said, tables, column, ones = settings, adm, adm.GUIDED, (1,)
    else:
        raise AssertionError(f"unknown family {family}: it is ddpm or adm")
    assert known >= config.keys(), f"unknown settings of {family}: {', '.join(config.keys() - known)}"
    want = tables.want(plan)
    shapes = {rule.key: want[rule.name] for rule in tables.table(plan, column)}
    stored = {  # attention is made of 1x1 convolutions there
        key: (*shape, *ones) if len(shape) == 2 and key.split(".")[-2] in ("q", "k", "v", "qkv", "proj_out") else shape
        for key, shape in shapes.items()
    }
    file = folder / "formula.safetensors"
    save_file(formula_weights(stored), file)
    (folder / "config.json").write_text(json.dumps(said))
    unet = network(file)
    return unet, sum(p.numel() for p in unet.parameters()), len(load_file(file))

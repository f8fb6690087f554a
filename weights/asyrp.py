"""Asyrp's delta blocks f(h, t), as the authors' 35 public files and safetensors of their tensors hold them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .errors import LayoutError, WeightsError
from .files import HALVES, check_finite, check_floating, opened
from .names import Rule, Shape, ends, rename
from .plan import need

#            ours     theirs
LEAVES = {
    "ddpm": (("conv1", "conv1"), ("emb", "temb_proj"), ("norm", "norm2"), ("conv2", "conv2")),
    "adm": (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("emb", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
    ),
}


class DeltaBlocks(NamedTuple):
    """The blocks of a file, one an attribute, and the family of network they were trained beside."""

    family: str  # ddpm | adm
    blocks: list[dict[str, Tensor]]  # under our names: [norm1,] conv1, emb, norm | norm2, conv2


def load_delta_blocks(path: str | os.PathLike[str]) -> DeltaBlocks:
    """The delta blocks in a file: state dicts under "0", "1", ... (the authors'), prefixed `block0.`, or one alone.

    What an optimiser and a scheduler left in the file is not read.  Raises a WeightsError of one line.
    """
    path = Path(path)
    content = opened(path).content
    try:
        blocks = [block(tensors) for tensors in separated(content)]
    except LayoutError as e:
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"{path}, read as Asyrp's delta blocks: {e.message}".removesuffix(": "), **lists) from e
    except WeightsError as e:
        raise type(e)(f"{path}: {e}") from e
    families, widths = {family for family, _ in blocks}, {tuple(b["emb.weight"].shape) for _, b in blocks}
    if len(families) > 1 or len(widths) > 1:
        raise LayoutError(f"{path} holds delta blocks of different kinds or widths: they belong to different networks")
    return DeltaBlocks(families.pop(), [tensors for _, tensors in blocks])


def separated(content: object) -> list[dict[str, Tensor]]:
    """The state dicts in what a file holds, in order of their numbers."""
    if not isinstance(content, Mapping):
        raise LayoutError(f"there are no named tensors in it, but {type(content).__name__}")
    numbered = {key: value for key, value in content.items() if re.fullmatch(r"\d{1,3}", str(key), re.ASCII)}
    if numbered:
        found = [numbered[key] for key in sorted(numbered, key=lambda key: int(str(key)))]
    else:
        groups: dict[int, dict[str, Tensor]] = {}
        for key, tensor in content.items():
            prefix = re.match(r"(?:block)?(\d{1,3})\.", str(key), re.ASCII)
            groups.setdefault(int(prefix[1]) if prefix else 0, {})[str(key)[prefix.end() if prefix else 0 :]] = tensor
        found = [groups[i] for i in sorted(groups)]
    for tensors in found:
        if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise LayoutError("not all of it is named tensors; free delta h, trained without f, is not a delta block")
    if not found:
        raise LayoutError("there is no delta block in it")
    return found


def block(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The family of one block, and its tensors under our names."""
    tensors = {str(key).removeprefix("module."): tensor for key, tensor in tensors.items()}
    family = "adm" if any(key.startswith(("in_layers.", "out_layers.", "emb_layers.")) for key in tensors) else "ddpm"
    rows = [
        Rule(theirs_end, ours_end)
        for ours, theirs in LEAVES[family]
        for ours_end, theirs_end in zip(ends(ours, ""), ends(theirs, ""), strict=True)
    ]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    ch, emb = need(shapes, dict(LEAVES[family])["emb"] + ".weight", 2)
    weights: dict[str, Shape] = {"conv1": (ch, ch, 1, 1), "conv2": (ch, ch, 1, 1), "emb": (ch, emb)}
    want = {
        end: weights.get(ours, (ch,)) if end.endswith("weight") else (ch,)
        for ours, _ in LEAVES[family]
        for end in ends(ours, "")
    }
    renamed = rename(tensors, rows, want)
    check_floating(renamed)
    check_finite({name: tensor for name, tensor in renamed.items() if tensor.dtype in HALVES})
    return family, renamed

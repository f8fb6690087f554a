"""LoRA files (Hu et al. 2022): kohya's, diffusers' and PEFT's names, each matched to one weight of a model."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import clip, hub, unet
from .errors import ConfigError, LayoutError, MissingFileError, first
from .files import check_finite, check_floating, opened, sha256
from .layout import foreign, state
from .load import SUFFIXES, Network
from .names import Shape, matrix, shape_of

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
LEAF = re.compile(
    r"(?P<module>.+?)(?P<old>_lora)?\.(lora_linear_layer\.|lora\.)?"
    r"(?P<leaf>lora_down|lora_up|lora_A|lora_B|down|up|alpha)((\.\w+)?\.weight)?"
)
SIDES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up"}
# other ways to change weights, by a part of their keys
OTHERS = {
    "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT", "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA", "lora_mid": "a LoCon in three factors", "glora": "GLoRA",
    ".diff": "a difference of weights", "ia3": "IA3", "lora_controlnet": "Control-LoRA",
}  # fmt: skip
READS = re.compile(r"attn2[._]to[._][kv]$")  # a module that reads text tokens
KINDS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "the XL refiner"}


class Factors(NamedTuple):
    """What is added to one weight W: scale * up down, of rank r."""

    down: Tensor  # (r, in), or (r, in, k, k) of a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    scale: float  # alpha / r
    key: str  # what the file calls it

    @property
    def rank(self) -> int:
        """The columns of `up`."""
        return self.up.shape[1]


@dataclass(frozen=True)
class Lora:
    """The factors of a file, under the names of a model's parts and our names of their weights."""

    factors: dict[str, dict[str, Factors]] = field(repr=False)  # part -> our name -> factors
    paths: tuple[Path, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, str, str, int, float]]:
        """The table of what matched: the file's name, the part, our name, rank, alpha."""
        for part, found in self.factors.items():
            for name, factors in found.items():
                yield factors.key, part, name, factors.rank, factors.scale * factors.rank

    @property
    def sha256(self) -> str:
        """Of the file, in hex."""
        return sha256(self.paths)


def load(
    source: str | os.PathLike[str],
    parts: Mapping[str, Network],
    *,
    only: tuple[str, ...] | None = None,
    file: str | None = None,
    revision: str | None = None,
) -> Lora:
    """The LoRA in a file, a folder or a repository, for a model's parts (`pipeline.load(...).parts`).

    Every key has to find its weight: what does not is an error that lists it.  `only` names parts (unet,
    text_encoder, text_encoder_2) whose factors are wanted; those of the others are left out.  Raises a WeightsError
    of one line, for a LoRA of another model one that says which.
    """
    path = find(source, file, revision)
    found = opened(path)
    tensors = state(found.content)
    check_floating({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")})
    try:
        factors = matched(tensors, parts, found.metadata)
    except LayoutError as e:
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"{path}: {e.message}".removesuffix(": "), **lists) from e
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    if only is not None:
        if strange := [part for part in only if part not in parts]:
            raise ConfigError(f"the model has no part {strange[0]}: it has {', '.join(parts)}")
        factors = {part: rows for part, rows in factors.items() if part in only}
    return Lora(factors, found.paths, found.metadata)


def find(source: str | os.PathLike[str], file: str | None, revision: str | None) -> Path:
    """The local file that a name stands for, fetched if it has to be."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        here = [path / file] if file else [path / known for known in NAMES] + sorted(path.glob("*.safetensors"))
        if chosen := [candidate for candidate in here if candidate.is_file()]:
            return chosen[0]
        raise MissingFileError(f"there is no {file or 'LoRA'} in {path}")
    if hub.is_repo(name) and not name.endswith(SUFFIXES):
        return hub.fetch(name, [file] if file else list(NAMES), revision=revision)
    raise MissingFileError(f"there is no {name or 'file without a name'}: give a LoRA's file, folder or repository")


def matched(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Network], metadata: Mapping[str, str] | None = None
) -> dict[str, dict[str, Factors]]:
    """Factors by part and our name.  Raises LayoutError with lists of what is wrong, ConfigError for other kinds."""
    for mark, kind in OTHERS.items():
        if any(mark in key for key in tensors):
            raise ConfigError(f"it is {kind}; plain LoRA (down, up, alpha) is read here")
    groups, unexpected = grouped(tensors)
    right_model(groups, parts)
    known = spelled(parts)
    alphas = Alphas(metadata or {})
    out: dict[str, dict[str, Factors]] = {part: {} for part in parts}
    missing, misshapen, doubled = [], [], []
    for key, sides in groups.items():
        if key not in known:
            unexpected.append(key)
            continue
        if lost := [side for side in ("down", "up") if side not in sides]:
            missing.append(f"{key} {lost[0]}")
            continue
        part, name, shape = known[key]
        down, up = (matrix(sides[side]) if len(shape) == 2 else sides[side] for side in ("down", "up"))
        if not fits(down, up, shape):
            both = f"{shape_of(sides['up'].shape)} times {shape_of(sides['down'].shape)}"
            misshapen.append(f"{key} {both} should make {shape_of(shape)}")
        elif name in out[part]:
            doubled.append(f"{key} and {out[part][name].key} are both {name} of {part}")
        else:
            rank = up.shape[1]
            scale = number(sides["alpha"], f"{key}.alpha") / rank if "alpha" in sides else alphas.scale(key, rank)
            check_finite({f"{key} {side}": x for side, x in (("down", down), ("up", up))})
            out[part][name] = Factors(down, up, scale, key)
    if missing or unexpected or misshapen or doubled:
        message = f"{len(groups) - len(unexpected)} of {len(groups)} modules match"
        raise LayoutError(message, missing=missing, unexpected=unexpected, misshapen=misshapen, doubled=doubled)
    return {part: rows for part, rows in out.items() if rows}


def number(value: Any, what: str) -> float:
    """One finite number.  Raises ConfigError for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = nan
    if not isfinite(found):
        raise ConfigError(f"{what} is not one finite number")
    return found


def grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module -> its down, up and alpha, and keys that are none of these.

    Raises LayoutError where there is no LoRA, and where there are several.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    unexpected, doubled = [], []
    for key, tensor in tensors.items():
        m = LEAF.fullmatch(key)
        if m is None:
            unexpected.append(key)
            continue
        module = m["module"].replace(".processor.", ".") if m["old"] else m["module"]
        module += ".0" if m["old"] and module.endswith(".to_out") else ""
        side, sides = SIDES.get(m["leaf"], m["leaf"]), groups.setdefault(module, {})
        if side in sides:
            doubled.append(f"{key} is {side} of {module} once more")
        sides[side] = tensor
    if doubled:
        raise LayoutError("it holds several adapters: save one alone", doubled=doubled)
    if not any({"down", "up"} & set(sides) for sides in groups.values()):
        what = foreign(tensors) or f"no LoRA: {first(tensors) or 'it is empty'}"
        raise LayoutError(f"it is {what}; a LoRA has keys that end in lora_down.weight or lora_A.weight")
    return groups, unexpected


def right_model(groups: Mapping[str, Mapping[str, Tensor]], parts: Mapping[str, Network]) -> None:
    """Raises LayoutError where the width of text tokens says that the LoRA is of another model."""
    reads = parts["unet"].config["context_dim"]
    for key, sides in groups.items():
        reading = READS.search(key) and "down" in sides and sides["down"].ndim > 1
        if reading and (width := sides["down"].shape[1]) != reads:
            found, this = KINDS.get(width, "another model"), KINDS.get(reads, "another")
            raise LayoutError(
                f"the LoRA is for {found} (text tokens of {width}); this model is {this}, which reads {reads}"
            )


def fits(down: Tensor, up: Tensor, shape: Shape) -> bool:
    """Whether up times down has a shape."""
    if down.ndim != len(shape) or up.ndim != len(shape) or up.shape[1] != down.shape[0] or not len(down):
        return False
    return (up.shape[0], *down.shape[1:]) == shape and all(n == 1 for n in up.shape[2:])


def spelled(parts: Mapping[str, Network]) -> dict[str, tuple[str, str, Shape]]:
    """Every name that a file may have for a weight -> (part, our name, our shape)."""
    known: dict[str, tuple[str, str, Shape]] = {}
    one_text = sum(part.startswith("text") for part in parts) == 1
    for part, net in parts.items():
        if part == "unet":
            tables: Any = unet
            dotted, flat = (
                {
                    unet.LDM: ["diffusion_model"],
                    unet.DIFFUSERS: ["unet", "base_model.model.unet", "base_model.model", ""],
                },
                ["lora_unet"],
            )
            plan: Any = unet_plan(net.config)
        elif part.startswith("text_encoder"):
            tables, plan = clip, clip.Plan(**{name: net.config[name] for name in CLIP_PLAN})
            dotted = {clip.TRANSFORMERS: [part, f"base_model.model.{part}"], clip.FLAT: [part]}
            flat = ["lora_te2" if part == "text_encoder_2" else "lora_te1"] + (["lora_te"] if one_text else [])
        else:
            continue
        for p in tables.parameters(plan):
            if len(p.shape) < 2 or not p.names[0].endswith(".weight") or p.names[0] == "token.weight":
                continue
            for column, heads in dotted.items():
                module = p.names[column].removesuffix(".weight")
                spellings = [f"{head}.{module}".strip(".") for head in heads]
                spellings += [f"{head}_{module}".replace(".", "_") for head in flat]
                if m := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", module):  # diffusers' own, in early 2023
                    leaf = "out.0" if m[2] == "out" else m[2]  # as `grouped` has it
                    spellings += [f"{head}.{m[1]}.to_{leaf}" for head in heads]
                known |= dict.fromkeys(spellings, (part, p.names[0], p.shape))
    return known


CLIP_PLAN = ("width", "layers", "mlp", "projection", "vocabulary", "positions")


def unet_plan(config: Mapping[str, Any]) -> unet.Plan:
    """The numbers of a UNet from its settings."""
    names = ("channels", "depth", "mid_depth", "blocks", "context_dim", "in_channels", "out_channels")
    marks = {name: config[name] for name in ("plain_mid", "hollow") if name in config}
    vector = config["pooled_dim"] + config["ids"] * config["id_dim"] if config["pooled_dim"] else None
    return unet.Plan(**{name: config[name] for name in names}, **marks, vector_dim=vector)


class Alphas:
    """alpha / r where no tensor says it: from the header that diffusers writes, else 1."""

    def __init__(self, metadata: Mapping[str, str]):
        try:
            said = json.loads(metadata.get("lora_adapter_metadata") or "{}")
        except ValueError as e:
            raise ConfigError(f"its header's lora_adapter_metadata is not json: {e}") from e
        self.said: Mapping[str, Any] = said if isinstance(said, Mapping) else {}

    def scale(self, key: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) where the header says use_rslora (Kalajdzievski 2023)."""
        part, _, module = key.partition(".")
        alpha = self.said.get(f"{part}.lora_alpha")
        patterns = self.said.get(f"{part}.alpha_pattern") or {}
        try:
            for pattern, value in patterns.items():
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    alpha = value
        except (AttributeError, re.error) as e:
            raise ConfigError(f"its header's alpha_pattern is malformed: {e}") from e
        if alpha is None:
            return 1.0
        return number(alpha, "lora_alpha of its header") / (rank**0.5 if self.said.get(f"{part}.use_rslora") else rank)

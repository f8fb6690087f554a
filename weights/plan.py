"""A network in plain numbers: what the shapes of its tensors say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nextafter
from typing import Any

from .errors import ConfigError, LayoutError
from .names import Shape, shape_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes alone determine."""

    base: int  # the time embedding is four times as wide
    widths: tuple[int, ...]  # channels of each level, fine to coarse
    blocks: int  # residual blocks per level
    attention: tuple[int, ...]  # levels with self-attention
    in_channels: int = 3
    out_channels: int = 3
    classes: int | None = None
    scale_shift: bool = False
    updown: bool = False  # residual blocks change the resolution
    resample_conv: bool = True

    @property
    def levels(self) -> range:
        return range(len(self.widths))

    def mult(self) -> tuple[float, ...]:
        """Widths over `base`: integers where they are, else the least float that gives the width back."""
        return tuple(w // self.base if w % self.base == 0 else ratio(w, self.base) for w in self.widths)

    def config(self, resolution: int) -> dict[str, Any]:
        """The settings that every family has, for images of `resolution`².  Raises ConfigError if it is too small."""
        if resolution >> self.levels[-1] < 1:
            raise ConfigError(f"resolution {resolution} cannot be halved {self.levels[-1]} times, as the tensors ask")
        return {
            "resolution": resolution,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "base": self.base,
            "mult": self.mult(),
            "blocks": self.blocks,
            "attention": tuple(resolution >> level for level in self.attention),
        }


def ratio(width: int, base: int) -> float:
    """The least float m >= width / base with int(base * m) == width."""
    m = width / base
    return m if int(base * m) == width else nextafter(m, inf)


def attention_at_16(plan: Plan) -> int:
    """DDPM and DDPM++: the finest attention is at 16 x 16; without any, the bottleneck is 8 x 8."""
    return 16 << plan.attention[0] if plan.attention else bottleneck_of_8(plan)


def bottleneck_of_8(plan: Plan) -> int:
    """ADM: the bottleneck is 8 x 8 (so it is in every published one)."""
    return 8 << plan.levels[-1]


def divides(groups: int, channels: Mapping[str, Shape], cure: str) -> None:
    """Raises ConfigError for a norm whose channels do not divide into `groups`; norms are told by their names."""
    for name, shape in channels.items():
        if name.split(".")[-2].startswith("norm") and name.endswith("weight") and shape[0] % groups:
            raise ConfigError(f"{shape[0]} channels of {name} do not divide into {groups} groups: {cure}")


def need(shapes: Mapping[str, Shape], key: str, rank: int) -> Shape:
    """The shape under a key that a layout cannot do without.  Raises LayoutError if it is missing or misshapen."""
    if key not in shapes:
        raise LayoutError("", missing=[key])
    if len(shapes[key]) != rank or 0 in shapes[key]:
        raise LayoutError(
            "", misshapen=[f"{key} {shape_of(shapes[key])} should have {rank} dimensions, none of them 0"]
        )
    return shapes[key]


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group finds among the keys' beginnings; 0 if none."""
    return 1 + max((int(m[1]) for key in shapes if (m := re.match(pattern, key, re.ASCII))), default=-1)


def holds(shapes: Mapping[str, Shape], prefix: str) -> bool:
    """Whether any key begins so."""
    return any(key.startswith(prefix) for key in shapes)


def agree(said: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError if settings contradict what the shapes say; None and absent settings agree with anything."""
    for name, value in said.items():
        if value is not None and name in found and plain(value) != plain(found[name]):
            raise ConfigError(f"{where} says {name} = {plain(value)}, the tensors say {plain(found[name])}")


def plain(value: Any) -> Any:
    """Tuples and lists alike, 1.0 and 1 alike."""
    return tuple(value) if isinstance(value, list | tuple) else value

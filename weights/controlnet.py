"""ControlNets of the text-conditioned UNets in two public layouts, side by side: LDM's single files, and diffusers'."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import unet
from .names import Rule, Shape
from .parameters import Parameter, conv, rules, shapes
from .plan import count, need

LDM, DIFFUSERS = unet.LDM, unet.DIFFUSERS


@dataclass(frozen=True, kw_only=True)
class Plan(unet.Plan):
    """What shapes alone determine."""

    hint: tuple[int, ...]
    hint_channels: int

    def config(self) -> dict[str, Any]:
        """The settings that the shapes say."""
        said = {name: value for name, value in super().config().items() if name != "out_channels"}
        return said | {"hint": self.hint, "hint_channels": self.hint_channels}


def hints(plan: Plan) -> Iterator[Parameter]:
    """The hint's convolutions; LDM counts the activations between them too."""
    widths = [plan.hint_channels, *(ch for ch in plan.hint for _ in range(2))]  # 3, 16, 16, 32, 32, ...
    widths = [*widths[:-1], plan.channels[0]]
    last = len(widths) - 2
    for i, (cin, cout) in enumerate(pairwise(widths)):
        theirs = "conv_in" if i == 0 else "conv_out" if i == last else f"blocks.{i - 1}"
        names = (f"hint.{i}", f"input_hint_block.{2 * i}", f"controlnet_cond_embedding.{theirs}")
        yield from conv(names, cin, cout)


def parameters(plan: Plan) -> Iterator[Parameter]:
    """Every parameter: the encoder's, then what is ControlNet's own."""
    yield from unet.encoder(plan)
    for i, ch in enumerate(unet.emitted(plan)):
        yield from conv((f"zeros.{i}", f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}"), ch, ch, 1)
    ch = plan.channels[-1]
    yield from conv(("zero_mid", "middle_block_out.0", "controlnet_mid_block"), ch, ch, 1)
    yield from hints(plan)


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    if column == LDM:
        convs = (count(found, r"input_hint_block\.(\d{1,3})\.") + 1) // 2
        keys = [f"input_hint_block.{2 * i}.weight" for i in range(convs - 1)]
    else:
        blocks = count(found, r"controlnet_cond_embedding\.blocks\.(\d{1,3})\.")
        keys = [f"controlnet_cond_embedding.{at}.weight" for at in ("conv_in", *(f"blocks.{i}" for i in range(blocks)))]
    widths = [need(found, key, 4)[0] for key in keys[::2]]
    base: dict[str, Any] = {**vars(unet.plan(found, column)), "out_channels": None}
    return Plan(**base, hint=tuple(widths), hint_channels=need(found, keys[0], 4)[1])


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(parameters(plan))


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names."""
    return rules(parameters(plan), column)


def strays(plan: Plan, column: int) -> list[str]:
    """Nothing besides the network is known in these files."""
    return []

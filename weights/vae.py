"""The autoencoder in its public layouts, side by side: single files (LDM), diffusers' folders, old attention names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .names import Rule, Shape
from .parameters import Names, Parameter, conv, linear, norm, rules, shapes, under
from .plan import count, need

LDM, DIFFUSERS, DIFFUSERS_2022 = 1, 2, 3  # columns below; 2022: the attention names before diffusers 0.15


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes alone determine; not the scaling."""

    in_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    blocks: int

    @property
    def last(self) -> int:
        """The coarsest level."""
        return len(self.channels) - 1

    def config(self) -> dict[str, Any]:
        """The settings that the shapes say."""
        return {name: getattr(self, name) for name in ("in_channels", "latent_channels", "channels", "blocks")}


def names(ours: str, ldm: str, diffusers: str) -> Names:
    """The names of a module; only attention was ever spelled otherwise in diffusers."""
    return ours, ldm, diffusers, diffusers


def res(at: Names, cin: int, cout: int) -> Iterator[Parameter]:
    """A residual block."""
    yield from norm(under(at, "norm1"), cin)
    yield from conv(under(at, "conv1"), cin, cout)
    yield from norm(under(at, "norm2"), cout)
    yield from conv(under(at, "conv2"), cout, cout)
    if cin != cout:
        yield from conv(under(at, names("skip", "nin_shortcut", "conv_shortcut")), cin, cout, 1)


def middle(ours: str, side: str, ch: int) -> Iterator[Parameter]:
    """A residual block, attention, a residual block."""
    yield from res(names(f"{ours}.0", f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"), ch, ch)
    at = names(f"{ours}.1", f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    yield from norm(under(at, names("norm", "norm", "group_norm")), ch)
    for leaf, now, then in (("q", "to_q", "query"), ("k", "to_k", "key"), ("v", "to_v", "value")):
        yield from linear(under(at, (leaf, leaf, now, then)), ch, ch)
    yield from linear(under(at, ("out", "proj_out", "to_out.0", "proj_attn")), ch, ch)
    yield from res(names(f"{ours}.2", f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"), ch, ch)


def out(ours: str, side: str, cin: int, cout: int) -> Iterator[Parameter]:
    """The last norm and convolution of a half."""
    yield from norm(names(f"{ours}.0.norm", f"{side}.norm_out", f"{side}.conv_norm_out"), cin)
    yield from conv(names(f"{ours}.0.conv", f"{side}.conv_out", f"{side}.conv_out"), cin, cout)


def parameters(plan: Plan) -> Iterator[Parameter]:
    """Every parameter, in order of execution."""
    last, z, ch = plan.last, plan.latent_channels, plan.channels[0]
    yield from conv(names("enc.0.0", "encoder.conv_in", "encoder.conv_in"), plan.in_channels, ch)
    for level, cout in enumerate(plan.channels):
        ldm, block = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for i in range(plan.blocks):
            yield from res(names(f"enc.{level + 1}.{i}", f"{ldm}.block.{i}", f"{block}.resnets.{i}"), ch, cout)
            ch = cout
        if level < last:
            at = names(f"enc.{level + 1}.{plan.blocks}", f"{ldm}.downsample", f"{block}.downsamplers.0")
            yield from conv(under(at, "conv"), ch, ch)
    yield from middle(f"enc.{last + 2}", "encoder", ch)
    yield from out(f"enc.{last + 3}", "encoder", ch, 2 * z)
    yield from conv(names("quant", "quant_conv", "quant_conv"), 2 * z, 2 * z, 1)
    yield from conv(names("post_quant", "post_quant_conv", "post_quant_conv"), z, z, 1)
    yield from conv(names("dec.0.0", "decoder.conv_in", "decoder.conv_in"), z, ch)
    yield from middle("dec.1", "decoder", ch)
    for level, cout in reversed(list(enumerate(plan.channels))):
        ours, block = f"dec.{last - level + 2}", f"decoder.up_blocks.{last - level}"
        ldm = f"decoder.up.{level}"  # LDM counts from the finest level, diffusers from the other end
        for i in range(plan.blocks + 1):
            yield from res(names(f"{ours}.{i}", f"{ldm}.block.{i}", f"{block}.resnets.{i}"), ch, cout)
            ch = cout
        if level:
            at = names(f"{ours}.{plan.blocks + 1}", f"{ldm}.upsample", f"{block}.upsamplers.0")
            yield from conv(under(at, "conv"), ch, ch)
    yield from out(f"dec.{last + 3}", "decoder", ch, plan.in_channels)


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    down, block = ("down", "block") if column == LDM else ("down_blocks", "resnets")
    levels = range(max(count(found, rf"encoder\.{down}\.(\d{{1,3}})\."), 1))
    return Plan(
        in_channels=need(found, "encoder.conv_in.weight", 4)[1],
        latent_channels=need(found, "post_quant_conv.weight", 4)[0],
        channels=tuple(need(found, f"encoder.{down}.{level}.{block}.0.conv1.weight", 4)[0] for level in levels),
        blocks=count(found, rf"encoder\.{down}\.0\.{block}\.(\d{{1,3}})\."),
    )


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(parameters(plan))


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names; in diffusers' files every attention may be spelled either way."""
    columns = (column,) if column == LDM else (column, DIFFUSERS + DIFFUSERS_2022 - column)
    return rules(parameters(plan), *columns)


def strays(plan: Plan, column: int) -> list[str]:
    """The two counters of averaged weights that some single files carry."""
    return ["model_ema.decay", "model_ema.num_updates"] if column == LDM else []

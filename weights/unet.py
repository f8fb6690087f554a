"""The text-conditioned UNet in two public layouts, side by side: single files (LDM, sgm), and diffusers' folders."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .names import Rule, Shape
from .parameters import Names, Parameter, conv, linear, norm, rules, shapes, under
from .plan import count, holds, need

LDM, DIFFUSERS = 1, 2  # columns below
BLOCK = r"transformer_blocks\.(\d{1,3})\."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes alone determine; only the heads and the groups are left to say."""

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    mid_depth: int
    plain_mid: bool = False  # the bottleneck is one residual block
    hollow: tuple[int, ...] = ()  # levels whose transformers have no blocks
    blocks: int
    context_dim: int | None  # None: no text is read
    vector_dim: int | None  # pooled text and ids together
    in_channels: int
    out_channels: int | None  # None: an encoder alone (ControlNet)

    @property
    def emb(self) -> int:
        """Width of the embedding."""
        return 4 * self.channels[0]

    @property
    def last(self) -> int:
        """The coarsest level."""
        return len(self.channels) - 1

    def config(self) -> dict[str, Any]:
        """The settings that the shapes say."""
        named = ["channels", "depth", "mid_depth", "blocks", "in_channels", "out_channels"]
        named += [name for name in ("plain_mid", "hollow") if getattr(self, name)]
        named += ["context_dim"] if self.context_dim else []
        return {name: getattr(self, name) for name in named}


def res(at: Names, cin: int, cout: int, emb: int) -> Iterator[Parameter]:
    """A residual block."""
    yield from norm(under(at, ("norm1", "in_layers.0", "norm1")), cin)
    yield from conv(under(at, ("conv1", "in_layers.2", "conv1")), cin, cout)
    yield from linear(under(at, ("emb", "emb_layers.1", "time_emb_proj")), emb, cout)
    yield from norm(under(at, ("norm2", "out_layers.0", "norm2")), cout)
    yield from conv(under(at, ("conv2", "out_layers.3", "conv2")), cout, cout)
    if cin != cout:
        yield from conv(under(at, ("skip", "skip_connection", "conv_shortcut")), cin, cout, 1)


def transformer(at: Names, ch: int, depth: int, context: int | None) -> Iterator[Parameter]:
    """A transformer, which both layouts spell alike; `context` may be None where it has no blocks."""
    yield from norm(under(at, "norm"), ch)
    yield from linear(under(at, "proj_in"), ch, ch)
    for i in range(depth):
        block = under(at, (f"blocks.{i}", *[f"transformer_blocks.{i}"] * 2))
        for ours, theirs, width in (("self_attn", "attn1", ch), ("cross_attn", "attn2", context or 0)):
            attn = under(block, (ours, theirs, theirs))
            for leaf, cin in (("q", ch), ("k", width), ("v", width)):
                yield from linear(under(attn, (leaf, f"to_{leaf}", f"to_{leaf}")), cin, ch, bias=False)
            yield from linear(under(attn, ("out", "to_out.0", "to_out.0")), ch, ch)
        yield from linear(under(block, ("ff_in", "ff.net.0.proj", "ff.net.0.proj")), ch, 8 * ch)
        yield from linear(under(block, ("ff_out", "ff.net.2", "ff.net.2")), 4 * ch, ch)
        for leaf in ("norm1", "norm2", "norm3"):
            yield from norm(under(block, leaf), ch)
    yield from linear(under(at, "proj_out"), ch, ch)


def head(plan: Plan) -> Iterator[Parameter]:
    """What makes the embedding, and the first convolution."""
    emb = plan.emb
    yield from linear(("time.0", "time_embed.0", "time_embedding.linear_1"), plan.channels[0], emb)
    yield from linear(("time.2", "time_embed.2", "time_embedding.linear_2"), emb, emb)
    if plan.vector_dim:
        yield from linear(("vector.0", "label_emb.0.0", "add_embedding.linear_1"), plan.vector_dim, emb)
        yield from linear(("vector.2", "label_emb.0.2", "add_embedding.linear_2"), emb, emb)
    yield from conv(("enc.0.0", "input_blocks.0.0", "conv_in"), plan.in_channels, plan.channels[0])


def pair(plan: Plan, side: str, k: int, block: str, i: int, cin: int, level: int) -> Iterator[Parameter]:
    """A residual block, and a transformer where there is one."""
    ours, ldm, cout = f"{side}.{k}", f"{'input' if side == 'enc' else 'output'}_blocks.{k}", plan.channels[level]
    yield from res((f"{ours}.0", f"{ldm}.0", f"{block}.resnets.{i}"), cin, cout, plan.emb)
    if (depth := plan.depth[level]) or level in plan.hollow:
        at = (f"{ours}.1", f"{ldm}.1", f"{block}.attentions.{i}")
        yield from transformer(at, cout, depth, plan.context_dim)


def encoder(plan: Plan) -> Iterator[Parameter]:
    """The embedding, the encoder and the bottleneck: what a ControlNet has too."""
    yield from head(plan)
    k, ch = 1, plan.channels[0]
    for level, cout in enumerate(plan.channels):
        block = f"down_blocks.{level}"
        for i in range(plan.blocks):
            yield from pair(plan, "enc", k, block, i, ch, level)
            k, ch = k + 1, cout
        if level < plan.last:
            yield from conv((f"enc.{k}.0.conv", f"input_blocks.{k}.0.op", f"{block}.downsamplers.0.conv"), ch, ch)
            k += 1
    yield from res(("mid.0", "middle_block.0", "mid_block.resnets.0"), ch, ch, plan.emb)
    if plan.plain_mid:
        return
    yield from transformer(("mid.1", "middle_block.1", "mid_block.attentions.0"), ch, plan.mid_depth, plan.context_dim)
    yield from res(("mid.2", "middle_block.2", "mid_block.resnets.1"), ch, ch, plan.emb)


def emitted(plan: Plan) -> list[int]:
    """Widths of the skips, in order."""
    out = [plan.channels[0]]
    for level, ch in enumerate(plan.channels):
        out += [ch] * (plan.blocks + (level < plan.last))
    return out


def decoder(plan: Plan) -> Iterator[Parameter]:
    """The decoder and the last convolution."""
    skips, k, ch = emitted(plan), 0, plan.channels[-1]
    for level, cout in reversed(list(enumerate(plan.channels))):
        block = f"up_blocks.{plan.last - level}"
        for i in range(plan.blocks + 1):
            yield from pair(plan, "dec", k, block, i, ch + skips.pop(), level)
            k, ch = k + 1, cout
        if level:
            at = f"{k - 1}.{2 if plan.depth[level] or level in plan.hollow else 1}.conv"
            yield from conv((f"dec.{at}", f"output_blocks.{at}", f"{block}.upsamplers.0.conv"), ch, ch)
    yield from norm(("norm_out", "out.0", "conv_norm_out"), ch)
    yield from conv(("conv_out", "out.2", "conv_out"), ch, plan.out_channels or 0)


def parameters(plan: Plan) -> Iterator[Parameter]:
    """Every parameter, in order of execution."""
    yield from encoder(plan)
    yield from decoder(plan)


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    return ldm_plan(found) if column == LDM else diffusers_plan(found)


def diffusers_plan(found: Mapping[str, Shape]) -> Plan:
    """diffusers' names show the structure."""
    levels = range(max(count(found, r"down_blocks\.(\d{1,3})\."), 1))
    depth = tuple(count(found, rf"down_blocks\.{level}\.attentions\.0\.{BLOCK}") for level in levels)
    more = holds(found, "mid_block.attentions.") or holds(found, "mid_block.resnets.1.")
    return Plan(
        channels=tuple(need(found, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels),
        depth=depth,
        mid_depth=count(found, rf"mid_block\.attentions\.0\.{BLOCK}"),
        plain_mid=not more,
        hollow=tuple(i for i in levels if not depth[i] and holds(found, f"down_blocks.{i}.attentions.0.")),
        blocks=count(found, r"down_blocks\.0\.resnets\.(\d{1,3})\."),
        context_dim=context(found),
        vector_dim=vector(found, "add_embedding.linear_1.weight"),
        in_channels=need(found, "conv_in.weight", 4)[1],
        out_channels=need(found, "conv_out.weight", 4)[0] if holds(found, "up_blocks.") else None,
    )


def ldm_plan(found: Mapping[str, Shape]) -> Plan:
    """LDM counts stages, not levels: each level but the last ends in a convolution of stride 2, called `op`."""
    stages = range(1, max(count(found, r"input_blocks\.(\d{1,3})\."), 2))
    ops = [k for k in stages if holds(found, f"input_blocks.{k}.0.op.")]
    firsts = [1, *(k + 1 for k in ops)]
    depth = tuple(count(found, rf"input_blocks\.{k}\.1\.{BLOCK}") for k in firsts)
    more = holds(found, "middle_block.1.") or holds(found, "middle_block.2.")
    return Plan(
        channels=tuple(need(found, f"input_blocks.{k}.0.in_layers.2.weight", 4)[0] for k in firsts),
        depth=depth,
        mid_depth=count(found, rf"middle_block\.1\.{BLOCK}"),
        plain_mid=not more,
        hollow=tuple(i for i, k in enumerate(firsts) if not depth[i] and holds(found, f"input_blocks.{k}.1.")),
        blocks=(ops[0] if ops else len(stages) + 1) - 1,
        context_dim=context(found),
        vector_dim=vector(found, "label_emb.0.0.weight"),
        in_channels=need(found, "input_blocks.0.0.weight", 4)[1],
        out_channels=need(found, "out.2.weight", 4)[0] if holds(found, "output_blocks.") else None,
    )


def context(found: Mapping[str, Shape]) -> int | None:
    """The width of a text token, from the first matrix that reads one; None where none does."""
    key = next((key for key in found if key.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
    return None if key is None else need(found, key, 2)[1]


def vector(found: Mapping[str, Shape], key: str) -> int | None:
    """The width of pooled text and ids together, or None."""
    return need(found, key, 2)[1] if key in found else None


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(parameters(plan))


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names."""
    return rules(parameters(plan), column)


def strays(plan: Plan, column: int) -> list[str]:
    """Nothing besides the network is known in these files."""
    return []

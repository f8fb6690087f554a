"""Ho's DDPM in its public layouts, side by side: the `.ckpt` files of the h-space papers, diffusers' UNet2DModel."""

from collections.abc import Iterator, Mapping

from .names import Leaves, Row, Rule, Shape, matrix, rules, shapes
from .plan import Plan, count, holds, need

HO, DIFFUSERS, DIFFUSERS_2022 = 1, 2, 3  # columns below; 2022: the attention names before diffusers 0.15

#    ours     Ho              diffusers          diffusers, old names
LEAVES: Leaves = {
    "res": [
        ("norm1", "norm1", "norm1", "norm1"),
        ("conv1", "conv1", "conv1", "conv1"),
        ("emb", "temb_proj", "time_emb_proj", "time_emb_proj"),
        ("norm2", "norm2", "norm2", "norm2"),
        ("conv2", "conv2", "conv2", "conv2"),
        ("skip", "nin_shortcut", "conv_shortcut", "conv_shortcut"),
    ],
    "attn": [
        ("norm", "norm", "group_norm", "group_norm"),
        ("q", "q", "to_q", "query"),
        ("k", "k", "to_k", "key"),
        ("v", "v", "to_v", "value"),
        ("out", "proj_out", "to_out.0", "proj_attn"),
    ],
}


def rows(plan: Plan) -> Iterator[Row]:
    """Every module in order of execution: ours, Ho's, diffusers'."""

    def row(kind: str, cin: int, cout: int, ours: str, ho: str, diffusers: str, skip: bool = False) -> Row:
        return Row(kind, cin, cout, (ours, ho, diffusers, diffusers), skip)

    base, last = plan.base, plan.levels[-1]
    yield row("linear", base, 4 * base, "time.0", "temb.dense.0", "time_embedding.linear_1")
    yield row("linear", 4 * base, 4 * base, "time.2", "temb.dense.1", "time_embedding.linear_2")
    yield row("conv", plan.in_channels, base, "enc.0.0", "conv_in", "conv_in")

    k, ch, emitted = 1, base, [base]
    for level, cout in enumerate(plan.widths):
        down, block = f"down.{level}", f"down_blocks.{level}"
        for i in range(plan.blocks):
            yield row("res", ch, cout, f"enc.{k}.0", f"{down}.block.{i}", f"{block}.resnets.{i}", ch != cout)
            if level in plan.attention:
                yield row("attn", cout, cout, f"enc.{k}.1", f"{down}.attn.{i}", f"{block}.attentions.{i}")
            k, ch = k + 1, cout
            emitted.append(ch)
        if level < last:
            yield row("conv", ch, ch, f"enc.{k}.0.conv", f"{down}.downsample.conv", f"{block}.downsamplers.0.conv")
            k += 1
            emitted.append(ch)

    yield row("res", ch, ch, "mid.0", "mid.block_1", "mid_block.resnets.0")
    yield row("attn", ch, ch, "mid.1", "mid.attn_1", "mid_block.attentions.0")
    yield row("res", ch, ch, "mid.2", "mid.block_2", "mid_block.resnets.1")

    k = 0
    for level, cout in reversed(list(enumerate(plan.widths))):
        up, block = (
            f"up.{level}",
            f"up_blocks.{last - level}",
        )  # Ho counts from the finest level, diffusers from the other end
        for i in range(plan.blocks + 1):
            cin = ch + emitted.pop()
            yield row("res", cin, cout, f"dec.{k}.0", f"{up}.block.{i}", f"{block}.resnets.{i}", cin != cout)
            if level in plan.attention:
                yield row("attn", cout, cout, f"dec.{k}.1", f"{up}.attn.{i}", f"{block}.attentions.{i}")
            k, ch = k + 1, cout
        if level:
            ours = f"dec.{k - 1}.{2 if level in plan.attention else 1}.conv"
            yield row("conv", ch, ch, ours, f"{up}.upsample.conv", f"{block}.upsamplers.0.conv")
    yield row("norm", ch, ch, "norm_out", "norm_out", "conv_norm_out")
    yield row("conv", ch, plan.out_channels, "conv_out", "conv_out", "conv_out")


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    time, down, block, attn = (
        ("temb.dense.0", "down", "block", "attn")
        if column == HO
        else ("time_embedding.linear_1", "down_blocks", "resnets", "attentions")
    )
    levels = range(max(count(found, rf"{down}\.(\d{{1,3}})\."), 1))
    return Plan(
        base=need(found, f"{time}.weight", 2)[1],
        widths=tuple(need(found, f"{down}.{level}.{block}.0.conv1.weight", 4)[0] for level in levels),
        blocks=count(found, rf"{down}\.0\.{block}\.(\d{{1,3}})\."),
        attention=tuple(level for level in levels if holds(found, f"{down}.{level}.{attn}.")),
        in_channels=need(found, "conv_in.weight", 4)[1],
        out_channels=need(found, "conv_out.weight", 4)[0],
    )


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(rows(plan), LEAVES, 4 * plan.base)


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names; in diffusers' files every attention may be spelled either way."""
    views = {"q": matrix, "k": matrix, "v": matrix, "out": matrix}
    columns = (column,) if column == HO else (column, DIFFUSERS + DIFFUSERS_2022 - column)
    spelled = [rule for c in columns for rule in rules(rows(plan), LEAVES, c, views)]
    return list({rule.key: rule for rule in spelled}.values())


def strays(plan: Plan, column: int) -> list[str]:
    """Second copies of the resampling convolutions, which early diffusers files carry under `Conv2d_0`."""
    convs = [key for r in rows(plan) if r.kind == "conv" and "samplers" in (key := r.names[DIFFUSERS])]
    return [] if column == HO else [f"{key[:-4]}Conv2d_0.{p}" for key in convs for p in ("weight", "bias")]

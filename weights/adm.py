"""ADM, iDDPM and P2 in two public layouts, side by side: guided-diffusion's `.pt` files, and diffusers' naming."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .errors import LayoutError
from .names import Leaves, Row, Rule, Shape, matrix, rules, shapes
from .plan import Plan, count, holds, need

GUIDED, DIFFUSERS = 1, 2  # columns below

#    ours     guided-diffusion  diffusers
LEAVES: Leaves = {
    "res": [
        ("norm1", "in_layers.0", "norm1"),
        ("conv1", "in_layers.2", "conv1"),
        ("emb", "emb_layers.1", "time_emb_proj"),
        ("norm2", "out_layers.0", "norm2"),
        ("conv2", "out_layers.3", "conv2"),
        ("skip", "skip_connection", "conv_shortcut"),
    ],
    "attn": [
        ("norm", "norm", "group_norm"),
        ("qkv", "qkv", "qkv"),  # in diffusers' naming after `fused`
        ("out", "proj_out", "to_out.0"),
    ],
}


def rows(plan: Plan) -> Iterator[Row]:
    """Every module in order of execution: ours, guided-diffusion's, diffusers'; the first two count alike."""

    def row(kind: str, cin: int, cout: int, ours: str, guided: str, diffusers: str) -> Row:
        return Row(kind, cin, cout, (ours, guided, diffusers), kind == "res" and cin != cout)

    def stage(k: int, side: str, block: str, level: int, i: int, cin: int) -> Iterator[Row]:
        ours, guided, cout = f"{side}.{k}", f"{'in' if side == 'enc' else 'out'}put_blocks.{k}", plan.widths[level]
        yield row("res", cin, cout, f"{ours}.0", f"{guided}.0", f"{block}.resnets.{i}")
        if level in plan.attention:
            yield row("attn", cout, cout, f"{ours}.1", f"{guided}.1", f"{block}.attentions.{i}")

    def resample(ch: int, ours: str, guided: str, diffusers: str, conv: str) -> Iterator[Row]:
        if plan.updown:
            yield row("res", ch, ch, ours, guided, diffusers)
        elif plan.resample_conv:
            yield row("conv", ch, ch, f"{ours}.conv", f"{guided}.{conv}", f"{diffusers}.conv")

    base, last, ch = plan.base, plan.levels[-1], plan.widths[0]
    yield row("linear", base, 4 * base, "time.0", "time_embed.0", "time_embedding.linear_1")
    yield row("linear", 4 * base, 4 * base, "time.2", "time_embed.2", "time_embedding.linear_2")
    if plan.classes:
        yield row("embedding", 4 * base, plan.classes, "label", "label_emb", "class_embedding")
    yield row("conv", plan.in_channels, ch, "enc.0.0", "input_blocks.0.0", "conv_in")

    k, emitted = 1, [ch]
    for level, cout in enumerate(plan.widths):
        block = f"down_blocks.{level}"
        for i in range(plan.blocks):
            yield from stage(k, "enc", block, level, i, ch)
            k, ch = k + 1, cout
            emitted.append(ch)
        if level < last:
            yield from resample(ch, f"enc.{k}.0", f"input_blocks.{k}.0", f"{block}.downsamplers.0", "op")
            k += 1
            emitted.append(ch)

    yield row("res", ch, ch, "mid.0", "middle_block.0", "mid_block.resnets.0")
    yield row("attn", ch, ch, "mid.1", "middle_block.1", "mid_block.attentions.0")
    yield row("res", ch, ch, "mid.2", "middle_block.2", "mid_block.resnets.1")

    k = 0
    for level, cout in reversed(list(enumerate(plan.widths))):
        block = f"up_blocks.{last - level}"
        for i in range(plan.blocks + 1):
            yield from stage(k, "dec", block, level, i, ch + emitted.pop())
            k, ch = k + 1, cout
        if level:
            at = f"{k - 1}.{2 if level in plan.attention else 1}"
            yield from resample(ch, f"dec.{at}", f"output_blocks.{at}", f"{block}.upsamplers.0", "conv")
    yield row("norm", ch, ch, "norm_out", "out.0", "conv_norm_out")
    yield row("conv", ch, plan.out_channels, "conv_out", "out.2", "conv_out")


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    return guided_plan(found) if column == GUIDED else diffusers_plan(found)


def guided_plan(found: Mapping[str, Shape]) -> Plan:
    """guided-diffusion counts stages, not levels: where the decoder first resamples, a level of it ends."""
    stages = max(count(found, r"(?:in|out)put_blocks\.(\d{1,3})\."), 2)
    ups = [k for k in range(stages) if any(resamples(found, f"output_blocks.{k}.{m}.") for m in (1, 2))]
    gaps = [k for k in range(1, stages) if not holds(found, f"input_blocks.{k}.")]  # pooling has no parameters
    blocks = ups[0] if ups else gaps[0] - 1 if gaps else stages - 1
    if blocks < 1:
        raise LayoutError("the first stage of the decoder changes the resolution, which no known network does")
    first = range(1, stages, blocks + 1)  # the first stage of each level
    widths = tuple(need(found, f"input_blocks.{k}.0.in_layers.2.weight", 4)[0] for k in first)
    attends = [holds(found, f"input_blocks.{k}.1.") for k in first]
    return Plan(
        base=need(found, "time_embed.0.weight", 2)[1],
        widths=widths,
        blocks=blocks,
        attention=tuple(level for level, yes in enumerate(attends) if yes),
        in_channels=need(found, "input_blocks.0.0.weight", 4)[1],
        out_channels=need(found, "out.2.weight", 4)[0],
        classes=need(found, "label_emb.weight", 2)[0] if "label_emb.weight" in found else None,
        scale_shift=need(found, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        updown=any(resamples(found, f"output_blocks.{k}.{m}.") == "in_layers" for k in ups for m in (1, 2)),
        resample_conv=bool(ups) or not gaps,
    )


def resamples(found: Mapping[str, Shape], member: str) -> str:
    """What doubles the resolution in a member of a decoder stage: "in_layers" of a block, "conv", or nothing."""
    return next((kind for kind in ("in_layers", "conv") if holds(found, f"{member}{kind}.")), "")


def diffusers_plan(found: Mapping[str, Shape]) -> Plan:
    """diffusers' names show the structure."""
    levels = range(max(count(found, r"down_blocks\.(\d{1,3})\."), 1))
    widths = tuple(need(found, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in levels)
    return Plan(
        base=need(found, "time_embedding.linear_1.weight", 2)[1],
        widths=widths,
        blocks=count(found, r"down_blocks\.0\.resnets\.(\d{1,3})\."),
        attention=tuple(level for level in levels if holds(found, f"down_blocks.{level}.attentions.")),
        in_channels=need(found, "conv_in.weight", 4)[1],
        out_channels=need(found, "conv_out.weight", 4)[0],
        classes=need(found, "class_embedding.weight", 2)[0] if "class_embedding.weight" in found else None,
        scale_shift=need(found, "down_blocks.0.resnets.0.time_emb_proj.weight", 2)[0] == 2 * widths[0],
        updown=holds(found, "down_blocks.0.downsamplers.0.conv1."),
        resample_conv=len(levels) == 1 or holds(found, "down_blocks.0.downsamplers."),
    )


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' to_q, to_k, to_v as one qkv, their rows below each other; the only tensors that are ever copied."""
    out = dict(tensors)
    for key in [key for key in tensors if ".to_q." in key]:
        parts = [key.replace(".to_q.", f".to_{p}.") for p in "qkv"]
        if (
            all(p in out for p in parts)
            and len({(out[p].shape[1:], out[p].dtype) for p in parts}) == 1
            and out[key].ndim
        ):
            out[key.replace(".to_q.", ".qkv.")] = torch.cat([out.pop(p) for p in parts])
    return out


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(rows(plan), LEAVES, 4 * plan.base, 2 if plan.scale_shift else 1)


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names."""
    return rules(rows(plan), LEAVES, column, {"qkv": matrix, "out": matrix})


def strays(plan: Plan, column: int) -> list[str]:
    """Nothing besides the network is known in these files."""
    return []

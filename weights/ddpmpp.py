"""DDPM++ in score_sde's layout: one flat list `all_modules`, counted in order of execution."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from .errors import LayoutError
from .names import Leaves, Row, Rule, Shape, rules, shapes, transposed
from .plan import Plan, holds, need

SCORE_SDE = 1
BUFFERS = ("sigmas",)  # the noise levels of the other SDE, which every file carries

#    ours     score_sde
LEAVES: Leaves = {
    "res": [
        ("norm1", "GroupNorm_0"),
        ("conv1", "Conv_0"),
        ("emb", "Dense_0"),
        ("norm2", "GroupNorm_1"),
        ("conv2", "Conv_1"),
        ("skip", "Conv_2"),
    ],
    "attn": [
        ("norm", "GroupNorm_0"),
        ("q", ("NIN_0.W", "NIN_0.b")),  # W is (in, out)
        ("k", ("NIN_1.W", "NIN_1.b")),
        ("v", ("NIN_2.W", "NIN_2.b")),
        ("out", ("NIN_3.W", "NIN_3.b")),
    ],
}


def rows(plan: Plan) -> Iterator[Row]:
    """Every module in order of execution, which is its number in the file."""
    modules = enumerate(unnumbered(plan))
    return (Row(kind, cin, cout, (ours, f"all_modules.{n}"), skip) for n, (kind, cin, cout, ours, skip) in modules)


def unnumbered(plan: Plan) -> Iterator[tuple[str, int, int, str, bool]]:
    """(kind, channels in, channels out, our name, whether the shortcut is a convolution) of every module."""
    base, last, ch = plan.base, plan.levels[-1], plan.base
    yield "linear", base, 4 * base, "time.0", False
    yield "linear", 4 * base, 4 * base, "time.2", False
    yield "conv", plan.in_channels, base, "enc.0.0", False

    k, emitted = 1, [base]
    for level, cout in enumerate(plan.widths):
        for _ in range(plan.blocks):
            yield "res", ch, cout, f"enc.{k}.0", ch != cout
            if level in plan.attention:
                yield "attn", cout, cout, f"enc.{k}.1", False
            k, ch = k + 1, cout
            emitted.append(ch)
        if level < last:
            yield "res", ch, ch, f"enc.{k}.0", True
            k += 1
            emitted.append(ch)

    yield "res", ch, ch, "mid.0", False
    yield "attn", ch, ch, "mid.1", False
    yield "res", ch, ch, "mid.2", False

    k = 0
    for level, cout in reversed(list(enumerate(plan.widths))):
        for _ in range(plan.blocks + 1):
            cin = ch + emitted.pop()
            yield "res", cin, cout, f"dec.{k}.0", cin != cout
            k, ch = k + 1, cout
        attends = level in plan.attention
        if attends:
            yield "attn", ch, ch, f"dec.{k - 1}.1", False
        if level:
            yield "res", ch, ch, f"dec.{k - 1}.{2 if attends else 1}", True
    yield "norm", ch, ch, "norm_out", False
    yield "conv", ch, plan.out_channels, "conv_out", False


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file: the encoder and the bottleneck end where a block takes more channels than came: a join."""
    base, (ch, in_channels) = need(found, "all_modules.0.weight", 2)[1], need(found, "all_modules.2.weight", 4)[:2]
    levels: list[list[int]] = [[]]  # the channels of each level's modules, 0 for attention
    for n in range(3, 3 + len(found)):
        at = f"all_modules.{n}"
        if holds(found, f"{at}.NIN_"):
            levels[-1].append(0)
            continue
        cout, cin = need(found, f"{at}.Conv_0.weight", 4)[:2]
        if cin != ch:
            break
        if cin == cout and holds(found, f"{at}.Conv_2."):
            levels.append([])
        else:
            levels[-1].append(cout)
        ch = cout
    if [bool(width) for width in levels[-1][-3:]] != [True, False, True]:
        raise LayoutError("the middle of all_modules is not a residual block, attention, a residual block")
    levels[-1][-3:] = []
    if not all(any(level) for level in levels):
        raise LayoutError("all_modules has a level without residual blocks")
    found_plan = Plan(
        base=base,
        widths=tuple(max(level) for level in levels),
        blocks=sum(map(bool, levels[0])),
        attention=tuple(i for i, level in enumerate(levels) if 0 in level),
        in_channels=in_channels,
    )
    end = sum(1 for _ in unnumbered(found_plan)) - 1
    return replace(found_plan, out_channels=need(found, f"all_modules.{end}.weight", 4)[0])


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(rows(plan), LEAVES, 4 * plan.base)


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from score_sde's numbers to our names."""
    return rules(rows(plan), LEAVES, column, dict.fromkeys(("q", "k", "v", "out"), transposed))


def strays(plan: Plan, column: int) -> list[str]:
    """What is no parameter."""
    return list(BUFFERS)

"""Renaming, prefixes and averages: what a table refuses, and what is taken off before it is asked."""

from pathlib import Path

import pytest
import torch
from diaphane.model.ddpmpp import DDPMpp, DDPMppConfig
from diaphane.weights import ddpm, ddpmpp
from diaphane.weights.errors import LayoutError
from diaphane.weights.layout import state
from diaphane.weights.names import Rule, matrix, rename, transposed

Shapes = dict[str, tuple[int, ...]]
WB = ("weight", "bias")


def listed(name: str) -> Shapes:
    """A key list of tests/keys."""
    lines = (line.split() for line in (Path(__file__).parent / "keys" / f"{name}.txt").read_text().splitlines())
    return {key: tuple(int(n) for n in shape.split(",")) for key, shape in lines}


def meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that hold nothing."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def score_sde(
    nf: int = 128, mult: tuple[int, ...] = (1, 2, 2, 2), blocks: int = 4, attends: tuple[int, ...] = (1,)
) -> Shapes:
    """score_sde's DDPM++ as its constructor appends it: modules counted from 0, a resampling block with `Conv_2`."""
    keys: Shapes = {"sigmas": (1000,)}
    n = 0

    def put(leaves: Shapes):
        nonlocal n
        keys.update({f"all_modules.{n}.{leaf}": shape for leaf, shape in leaves.items()})
        n += 1

    def res(cin: int, cout: int, resample: bool = False):
        modules = {
            "GroupNorm_0": (cin,), "Conv_0": (cout, cin, 3, 3), "Dense_0": (cout, 4 * nf), "GroupNorm_1": (cout,),
            "Conv_1": (cout, cout, 3, 3), **({"Conv_2": (cout, cin, 1, 1)} if resample or cin != cout else {}),
        }  # fmt: skip
        both = [(f"{module}.{p}", shape[: 4 if p == "weight" else 1]) for module, shape in modules.items() for p in WB]
        put(dict(both))

    def attn(ch: int):
        nin = {f"NIN_{i}.{p}": (ch, ch) if p == "W" else (ch,) for i in range(4) for p in "Wb"}
        put({"GroupNorm_0.weight": (ch,), "GroupNorm_0.bias": (ch,), **nin})

    put({"weight": (4 * nf, nf), "bias": (4 * nf,)})
    put({"weight": (4 * nf, 4 * nf), "bias": (4 * nf,)})
    put({"weight": (nf, 3, 3, 3), "bias": (nf,)})
    stack, ch = [nf], nf
    for level, m in enumerate(mult):
        for _ in range(blocks):
            res(ch, m * nf)
            ch = m * nf
            if level in attends:
                attn(ch)
            stack.append(ch)
        if level + 1 < len(mult):
            res(ch, ch, resample=True)
            stack.append(ch)
    res(ch, ch)
    attn(ch)
    res(ch, ch)
    for level in range(len(mult) - 1, -1, -1):
        for _ in range(blocks + 1):
            res(ch + stack.pop(), mult[level] * nf)
            ch = mult[level] * nf
        if level in attends:
            attn(ch)
        if level:
            res(ch, ch, resample=True)
    put({"weight": (ch,), "bias": (ch,)})
    put({"weight": (3, ch, 3, 3), "bias": (3,)})
    return keys


def test_swapping_two_keys_is_an_error_that_names_both():
    shapes = listed("ho-cifar10")
    a, b = "down.0.block.0.conv1.weight", "up.0.block.0.conv1.weight"
    shapes[a], shapes[b] = shapes[b], shapes[a]
    plan = ddpm.plan(listed("ho-cifar10"), ddpm.HO)
    with pytest.raises(LayoutError) as caught:
        rename(meta(shapes), ddpm.table(plan, ddpm.HO), ddpm.want(plan))
    assert [a in m or b in m for m in caught.value.misshapen] == [True, True]
    assert a in str(caught.value)
    assert b in str(caught.value)
    assert "(128, 384, 3, 3) should be (128, 128, 3, 3)" in str(caught.value)


def test_missing_unexpected_misshapen_and_doubled_keys_are_counted_and_listed():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3), "bb": torch.zeros(3), "x": torch.zeros(1), "y": torch.zeros(1)}
    table = [Rule("a", "A"), Rule("b", "B"), Rule("bb", "B"), Rule("c", "C")]
    with pytest.raises(LayoutError) as caught:
        rename(tensors, table, {"A": (1,), "B": (3,), "C": (1,)}, ignore=["y"])
    e = caught.value
    assert (e.missing, e.unexpected, e.doubled) == (("c",), ("x",), ("bb and b are both B",))
    assert e.misshapen == ("a (2) should be (1)",)
    assert all(part in str(e) for part in ("1 missing: c", "1 unexpected: x", "1 misshapen: a", "1 doubled: bb and b"))


def test_old_and_new_attention_names_may_mix_but_not_meet():
    new = listed("diffusers-cifar10")
    one = "mid_block.attentions.0.to_q.weight"
    mixed = {key.replace("to_q", "query") if key == one else key: shape for key, shape in new.items()}
    plan = ddpm.plan(mixed, ddpm.DIFFUSERS)
    table, want = ddpm.table(plan, ddpm.DIFFUSERS), ddpm.want(plan)
    assert len(rename(meta(mixed), table, want)) == len(want)
    with pytest.raises(LayoutError, match=r"1 doubled: mid_block.attentions.0.to_q.weight and .*query.weight"):
        rename(meta(mixed | {one: new[one]}), table, want)


def test_the_second_copies_of_early_diffusers_files_are_ignored_and_nothing_else_is():
    shapes = listed("diffusers-cifar10")
    plan = ddpm.plan(shapes, ddpm.DIFFUSERS)
    table, want, strays = ddpm.table(plan, 2), ddpm.want(plan), ddpm.strays(plan, 2)
    copies = {key.replace(".conv.", ".Conv2d_0."): shape for key, shape in shapes.items() if "samplers" in key}
    assert set(copies) == set(strays)
    assert len(rename(meta(shapes | copies), table, want, ignore=strays)) == len(want)
    with pytest.raises(LayoutError, match=r"1 unexpected: down_blocks.0.downsamplers.0.Conv2d_1.weight"):
        rename(meta(shapes | {"down_blocks.0.downsamplers.0.Conv2d_1.weight": (1,)}), table, want, ignore=strays)


def test_views_share_memory_and_only_trailing_ones_are_dropped():
    w = torch.randn(4, 6, 1, 1)
    assert matrix(w).shape == (4, 6)
    assert matrix(w).data_ptr() == w.data_ptr() == transposed(matrix(w)).data_ptr()
    assert matrix(torch.zeros(4, 3, 2, 1)).shape == (4, 3, 2)
    assert transposed(torch.zeros(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.", "ema.", "model_ema.", "module.model."])
def test_prefixes_and_wrappers_are_taken_off(prefix: str):
    tensors = meta(listed("ho-cifar10"))
    assert set(state({prefix + key: t for key, t in tensors.items()})) == set(tensors)
    assert set(state({"state_dict": {prefix + key: t for key, t in tensors.items()}, "epoch": 3})) == set(tensors)


def test_averaged_weights_come_before_raw_ones():
    raw, averaged = {"conv_in.weight": torch.zeros(1)}, {"conv_in.weight": torch.ones(1)}
    assert state({"model": raw, "ema": averaged})["conv_in.weight"] == 1
    assert (
        state({"model.conv_in.weight": raw["conv_in.weight"], "ema.conv_in.weight": torch.ones(1)})["conv_in.weight"]
        == 1
    )


def test_score_sdes_list_of_averages_meets_the_names_in_order():
    shapes = score_sde(nf=16, mult=(1, 2), blocks=1)
    model = {f"module.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    shadow = [torch.full(shape, float(i)) for i, shape in enumerate(s for k, s in shapes.items() if k != "sigmas")]
    content = {
        "optimizer": {},
        "model": model,
        "ema": {"decay": 0.9999, "num_updates": 1, "shadow_params": shadow},
        "step": 1,
    }
    named = state(content)
    assert list(named) == [key for key in shapes if key != "sigmas"]
    assert [int(t.flatten()[0]) for t in named.values()] == list(range(len(shadow)))
    content["ema"]["shadow_params"] = shadow[:-1]
    with pytest.raises(LayoutError, match=rf"holds {len(shadow) - 1} tensors, the model {len(shadow)} parameters"):
        state(content)
    content["ema"]["shadow_params"] = [shadow[1], shadow[0], *shadow[2:]]
    with pytest.raises(LayoutError, match=r"another order"):
        state(content)


def test_score_sdes_attention_weights_are_transposed():
    plan = ddpmpp.plan(score_sde(nf=16, mult=(1, 2), blocks=1), 1)
    tensors = {key: torch.randn(shape) for key, shape in score_sde(nf=16, mult=(1, 2), blocks=1).items()}
    ours = rename(tensors, ddpmpp.table(plan, 1), ddpmpp.want(plan), ignore=["sigmas"])
    n = next(key for key in tensors if "NIN_1.W" in key)
    assert torch.equal(ours["enc.3.1.k.weight"], tensors[n].T)
    assert ours["enc.3.1.k.weight"].data_ptr() == tensors[n].data_ptr()
    assert set(ours) == set(DDPMpp(DDPMppConfig(base=16, mult=(1, 2), blocks=1)).state_dict())


def test_the_lists_of_score_sde_are_what_its_constructor_appends():
    assert score_sde() == listed("score-sde")
    assert score_sde(blocks=8) == listed("score-sde-deep")

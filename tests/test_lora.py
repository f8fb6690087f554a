"""LoRA: every spelling finds its weight, merged and beside are one definition, and what does not match is refused."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.methods import lora as method
from diaphane.methods.lora import Beside, beside, merged, with_lora
from diaphane.model.components import Components, components, placed
from diaphane.weights import clip, lora, pipeline, unet
from diaphane.weights.errors import ConfigError, DtypeError, LayoutError, MissingFileError, WeightsError
from diaphane.weights.files import write
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

F64 = torch.float64
FOLDERS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
KINDS = ("kohya, sgm blocks", "kohya, diffusers blocks", "PEFT", "PEFT, adapter named", "diffusers", "diffusers, 2023")
Raw = dict[str, dict[str, tuple[Tensor, Tensor, float]]]  # part -> diffusers' module -> down, up, alpha


@pytest.fixture(scope="module")
def whole() -> pipeline.Pipeline:
    return pipeline.load(twins.TINY)


def theirs(part: str) -> dict[str, Tensor]:
    """A part's tensors under diffusers' and transformers' names."""
    return {k: v.float() for k, v in load_file(twins.TINY / part / f"{FOLDERS[part]}.safetensors").items()}


def wanted(kind: str, part: str, module: str) -> bool:
    """Whether a spelling can say this module."""
    if part != "unet":
        return "self_attn" in module or ("mlp" in module and kind != "diffusers, 2023")
    attention = ".attn" in module
    return attention if kind == "diffusers, 2023" else attention or any(
        part in module for part in ("ff.net", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
                                    "samplers.0.conv", "conv_in", "time_embedding", "add_embedding")
    )  # fmt: skip


def raw(kind: str, rank: int = 3) -> Raw:
    """Random factors for every module that a spelling can say, of ranks and alphas that differ."""
    gen, out = torch.Generator().manual_seed(3), {}
    for part in FOLDERS:
        out[part] = {}
        for key, w in theirs(part).items():
            module = key.removesuffix(".weight")
            if w.ndim < 2 or module == key or "embeddings" in key or not wanted(kind, part, module):
                continue
            r = rank + len(out[part]) % 2
            down = torch.randn(r, *w.shape[1:], generator=gen) / w[0].numel() ** 0.5
            up = torch.randn(w.shape[0], r, *[1] * (w.ndim - 2), generator=gen) / r
            out[part][module] = (down, up, [4.0, 2.0][len(out[part]) // 2 % 2])
    return out


def sgm() -> dict[str, str]:
    """diffusers' module -> the single file's, from the reference data."""
    table = json.loads((twins.TINY / "single_file_key_map.json").read_text())
    out = {}
    for key, row in table.items():
        if isinstance(row, dict) and row.get("component") == "unet":
            one = row.get("key") or row.get("keys")
            one = one[0] if isinstance(one, list) else one
            out[one.removesuffix(".weight")] = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
    return out


def spelled(kind: str, factors: Raw) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and header."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    blocks = sgm() if kind == "kohya, sgm blocks" else {}
    for part, modules in factors.items():
        head = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        for module, (down, up, alpha) in modules.items():
            if kind.startswith("kohya"):
                name = f"{head}_{blocks.get(module, module) if part == 'unet' else module}".replace(".", "_")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
            elif kind.startswith("PEFT"):
                adapter = ".default" if "named" in kind else ""
                tensors |= {
                    f"{part}.{module}.lora_A{adapter}.weight": down,
                    f"{part}.{module}.lora_B{adapter}.weight": up,
                }
                said.setdefault(f"{part}.lora_alpha", 4.0)
                if alpha != 4.0:
                    said.setdefault(f"{part}.alpha_pattern", {})[module] = alpha
            else:
                name = f"{part}.{module}"
                if "2023" in kind and part == "unet":
                    at, _, leaf = name.rpartition(".to_")
                    name = f"{at}.processor.to_{leaf.removesuffix('.0')}_lora"
                elif part != "unet":
                    name = f"{name}.lora_linear_layer"
                else:
                    name = f"{name}.lora"
                tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors, {"lora_adapter_metadata": json.dumps(said)} if said else {}


def alpha_of(kind: str, alpha: float, rank: int) -> float:
    """What is in force: diffusers' own spellings say none."""
    return alpha if kind.startswith(("kohya", "PEFT")) else rank


def changed(kind: str, factors: Raw, part: str, weight: float) -> dict[str, Tensor]:
    """What a part should become, by definition, under our names."""
    tensors = theirs(part)
    for module, (down, up, alpha) in factors[part].items():
        both = torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1))
        w = tensors[f"{module}.weight"]
        share = weight * alpha_of(kind, alpha, len(down)) / len(down)
        tensors[f"{module}.weight"] = (w.double() + share * both.view(w.shape)).float()
    tables, column = (unet, unet.DIFFUSERS) if part == "unet" else (clip, clip.TRANSFORMERS)
    return twins.ours(tensors, tables, column)


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_changes_every_weight_as_defined(tmp_path: Path, whole: pipeline.Pipeline, kind: str):
    factors = raw(kind)
    tensors, header = spelled(kind, factors)
    found = lora.load(write(tmp_path / "l.safetensors", tensors, header), whole.parts)
    assert {part: len(rows) for part, rows in found.factors.items()} == {p: len(rows) for p, rows in factors.items()}
    parts = components(whole.parts, dtype=torch.float32)
    new = with_lora(parts, found.factors, 0.7)
    for part, net in (("unet", new.unet), *zip(new.texts, new.towers, strict=True)):
        want, got = changed(kind, factors, part, 0.7), net.state_dict()
        assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)
    rows = list(found.rows())
    assert len(rows) == sum(map(len, factors.values()))
    assert {row[3] for row in rows} == {3, 4}


def test_a_spelling_without_parts_and_one_of_peft_alone_are_the_unets(whole: pipeline.Pipeline):
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    for head in ("", "base_model.model.", "unet."):
        tensors = {f"{head}{module}.lora_A.weight": down, f"{head}{module}.lora_B.weight": up}
        (row,) = lora.Lora(lora.matched(tensors, whole.parts)).rows()
        assert row == (f"{head}{module}", "unet", "enc.4.1.blocks.0.cross_attn.k.weight", 2, 2.0)
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.use_rslora": True})}
    tensors = {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
    factors = lora.matched(tensors, whole.parts, header)["unet"]["enc.4.1.blocks.0.cross_attn.k.weight"]
    assert factors.scale == pytest.approx(6 / 2**0.5)


Rows = dict[str, dict[str, lora.Factors]]


@pytest.fixture(scope="module")
def parts(whole: pipeline.Pipeline) -> Components:
    return components(whole.parts, dtype=F64)


@pytest.fixture(scope="module")
def factors(whole: pipeline.Pipeline) -> Rows:
    tensors, header = spelled("kohya, sgm blocks", raw("kohya, sgm blocks"))
    return lora.matched(tensors, whole.parts, header)


def forward(parts: Components, n: int) -> Tensor:
    """The UNet on n pictures with texts of its own towers, all different."""
    gen = torch.Generator().manual_seed(8)
    ids = torch.randint(0, 799, (n, 6), generator=gen)
    texts = [tower(torch.cat([ids, torch.full((n, 1), 799)], 1)) for tower in parts.towers]
    context = torch.cat([text.skipped() for text in texts], -1)
    x, t = torch.randn(n, 4, 8, 8, generator=gen, dtype=F64), torch.arange(n, dtype=F64) * 100
    sizes = torch.randint(0, 99, (n, 6), generator=gen).double()
    return parts.unet(x, parts.unet.embed(t, context, texts[-1].pooled, sizes))


def test_beside_is_merged_for_each_picture_with_its_own_weight(parts: Components, factors: Rows):
    weights = torch.tensor([0.0, 0.6, -1.3, 0.6])
    got = forward(with_lora(parts, factors, weights, merge=False), 4)
    for i, weight in enumerate(weights.tolist()):
        want = forward(with_lora(parts, factors, weight), 4)
        assert (got[i] - want[i]).abs().amax() < 1e-9 * want.abs().amax()
    assert (got[1] - got[3]).abs().amax() > 1e-3
    assert (forward(parts, 4)[1] - got[1]).abs().amax() > 1e-2


def test_what_is_beside_goes_where_its_network_goes_and_comes_back(parts: Components, factors: Rows):
    net = with_lora(parts, factors, merge=False).unet
    state = net.state_dict()
    assert not [name for name in state if name.endswith((".down", ".up"))]
    layers = [module for module in net.modules() if isinstance(module, Beside)]
    before = [tensor for module in layers for tensor in (module.down, module.up)]
    assert len(before) == 2 * len(factors["unet"])
    with placed("meta", net):
        assert (
            {module.down.device.type for module in layers} == {module.up.device.type for module in layers} == {"meta"}
        )
        assert {p.device.type for p in net.parameters()} == {"meta"}
    after = [tensor for module in layers for tensor in (module.down, module.up)]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_weights_of_two_pictures_go_over_a_doubled_batch(parts: Components, factors: Rows):
    twice = forward(with_lora(parts, factors, torch.tensor([0.5, 1.0]), merge=False), 4)
    four = forward(with_lora(parts, factors, torch.tensor([0.5, 1.0, 0.5, 1.0]), merge=False), 4)
    assert torch.equal(twice, four)
    with pytest.raises(ValueError, match="one a picture"):
        forward(with_lora(parts, factors, torch.tensor([0.5, 1.0, 2.0]), merge=False), 4)


def test_weight_0_and_a_lora_of_nothing_change_nothing_and_the_network_stays_as_it_was(
    parts: Components, factors: Rows
):
    before = {name: p.clone() for name, p in parts.unet.named_parameters()}
    plain = forward(parts, 2)
    for merge in (True, False):
        assert torch.equal(forward(with_lora(parts, factors, 0.0, merge=merge), 2), plain)
        assert torch.equal(forward(with_lora(parts, {}, 1.0, merge=merge), 2), plain)
        with_lora(parts, factors, 1.0, merge=merge)
    assert all(torch.equal(p, before[name]) for name, p in parts.unet.named_parameters())


def test_untouched_weights_are_shared_and_merged_ones_are_not(whole: pipeline.Pipeline, factors: Rows):
    net = components(whole.parts).unet
    name = "enc.4.1.blocks.0.cross_attn.k.weight"
    new = merged(net, {name: factors["unet"][name]})
    shared = [a is b for a, b in zip(net.parameters(), new.parameters(), strict=True)]
    assert shared.count(False) == 1
    assert new.get_parameter(name).dtype == torch.float16


def test_two_loras_add_up_in_either_form(parts: Components, factors: Rows):
    both = with_lora(with_lora(parts, factors, 0.5), factors, 0.25)
    side = with_lora(with_lora(parts, factors, 0.5, merge=False), factors, 0.25, merge=False)
    mixed = with_lora(with_lora(parts, factors, 0.5), factors, 0.25, merge=False)
    want = forward(with_lora(parts, factors, 0.75), 2)
    for got in (both, side, mixed):
        assert (forward(got, 2) - want).abs().amax() < 1e-9 * want.abs().amax()
    with pytest.raises(ValueError, match="merge first"):
        with_lora(side, factors, 1.0)


def test_gradients_reach_the_weight_of_each_picture(parts: Components, factors: Rows):
    weights = torch.tensor([0.3, 0.9], dtype=F64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return forward(with_lora(parts, factors, w, merge=False), 2).square().sum()

    (grad,) = torch.autograd.grad(loss(weights), weights)
    step = torch.tensor([1e-6, 0.0], dtype=F64)
    slope = (loss(weights + step) - loss(weights - step)) / 2e-6
    assert grad[0] == pytest.approx(float(slope.detach()), rel=1e-5)
    assert grad[1] != 0


def test_what_does_not_match_is_an_error_that_lists_it(tmp_path: Path, whole: pipeline.Pipeline):
    tensors, _ = spelled("kohya, sgm blocks", raw("kohya, sgm blocks"))
    key = next(key for key in tensors if key.endswith("attn1_to_q.lora_up.weight"))
    module = key.removesuffix(".lora_up.weight")

    def refused(change: Mapping[str, Tensor | None]) -> LayoutError:
        new = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        with pytest.raises(LayoutError) as e:
            lora.load(write(tmp_path / "l.safetensors", new), whole.parts)
        assert "\n" not in str(e.value)
        return e.value

    assert refused({"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)}).unexpected == ("lora_unet_nowhere",)
    assert refused({"lora_te3_x.lora_up.weight": torch.zeros(2, 2)}).unexpected == ("lora_te3_x",)
    assert refused({"something": torch.zeros(2, 2)}).unexpected == ("something",)
    assert refused({key: None}).missing == (f"{module} up",)
    assert module in refused({key: torch.zeros(5, 3)}).misshapen[0]
    assert module in refused({key: tensors[key][..., None, None].repeat(1, 1, 3, 3)}).misshapen[0]
    twice = {name.replace("input_blocks_4_1", "down_blocks_1_attentions_0"): t.clone() for name, t in tensors.items()
             if "input_blocks_4_1_" in name}  # fmt: skip
    assert "are both" in refused(twice).doubled[0]


def test_an_alpha_may_be_a_whole_number_and_weights_may_not(tmp_path: Path, whole: pipeline.Pipeline):
    tensors, _ = spelled("kohya, sgm blocks", raw("kohya, sgm blocks"))
    counted = {key: t.to(torch.int64) if key.endswith(".alpha") else t for key, t in tensors.items()}
    want, got = (lora.load(write(tmp_path / "l.safetensors", t), whole.parts) for t in (tensors, counted))
    assert list(got.rows()) == list(want.rows())
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    with pytest.raises(DtypeError, match="int8"):
        lora.load(write(tmp_path / "l.safetensors", {**tensors, key: tensors[key].to(torch.int8)}), whole.parts)


def test_a_lora_of_another_model_is_an_error_that_names_both(whole: pipeline.Pipeline):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 768), f"{name}.lora_up.weight": torch.zeros(320, 4)}
    with pytest.raises(LayoutError, match=r"is for Stable Diffusion 1 \(text tokens of 768\)"):
        lora.matched(tensors, whole.parts)


@pytest.mark.parametrize(("leaf", "kind"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"),
                                            ("lora_mid.weight", "three factors"), ("diff", "difference")])  # fmt: skip
def test_other_ways_to_change_weights_are_refused_by_name(whole: pipeline.Pipeline, leaf: str, kind: str):
    tensors, _ = spelled("kohya, sgm blocks", raw("kohya, sgm blocks"))
    with pytest.raises(ConfigError, match=kind):
        lora.matched(tensors | {f"lora_unet_x.{leaf}": torch.zeros(2, 2)}, whole.parts)


def test_files_that_are_no_lora_and_names_that_are_no_file_say_so(tmp_path: Path, whole: pipeline.Pipeline):
    def refused(source: Any, **more: Any) -> str:
        with pytest.raises(WeightsError) as e:
            lora.load(source, whole.parts, **more)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "latent diffusion UNet" in refused(twins.TINY / "unet" / "diffusion_pytorch_model.safetensors")
    assert "there is no" in refused(tmp_path / "nothing.safetensors")
    assert "no LoRA in" in refused(tmp_path)
    tensors, header = spelled("PEFT", raw("PEFT"))
    path = write(tmp_path / "pytorch_lora_weights.safetensors", tensors, header)
    assert "no part vae2" in refused(path, only=("vae2",))
    assert set(lora.load(tmp_path, whole.parts, only=("unet",)).factors) == {"unet"}
    write(path, tensors, {"lora_adapter_metadata": "{"})
    assert "not json" in refused(path)
    with pytest.raises(MissingFileError):
        lora.load(tmp_path, whole.parts, file="other.safetensors")


def test_a_network_refuses_factors_of_another(parts: Components, factors: Rows):
    name, one = next(iter(factors["unet"].items()))
    for form in (merged, beside):
        with pytest.raises(ValueError, match="no nowhere"):
            form(parts.unet, {"nowhere.weight": one}, 1.0)
        with pytest.raises(ValueError, match="its LoRA"):
            form(parts.unet, {name: one._replace(up=one.up[:-1])}, 1.0)
    with pytest.raises(ValueError, match="not Embedding"):
        beside(parts.towers[0], {"token.weight": one})
    with pytest.raises(ValueError, match="has no vae"):
        with_lora(parts, {"vae": {}})
    with pytest.raises(ValueError, match="cannot be merged"):
        with_lora(parts, factors, torch.ones(2))
    assert method.delta(one).shape == parts.unet.get_parameter(name).shape


def diffusers_pipeline() -> Any:
    """diffusers' pipeline around the tiny networks; its LoRA is PEFT's."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(twins.TINY, dtype=torch.float32)


def check_fused(pipe: Any, path: Path, whole: pipeline.Pipeline, weight: float):
    """diffusers' weights with the LoRA in them are ours."""
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"], lora_scale=weight)
    pipe.unload_lora_weights()
    new = with_lora(components(whole.parts, dtype=torch.float32), lora.load(path, whole.parts).factors, weight)
    for part, net in (("unet", new.unet), *zip(new.texts, new.towers, strict=True)):
        tables, column = (unet, unet.DIFFUSERS) if part == "unet" else (clip, clip.TRANSFORMERS)
        state = getattr(pipe, part).state_dict()
        if part != "unet" and not any(key.startswith("text_model.") for key in state):
            column = clip.FLAT
        want, got = twins.ours(state, tables, column), net.state_dict()
        assert not [name for name in want if not torch.allclose(got[name], want[name], atol=1e-5)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "named" not in kind])
def test_diffusers_own_loader_says_the_same_of_files_with_one_alpha(
    tmp_path: Path, whole: pipeline.Pipeline, kind: str
):
    pipe = diffusers_pipeline()
    skip = ("time_embedding", "add_embedding", "time_emb_proj", "conv_in") if kind.startswith("kohya") else ()
    factors = {
        part: {module: (*both, 4.0) for module, (*both, _) in modules.items() if not any(s in module for s in skip)}
        for part, modules in raw(kind).items()
    }  # diffusers drops alphas that differ, and respells what is skipped in its own way
    tensors, _ = spelled(kind, factors)  # type: ignore[arg-type]
    path = write(tmp_path / "l.safetensors", tensors)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    check_fused(pipe, path, whole, 0.7)


def test_the_header_that_diffusers_writes_is_read(tmp_path: Path, whole: pipeline.Pipeline):
    pipe = diffusers_pipeline()
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(4)
    targets = ["to_q", "to_k", "ff.net.0.proj"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, alpha_pattern={"attn1.to_q": 2, "mid_block.+to_k": 9}
    )
    pipe.unet.add_adapter(config)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], use_rslora=True))
    layers = {}
    for name in ("unet", "text_encoder"):
        net = getattr(pipe, name)
        for key, p in net.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.1)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(net)
    said = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    pipe.save_lora_weights(tmp_path, **layers, **said)
    check_fused(pipe, tmp_path / "pytorch_lora_weights.safetensors", whole, 0.7)


OLD = {
    "text encoders of PEFT": (r"^text_encoder\.", "base_model.model.text_encoder."),
    "text encoders of early 2023": (r"self_attn\.q_proj\.", "self_attn.to_q."),
    "outputs of text encoders of early 2023": (r"self_attn\.out_proj\.lora_(A|B)\.", r"self_attn.to_out_lora.lora_\1."),
    "UNets of PEFT": (r"^unet\.", "base_model.model.unet."),
}


@pytest.mark.parametrize("name", OLD)
def test_older_and_longer_names_are_the_same_weights(whole: pipeline.Pipeline, name: str):
    tensors, said = spelled("PEFT", raw("PEFT"))
    renamed = {re.sub(*OLD[name], key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    got, want = (lora.matched(found, whole.parts, said) for found in (renamed, tensors))
    assert {part: rows.keys() for part, rows in got.items()} == {part: rows.keys() for part, rows in want.items()}


def test_a_file_of_two_adapters_is_refused(whole: pipeline.Pipeline):
    tensors, said = spelled("PEFT", raw("PEFT"))
    two = {key.replace(".weight", f".{name}.weight"): t for key, t in tensors.items() for name in ("first", "second")}
    with pytest.raises(LayoutError, match=r"several adapters.*once more"):
        lora.matched(two, whole.parts, said)


def test_factors_that_are_not_finite_are_refused_by_name(whole: pipeline.Pipeline):
    tensors, said = spelled("PEFT", raw("PEFT"))
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key] = tensors[key].clone().index_fill(0, torch.tensor([1]), float("nan"))
    with pytest.raises(WeightsError, match=r"values of .* up are not finite"):
        lora.matched(tensors, whole.parts, said)

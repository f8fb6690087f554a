"""Whole models: folders and single files give the same, what they say of themselves, and parts that do not fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.model.clip import TextConfig, TextTower
from diaphane.model.components import components, placed
from diaphane.model.unet import UNet
from diaphane.model.vae import VAE, VAEConfig
from diaphane.weights import clip, hub, latent, pipeline, unet, vae
from diaphane.weights.errors import ConfigError, LayoutError, MissingFileError, WeightsError
from diaphane.weights.files import write
from diaphane.weights.load import Network
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

WEIGHTS = "diffusion_pytorch_model.safetensors"
SINGLE = twins.TINY / "single_file.safetensors"
GIVEN = {
    "unet": {"head_dim": 16, "id_dim": 8},
    "text_encoder": {"heads": 3, "act": "quick_gelu"},
    "text_encoder_2": {"heads": 5, "act": "gelu"},
}


def single(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> Path:
    """The tiny single file, changed."""
    tensors = dict(load_file(SINGLE))
    change(tensors)
    return write(tmp_path / "single.safetensors", tensors, metadata)


def folder(tmp_path: Path, **changes: dict[str, Any]) -> Path:
    """The tiny folder with json files changed: {"scheduler/scheduler_config": {"prediction_type": "sample"}}."""
    copied = shutil.copytree(twins.TINY, tmp_path / "model", ignore=shutil.ignore_patterns("single*", "ip_adapter"))
    for name, change in changes.items():
        path = copied / f"{name}.json"
        path.chmod(0o644)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return copied


def test_a_single_file_gives_the_tensors_and_settings_of_the_folder():
    whole, one = pipeline.load(twins.TINY), pipeline.load(SINGLE, given=GIVEN, tokenizer=twins.TINY)
    assert list(whole.parts) == list(one.parts) == list(pipeline.PARTS)
    assert whole.texts == one.texts == ["text_encoder", "text_encoder_2"]
    for name, part in whole.parts.items():
        assert part.config == one.parts[name].config
        assert all(torch.equal(t, one.parts[name].tensors[key]) for key, t in part.tensors.items())
    assert whole.words == one.words
    assert [words.pad for words in whole.words.values()] == ["<|endoftext|>", "!"]
    assert asdict(whole.says) == asdict(one.says) | {"side": 128}
    assert whole.says.zero_negative
    assert pipeline.load(SINGLE, given=GIVEN).words == {}


def test_networks_are_made_of_the_very_tensors_in_the_file_in_the_type_that_it_has():
    found = pipeline.load(SINGLE, given=GIVEN)
    made = components(found.parts)
    for net, name in ((made.unet, "unet"), (made.vae, "vae"), *zip(made.towers, found.texts, strict=True)):
        for key, p in net.named_parameters():
            assert p.data_ptr() == found.parts[name].tensors[key].data_ptr()
            assert p.dtype == torch.float16
    assert made.xl
    assert (made.factor, made.tokenizers) == (8, ())
    mixed = components(found.parts, dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert next(mixed.unet.parameters()).dtype == torch.bfloat16
    assert next(mixed.vae.parameters()).dtype == torch.float32


def test_an_autoencoder_that_overflows_float16_is_float32_beside_float16_networks(tmp_path: Path):
    def kinds(found: pipeline.Pipeline, dtype: torch.dtype, **more: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        made = components(found.parts, dtype=dtype, **more)  # type: ignore[arg-type]
        return next(made.unet.parameters()).dtype, next(made.vae.parameters()).dtype

    half, wide, brain = torch.float16, torch.float32, torch.bfloat16
    whole, one = pipeline.load(twins.TINY), pipeline.load(SINGLE, given=GIVEN)
    assert [found.parts["vae"].config["upcast"] for found in (whole, one)] == [True, True]
    assert [kinds(found, half) for found in (whole, one)] == [(half, wide)] * 2
    assert kinds(whole, brain) == (brain, brain)
    assert kinds(whole, half, vae_dtype=half) == (half, half)
    shutil.copytree(twins.TINY / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for said, want in ((False, False), (True, True), (None, True)):
        config = {name: value for name, value in config.items() if name != "force_upcast"}
        config |= {} if said is None else {"force_upcast": said}
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
        fixed = pipeline.load(twins.TINY, replaced={"vae": tmp_path / "vae"})
        assert fixed.parts["vae"].config["upcast"] is want
        assert kinds(fixed, half) == (half, wide if want else half)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    assert not pipeline.load(twins.TINY, replaced={"vae": tmp_path / "vae"}).parts["vae"].config["upcast"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": "no"}))
    with pytest.raises(WeightsError, match="upcast = 'no'"):
        pipeline.load(twins.TINY, replaced={"vae": tmp_path / "vae"})


def test_a_name_of_the_catalogue_stands_for_its_repository_its_file_and_what_that_does_not_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked = []

    def fetch(repo: str, files: list[str], **more: Any) -> Path:
        asked.append((repo, files[0]))
        folder = twins.TINY / ("controlnet" if "controlnet" in repo else "vae")
        return SINGLE if "stable-diffusion" in repo else folder / WEIGHTS

    def download(repo: str, file: str, revision: str | None) -> Path | None:
        asked.append((repo, file))
        path = twins.TINY / file.replace(".fp16.", ".")
        return path if path.is_file() else None

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "download", download)
    xl = "stabilityai/stable-diffusion-xl-base-1.0"
    found = pipeline.load("sdxl", given=GIVEN, replaced={"vae": "sdxl-vae-fp16-fix"}, prediction="v")
    assert asked == [(xl, "sd_xl_base_1.0.safetensors"), ("madebyollin/sdxl-vae-fp16-fix", WEIGHTS)]
    assert found.says.prediction == "v"
    asked.clear()
    assert pipeline.load("sdxl-folder").parts["unet"].path == twins.TINY / "unet" / WEIGHTS
    assert asked[0] == (xl, "model_index.json")
    assert (xl, "unet/diffusion_pytorch_model.fp16.safetensors") in asked
    assert pipeline.load("sdxl-folder", replaced={"vae": "sdxl-folder"}).texts == ["text_encoder", "text_encoder_2"]
    asked.clear()
    assert latent.load("controlnet-depth-sdxl-small").family == "controlnet"
    assert latent.load("someone/controlnet").family == "controlnet"
    assert asked == [
        ("diffusers/controlnet-depth-sdxl-1.0-small", "diffusion_pytorch_model.fp16.safetensors"),
        ("someone/controlnet", WEIGHTS),
    ]
    predictions = [pipeline.load(name, given=GIVEN).says.prediction for name in ("sd21", "sd21-base", "sdxl")]
    assert predictions == ["v", "eps", "eps"]
    with pytest.raises(ConfigError, match="sdxl-vae-fp16-fix is of the kind vae, not a whole latent model"):
        pipeline.load("sdxl-vae-fp16-fix")
    with pytest.raises(MissingFileError, match="sdxl-folder is a folder of parts"):
        latent.load("sdxl-folder")
    with pytest.raises(MissingFileError, match="there is no sdxll: give a file"):
        latent.load("sdxll")


def test_a_tokeniser_says_the_same_from_a_folder_and_beside_a_single_file():
    for found in (pipeline.load(twins.TINY), pipeline.load(SINGLE, given=GIVEN, tokenizer=twins.TINY / "tokenizer")):
        first, second = components(found.parts, found.words).tokenizers
        cases = json.loads((twins.CASES / "01_tokenizer.json").read_text())
        for case in cases:
            assert first(case["text"])[0].tolist() == case["ids_1"]
            assert second(case["text"])[0].tolist() == case["ids_2"]


def test_types_that_networks_do_not_compute_in_and_parts_that_are_missing_are_errors_of_one_line():
    found = pipeline.load(twins.TINY).parts
    for dtype, said in ((torch.int32, "torch.int32"), ("float16", "'float16'"), (torch.float8_e4m3fn, "torch.float8")):
        with pytest.raises(
            ValueError, match=f"^unet: dtype is torch.float16, bfloat16, float32 or float64, not {said}"
        ):
            components(found, dtype=dtype)  # type: ignore[arg-type]
    small = {name: t.to(torch.float8_e4m3fn) for name, t in found["vae"].tensors.items()}
    eighth = replace(found["vae"], tensors=small)
    with pytest.raises(ValueError, match=r"^vae: the tensors are stored as torch.float8_e4m3fn, in which nothing"):
        components({**found, "vae": eighth})
    assert next(components({**found, "vae": eighth}, dtype=torch.float32).vae.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^there is no unet among the parts \(vae\)$"):
        components({"vae": found["vae"]})


def test_networks_placed_elsewhere_come_back_as_the_very_tensors_they_were():
    net = components(pipeline.load(twins.TINY).parts).towers[0]
    before = list(net.parameters())
    with placed("meta", net):
        assert {p.device.type for p in net.parameters()} == {"meta"}
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="no"), placed("meta", net):
        raise RuntimeError("no")
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


def test_variants_and_shards_of_a_folder_are_found_and_nothing_else_is_taken_for_them(tmp_path: Path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shutil.copy(twins.TINY / "model_index.json", tmp_path)
    shutil.copytree(twins.TINY / "scheduler", tmp_path / "scheduler")
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for name, kind in kinds.items():
        net = kind.from_pretrained(twins.TINY / name).half()
        size = "3MB" if name == "unet" else "10GB"
        net.save_pretrained(tmp_path / name, variant="fp16", max_shard_size=size)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 3
    want, got = pipeline.load(twins.TINY), pipeline.load(tmp_path, variant="fp16")
    assert len(got.parts["unet"].paths) > 3
    for name, part in want.parts.items():
        assert all(torch.equal(t, got.parts[name].tensors[key]) for key, t in part.tensors.items())
    with pytest.raises(MissingFileError, match=r"no weights of unet .*variant"):
        pipeline.load(tmp_path)
    with pytest.raises(MissingFileError, match="no fp16 weights of unet"):
        pipeline.load(twins.TINY, variant="fp16")


def test_a_scheduler_says_prediction_schedule_and_timesteps(tmp_path: Path):
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
            "steps_offset": 0, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # fmt: skip
    path = folder(
        tmp_path, **{"scheduler/scheduler_config": said, "model_index": {"force_zeros_for_empty_prompt": False}}
    )
    says = pipeline.load(path).says
    assert (says.prediction, says.zero_terminal_snr, says.spacing, says.offset) == ("v", True, "trailing", 0)
    assert (says.betas, says.beta_0, says.beta_1, says.zero_negative) == ("linear", 1e-4, 0.02, False)


def test_what_a_scheduler_does_not_say_is_what_diffusers_does_without_it(tmp_path: Path):
    import diffusers

    path = folder(tmp_path) / "scheduler/scheduler_config.json"
    kinds = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
             "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
             "KDPM2DiscreteScheduler", "LCMScheduler", "TCDScheduler"]  # fmt: skip
    for kind in kinds:
        path.write_text(json.dumps({"_class_name": kind, "use_karras_sigmas": True}))
        theirs = {name: p.default for name, p in signature(getattr(diffusers, kind).__init__).parameters.items()}
        ours = pipeline.load(path.parents[1]).says
        assert ours.betas == theirs["beta_schedule"]
        assert (ours.beta_0, ours.beta_1) == (theirs["beta_start"], theirs["beta_end"])
        assert (ours.spacing, ours.offset, ours.karras) == (theirs["timestep_spacing"], theirs["steps_offset"], True)


@pytest.mark.parametrize("change", [{"prediction_type": "flow"}, {"beta_schedule": "sigmoid"}, {"trained_betas": [0.1]},
                                    {"beta_start": float("nan")}, {"beta_end": 2.0}, {"beta_start": -1e-4},
                                    {"beta_end": True}, {"beta_end": "0.02"}, {"num_train_timesteps": 0},
                                    {"num_train_timesteps": 1e12}, {"steps_offset": -1}, {"beta_end": None},
                                    {"use_karras_sigmas": "no"}, {"num_train_timesteps": 2.5},
                                    {"timestep_spacing": "odd"}, {"steps_offset": "x"},
                                    {"_class_name": "EDMDPMSolverMultistepScheduler"},
                                    {"_class_name": "FlowMatchEulerDiscreteScheduler"}])  # fmt: skip
def test_what_a_scheduler_says_that_is_not_done_here_is_an_error(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(ConfigError, match="scheduler_config") as e:
        pipeline.load(folder(tmp_path, **{"scheduler/scheduler_config": change}))
    assert "\n" not in str(e.value)


def test_marks_among_the_keys_and_the_header_of_a_single_file_say_the_prediction(tmp_path: Path):
    def mark(*names: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: tensors.update({name: torch.zeros(0) for name in names})

    says = pipeline.load(single(tmp_path, mark("v_pred", "ztsnr")), given=GIVEN).says
    assert (says.prediction, says.zero_terminal_snr) == ("v", True)
    says = pipeline.load(single(tmp_path, mark(), {"modelspec.prediction_type": "v"}), given=GIVEN).says
    assert (says.prediction, says.zero_terminal_snr) == ("v", False)
    assert pipeline.load(single(tmp_path, mark()), given=GIVEN).says.prediction == "eps"
    assert pipeline.load(single(tmp_path, mark()), given=GIVEN, prediction="v").says.prediction == "v"
    with pytest.raises(ConfigError, match="edm_mean"):
        pipeline.load(single(tmp_path, mark("edm_mean", "edm_std")), given=GIVEN)
    with pytest.raises(ConfigError, match="prediction_type = 'flow'"):
        pipeline.load(single(tmp_path, mark(), {"modelspec.prediction_type": "flow"}), given=GIVEN)


def test_a_folder_without_a_scheduler_says_no_more_than_a_single_file(tmp_path: Path):
    path = folder(tmp_path)
    said = pipeline.load(path).says
    shutil.rmtree(path / "scheduler")
    assert pipeline.load(path).says == said


def test_losses_and_counters_of_an_autoencoders_training_are_left_out(tmp_path: Path):
    plain = pipeline.load(single(tmp_path, lambda _: None), given=GIVEN).parts["vae"]
    names = ("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay", "model_ema.num_updates")
    more = {f"first_stage_model.{name}": torch.zeros(1) for name in names}
    found = pipeline.load(single(tmp_path, lambda tensors: tensors.update(more)), given=GIVEN).parts["vae"]
    assert found.config == plain.config
    assert found.tensors.keys() == plain.tensors.keys()


def test_what_merged_single_files_hold_besides_is_read_or_left_out(tmp_path: Path):
    plain = pipeline.load(single(tmp_path, lambda _: None), given=GIVEN)
    text, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{second}text_projection.weight"] = tensors.pop(f"{second}text_projection").mT.contiguous()
        tensors |= {f"{text}logit_scale": torch.tensor(4.6), "scale_factor": torch.tensor(0.2)}
        tensors |= {f"{second}position_ids": torch.arange(77)[None]}
        tensors |= {f"{text}text_model.embeddings.position_ids": torch.arange(77)[None].bfloat16()}

    found = pipeline.load(single(tmp_path, change), given=GIVEN)
    for name, part in plain.parts.items():
        assert all(torch.equal(t, found.parts[name].tensors[key]) for key, t in part.tensors.items())
    assert (plain.parts["vae"].config["scaling"], found.parts["vae"].config["scaling"]) == (0.13025, 0.2)
    for wrong in (torch.zeros(()), torch.ones(2), torch.tensor(float("nan"))):
        with pytest.raises(ConfigError, match="scale_factor is not one positive number"):
            pipeline.load(single(tmp_path, lambda tensors, w=wrong: tensors.update(scale_factor=w)), given=GIVEN)


def ldm(net: Any, tables: Any, plan: Any, column: int, prefix: str) -> dict[str, Tensor]:
    """A network's tensors under a layout's keys."""
    keys = {rule.name: rule for rule in reversed(tables.table(plan, column))}
    state = net.state_dict()
    return {prefix + keys[name].key: t.mT.contiguous() if keys[name].view is clip.transposed else t
            for name, t in state.items()}  # fmt: skip


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's one matrix for q, k and v."""
    out: dict[str, Tensor] = {}
    for key, t in tensors.items():
        stem, _, leaf = key.rpartition(".attn.q.")
        if stem:
            out[f"{stem}.attn.in_proj_{leaf}"] = torch.cat([tensors[f"{stem}.attn.{p}.{leaf}"] for p in "qkv"])
        elif not any(f".attn.{p}." in key for p in "kv"):
            out[key] = t
    return out


def second(tmp_path: Path) -> tuple[Path, TextTower]:
    """A single file of the kind of Stable Diffusion 2, tiny but for the width of its tokens, and its text tower."""
    text = TextConfig(width=1024, layers=3, heads=16, mlp=16, projection=24, vocabulary=30, positions=9)
    cfg = twins.replace(twins.SD2, context_dim=1024, in_channels=4, groups=8)
    body, coder, tower = UNet(cfg), VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4)), TextTower(text)
    for net in (body, coder, tower):
        net.requires_grad_(False)
        twins.randomised(net)
    plans = (
        unet.Plan(channels=cfg.channels, depth=cfg.depth, mid_depth=1, blocks=1, context_dim=1024, vector_dim=None,
                  in_channels=4, out_channels=4),
        vae.Plan(in_channels=3, latent_channels=4, channels=(8, 8), blocks=1),
        clip.Plan(width=1024, layers=3, mlp=16, projection=24, vocabulary=30, positions=9),
    )  # fmt: skip
    tensors = ldm(body, unet, plans[0], unet.LDM, "model.diffusion_model.")
    tensors |= ldm(coder, vae, plans[1], vae.LDM, "first_stage_model.")
    tensors |= fused(ldm(tower, clip, plans[2], clip.OPEN_CLIP, "cond_stage_model.model."))
    return write(tmp_path / "second.safetensors", {**tensors, "betas": torch.zeros(9)}), tower


def test_stable_diffusion_2_ends_at_the_last_layer_but_one_and_must_be_told_its_prediction(tmp_path: Path):
    path, tower = second(tmp_path)
    given = {"unet": {"head_dim": 8, "groups": 8}, "vae": {"groups": 4}}
    with pytest.raises(ConfigError, match="does not say what its UNet predicts: give prediction"):
        pipeline.load(path, given=given)
    found = pipeline.load(path, given=given, prediction="v")
    assert found.parts["vae"].config["scaling"] == 0.18215
    made = components(found.parts)
    ids = torch.tensor([[3, 1, 29, 29]])
    assert torch.allclose(made.towers[0](ids).last, tower.norm(tower(ids).hidden[-2]), atol=1e-5)
    assert not made.xl


def test_only_the_named_files_of_a_repository_are_fetched(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(repo: str, file: str, revision: str | None) -> Path | None:
        asked.append(file)
        path = twins.TINY / file
        return path if path.is_file() else None

    monkeypatch.setattr(hub, "download", download)
    found = pipeline.load("someone/tiny", revision="main")
    assert list(found.parts) == list(pipeline.PARTS)
    got = [name for name in asked if (twins.TINY / name).is_file()]
    assert "single_file.safetensors" not in asked
    assert {name for name in got if name.endswith("safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
    }  # fmt: skip


def test_a_part_may_come_from_elsewhere(tmp_path: Path):
    other = tmp_path / "vae"
    shutil.copytree(twins.TINY / "vae", other)
    config = other / "config.json"
    config.chmod(0o644)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    for source in (other, other / "diffusion_pytorch_model.safetensors"):
        assert pipeline.load(twins.TINY, replaced={"vae": source}).parts["vae"].config["scaling"] == 0.5
    bare = tmp_path / "bare.safetensors"
    shutil.copy(other / "diffusion_pytorch_model.safetensors", bare)
    assert pipeline.load(twins.TINY, replaced={"vae": bare}).parts["vae"].config["scaling"] == 0.13025
    assert pipeline.load(SINGLE, given=GIVEN, replaced={"vae": bare}).parts["vae"].config["upcast"]
    told = pipeline.load(twins.TINY, replaced={"vae": bare}, given={"vae": {"scaling": 0.7}}).parts["vae"].config
    assert (told["scaling"], told["upcast"]) == (0.7, False)
    taken = pipeline.load(twins.TINY, replaced={"text_encoder": SINGLE, "vae": twins.TINY}, given=GIVEN)
    assert taken.parts["text_encoder"].paths == (SINGLE,)


def test_parts_that_do_not_belong_together_are_an_error_that_says_what_was_found_and_what_fits():
    def refused(**replaced: Path) -> str:
        with pytest.raises(WeightsError) as e:
            pipeline.load(twins.TINY, replaced=replaced)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "tokens of 64: one (24) fits" in refused(text_encoder=twins.TINY / "text_encoder_2")
    assert "kind clip_vision" in refused(text_encoder_2=twins.TINY / "image_encoder")
    assert "vae is of the kind unet" in refused(vae=twins.TINY / "unet")
    assert "unet is of the kind controlnet" in refused(unet=twins.TINY / "controlnet")
    assert "no /nowhere" in refused(unet=Path("/nowhere"))


def towers(**widths: tuple[int, int | None]) -> dict[str, Network]:
    """SDXL's parts, as far as their settings tell whether they fit; text encoders by width and projection."""

    def network(family: str, **config: Any) -> Network:
        return Network(family, config, {}, "", (Path(f"/{family}.safetensors"),))

    sdxl = network("unet", context_dim=2048, pooled_dim=1280, in_channels=4, out_channels=4)
    texts = {name: network("clip_text", width=w, projection=p) for name, (w, p) in widths.items()}
    return {"unet": sdxl, "vae": network("vae", latent_channels=4), **texts}


L, H, BIGG = (768, None), (1024, 1024), (1280, 1280)


@pytest.mark.parametrize(
    ("one", "two", "replaced", "line"),
    [
        (BIGG, BIGG, "text_encoder", r"text_encoder is CLIP bigG \(1280 .*tokens of 2048: CLIP L \(768\) fits"),
        (L, L, "text_encoder_2", r"text_encoder_2 is CLIP L \(768 .*tokens of 2048: CLIP bigG \(1280\) fits"),
        (L, H, "text_encoder_2", r"text_encoder_2 is CLIP H \(1024 .*tokens of 2048: CLIP bigG \(1280\) fits"),
        (H, BIGG, "text_encoder", r"text_encoder is CLIP H \(1024 .*tokens of 2048: CLIP L \(768\) fits"),
        (BIGG, L, "text_encoder", r"text_encoder_2 projects to None; the UNet takes pooled text of 1280"),
    ],
)
def test_a_tower_in_anothers_place_is_named_and_so_is_the_one_that_fits(
    one: tuple[int, int | None], two: tuple[int, int | None], replaced: str, line: str
):
    pipeline.consistent(towers(text_encoder=L, text_encoder_2=BIGG))
    with pytest.raises(LayoutError, match=line):
        pipeline.consistent(towers(text_encoder=one, text_encoder_2=two), [replaced])


def test_what_is_no_whole_model_is_an_error_that_says_what_it_is(tmp_path: Path):
    def refused(source: Path, **more: Any) -> str:
        with pytest.raises(WeightsError) as e:
            pipeline.load(source, **more)
        assert "\n" not in str(e.value)
        return str(e.value)

    def without(prefix: str) -> Path:
        def change(tensors: dict[str, Tensor]) -> None:
            for key in [key for key in tensors if key.startswith(prefix)]:
                del tensors[key]

        return single(tmp_path, change)

    assert "a whole model has vae too" in refused(without("first_stage"))
    assert "a whole model has text_encoder too" in refused(without("conditioner"))
    assert "a whole model has unet too" in refused(twins.TINY / "vae" / "diffusion_pytorch_model.safetensors")
    lora = write(tmp_path / "l.safetensors", {"lora_unet_mid_block.lora_down.weight": torch.zeros(2, 2)})
    assert "is a LoRA" in refused(lora)
    assert "model_index.json" in refused(twins.TINY / "unet")
    assert "no vocab.json" in refused(twins.TINY, tokenizer=twins.TINY / "unet")
    assert "no part moon" in refused(twins.TINY, given={"moon": {}})
    assert "give a file, a folder or a repository" in refused(tmp_path / "nothing.safetensors")
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    assert "is a FluxPipeline and has no unet" in refused(tmp_path / "flux")
    with pytest.raises(LayoutError) as e:
        pipeline.load(single(tmp_path, lambda tensors: tensors.update(odd=torch.zeros(1))), given=GIVEN)
    assert e.value.unexpected == ("odd",)

"""The runner on reference data of latent methods: other data of the same kinds run, what is not known fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.prompt import encode, size_ids
from diaphane.samplers.ddim import ddim
from diaphane.samplers.noise import seeded
from safetensors.torch import load_file, save_file
from torch import Tensor

from .golden_latent import SCHEDULE, parts, path_of, told
from .test_golden import GOLDEN, collect, failures

FILES = ("01_tokenizer.json", "cases.json", "02_text_encode.safetensors", "09b_inpaint_4ch.safetensors",
         "08a_sample_euler_style.safetensors")  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of a few instantstyle files and the inversion of consistory, which may be changed."""
    for method, names in {
        "instantstyle": FILES,
        "consistory": ("10_edit_friendly_inversion.json", "10_edit_friendly_inversion.safetensors"),
    }.items():
        (tmp_path / method).mkdir()
        for name in names:
            shutil.copy(GOLDEN / method / name, tmp_path / method)
            (tmp_path / method / name).chmod(0o644)
    return tmp_path


def edit_cases(root: Path, change: Callable[[list[dict[str, Any]]], object]):
    path = root / "instantstyle" / "cases.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]):
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_files_may_be_absent(copy: Path):
    assert failures(copy, "unknown") == []
    skipped = {case.name: case.skip for case in collect(copy) if case.skip}
    assert skipped["instantstyle/04_vae"] == "04_vae.safetensors is not in this folder"
    (copy / "consistory" / "10_edit_friendly_inversion.safetensors").unlink()
    skipped = {case.name: case.skip for case in collect(copy) if case.skip}
    assert "is not in this folder" in skipped["consistory/10_edit_friendly_inversion"]


@pytest.mark.parametrize("name", ["11_moon.safetensors", "notes.txt", "08h_moon.json"])
@pytest.mark.parametrize("method", ["instantstyle", "consistory"])
def test_an_unknown_file_fails_by_its_name(copy: Path, method: str, name: str):
    (copy / method / name).write_bytes(b"{}")
    assert failures(copy, "unknown file") == [f"{method}/unknown file {name}"]


def test_unknown_settings_keys_cases_and_tensors_fail_by_their_names(copy: Path):
    edit_cases(copy, lambda rows: row(rows, "02_text_encode")["settings"].update(sharpness=2))
    edit_cases(copy, lambda rows: row(rows, "09b_inpaint_4ch")["tolerance"].update(moon=2))
    edit_cases(copy, lambda rows: row(rows, "04_vae").update(weather={}))
    edit_cases(copy, lambda rows: rows.append({"name": "12_moon", "settings": {}}))
    edit_tensors(copy / "instantstyle" / FILES[2], lambda t: t.update(moon=torch.zeros(1)))
    found = failures(copy, "instantstyle")
    assert {"instantstyle/02_text_encode", "instantstyle/unknown case 12_moon in cases.json",
            "instantstyle/unknown key weather of 04_vae in cases.json"} < set(found)  # fmt: skip
    assert "instantstyle/09b_inpaint_4ch-run" in found
    path = copy / "consistory" / "10_edit_friendly_inversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sharpness": 2}))
    assert failures(copy, "consistory") == ["consistory/10_edit_friendly_inversion"]


def test_a_changed_tensor_fails(copy: Path):
    folder = copy / "instantstyle"
    edit_tensors(folder / FILES[2], lambda t: t.update(pooled=t["pooled"] + 1e-4))
    edit_tensors(folder / FILES[3], lambda t: t.update(model_input_0=t["model_input_0"] + 1e-4))
    edit_tensors(folder / FILES[4], lambda t: t.update(image=t["image"] + 3e-3))
    edit_tensors(copy / "consistory" / "10_edit_friendly_inversion.safetensors", lambda t: t["zs"].mul_(1.01))
    rows = json.loads((folder / FILES[0]).read_text())
    rows[0]["unpadded_2"][3] += 1
    (folder / FILES[0]).write_text(json.dumps(rows))
    wrong = ["01_tokenizer", "02_text_encode", "08a_sample_euler_style-picture"]
    wrong += ["09b_inpaint_4ch-start", "09b_inpaint_4ch-run"]
    assert failures(copy) == ["consistory/10_edit_friendly_inversion", *(f"instantstyle/{name}" for name in wrong)]


@pytest.mark.parametrize("scheduler", ["euler", "ddim"])
@pytest.mark.parametrize("guidance", [0.5, 1.0, 3.0])
def test_other_seeds_sizes_batches_and_flags_run_without_an_image_prompt(
    tmp_path: Path, scheduler: str, guidance: float
):
    (tmp_path / "instantstyle").mkdir()
    said = {
        "prompt": ["a dog", "a fox"], "negative_prompt": "low", "guidance_scale": guidance, "steps": 3,
        "scheduler": scheduler, "num_images_per_prompt": 1, "height": 64, "width": 96, "guidance_rescale": 0.5,
        "adapter": None, "crops_coords_top_left": [8, 0],
    }  # fmt: skip
    x, path = seeded([7, 8])(torch.empty(2, 4, 8, 12)), path_of(scheduler, 3)
    texts = [encode(parts(), ["a dog", "a fox"]), encode(parts(), "low").repeated(2) if guidance > 1 else None]
    ids = size_ids((64, 96), 2, crop=(8, 0))
    denoise = t2i.denoiser(parts().unet, *texts, schedule=SCHEDULE, ids=ids, guidance=guidance, rescale=0.5)
    with torch.no_grad():
        latents = [told(step.x, step.s, scheduler) for step in ddim(denoise, x, SCHEDULE, path)]
    tensors = {"latents_unit": x, "timesteps": torch.tensor(path[:-1], dtype=torch.float32),
               "model_input_0": x.repeat(2 if guidance > 1 else 1, 1, 1, 1),
               "latents_per_step": torch.stack(latents), "final_latents": latents[-1].clone()}  # fmt: skip
    row = {"name": "08h_sample_plain", "settings": said, "tolerance": {"atol_over_std": 1e-4}}
    (tmp_path / "instantstyle" / "cases.json").write_text(json.dumps([row]))
    save_file(tensors, tmp_path / "instantstyle" / "08h_sample_plain.safetensors")
    names = [case.name for case in collect(tmp_path)]
    assert names == ["instantstyle/08h_sample_plain-start", "instantstyle/08h_sample_plain-run"]
    assert failures(tmp_path) == []
    row["settings"]["prompt"] = ["a dog", "a cat"]
    (tmp_path / "instantstyle" / "cases.json").write_text(json.dumps([row]))
    assert failures(tmp_path) == ["instantstyle/08h_sample_plain-run"]


def test_settings_of_a_run_that_change_nothing_pass_and_others_fail(tmp_path: Path):
    folder, stem = tmp_path / "instantstyle", "10_controlnet_style"
    folder.mkdir()
    shutil.copy(GOLDEN / "instantstyle" / f"{stem}.safetensors", folder)
    said = row(json.loads((GOLDEN / "instantstyle" / "cases.json").read_text()), stem)

    def wrong(**more: object) -> set[str]:
        rows = [said | {"settings": said["settings"] | more}]
        (folder / "cases.json").write_text(json.dumps(rows))
        return {name.removeprefix(f"instantstyle/{stem}-") for name in failures(tmp_path)}

    whole = {"negative_original_size": [128, 128], "negative_target_size": [128, 128]}
    assert wrong(control_guidance_start=0.0, control_guidance_end=1.0, eta=0.0, **whole) == set()
    assert wrong(negative_target_size=[64, 64]) == set()  # one of two is none, as in diffusers
    assert wrong(control_guidance_start=0.3) == {"residuals", "run"}
    assert wrong(control_guidance_end=0.7) == {"run"}
    assert wrong(control_guidance_start=0.9, control_guidance_end=0.1) == {"residuals", "run"}
    assert wrong(**whole | {"negative_target_size": [64, 64]}) == {"run"}
    assert wrong(eta=0.5) == {"run"}

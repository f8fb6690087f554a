"""`diaphane generate` beside diffusers' pipelines: from the same folder, seed and options comes the same picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diffusers import StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
from PIL import Image

from . import latent_twins as twins

V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
ZERO = V | {"rescale_betas_zero_snr": True}
KARRAS = {"use_karras_sigmas": True}
DDIM = {"clip_sample": False, "set_alpha_to_one": True}
MULTISTEP = {"final_sigmas_type": "zero"}
# our sampler, diffusers' scheduler, what that is told, and what scheduler_config.json says
RUNS = {
    "euler": ("euler", "EulerDiscreteScheduler", {}, {}),
    "euler a": ("euler-a", "EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("heun", "HeunDiscreteScheduler", {}, {}),
    "dpm++ 2m": ("dpmpp", "DPMSolverMultistepScheduler", MULTISTEP, {}),
    "ddim": ("ddim", "DDIMScheduler", DDIM, {}),
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False}, {}),
    "euler, Karras": ("euler", "EulerDiscreteScheduler", {}, KARRAS),
    "heun, Karras": ("heun", "HeunDiscreteScheduler", {}, KARRAS),
    "dpm++ 2m, Karras": ("dpmpp", "DPMSolverMultistepScheduler", MULTISTEP, KARRAS),
    "dpm++ 2m, v, Karras": ("dpmpp", "DPMSolverMultistepScheduler", MULTISTEP, V | KARRAS),
    "ddim, v": ("ddim", "DDIMScheduler", DDIM, V),
    "ddim, zero terminal SNR": ("ddim", "DDIMScheduler", DDIM, ZERO),
    "ddpm, zero terminal SNR": ("ddpm", "DDPMScheduler", {"clip_sample": False}, ZERO),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = StableDiffusionXLPipeline.from_pretrained(twins.TINY, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_drawn_picture_is_diffusers_picture(tmp_path: Path, pipe: Any, name: str):
    import diffusers

    sampler, kind, settings, change = RUNS[name]
    model, out = twins.scheduled(tmp_path / "model", change), tmp_path / "out"
    words = ["--steps", "5", "--sampler", sampler, "--negative", "low", "--seed", "3", "--size", "96x64"]
    words += ["--guidance", "4", "--model", str(model), "--out", str(out), "--quiet"]
    assert main(["generate", "a red fox!", *words]) == 0
    scheduler = getattr(diffusers, kind)
    pipe.scheduler = scheduler.from_config(scheduler.load_config(model, subfolder="scheduler"), **settings)
    theirs = pipe("a red fox!", negative_prompt="low", guidance_scale=4.0, num_inference_steps=5, height=64, width=96,
                  generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    pictures = [np.asarray(picture, dtype=int) for picture in (Image.open(out / "0001.png"), theirs)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1

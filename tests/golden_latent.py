"""What the reference data of latent methods shares: the tiny SDXL, its schedule, and the settings of a listed case."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diaphane.model.components import Components, components
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import pipeline
from torch import Tensor

from .golden_reader import Case, Entry, Folder

TINY = Path(__file__).parent / "golden" / "tiny-sdxl"
SCHEDULE = scaled_linear()
TOLD = {"name", "description", "reference_noise", "cross_check", "notes", "tensors"}  # for people


@cache
def parts() -> Components:
    """The tiny SDXL in float32, without gradients."""
    found = pipeline.load(TINY)
    made = components(found.parts, found.words, dtype=torch.float32)
    for net in (made.unet, made.vae, *made.towers):
        net.requires_grad_(False)
    return made


def kind_of(stem: str) -> str:
    """What a file holds: text_encode, vision, vae, unet_ip, sample, inpaint, controlnet, ..., or "": unknown."""
    found = re.fullmatch(
        r"\d+[a-z]*_(tokenizer|text_encode|vision|vae|image_tokens|unet_ip|subtraction|sample|inpaint|controlnet)"
        r"(_.*)?", stem)  # fmt: skip
    return found[1] if found else ""


def listed(folder: Folder, stem: str) -> dict[str, Any]:
    """The object of cases.json whose name is `stem`, or an empty one."""
    rows = folder.documents.get("cases", [])
    return next((row for row in rows if row.get("name") == stem), {})


def entry(folder: Folder, stem: str, settings: str, tolerance: str = "") -> Entry:
    """The settings and tolerances of a listed case that one comparison reads, by their names in a row."""
    row = listed(folder, stem)
    said = {
        kind: {key: row.get(kind, {})[key] for key in keys.split() if key in row.get(kind, {})}
        for kind, keys in (("settings", settings), ("tolerance", tolerance))
    }
    made = Entry(said, stem)
    _ = made["settings"], made["tolerance"]  # of which a comparison may need none
    return made


def whole_entry(folder: Folder, stem: str) -> Entry:
    """All settings and tolerances of a listed case."""
    row = listed(folder, stem)
    return entry(folder, stem, " ".join(row.get("settings", {})), " ".join(row.get("tolerance", {})))


def within(case: Case, name: str, ours: Tensor, bound: float):
    """|ours - the tensor `name`| <= bound, a number of the case's own."""
    if case.has(name):
        theirs = case.input(name).double()
        assert ours.shape == theirs.shape, f"{case.stem}: {name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        assert ours.isfinite().all(), f"{case.stem}: {name}: ours is not finite"
        error = float((ours.double() - theirs).abs().max())
        assert error <= bound, f"{case.stem}: {name}: off by {error:.3g}, may be {bound:.3g}"


def path_of(scheduler: str, steps: int) -> list[int]:
    """The timesteps of the reference's samplers: Euler ends in a clean image, DDIM at the first timestep's alpha."""
    assert scheduler in ("euler", "ddim"), f"unknown scheduler {scheduler}"
    return leading(steps, len(SCHEDULE), offset=1, end=-1 if scheduler == "euler" else 0)


def told(x: Tensor, s: float, scheduler: str) -> Tensor:
    """Our x at s in the reference's terms: Euler's latents are x / sqrt(alpha)."""
    return x / SCHEDULE(s).sqrt().float() if scheduler == "euler" else x

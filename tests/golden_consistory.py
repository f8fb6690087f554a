"""Every case of a consistory folder, and a failing one for whatever in it is not known.

A file is told by its name without the number, so that 6b_run_batch is one of the kind run_batch; its settings are in
the json file beside it.  A kind is a function of the folder and the file's stem that gives its cases.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from diaphane.model.blocks import denoiser
from diaphane.samplers import path, schedule
from diaphane.samplers.ddim import ddim
from diaphane.samplers.edit_friendly import NoiseMaps, noise_maps
from diaphane.samplers.guidance import guided
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import replayed
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.schedule import Schedule
from torch import Tensor

from . import golden_consistory_attention as calls
from . import golden_consistory_parts as pieces
from . import golden_consistory_runs as runs
from .golden_latent import parts, within
from .golden_reader import Case, Entry, Folder, unclaimed, unknown


def inversion_cases(folder: Folder, stem: str) -> list[Case]:
    """Edit-friendly DDPM inversion: the noise maps, the way back, and the way to another text."""
    return [Case(stem, inversion, folder, stem, frozenset(folder.tensors(stem)), folder.entry(stem))]


KINDS: dict[str, Callable[[Folder, str], list[Case]]] = {
    "masks": pieces.mask_cases,
    "sdsa_attention": calls.attention_cases,
    "query_blend": calls.blend_cases,
    "dift_injection": pieces.dift_cases,
    "unet_sdsa": calls.unet_cases,
    "run_batch": runs.run_cases,
    "run_cached": runs.run_cases,
    "run_instance": runs.run_cases,
    "edit_friendly_inversion": inversion_cases,
}


def cases(folder: Folder) -> list[Case]:
    """Files and tensors, each taken by a case or by one that fails; a case reads all of its json file."""
    found, stems = [], []
    for file in sorted(folder.path.iterdir()):
        name = re.fullmatch(rf"\d+[a-z]*_({'|'.join(KINDS)})(_.*)?", file.stem)
        if name and file.suffix == ".safetensors":
            found += KINDS[name[1]](folder, file.stem)
            stems.append(file.stem)
        elif name and file.suffix == ".json":
            if not folder.has(file.stem):
                why = f"{file.stem}.safetensors is not in this folder"
                found.append(Case(file.stem, lambda case: None, folder, skip=why))
        elif file.name != "README.md":
            found.append(unknown(folder, f"file {file.name}"))
    return found + unclaimed(folder, found, stems)


def trained(said: Entry) -> tuple[Schedule, Callable[[int], list[int]]]:
    """The schedule of a scheduler's settings, and its path of so many steps."""
    kind, spacing = said["beta_schedule"], said["timestep_spacing"]
    assert kind in ("linear", "scaled_linear"), f"unknown beta_schedule {kind}"
    assert spacing in ("leading", "trailing", "linspace"), f"unknown timestep_spacing {spacing}"
    assert (said["prediction_type"], said["clip_sample"]) == ("epsilon", False)
    made = getattr(schedule, kind)(said["num_train_timesteps"], said["beta_start"], said["beta_end"])
    end, offset = (-1 if said["set_alpha_to_one"] else 0), said["steps_offset"]
    more = {"offset": offset} if spacing == "leading" else {}
    return made, lambda n: getattr(path, spacing)(n, len(made), end=end, **more)


def texts(case: Case, names: list[str], size: tuple[int, int]) -> Denoise:
    """The tiny UNet for a batch of len(names) equal parts, each under the stored text of that name."""
    unet, (height, width) = parts().unet, (8.0 * side for side in size)

    def rows(part: str, n: int) -> Tensor:
        stored = [case.input(f"{name}_{part}") for name in names]
        return torch.cat([t.repeat(n // len(t), *[1] * (t.ndim - 1)) for t in stored])

    def cond(t: Tensor) -> Any:
        n = len(t) // len(names)
        ids = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(t), 1)
        return unet.embed(t, rows("embeds", n), rows("pooled", n), ids)

    return denoiser(unet, cond)


def inversion(case: Case):
    said = case.settings
    said.read |= {key: value for key, value in said.value.items() if key == "seed" or key.startswith("fp64_gap")}
    train, walk_of = trained(said["scheduler"])
    walk, x0 = walk_of(said["n"]), case.input("x0")
    size = (said["H"], said.get("W", said["H"]))
    assert tuple(x0.shape[-2:]) == size
    assert case.input("null_embeds").shape[1] == said["L"]
    within(case, "timesteps", torch.tensor(walk[:-1]), 0)
    source = guided(texts(case, ["null", "src"], size), texts(case, ["src"], size), said["cfg_src"])
    target = guided(texts(case, ["null", "tar"], size), texts(case, ["tar"], size), said["cfg_tar"])
    noise = case.input("noise").view(said["n"], *x0.shape)
    with torch.no_grad():
        maps = noise_maps(source, x0, train, walk, noise=replayed(noise), eta=said["eta"])
        within(case, "xts", maps.xs.flip(0).flatten(0, 1), 1e-5)
        within(case, "zs", maps.zs.flip(0).flatten(0, 1), 1e-3)
        reconstruction = back(source, maps, train, 0)
        within(case, "reconstruction", reconstruction, 1e-4)
        within(case, "edited", back(target, maps, train, said["skip"]), 1e-3)
    worst, told = float((reconstruction - x0).abs().max()), said["reconstruction_max_error"]
    assert abs(worst - told) <= 1e-4, f"{case.stem}: reconstruction_max_error: {worst:.6g}, not {told:.6g}"


def back(denoise: Denoise, maps: NoiseMaps, train: Schedule, skip: int) -> Tensor:
    """Down the path again with the stored noise, `skip` steps left out."""
    walk = ddim(denoise, maps.xs[skip], train, maps.path[skip:], eta=maps.eta, noise=replayed(maps.zs[skip:]))
    return last(walk).x

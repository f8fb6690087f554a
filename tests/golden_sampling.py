"""Sampling, inpainting and ControlNet cases of the latent reference data, with or without an image prompt in `Ops`.

`runs(folder, stem, speak)` are whole runs: `speak(case, n)` gives what the UNet speaks for n pictures (an adapter reads
its tensors and settings from the case).  `parts_of(folder, stem)` are the comparisons that need no adapter: where a run
starts, one step from a stored prediction, what a ControlNet adds, and the picture at the end.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.controlnet import Control, between
from diaphane.methods.prompt import Prompt, conditioning, encode, size_ids
from diaphane.model.controlnet import ControlNet
from diaphane.model.latent import build
from diaphane.model.ops import TORCH, Ops
from diaphane.model.unet import UNet
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.ddim import step as ddim_step
from diaphane.samplers.guidance import guide, halves
from diaphane.samplers.parameterisation import noised
from diaphane.samplers.schedule import sigma_of
from diaphane.weights import latent
from torch import Tensor

from .golden_latent import SCHEDULE, TINY, entry, listed, parts, path_of, told, whole_entry, within
from .golden_reader import Case, Folder

Speak = Callable[[Case, int], Ops]
WALK = "scheduler steps strength steps_requested steps_run"
TEXT = (
    "negative_prompt prompt_2 negative_prompt_2 clip_skip original_size target_size crops_coords_top_left "
    "negative_original_size negative_target_size"
)
START = frozenset(
    ("latents_unit", "timesteps", "model_input_0", "sigmas", "init_noise_sigma", "noise", "image_latents")
) | {"latent_mask", "masked_image_latents", "conv_in_weight_9ch"}
STEPPED = frozenset(("latents_per_step", "final_latents"))


def plainly(case: Case, n: int) -> Ops:
    """No image prompt."""
    for key in ("adapter", "ip_adapter_scale"):
        case.settings["settings"].get(key)
    return TORCH


def alone(folder: Folder, stem: str) -> bool:
    """Whether a case has no image prompt."""
    return not listed(folder, stem).get("settings", {}).get("adapter")


def runs(folder: Folder, stem: str, speak: Speak) -> list[Case]:
    """The whole run of a file, which reads every setting and every tensor but a model's output and residuals."""
    stored = set(folder.tensors(stem))
    later = {name for name in stored if name.startswith(("model_output_", "mid_residual_", "down_residual_"))}
    later |= {"image", "sigmas", "init_noise_sigma"} | ({"model_input_0"} if "latents_unit" in stored else set())
    claims = frozenset(stored - later)
    said = whole_entry(folder, stem)
    for name in ("residual_atol", "image_atol"):  # the bounds of comparisons of their own, below
        said["tolerance"].get(name)
    return [Case(f"{stem}-run", partial(run, speak=speak), folder, stem, claims, said)]


def parts_of(folder: Folder, stem: str) -> list[Case]:
    """What of a file needs no image prompt."""
    stored, found = set(folder.tensors(stem)), []

    def part(name: str, check: Callable[[Case], None], needs: set[str], claims: frozenset[str], *said: str):
        if needs <= stored:
            claims = claims & stored if name != "residuals" else claims
            found.append(Case(f"{stem}-{name}", check, folder, stem, claims, entry(folder, stem, *said)))

    size = "height width num_images_per_prompt prompt guidance_scale"
    part("start", start, {"timesteps"}, START, f"{WALK} {size} mask")
    part("guidance", guidance, {"model_output_0", "latents_unit"}, STEPPED | {"model_output_0", "latents_unit"},
         f"{WALK} guidance_scale guidance_rescale", "atol_over_std note")  # fmt: skip
    part("picture", picture, {"image"}, STEPPED | {"image"}, "", "image_atol")
    added = frozenset(name for name in stored if name.startswith(("mid_residual_", "down_residual_")))
    part("residuals", residuals, {"mid_residual_0", "control_image"},
         added | {"control_image", "latents_unit", "timesteps"},
         f"{WALK} {size} {TEXT} controlnet_conditioning_scale control_guidance_start control_guidance_end",
         "residual_atol")  # fmt: skip
    return found


def walked(case: Case) -> tuple[str, list[int], list[int]]:
    """Sampler, all timesteps, and those that run."""
    said = case.settings["settings"]
    scheduler = said["scheduler"]
    if "strength" not in said:
        path = path_of(scheduler, said["steps"])
        return scheduler, path, path
    path = path_of(scheduler, said["steps_requested"])
    run = t2i.tail(path, said["strength"])
    assert len(run) - 1 == said["steps_run"], f"{case.stem}: {len(run) - 1} steps run, not {said['steps_run']}"
    return scheduler, path, run


def begun(case: Case, path: list[int]) -> Tensor:
    """x at the first timestep that runs."""
    if case.has("latents_unit"):
        return case.input("latents_unit")
    noise, x0 = case.input("noise"), case.input("image_latents")
    full = case.settings["settings"].get("strength") == 1
    return noise if full else noised(x0, noise, SCHEDULE(path[0]))


def guides(said: Any) -> bool:
    """Whether the reference has an unconditional half: at a scale of 1, or below, it has none."""
    return said["guidance_scale"] > 1


def pictures_of(said: Any) -> int:
    """How many pictures a run draws."""
    return said.get("num_images_per_prompt", 1) * (len(said["prompt"]) if isinstance(said["prompt"], list) else 1)


def beside(x: Tensor, canvas: Tensor) -> Tensor:
    """What an inpainting UNet sees: x, and the canvas for every picture."""
    return torch.cat([x, canvas.expand(len(x), -1, -1, -1)], 1)


def start(case: Case):
    said = case.settings["settings"]
    _, everything, path = walked(case)
    within(case, "timesteps", torch.tensor(path[:-1], dtype=torch.float32), 0)
    sigmas = torch.cat([sigma_of(SCHEDULE(torch.tensor(everything[:-1]))), torch.zeros(1)])
    within(case, "sigmas", sigmas, 1e-4)
    within(case, "init_noise_sigma", (sigmas[0] ** 2 + 1).sqrt(), 1e-4)
    x = begun(case, path)
    assert x.shape == (pictures_of(said), 4, said["height"] // 8, said["width"] // 8)
    seen = x
    if case.has("latent_mask"):
        assert said["mask"]
        mask = case.input("latent_mask")
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        if case.has("masked_image_latents"):
            seen = beside(x, t2i.canvas(mask, case.input("masked_image_latents")))
    if case.has("conv_in_weight_9ch"):
        assert case.input("conv_in_weight_9ch").shape[1] == seen.shape[1]
    within(case, "model_input_0", seen.repeat(1 + guides(said), 1, 1, 1), 1e-5)


def bound_of(case: Case) -> float:
    """The bound of latents: a share of their deviation in the end."""
    tolerance = case.settings["tolerance"]
    tolerance.get("note")
    return tolerance["atol_over_std"] * float(case.input("final_latents").std())


def guidance(case: Case):
    said, eps = case.settings["settings"], case.input("model_output_0")
    scheduler, _, path = walked(case)
    if guides(said):
        eps = guide(*halves(eps), said["guidance_scale"], said.get("guidance_rescale", 0.0))
    else:
        said.get("guidance_rescale")
    x, _ = ddim_step(case.input("latents_unit"), eps, SCHEDULE(path[0]), SCHEDULE(path[1]))
    close_steps(case, [told(x, path[1], scheduler)], bound_of(case))


def close_steps(case: Case, latents: list[Tensor], bound: float):
    """Latents after the first steps, in the reference's terms."""
    for i, (ours, theirs) in enumerate(zip(latents, case.input("latents_per_step"), strict=False)):
        error = float((ours - theirs).abs().max())
        assert error <= bound, f"{case.stem}: latents_per_step {i}: off by {error:.3g}, may be {bound:.3g}"


def picture(case: Case):
    final, vae = case.input("final_latents"), parts().vae
    assert torch.equal(case.input("latents_per_step")[-1], final)
    within(case, "image", vae.decode(final / vae.cfg.scaling), case.settings["tolerance"]["image_atol"])


@cache
def controlnet() -> ControlNet:
    found = latent.load(TINY / "controlnet")
    return build(found.family, found.config, found.tensors, dtype=torch.float32).requires_grad_(False)


def control(case: Case) -> Control:
    """The ControlNet of a case with its hint, whose values are 0 and 1."""
    hint = case.input("control_image").float().expand(-1, 3, -1, -1)
    said = case.settings["settings"]
    first, last = controlled(case)
    return Control(net=controlnet(), hint=hint, scale=said["controlnet_conditioning_scale"], first=first, last=last)


def controlled(case: Case) -> tuple[float | None, float | None]:
    """The first and last timestep of a case that its ControlNet adds to; above all of them where it never does."""
    said = case.settings["settings"]
    start, end = said.get("control_guidance_start", 0.0), said.get("control_guidance_end", 1.0)
    if (start, end) == (0, 1):
        return None, None
    _, _, path = walked(case)
    try:
        return between(path, start, end)
    except ValueError:
        return path[0] + 1, path[0] + 1


def residuals(case: Case):
    said, x, wanted = case.settings["settings"], case.input("latents_unit"), case.input("mid_residual_0")
    said.get("num_images_per_prompt"), said["guidance_scale"]
    _, _, path = walked(case)
    within(case, "timesteps", torch.tensor(path[:-1], dtype=torch.float32), 0)
    positive, negative = prompts(said, len(x))
    rows = [positive] if len(wanted) == len(x) else [negative, positive]  # of the conditional half, or of both
    context = torch.cat([prompt.context for prompt in rows])
    pooled = torch.cat([prompt.pooled for prompt in rows if prompt.pooled is not None])
    net, t = control(case), torch.full((len(context),), path[0])
    ids = torch.cat([ids_of(said, len(x), negative=prompt is negative) for prompt in rows])
    embed = conditioning(net.net, Prompt(context, pooled), ids)
    found = net.residuals(x.repeat(len(rows), 1, 1, 1), t, embed).scaled(float(net.on(t)))
    for name in sorted(case.claims - {"control_image", "latents_unit", "timesteps"}):
        ours = found.h if name == "mid_residual_0" else found.skips[int(name.removeprefix("down_residual_0_"))]
        within(case, name, ours, case.settings["tolerance"]["residual_atol"])


def prompts(said: Any, n: int) -> tuple[Prompt, Prompt]:
    """What the text and the negative text become, n rows each."""
    text, no = said["prompt"], said["negative_prompt"]
    skip = said.get("clip_skip") or 0
    positive = encode(parts(), text, said.get("prompt_2"), clip_skip=skip)
    negative = positive.zeros() if no is None else encode(parts(), no, said.get("negative_prompt_2"))
    return positive.repeated(n // len(positive.context)), negative.repeated(n // len(negative.context))


def ids_of(said: Any, n: int, *, negative: bool = False) -> Tensor:
    """The size ids of n pictures, or those that their unconditional half is told."""
    both = said.get("negative_original_size"), said.get("negative_target_size")
    own = negative and all(both)
    names = [
        f"{'negative_' if own else ''}{name}" for name in ("original_size", "target_size", "crops_coords_top_left")
    ]
    original, target, crop = (said.get(name) for name in names)
    return size_ids((said["height"], said["width"]), n, original=original, target=target, crop=tuple(crop or (0, 0)))


def run(case: Case, speak: Speak):
    said = case.settings["settings"]
    scheduler, _, path = walked(case)
    assert said.get("eta", 0.0) == 0, "there is no noise among the tensors for eta > 0"
    said.get("negative_crops_coords_top_left")  # which is of no use without sizes
    within(case, "timesteps", torch.tensor(path[:-1], dtype=torch.float32), 0)
    x = begun(case, path)
    n = pictures_of(said)
    assert len(x) == n
    positive, negative = prompts(said, n)
    unet, canvas = network(case)
    denoise = t2i.denoiser(
        unet, positive, negative if guides(said) else None, schedule=SCHEDULE, ids=ids_of(said, n),
        negative_ids=ids_of(said, n, negative=True),
        guidance=said["guidance_scale"], rescale=said.get("guidance_rescale", 0.0), ops=speak(case, n), canvas=canvas,
        controls=[control(case)] if case.has("control_image") else [],
    )  # fmt: skip
    if case.has("latent_mask"):
        assert said["mask"]
    if case.has("model_input_0"):
        seen = x if canvas is None else beside(x, canvas)
        within(case, "model_input_0", seen.repeat(1 + guides(said), 1, 1, 1), 1e-5)
    steps = walk(case, denoise, x, path, canvas)
    bound = bound_of(case)
    assert len(steps) == len(case.input("latents_per_step"))
    close_steps(case, [told(step.x, step.s, scheduler) for step in steps], bound)
    within(case, "final_latents", told(steps[-1].x, steps[-1].s, scheduler), bound)


def network(case: Case) -> tuple[UNet, Tensor | None]:
    """The tiny UNet, or with a first convolution of nine channels, and what that sees beside x."""
    if not case.has("conv_in_weight_9ch"):
        return parts().unet, None
    state = {**parts().unet.state_dict(), "enc.0.0.weight": case.input("conv_in_weight_9ch")}
    unet = build("unet", {**vars(parts().unet.cfg), "in_channels": 9}, state).requires_grad_(False)
    return unet, t2i.canvas(case.input("latent_mask"), case.input("masked_image_latents"))


def walk(case: Case, denoise: Any, x: Tensor, path: list[int], canvas: Tensor | None) -> list[Step]:
    """All steps of a run; with a mask and an ordinary UNet, what is kept is kept at every step."""
    with torch.no_grad():
        if canvas is not None or not case.has("latent_mask"):
            for name in case.claims & {"image_latents", "noise"}:
                case.input(name)
            return list(ddim(denoise, x, SCHEDULE, path))
        x0, noise, mask = (case.input(name) for name in ("image_latents", "noise", "latent_mask"))
        return list(t2i.repainted(ddim, denoise, x, SCHEDULE, path, x0, noise, mask))

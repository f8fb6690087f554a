"""The stylealigned set's runs: plain and styled sampling, pictures as references, panoramas, ControlNet residuals."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diaphane.methods import style_reference as sr
from diaphane.methods.controlnet import predicting
from diaphane.methods.multidiffusion import Batch, View, multidiffusion
from diaphane.methods.prompt import Prompt, beside, encode_ids
from diaphane.methods.style_targets import TargetControl
from diaphane.methods.text_to_image import denoiser
from diaphane.model.controlnet import Residuals
from diaphane.model.ops import TORCH, Ops
from diaphane.samplers.ddim import Step, ddim, step
from diaphane.samplers.inversion import last
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.path import leading, linspace, trailing
from diaphane.samplers.schedule import Schedule, linear, rescale_zero_terminal_snr, scaled_linear
from torch import Tensor, nn

from .golden_latent import TINY, parts
from .golden_reader import Case, Entry
from .golden_stylealigned import knobs, within

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def walk_of(said: Entry, steps: int) -> tuple[Schedule, list[int], str]:
    """The schedule, the path and what the network predicts, of a DDIM scheduler's settings."""
    assert said["type"] == "DDIM", f"unknown scheduler {said['type']}"
    for key in ("clip_sample", "thresholding"):
        assert not said.get(key), f"{key} is no walk of latent models"
    make = {"scaled_linear": scaled_linear, "linear": linear}[said["beta_schedule"]]
    schedule = make(said["num_train_timesteps"], said["beta_start"], said["beta_end"])
    if said.get("rescale_betas_zero_snr"):
        schedule = rescale_zero_terminal_snr(schedule)
    end, total = -1 if said["set_alpha_to_one"] else 0, said["num_train_timesteps"]
    offset, spacing = said.get("steps_offset", 0), said.get("timestep_spacing", "leading")
    if spacing == "leading":
        path = leading(steps, total, offset=offset, end=end)
    else:
        path = {"trailing": trailing, "linspace": linspace}[spacing](steps, total, end=end)
    return schedule, path, PREDICTIONS[said["prediction_type"]]


def prompts(case: Case) -> tuple[Prompt, Prompt]:
    """The texts and the negative texts of a run, one row an image."""
    return (
        Prompt(case.input("in.prompt_embeds"), case.input("in.pooled_prompt_embeds")),
        Prompt(case.input("in.negative_prompt_embeds"), case.input("in.negative_pooled_prompt_embeds")),
    )


def picked(prompt: Prompt, rows: Sequence[int]) -> Prompt:
    """Some rows of a prompt, in that order."""
    assert prompt.pooled is not None
    return Prompt(prompt.context[list(rows)], prompt.pooled[list(rows)])


def raw(case: Case, name: str, both: Denoise, x: Tensor, t: float):
    """What the network says in the first step, both halves."""
    if case.has(name):
        within(case, name, both(torch.cat([x, x]), torch.full((2 * len(x),), float(t))))


def sampling(case: Case):
    said = case.settings["settings"]
    n, ids = said["num_images"], case.input("in.time_ids").float().repeat(said["num_images"], 1)
    positive, negative = prompts(case)
    x = case.input("in.latents_init")
    assert x.shape == (n, 4, *said["latent_hw"])
    assert said.get("eta", 0.0) == 0, "there is no noise among the tensors for eta > 0"
    schedule, path, kind = walk_of(said["scheduler"], said["num_inference_steps"])
    assert case.input("in.timesteps").tolist() == path[:-1]
    ops = knobs(said, [0] * n)
    denoise = denoiser(
        parts().unet, positive, negative, schedule=schedule, ids=ids, prediction=kind,
        guidance=said["guidance_scale"], ops=ops,
    )  # type: ignore[arg-type]  # fmt: skip
    both = predicting(parts().unet, beside(negative, positive), ids.repeat(2, 1), ops=ops)
    raw(case, "out.unet_out_step0", both, x, path[0])
    steps = list(ddim(denoise, x, schedule, path))
    within(case, "out.latents_per_step", torch.stack([one.x for one in steps]))
    within(case, "out.final_latents", steps[-1].x)


def transfer(case: Case):
    said = case.settings["settings"]
    n, z0, x = said["num_images"], case.input("in.z0"), case.input("in.latents_init")
    assert x.shape == (n, 4, *said["latent_hw"])
    said.get("compute_dtype")
    positive, negative = prompts(case)
    ids = case.input("in.time_ids").float()
    schedule, path, kind = walk_of(said["scheduler"], said["num_inference_steps"])

    def source(scale: float) -> Denoise:
        return denoiser(parts().unet, picked(positive, [0]), picked(negative, [0]), schedule=schedule, ids=ids,
                        prediction=kind, guidance=scale)  # type: ignore[arg-type]  # fmt: skip

    up, again = said["guidance_scale_inversion"], said["guidance_scale_reconstruction"]
    zts = sr.trajectory(z0, sr.inverted(source(up), z0, schedule, path), path)
    within(case, "out.zts", zts[:, 0])
    recon = sr.trajectory(z0, sr.inverted(source(again), z0, schedule, path), path)
    within(case, "out.zts_recon", recon[:, 0])
    within(case, "out.reconstruction", last(ddim(source(again), recon[0], schedule, path)).x)
    within(case, "out.reconstruction_same_guidance", last(ddim(source(up), zts[0], schedule, path)).x)
    ops = knobs(said, [0] * n)
    rows = ids.repeat(n, 1)
    references = sr.Trajectory(zts, path, said["offset"])
    denoise = denoiser(parts().unet, positive, negative, schedule=schedule, ids=rows, prediction=kind,
                       guidance=said["guidance_scale_generation"], ops=ops)  # type: ignore[arg-type]  # fmt: skip
    start = torch.cat([zts[said["offset"]], x[1:]])
    within(case, "out.latents_start", start)
    both = predicting(parts().unet, beside(negative, positive), rows.repeat(2, 1), ops=ops)
    raw(case, "out.unet_out_step0", both, start, path[0])
    steps = list(sr.transferred(ddim, denoise, x, schedule, path, references))
    within(case, "out.latents_per_step", torch.stack([one.x for one in steps]))
    within(case, "out.final_latents", steps[-1].x)
    seen = [zts[int(i)] for i in references.shown[:-1]]
    within(
        case,
        "out.reference_before_overwrite",
        torch.cat([own(a, b, schedule) for a, b in zip(steps, seen, strict=True)]),
    )


def own(one: Step, seen: Tensor, schedule: Schedule) -> Tensor:
    """Where the step itself would take the reference that the network saw."""
    return step(seen, one.eps[:1], schedule(one.t), schedule(one.s))[0]


def end_to_end(case: Case):
    said = case.settings["settings"]
    for part, digest in said["component_sha256"].value.items():
        name = "diffusion_pytorch_model" if part == "vae" else "model"
        data = (TINY / part / f"{name}.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == said["component_sha256"][part] == digest, f"another {part}"
    n, size, image = said["num_images"], said["image_size"], case.input("in.image")
    assert image.shape == (size, size, 3)
    z0 = parts().vae.latents((image.permute(2, 0, 1)[None] / 255) * 2 - 1)
    within(case, "out.z0", z0)
    ids = [case.input("in.input_ids"), case.input("in.input_ids_2")]
    for tokenizer, row in zip(parts().tokenizers, ids, strict=True):
        assert torch.cat([tokenizer(text) for text in said["prompts"]]).tolist() == row.tolist()
    if case.has("in.inversion_empty_ids"):
        case.input("in.inversion_empty_ids")  # their states are zeros
    positive = encode_ids(parts(), [row.long() for row in ids])
    within(case, "out.prompt_embeds", positive.context)
    within(case, "out.pooled_prompt_embeds", positive.pooled)
    source = picked(positive, [0])
    pair = beside(source.zeros(), source)
    within(case, "out.inv_context", pair.context)
    within(case, "out.inv_text_embeds", pair.pooled)
    inv_ids, gen_ids = (torch.tensor([said[f"{when}_time_ids"]]).float() for when in ("inversion", "generation"))
    within(case, "out.inv_time_ids", inv_ids.repeat(2, 1))
    schedule, path, kind = walk_of(said["scheduler"], said["num_inference_steps"])
    up = denoiser(parts().unet, source, source.zeros(), schedule=schedule, ids=inv_ids, prediction=kind,
                  guidance=said["guidance_scale_inversion"])  # type: ignore[arg-type]  # fmt: skip
    zts = sr.trajectory(z0, sr.inverted(up, z0, schedule, path), path)
    within(case, "out.zts", zts[:, 0])
    denoise = denoiser(parts().unet, positive, positive.zeros(), schedule=schedule, ids=gen_ids.repeat(n, 1),
                       prediction=kind, guidance=said["guidance_scale_generation"],
                       ops=knobs(said, [0] * n))  # type: ignore[arg-type]  # fmt: skip
    references = sr.Trajectory(zts, path, said["offset"])
    steps = sr.transferred(ddim, denoise, case.input("in.latents_init"), schedule, path, references)
    within(case, "out.final_latents", last(steps).x)


def panorama(case: Case):
    said = case.settings["settings"]
    x, ref = case.input("in.latents_init"), case.input("in.reference_latent")
    height, width = said["panorama_latent_hw"]
    assert x.shape == (1, 4, height, width)
    views = [View(*row) for row in said["views_hstart_hend_wstart_wend"]]
    wide, stride, circular = said["window"], said["stride"], said["circular_padding"]
    assert ref.shape == (1, 4, min(wide, height), wide)
    assert circular or all(view.right <= width for view in views)
    assert all(b.left - a.left == stride for a, b in pairwise(views) if a.top == b.top)
    assert said.get("note") is None or said["note"]
    positive, negative = prompts(case)
    ids = case.input("in.time_ids").float()
    schedule, path, kind = walk_of(said["scheduler"], said["num_inference_steps"])

    def make(batch: Batch) -> Denoise:
        which = [0] * len(batch.references) + [1] * len(batch.views)
        return denoiser(
            parts().unet, picked(positive, which), picked(negative, which), schedule=schedule,
            ids=ids.repeat(len(which), 1), prediction=kind, guidance=said["guidance_scale"],
            ops=knobs(said, batch.refs),
        )  # type: ignore[arg-type]  # fmt: skip

    alone = make(Batch([0], [], [0]))
    path_of_reference = sr.drawn(ddim(alone, ref, schedule, path), ref)
    references = sr.Trajectory(path_of_reference, path)
    denoise = multidiffusion(make, views, batch=said["view_batch_size"], references=references)
    within(case, "out.final_reference", path_of_reference[-1])
    bottom, right = max(view.bottom for view in views), min(width, max(view.right for view in views))
    drawn = last(ddim(denoise, x[:, :, :bottom, :right], schedule, path)).x
    unseen = (0, width - right, 0, height - bottom)  # what no window of the authors' reaches, they leave 0
    within(case, "out.final_panorama", F.pad(drawn, unseen))


class Constant(nn.Module):
    """A ControlNet that says the same whatever it sees."""

    def __init__(self, found: Residuals):
        super().__init__()
        self.found, self.in_channels = found, 4
        self.kind = nn.Parameter(torch.zeros(1))
        self.vector, self.embed = parts().unet.vector, parts().unet.embed

    def forward(self, x: Tensor, c: object, hint: Tensor, ops: Ops = TORCH) -> Residuals:
        both = len(self.found.h)
        assert len(x) in (both, both // 2)
        own = slice(both - len(x), None)  # without guidance only the texts are asked about
        return Residuals(self.found.h[own], [skip[own] for skip in self.found.skips])


def controlnet(case: Case):
    said = case.settings["settings"]
    n = 1 + said["num_targets"]
    assert said.get("note") is None or said["note"]
    x, ids = case.input("in.latents_init"), case.input("in.time_ids").float().repeat(n, 1)
    assert x.shape == (n, 4, *said["latent_hw"])
    which = [0] + [1] * (n - 1)
    positive, negative = (picked(prompt, which) for prompt in prompts(case))
    schedule, path, kind = walk_of(said["scheduler"], said["num_inference_steps"])
    names = sorted(
        (name for name in case.claims if ".down_residual." in name), key=lambda name: int(name.split(".")[-1])
    )
    found = Residuals(case.input("in.mid_residual"), [case.input(name) for name in names])
    start, end, total = said["control_guidance_start"], said["control_guidance_end"], len(path) - 1
    keeps = [0.0 if i / total < start or (i + 1) / total > end else 1.0 for i in range(total)]
    assert keeps == said["controlnet_keep_per_step"]
    scale, steps, ops = said["controlnet_conditioning_scale"], [], knobs(said, [0] * n)
    for i, keep in enumerate(keeps):
        control = TargetControl(net=Constant(found), hint=torch.zeros(1, 3, 8, 8), scale=scale * keep, refs=[0] * n)  # type: ignore[arg-type]
        denoise = denoiser(
            parts().unet, positive, negative, schedule=schedule, ids=ids, prediction=kind,
            guidance=said["guidance_scale"], controls=[control] if scale * keep else [], ops=ops,
        )  # type: ignore[arg-type]  # fmt: skip
        x = next(ddim(denoise, x, schedule, path[i : i + 2])).x
        steps.append(x)
    within(case, "out.latents_per_step", torch.stack(steps))
    within(case, "out.final_latents", x)

"""The h-space set's cases about schedules, paths and DDIM walks: inversion, single steps, learned variances."""

import re
from functools import cache, partial
from pathlib import Path

import torch
from diaphane.methods.diffstyle import AuthorsCode, Content, diffstyle
from diaphane.methods.taps import Inverted, Tap, invert, look, tapped
from diaphane.model.blocks import ThreeLists, denoiser
from diaphane.samplers import ddpm
from diaphane.samplers.ddim import Step, ddim
from diaphane.samplers.parameterisation import over, x0_from_eps
from diaphane.samplers.path import papers, upward
from diaphane.samplers.schedule import linear
from torch import Tensor

from .golden_nets import tiny
from .golden_networks import blend_of, face
from .golden_reader import RUN, STEP, Case, Entry, Folder, close, near, stat

SCHEDULE = linear()
NEVER = 10_000  # no timestep is as high


class Tape:
    """The stored noise, drawn in order; `at` may be set where the authors' code draws more than it uses."""

    def __init__(self, folder: Folder):
        self.values, self.at = folder.tensors("noise")["noise_x32"].float() / 32, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.at += 1
        return self.values[self.at - 1].expand_as(x)


class Calls:
    """How often a network's encoder and decoder ran while this was open."""

    def __init__(self, unet: ThreeLists):
        self.encoder = self.decoder = 0
        self.handles = [
            unet.enc[0].register_forward_hook(self.encoded),
            unet.conv_out.register_forward_hook(self.decoded),
        ]

    def encoded(self, *_):
        self.encoder += 1

    def decoded(self, *_):
        self.decoder += 1

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def pixels(u8: Tensor) -> Tensor:
    """(C, H, W) or (B, C, H, W) bytes -> (B, C, H, W) in [-1, 1]."""
    return ((u8.float() / 255 - 0.5) / 0.5).reshape(-1, *u8.shape[-3:])


@cache
def held(model: str, path: Path, image: str, n: int) -> Inverted:
    """An image of a set inverted in n steps."""
    return invert(tiny(model), pixels(Folder(path).tensors("images")[f"{image}_u8"]), SCHEDULE, papers(n))


def same_steps(ours: list[Step], theirs: list[Entry], tolerance: float, what: str, x0: str = "x0"):
    """Timesteps and the figures of every step."""
    assert [(step.t, step.s) for step in ours] == [(step["t"], step["t_next"]) for step in theirs], what
    for step, figures in zip(ours, theirs, strict=True):
        stat(step.x, figures["x_out"], tolerance, f"{what}: x after t = {step.t}")
        stat(step.x0, figures[x0], tolerance, f"{what}: x0 at t = {step.t}")


def image_cases(folder: Folder, stem: str) -> list[Case]:
    names = [name for name in folder.tensors(stem) if name.endswith("_u8")]
    return [Case(f"{stem}-{name}", partial(image, name=name), folder, stem, frozenset({name})) for name in names]


def image(case: Case, name: str):
    u8 = case.input(name)
    assert u8.dtype == torch.uint8
    assert u8.shape[-3] == 3
    assert 0 < float(pixels(u8).abs().max()) <= 1


def noise_cases(folder: Folder, stem: str) -> list[Case]:
    return [Case(f"{stem}-tape", tape, folder, stem, frozenset({"noise_x32"}))]


def tape(case: Case):
    noise = case.input("noise_x32")
    assert noise.dtype == torch.int8
    assert abs(float((noise.float() / 32).std()) - 1) < 0.1


def schedule_cases(folder: Folder, stem: str) -> list[Case]:
    return [Case(f"{stem}-linear", schedule, folder, stem, frozenset(folder.tensors(stem)))]


def schedule(case: Case):
    alphas, n = SCHEDULE.alphas, len(SCHEDULE)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    case.compare("betas", 1 - alphas / before, 1e-7)
    case.compare("alphas_cumprod_f32", alphas, 1e-6)
    logs = torch.stack([ddpm.log_variance(SCHEDULE, t, t - 1, "small") for t in range(1, n)])
    theirs = case.input("logvar_fixedsmall")
    close(logs, theirs[1:], 1e-5, "log posterior variances")
    near(float(theirs[0]), float(torch.tensor(1e-20).log()), 1e-5, "the log variance of no noise")


def sequence_cases(folder: Folder) -> list[Case]:
    names = folder.json("inject", "sequences") or {}
    return [
        Case(f"sequence-{name}", partial(sequence, name=name), folder, entry=folder.entry("inject", "sequences", name))
        for name in names
    ]


def sequence(case: Case, name: str):
    found = re.fullmatch(r"n(\d+)_t(\d+)", name)
    assert found, f"a sequence is called nN_tT; this one is {name}"
    path = papers(int(found[1]), int(found[2]))
    assert upward(path) == case.settings["seq"]
    assert list(reversed(path[1:])) == case.settings["seq_next"]


def learned_range_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    return [Case(stem, partial(learned_range, model=model), folder, stem, frozenset(folder.tensors(stem)))]


def learned_range(case: Case, model: str):
    unet, x, t = tiny(model), case.input("x"), case.input("t")
    eps, v = unet(x, unet.embed(t.float())).chunk(2, dim=1)
    x0 = x0_from_eps(x, eps, SCHEDULE(t))
    means, logs = [], []
    for i, now in enumerate(t.expand(len(x)).tolist()):
        means.append(ddpm.posterior_mean(x[i], x0[i], SCHEDULE, now, now - 1))
        logs.append(ddpm.log_variance(SCHEDULE, now, now - 1, "learned", v[i]))
    case.compare("pred_xstart", x0, STEP)
    case.compare("mean", torch.stack(means), STEP)
    case.compare("log_variance", torch.stack(logs), STEP)


def invert_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    cases = []
    for i, run in enumerate(folder.json("inject", "invert", model, "runs") or []):
        image, where = run["image"], f"inject.invert.{model}.runs[{i}]"
        kept = rf"{re.escape(image)}_(xT|rec|fwd_x_mid|h_t\d+)"
        claims = frozenset(key for key in folder.tensors(stem) if re.fullmatch(kept, key))
        check = partial(inversion, model=model)
        cases.append(Case(f"{stem}-{i}-{image}", check, folder, stem, claims, Entry(run, where)))
    return cases


def inversion(case: Case, model: str):
    unet, entry, n = tiny(model), case.settings, case.folder.json("inject", "invert", model, "n")
    image, steps = entry["image"], entry["steps"]
    assert len(steps) == 2 * n - 1
    path = papers(n, max(step["t"] for step in steps))
    x0 = pixels(case.folder.tensors("images")[f"{image}_u8"])
    taps: list[Tap] = list(tapped(unet, x0, SCHEDULE, upward(path)))
    x_T = taps[-1].step.x
    taps += tapped(unet, x_T, SCHEDULE, path)
    same_steps([tap.step for tap in taps], steps, RUN, f"{case.name}", "x0_pred")
    for tap, figures in zip(taps, steps, strict=True):
        stat(tap.h, figures["h"], RUN, f"{case.name}: h at t = {tap.step.t}")
    case.compare(f"{image}_xT", x_T, RUN)
    case.compare(f"{image}_rec", taps[-1].step.x, RUN)
    case.compare(f"{image}_fwd_x_mid", taps[n // 2 - 1].step.x, RUN)
    rmse = float((taps[-1].step.x - x0).square().mean().sqrt())
    near(rmse, entry["rec_rmse"], RUN, f"{case.name}: rmse of the reconstruction")
    hs = {tap.step.t: tap.h for tap in taps[: n - 1]}
    for key in case.claims:
        if found := re.fullmatch(rf"{image}_h_t(\d+)", key):
            case.compare(key, hs[int(found[1])], RUN)


def step_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    cases = []
    for name, value in (folder.json("inject", "steps", model) or {}).items():
        stored, t = folder.tensors(stem), value["t"]
        claims = {key for key in stored if key.startswith(f"{name}.")} | {f"x_t{t}"}
        if value["gamma"] is not None:
            claims.add(f"content_h_t{t}")
        entry = folder.entry("inject", "steps", model, name)
        cases.append(
            Case(f"{stem}-{name}", partial(one_step, model=model, name=name), folder, stem, frozenset(claims), entry)
        )
    return cases


def one_step(case: Case, model: str, name: str):
    unet, entry, noise = tiny(model), case.settings, Tape(case.folder)
    t, s, gamma, omega = entry["t"], entry["t_next"], entry["gamma"], entry.get("omega", 0.0)
    eta, t_edit, masked = entry.get("eta", 0.0), entry.get("t_edit", 0), entry.get("use_mask", False)
    dt_lambda, dt_end = entry.get("dt_lambda", 1.0), entry.get("dt_end", 950)
    x, path = case.input(f"x_t{t}"), [t, s]
    calibrated = gamma is not None and omega != 0
    noise.at = 1 if calibrated and eta else 0  # a calibrated step draws twice and uses the second
    assert entry["noise_draws"] == (noise.at + 1 if eta else 0)
    with Calls(unet) as calls:
        if gamma is None and dt_lambda == 1:
            step = next(ddim(denoiser(unet), x, SCHEDULE, path, eta=eta, noise=noise))
        else:
            h = look(unet, x, t)[0] if gamma is None else case.input(f"content_h_t{t}")
            content = Content({t: h}, gamma or 0.0, face(h) if masked else None)
            calls.encoder = 0
            authors = AuthorsCode(dt_lambda=dt_lambda, dt_end=dt_end)
            step = next(
                diffstyle(
                    unet, x, [content], SCHEDULE, path, blend=blend_of(masked), omega=omega, t_edit=t_edit,
                    t_boost=t if eta else -1, eta=eta, noise=noise, authors=authors,
                )
            )  # fmt: skip
    below = calibrated and t < t_edit  # there our calibration changes nothing and costs nothing
    theirs = entry["unet_calls"]
    assert (calls.encoder, theirs) == ((1, 2) if below else (theirs, 2 if calibrated else 1))
    a = SCHEDULE(t)
    called_at = over(a.sqrt(), x) * step.x0 + over((1 - a).sqrt(), x) * step.eps  # where the last call was made
    case.compare(f"{name}.x_next", step.x, STEP)
    case.compare(f"{name}.x0_pred", step.x0, STEP)
    case.compare(f"{name}.x_calibrated", called_at, STEP)
    stat(step.x, entry["x_next"], STEP, f"{case.name}: x")
    if "dx_rms" in entry:
        near(float((called_at - x).square().mean().sqrt()), entry["dx_rms"], 1e-5, f"{case.name}: rms of dx")
    if "max_abs_diff_to_plain_ddim" in entry:
        plain = next(ddim(denoiser(unet), x, SCHEDULE, path))
        difference = float((step.x - plain.x).abs().max())
        assert difference <= max(1e-6, entry["max_abs_diff_to_plain_ddim"]) * max(1.0, float(plain.x.abs().max()))


def diffstyle_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    cases = []
    for i, value in enumerate(folder.json("inject", "diffstyle") or []):
        if value["model"] == model:
            claims = frozenset(key for key in folder.tensors(stem) if key.startswith(f"{value['name']}."))
            entry = Entry(value, f"inject.diffstyle[{i}]")
            cases.append(Case(f"{stem}-{value['name']}", partial(injection, model=model), folder, stem, claims, entry))
    return cases


def injection(case: Case, model: str):
    unet, entry, noise, args = tiny(model), case.settings, Tape(case.folder), case.settings["args"]
    name, path, replace = entry["name"], papers(args["n_gen_step"]), args["content_replace_step"]
    assert entry["model"] == model
    t_edit, t_boost, omega, masked = args["user_defined_t_edit"], args["t_noise"], args["omega"], args["use_mask"]
    content_h = held(model, case.folder.path, "content", args["n_inv_step"]).h
    x = held(model, case.folder.path, "style", args["n_inv_step"]).x_T
    inject_at = None if replace == -1 else papers(replace)[:-1]
    injected = [t for t in path[:-1] if inject_at is None or t in inject_at]
    noisy = [t for t in injected if t <= t_boost]
    draws = 2 if omega else 1
    assert entry["injected_t"] == injected
    assert entry["noisy_t"] == noisy
    assert entry["noise_draws"] == draws * len(noisy)
    edited = [t for t in path[:-1] if t >= t_edit]
    assert entry["edit_end_t"] == (edited[-1] if edited else None)
    mask = face(next(iter(content_h.values()))) if masked else None
    walk = diffstyle(
        unet, x, [Content(content_h, args["hs_coeff"], mask)], SCHEDULE, path, blend=blend_of(masked), omega=omega,
        t_edit=t_edit, t_boost=t_boost, noise=noise,
        authors=AuthorsCode(inject_at=inject_at, dt_lambda=args["dt_lambda"], dt_end=args["dt_end"]),
    )  # fmt: skip
    steps = []
    for t, theirs in zip(path[:-1], entry["unet_calls"], strict=True):
        noise.at = draws * sum(u > t for u in noisy) + draws - 1
        with Calls(unet) as calls:
            steps.append(next(walk))
        calibrates = t in injected and omega != 0
        assert theirs == (2 if calibrates else 1)
        assert calls.encoder == (2 if calibrates and t >= t_edit else 1)
        assert calls.decoder == calls.encoder + (t in injected and t >= t_edit)
    same_steps(steps, entry["steps"], RUN, case.name)
    case.compare(f"{name}.x_final", steps[-1].x, RUN)
    if case.has(f"{name}.x_after_edit"):
        case.compare(f"{name}.x_after_edit", steps[path.index(entry["edit_end_t"])].x, RUN)

"""The h-space set's cases about Asyrp: delta blocks, asymmetric steps, whole edits, training, thresholds."""

from functools import partial

import torch
import torch.nn.functional as F
from diaphane.methods.asyrp import DeltaF, Edit, asyrp, deltas
from diaphane.methods.delta import given, timeless
from diaphane.methods.thresholds import t_boost, t_edit
from diaphane.methods.train_delta import text_direction, train_delta, training_path
from diaphane.samplers.ddim import Step
from diaphane.samplers.inversion import last
from diaphane.samplers.path import papers, upward
from torch import Tensor

from .golden_nets import blocks, official_name, tiny
from .golden_reader import FORWARD, HALF, RUN, STEP, Case, Entry, Folder, near, stat
from .golden_walks import NEVER, SCHEDULE, Tape, pixels


def step_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    stored, named = set(folder.tensors(stem)), folder.json("asyrp", "steps", model) or {}
    shared = {key for key in stored if "." not in key and not key.startswith("x_t")}
    cases = []
    if shared & {"delta_h_t", "delta_h_no_t", "temb"}:
        cases.append(Case(f"{stem}-block0", partial(block, model=model), folder, stem, frozenset(shared)))
    for name, value in named.items():
        claims = frozenset({key for key in stored if key.startswith(f"{name}.")} | {f"x_t{value['t']}"})
        entry = folder.entry("asyrp", "steps", model, name)
        run = partial(one_step, model=model, name=name)
        cases.append(Case(f"{stem}-{name}", run, folder, stem, claims, entry))
    return cases


def block(case: Case, model: str):
    f, h, emb = blocks(model)[0], case.input("h"), tiny(model).embed(case.input("t")).emb
    case.compare("temb", emb, FORWARD)
    case.compare("delta_h_t", f(h, emb), FORWARD)
    case.compare("delta_h_no_t", timeless(f)(h, emb), FORWARD)


def sum_of_blocks(model: str, coefficients: list[float], timeless_too: bool) -> Edit:
    """coefficients: of h itself, then of block 0, 1, ..."""
    fs: list[DeltaF] = [timeless(f) if timeless_too else f for f in blocks(model)[: len(coefficients) - 1]]
    return deltas(fs, coefficients[1:], origin=coefficients[0])


def one_step(case: Case, model: str, name: str):
    entry, noise = case.settings, Tape(case.folder)
    t, s, eta, coefficients = entry["t"], entry["t_next"], entry.get("eta", 0.0), entry["hs_coeff"]
    assert len(coefficients) == entry["index"] + 2
    ignore = entry.get("ignore_timestep", False)
    if entry["given_delta"]:
        edit = given(case.input(f"{name}.delta_h_given"), coefficients[1], origin=coefficients[0])
    else:
        edit = sum_of_blocks(model, coefficients, ignore)
    step = next(
        asyrp(
            tiny(model), case.input(f"x_t{t}"), SCHEDULE, [t, s], edit,
            t_edit=entry["t_edit"], t_boost=t + 1 if eta else 0, eta=eta, noise=noise,
        )
    )  # fmt: skip
    assert noise.at == entry["noise"]
    case.compare(f"{name}.x_next", step.x, STEP)
    case.compare(f"{name}.x0_edit", step.x0, STEP)


def edit_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    cases, runs = [], folder.json("asyrp", "edit", model) or []
    for i, value in enumerate(runs):
        claims = {key for key in folder.tensors(stem) if key.startswith(f"{value['name']}.")} | {"xT"}
        entry = Entry(value, f"asyrp.edit.{model}[{i}]")
        run = partial(whole_edit, model=model)
        cases.append(Case(f"{stem}-{value['name']}", run, folder, stem, frozenset(claims), entry))
    return cases


def whole_edit(case: Case, model: str):
    unet, entry, noise, x = tiny(model), case.settings, Tape(case.folder), case.input("xT")
    name, n, edited_from, boosted_below = entry["name"], entry["n"], entry["t_edit"], entry["t_boost"]
    path = papers(n, entry["seq"][0])
    assert path[:-1] == entry["seq"]
    tuples = entry["hs_coeff"] if isinstance(entry["hs_coeff"][0], list) else [entry["hs_coeff"]]
    unedited = partial(asyrp, unet, x, SCHEDULE, path, lambda h, t, c: h, t_edit=NEVER)
    runs: list[list[Step]] = [list(unedited())]
    boosted = last(unedited(t_boost=boosted_below, noise=Tape(case.folder))).x  # from the start of the tape
    for coefficients in tuples:
        assert len(coefficients) == entry["n_attr"] + 1
        edit = sum_of_blocks(model, coefficients, entry["ignore_timesteps"])
        walk = asyrp(unet, x, SCHEDULE, path, edit, t_edit=edited_from, t_boost=boosted_below, noise=noise)
        runs.append(list(walk))
    assert noise.at == entry["noise_draws"]
    assert len(entry["steps"]) == len(runs) * n
    for i, figures in enumerate(entry["steps"]):
        step = runs[figures["run"]][i % n]
        assert (figures["run"], figures["t"]) == (i // n, step.t)
        assert figures["eta"] == (1.0 if figures["run"] and step.t < boosted_below else 0.0)
        stat(step.x, figures["x_out"], RUN, f"{case.name}: run {i // n}, x after t = {step.t}")
        stat(step.x0, figures["x0"], RUN, f"{case.name}: run {i // n}, x0 at t = {step.t}")
    case.compare(f"{name}.x_origin", runs[0][-1].x, RUN)
    above = sum(t >= edited_from for t in path[:-1])
    for k, steps in enumerate(runs[1:]):
        case.compare(f"{name}.x_edit{k}", steps[-1].x, RUN)
        case.compare(f"{name}.x_after_edit{k}", steps[above - 1].x, RUN)
        strength = float((steps[-1].x - boosted).abs().mean())
        near(strength, entry["edit_strength_mean_abs"][k], 1e-4, f"{case.name}: strength of edit {k}")


def train_cases(folder: Folder, stem: str) -> list[Case]:
    paths = (("asyrp", "train_init_block"), ("asyrp", "train_change_rms"))
    entry = folder.entry("asyrp", "train")
    return [Case(stem, training, folder, stem, frozenset(folder.tensors(stem)), entry, paths=paths)]


def training(case: Case):
    entry, stored = case.settings, case.folder.tensors(case.stem)
    source, target, plain = case.input("text_src"), case.input("text_trg"), case.input("text_plain")
    text = text_direction(source, target)
    case.compare("clip_text_dir", text, 1e-6)
    cosine = float(F.cosine_similarity(plain[:1], plain[1:]))
    near(cosine, entry["text_cosine"], 1e-6, "cosine of the plain words")
    assert entry["order"] == "for iter: for image: for t in reversed(seq_train): one SGD step"

    path = training_path(entry["n_train_step"], entry["t_edit"])
    assert upward(path) == entry["seq_train"]
    assert list(reversed(path[1:])) == entry["seq_train_next"]
    count = sum(key.startswith("x0_u8_") for key in stored)
    images = [(pixels(case.input(f"x0_u8_{i}")), case.input(f"xT_{i}")) for i in range(count)]
    weight = case.input("clip_W")

    def encode(x: Tensor) -> Tensor:
        pooled = F.avg_pool2d((x + 1) / 2, 4)
        return pooled.flatten(1) @ weight.T

    f = blocks("ddpm")[case.folder.json("asyrp", "train_init_block")].requires_grad_(True)
    names = {name: official_name("ddpm", name) for name, _ in f.named_parameters()}
    start = {name: p.detach().clone() for name, p in f.named_parameters()}
    optimiser = torch.optim.SGD(f.parameters(), lr=entry["lr"])
    rate = torch.optim.lr_scheduler.StepLR(optimiser, entry["scheduler_step"], entry["sch_gamma"])
    losses, change = [], dict(case.folder.json("asyrp", "train_change_rms") or {})
    for i in range(entry["n_iter"]):
        losses += train_delta(
            tiny("ddpm"), images, SCHEDULE, path, deltas([f], [1.0]), optimiser, encode, text,
            w_clip=entry["clip_w"], w_l1=entry["l1_w"], text_cosine=cosine,
        )  # fmt: skip
        rate.step()
        for name, p in f.named_parameters():
            key, moved = f"{i}.{names[name]}", float((p.detach() - start[name]).square().mean().sqrt())
            if key in change:
                theirs = change.pop(key)
                assert abs(moved - theirs) <= 1e-6, f"{key} changed by {moved:.4g}, not {theirs:.4g}"
            stored_name = f"after_iter{i}.{names[name]}"
            if case.has(stored_name):
                ours, theirs = p.detach().flatten(), case.input(stored_name).flatten()
                bound = 1e-6 if stored[stored_name].dtype == torch.float32 else HALF
                assert float((ours - theirs).abs().max()) <= bound, stored_name
    assert not change, f"train_change_rms has also {', '.join(change)}"
    for ours, theirs in zip(losses, entry["log"], strict=True):
        for name, value in (("l1", ours.l1), ("dir", ours.direction), ("clip_term", ours.clip), ("loss", ours.total)):
            near(value, theirs[name], RUN, f"{name} at t = {ours.t}")


def select_cases(folder: Folder) -> list[Case]:
    select = folder.json("asyrp", "t_select") or {}
    cases = []
    for i, value in enumerate(select.get("cases", [])):
        needed = [f"{value['table']}_x0_t", f"{value['table']}_{value['boost_from']}"]
        missing = [name for name in needed if name not in select]
        why = f"the table {value['table']} ships with Asyrp, not with this data" if missing else ""
        entry = Entry(value, f"asyrp.t_select.cases[{i}]")
        paths = () if missing else tuple(("asyrp", "t_select", name) for name in needed)
        name = f"t_select-{i}-{value['table']}"
        cases.append(Case(name, partial(select_times, needed=needed), folder, entry=entry, paths=paths, skip=why))
    return cases


def select_times(case: Case, needed: list[str]):
    entry = case.settings
    assert [f"{entry['table']}_x0_t", f"{entry['table']}_{entry['boost_from']}"] == needed
    x0, boost = ({int(t): d for t, d in case.folder.json("asyrp", "t_select", name)} for name in needed)
    assert t_edit(x0, entry["text_cosine"], entry["edit_th"]) == entry["t_edit"]
    assert t_boost(boost, entry["boost_th"]) == entry["t_boost"]

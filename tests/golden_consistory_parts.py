"""ConsiStory's parts against the reference data: masks, attention, blended queries, matches and what they carry."""

import re
from typing import Any

import torch
from diaphane.methods.dift import injected, matches, plan, smoothed, waves
from diaphane.methods.subject_masks import dropped, otsu, thresholded
from torch import Tensor

from .golden_latent import within
from .golden_reader import Case, Entry, Folder


def grouped(folder: Folder, stem: str, run: Any) -> list[Case]:
    """One case for every group of tensors, told by what is before the first dot."""
    names = folder.tensors(stem)
    groups = sorted({name.partition(".")[0] for name in names})
    return [
        Case(
            f"{stem}-{group}",
            run,
            folder,
            stem,
            frozenset(name for name in names if name.partition(".")[0] == group),
            folder.entry(stem, group),
        )
        for group in groups
    ]


def group_of(case: Case) -> str:
    """The group's name with its dot."""
    return case.name.rpartition("-")[2] + "."


def exact(case: Case, name: str, ours: Tensor):
    """Ours against a tensor of integers or booleans, which have to be the same."""
    if case.has(name):
        theirs = case.input(name)
        assert ours.shape == theirs.shape, f"{case.stem}: {name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        wrong = int((ours.to(theirs) != theirs).sum())
        assert not wrong, f"{case.stem}: {name}: {wrong} of {theirs.numel()} differ"


def relative(case: Case, name: str, ours: Tensor, bound: float):
    """|ours - theirs| <= bound |theirs|."""
    if case.has(name):
        theirs = case.input(name).double()
        error = float(((ours.double() - theirs).abs() / theirs.abs().clamp(min=1e-12)).max())
        assert error <= bound, f"{case.stem}: {name}: off by {error:.3g} of it, may be {bound:.3g}"


def told(entry: Entry, *keys: str):
    """What is for people, or was not needed: taken for read."""
    for key in keys:
        if key in entry and key not in entry.read:
            entry.read[key] = None


# --- masks


def mask_cases(folder: Folder, stem: str) -> list[Case]:
    """Otsu's threshold; maps from probabilities, and masks from them or from a history of maps."""
    names = sorted(folder.tensors(stem))
    arrays = sorted({name.rpartition(".")[0] for name in names if name.startswith("otsu.")})
    otsus = [
        Case(f"{stem}-{name}", otsu_case, folder, stem, frozenset(n for n in names if n.startswith(f"{name}.")))
        for name in arrays
    ]
    rest = [case for case in grouped(folder, stem, mask_case) if not case.name.endswith("-otsu")]
    return otsus + rest


def otsu_case(case: Case):
    name = case.name.partition("-")[2]
    case.read.add(f"{name}.x")
    x = case.folder.tensors(case.stem)[f"{name}.x"]  # in its own type: float16 has bins of its own
    threshold = otsu(x.flatten())
    relative(case, f"{name}.threshold", threshold[None], 1e-3 if x.dtype == torch.float16 else 1e-6)
    exact(case, f"{name}.above", x > threshold)


def mask_case(case: Case):
    said, at = case.settings, group_of(case)
    tokens, side = case.input(f"{at}token_indices").T, said["res"]
    size = (side, side)
    if case.has(f"{at}probs"):
        probs = case.input(f"{at}probs")
        assert probs.shape[:2] == (said["steps"], len(said["layers_kept"]))
        assert (probs.shape[3], probs.shape[4], probs.shape[6]) == (said["B"], said["heads"], said["L"])
        history = probs[:, :, 1].mean(3).transpose(0, 1)  # (layer, step, image, pixel, token), heads averaged
    else:
        history = case.input(f"{at}history")
        assert (history.shape[1], history.shape[2], history.shape[4]) == (said["n_history"], said["B"], said["L"])
    kept = history[:, -said["window"] :] if "window" in said else history[:, -20:]
    mean = kept.mean((0, 1))
    within(case, f"{at}mean_map", mean, 1e-6)
    chosen = tokens.clamp(min=0)[:, None].expand(-1, mean.shape[1], -1)
    maps = mean.gather(-1, chosen)
    found = []
    for to in resolutions(case, f"{at}mask_"):
        made = thresholded(maps, tokens, size, (to, to))
        found.append(made.thresholds[tokens >= 0])
        exact(case, f"{at}mask_{to}", made.mask)
        exact(
            case,
            f"{at}mask_dropped_{to}",
            dropped(made.mask, case.input(f"{at}uniform_{to}"), said["mask_dropout"]),
        )
    relative(case, f"{at}thresholds", torch.stack(found), 1e-6)


def resolutions(case: Case, start: str) -> list[int]:
    """Sides of the masks that a case has, in order."""
    found = [re.fullmatch(rf"{re.escape(start)}(\d+)", name) for name in case.claims]
    return sorted(int(m[1]) for m in found if m)


# --- matches and injection


def dift_cases(folder: Folder, stem: str) -> list[Case]:
    """Smoothed features, nearest pixels, and outputs carried along them, in the authors' order."""
    return grouped(folder, stem, dift_case)


def dift_case(case: Case):
    said, at = case.settings, group_of(case)
    told(said, "fp64_gap", "nn_gap", "extra_uses_anchor_outputs")
    first, last = said.get("inject_range") or (0, 0)
    acts = first <= said.get("step", first) <= last
    sees = case.input(f"{at}mapping").bool().fill_diagonal_(False)
    features = case.input(f"{at}features")
    assert features.shape[:2] == (said["B"], said["C"])
    smooth = smoothed(features)
    within(case, f"{at}smoothed", smooth, 1e-5)
    found = None
    for side in (said["res_small"], said["res_big"]):
        mask = case.input(f"{at}mask_{side}").bool()
        all_pairs = ~torch.eye(said["B"], dtype=torch.bool)
        found = matches(smooth, mask, smooth, (side, side), all_pairs)
        compare_matches(case, at, "", side, found, mask.any(1))
    big = said["res_big"]
    mask = case.input(f"{at}mask_{big}").bool()
    assert found is not None
    made = plan(found._replace(distance=torch.where(sees[..., None], found.distance, torch.inf)), mask)
    x = case.input(f"{at}self_attn_out")
    out = injected(x, made, waves(sees.tolist()), said["alpha"]) if acts else x
    within(case, f"{at}injected", out, 1e-5)
    exact(case, f"{at}changed", (out != x).any(2))
    thresholds = made.threshold[sees.any(1)]
    if case.has(f"{at}extra_features"):
        n, other = said["n_anchors"], case.input(f"{at}extra_features")
        told_sees = torch.ones(len(other), n, dtype=torch.bool)
        for side in (said["res_small"], big):
            if case.has(f"{at}extra_nn_map_{side}") or side == big:
                sources = case.input(f"{at}mask_{side}").bool()[:n]
                found = matches(smooth[:n], sources, smoothed(other), (side, side), told_sees)
                compare_matches(case, at, "extra_", side, found, sources.any(1))
        case.read |= {name for name in case.claims if name.startswith(f"{at}extra_mask_")}
        made = plan(found, case.input(f"{at}extra_mask_{big}").bool())
        y = case.input(f"{at}extra_self_attn_out")
        order = waves(told_sees.tolist(), sequential=False)
        out_extra = injected(y, made, order, said["alpha"], out[:n].flatten(0, 1)) if acts else y
        within(case, f"{at}extra_injected", out_extra, 1e-5)
        if case.has(f"{at}dist_thresholds") and len(case.input(f"{at}dist_thresholds")) > len(thresholds):
            thresholds = torch.cat([thresholds, made.threshold])
    within(case, f"{at}dist_thresholds", thresholds.double(), 1e-5)


def compare_matches(case: Case, at: str, start: str, side: int, found: Any, subject: Tensor, allowed: float = 0.0):
    """Indices and distances; indices of a source without a subject are arbitrary, and so is the unused diagonal."""
    name = f"{at}{start}nn_map_{side}"
    if case.has(name):
        theirs = case.input(name).long()
        used = (theirs >= 0) & subject[None, :, None] & found.distance.isfinite()
        wrong = float(((found.pixel != theirs) & used).float().mean())
        assert wrong <= allowed, f"{case.stem}: {name}: {wrong:.2%} differ"
    name = f"{at}{start}nn_dist_{side}"
    if case.has(name):
        theirs = case.input(name)
        assert bool((theirs.isinf() == found.distance.isinf()).all()), f"{case.stem}: {name}: inf elsewhere"
        error = float((found.distance - theirs)[theirs.isfinite()].abs().max())
        assert error <= 1e-5, f"{case.stem}: {name}: off by {error:.3g}"

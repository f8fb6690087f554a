"""The h-space set's cases about networks alone: embeddings, h, skips, outputs, edits of h, other configurations."""

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diaphane.methods.blend import Blend, norm_matched_slerp, slerp
from diaphane.methods.diffstyle import Content, inject
from diaphane.model.blocks import ThreeLists
from torch import Tensor

from .golden_nets import formula_network, tiny, tiny_new_order, tiny_scaled_stem
from .golden_reader import FORWARD, Case, Folder, close, stat

TIMES = (0, 1, 19, 500, 999)  # of the stored embeddings, by the set's README


def face(h: Tensor) -> Tensor:
    """The one mask of the authors' code: rows 4 ... H-2, columns 3 and 4."""
    mask = torch.zeros(1, 1, *h.shape[-2:])
    mask[:, :, 4:-1, 3:5] = 1
    return mask


def blend_of(masked: bool) -> Blend:
    """The authors match norms only where there is no mask."""
    return slerp if masked else norm_matched_slerp


def unet_cases(folder: Folder, stem: str, model: str) -> list[Case]:
    stored = set(folder.tensors(stem))
    parts: dict[str, tuple[Callable[[Case], None], str]] = {
        "forward": (partial(forward, model=model), r"x|t|eps|h|skip_\d+"),
        "embedding": (partial(embedding, model=model), r"temb_(sin|mlp)"),
        "slerp": (partial(edited, model=model, masked=False), r"eps_slerp"),
        "slerp_mask": (partial(edited, model=model, masked=True), r"eps_slerp_mask"),
        "conv_in_scaled": (partial(scaled_stem, model=model), r"eps_conv_in_scaled"),
        "new_attention_order": (partial(new_order, model=model), r"eps_new_attention_order"),
    }
    also = {"slerp": {"x", "t", "content_h"}, "conv_in_scaled": {"x", "t"}, "new_attention_order": {"x", "t"}}
    also["slerp_mask"] = also["slerp"]
    cases = []
    for name, (run, pattern) in parts.items():
        if claims := {key for key in stored if re.fullmatch(pattern, key)}:
            shared = ("skips", "skip_channel_stride") if name == "forward" else ("fw_gamma",) if "slerp" in name else ()
            paths = tuple(("inject", key, model) if key == "skips" else ("inject", key) for key in shared)
            claims |= also.get(name, set())
            cases.append(Case(f"{stem}-{name}", run, folder, stem, frozenset(claims), paths=paths))
    for key in sorted(stored):
        if found := re.fullmatch(r"eps_(b\d+)", key):
            claims = frozenset((key, f"x_{found[1]}", f"t_{found[1]}"))
            run = partial(batch, model=model, suffix=found[1])
            cases.append(Case(f"{stem}-batch_{found[1]}", run, folder, stem, claims))
    return cases


def forward(case: Case, model: str):
    unet, x, t = tiny(model), case.input("x"), case.input("t")
    c = unet.embed(t)
    deep, skips = unet.encode(x, c)
    h = unet.middle(deep, c)
    shapes, stride = case.folder.json("inject", "skips", model), case.folder.json("inject", "skip_channel_stride")
    assert [list(skip.shape) for skip in skips] == shapes
    case.compare("h", h, FORWARD)
    case.compare("eps", unet.decode(h, skips, c), FORWARD)
    for i, skip in enumerate(skips):
        case.compare(f"skip_{i:02d}", skip[:, ::stride], FORWARD)


def embedding(case: Case, model: str):
    unet, seen = tiny(model), []
    handle = unet.get_submodule("time").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    emb = unet.embed(torch.tensor(TIMES, dtype=torch.float32)).emb
    handle.remove()
    case.compare("temb_sin", seen[0], FORWARD)
    case.compare("temb_mlp", emb, FORWARD)


def batch(case: Case, model: str, suffix: str):
    unet = tiny(model)
    eps = unet(case.input(f"x_{suffix}"), unet.embed(case.input(f"t_{suffix}")))
    case.compare(f"eps_{suffix}", eps, FORWARD)


def edited(case: Case, model: str, masked: bool):
    unet, x, t = tiny(model), case.input("x"), case.input("t")
    c = unet.embed(t)
    deep, skips = unet.encode(x, c)
    h = unet.middle(deep, c)
    gamma = case.folder.json("inject", "fw_gamma")
    content = Content({int(t[0]): case.input("content_h")}, gamma, face(h) if masked else None)
    edit = inject([content], blend_of(masked))
    eps = unet.decode(edit(h, int(t[0]), c), skips, c)[:, : x.shape[1]]
    case.compare("eps_slerp_mask" if masked else "eps_slerp", eps, FORWARD)


def first_channels(unet: ThreeLists, x: Tensor, t: Tensor) -> Tensor:
    return unet(x, unet.embed(t))[:, : x.shape[1]]


def scaled_stem(case: Case, model: str):
    eps = first_channels(tiny_scaled_stem(model, 2.0**-8), case.input("x"), case.input("t"))
    error = float((eps - case.input("eps_conv_in_scaled")).abs().max())
    assert error <= 1e-4, f"{case.stem}: eps_conv_in_scaled: off by {error:.3g}, may be 1e-4"


def new_order(case: Case, model: str):
    eps = first_channels(tiny_new_order(model), case.input("x"), case.input("t"))
    case.compare("eps_new_attention_order", eps, FORWARD)


def formula_cases(folder: Folder, stem: str) -> list[Case]:
    cases = []
    for name in folder.json("inject", "formula_models") or {}:
        claims = frozenset(key for key in folder.tensors(stem) if key.startswith(f"{name}."))
        entry = folder.entry("inject", "formula_models", name)
        run = partial(formula, name=name)
        cases.append(
            Case(f"{stem}-{name}", run, folder, stem, claims, entry, paths=(("inject", "formula_models", name),))
        )
    return cases


def formula(case: Case, name: str):
    entry, x = case.settings, case.input(f"{name}.x")
    settings = dict(entry["config"].value)
    for key in settings:
        entry["config"].get(key)  # `formula_network` refuses what it does not know
    with tempfile.TemporaryDirectory() as folder:
        unet, parameters, tensors = formula_network(entry["family"], settings, entry["image_size"], Path(folder))
        assert (parameters, tensors) == (entry["n_params"], entry["n_tensors"])
        c = unet.embed(torch.full((len(x),), float(entry["t"])))
        deep, skips = unet.encode(x, c)
        h = unet.middle(deep, c)
        eps = unet.decode(h, skips, c)
    assert list(h.shape) == entry["h_shape"]
    case.compare(f"{name}.h", h, FORWARD)
    case.compare(f"{name}.eps", eps, FORWARD)
    stat(h, entry["h"], FORWARD, f"{name}: h")
    stat(eps, entry["eps"], FORWARD, f"{name}: eps")


def slerp_cases(folder: Folder, stem: str) -> list[Case]:
    names = {"matched": "out_norm_matched", "raw": "out_raw"}
    cases = [
        Case(f"{stem}-{kind}", partial(interpolate, kind=kind), folder, stem, frozenset({"v0", "v1", "gammas", name}))
        for kind, name in names.items()
        if name in folder.tensors(stem)
    ]
    if folder.json("inject", "slerp_same_input_is_nan") is not None:
        paths = (("inject", "slerp_same_input_is_nan"),)
        cases.append(Case(f"{stem}-same_input", same_input, folder, stem, frozenset({"v0"}), paths=paths))
    if folder.json("inject", "slerp_norm_preserved_maxrel") is not None:
        paths, claims = (("inject", "slerp_norm_preserved_maxrel"),), frozenset({"v0", "v1", "gammas"})
        cases.append(Case(f"{stem}-norm", norm_preserved, folder, stem, claims, paths=paths))
    return cases


def interpolate(case: Case, kind: str):
    v0, v1 = case.input("v0"), case.input("v1")
    mix = norm_matched_slerp if kind == "matched" else slerp
    ours = torch.stack([mix(v0, v1, float(gamma)) for gamma in case.input("gammas")])
    case.compare("out_norm_matched" if kind == "matched" else "out_raw", ours, FORWARD)


def same_input(case: Case):
    assert case.folder.json("inject", "slerp_same_input_is_nan") is True
    v0 = case.input("v0")  # the authors' slerp has no answer here; the one that is continuous is the input
    close(norm_matched_slerp(v0, v0, 0.3), v0.double(), 1e-6, "slerp of equal inputs")


def norm_preserved(case: Case):
    v0, v1 = case.input("v0"), case.input("v1")
    for gamma in case.input("gammas").tolist():
        ratio = norm_matched_slerp(v0, v1, gamma).flatten(1).norm(dim=1) / v0.flatten(1).norm(dim=1)
        bound = max(1e-6, case.folder.json("inject", "slerp_norm_preserved_maxrel"))
        assert float((ratio - 1).abs().max()) <= bound

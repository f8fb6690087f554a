"""Every case of a stylealigned folder: statistics, single attentions, the UNet, maps, the level rule, and runs.

A file is of the kind that its json says, whatever its name; settings and bounds come from there.  A file, tensor, key
or kind that no case takes fails by its name.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from diaphane.kernels import reference
from diaphane.kernels.adain import adain, token_stats
from diaphane.kernels.sources import Seen
from diaphane.methods.attention_maps import SharedMaps, principal
from diaphane.methods.style_aligned import Sharing, style_aligned
from diaphane.methods.style_layers import by_level, layers, plain
from diaphane.model import sites
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import SD15, SDXL
from torch import Tensor

from .golden_latent import SCHEDULE, TINY, parts
from .golden_reader import Case, Entry, Folder, unclaimed, unknown

TOLD = {"case", "description", "tensors", "fp32_vs_fp64"}  # for people
READ = {"kind", "weights", "settings", "suggested_tolerance"}
BESIDE = ("README.md", "switch_vectors.json", "scheduler.safetensors")


def cases(folder: Folder) -> list[Case]:
    """Files, tensors and json keys, each taken by a case or by one that fails."""
    from . import golden_style_walks as walks

    kinds: dict[str, Callable[[Case], None]] = {
        "unit": unit,
        "attention": attention,
        "unet_forward": forward,
        "attention_maps": maps,
        "sampling": walks.sampling,
        "inversion_transfer": walks.transfer,
        "image_transfer_end_to_end": walks.end_to_end,
        "multidiffusion": walks.panorama,
        "controlnet_residuals": walks.controlnet,
    }
    found, stems = [], []
    for path in sorted(folder.path.iterdir()):
        stem, said = path.stem, folder.documents.get(path.stem)
        if path.name == "scheduler.safetensors":
            found.append(Case(stem, scheduler, folder, stem, frozenset(folder.tensors(stem))))
            stems.append(stem)
        elif path.name == "switch_vectors.json":
            found.append(Case(stem, switches, folder, entry=folder.entry(stem)))
        elif path.suffix == ".safetensors" and isinstance(said, dict) and said.get("kind") in kinds:
            chosen = {key: value for key, value in said.items() if key not in TOLD}
            claims = frozenset(folder.tensors(stem))
            found.append(Case(stem, kinds[said["kind"]], folder, stem, claims, Entry(chosen, stem)))
            stems.append(stem)
        elif path.suffix == ".json" and isinstance(said, dict) and said.get("kind") in kinds:
            if not folder.has(stem):
                found.append(Case(stem, lambda case: None, folder, skip=f"{stem}.safetensors is not in this folder"))
        elif path.name not in BESIDE:
            kind = f" of kind {said['kind']}" if isinstance(said, dict) and "kind" in said else ""
            found.append(unknown(folder, f"file {path.name}{kind}"))
    return found + unclaimed(folder, found, stems)


def within(case: Case, name: str, ours: Tensor | None):
    """max |ours - theirs| / max(1, std(theirs)) within the bound of the case, if it has the tensor."""
    begin(case)
    if not case.has(name):
        return
    theirs = case.input(name).double()
    assert ours is not None
    assert ours.shape == theirs.shape, f"{case.stem}: {name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    assert ours.isfinite().all(), f"{case.stem}: {name}: ours is not finite"
    scale = max(1.0, float(theirs.std())) if theirs.numel() > 1 else 1.0
    noise = case.folder.json(case.stem, "fp32_vs_fp64", name.removeprefix("out."), "max_abs_err") or 0.0
    bound = max(case.settings["suggested_tolerance"]["value"], 3 * noise / scale)  # theirs is off by that itself
    error = float((ours.double() - theirs).abs().max()) / scale
    assert error <= bound, f"{case.stem}: {name}: off by {error:.3g}, may be {bound:.3g}"


def begin(case: Case):
    """What the json says besides settings: the weights, which have to be those here, and how errors are measured."""
    said = case.settings
    if "weights" in said.read:
        return
    path, digest = said["weights"]["path"], said["weights"]["sha256"]
    assert path == "tiny-sdxl/unet", f"{case.stem}: unknown network {path}"
    weights = (TINY / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == digest, f"{case.stem}: made with other weights of {path}"
    assert said["suggested_tolerance"]["metric"] == "max|a-b| / max(1, std(b)) per output tensor"
    assert said["kind"]
    for key in ("seed", "uncond_embeddings", "cfg_halves_share_latents"):
        said["settings"].get(key)  # how the inputs were made


def knobs(said: Entry, refs: list[int], ops: Ops = TORCH, *, one: bool = False) -> Ops:
    """The verbs that a case's settings describe; of `one` module alone, which shares whatever the level says."""
    flags = said["style_aligned"]
    on = said.get("handler_registered", True)
    if flags is None or not on:
        assert flags is None or flags.value
        return ops
    flags.get("share_layer_norm")  # statistics of one token each: nothing to share
    sharing = Sharing(
        attention=flags["share_attention"],
        adain_q=flags["adain_queries"],
        adain_k=flags["adain_keys"],
        adain_v=flags["adain_values"],
        scale=flags["shared_score_scale"],
        shift=flags["shared_score_shift"],
        norms=flags["share_group_norm"],
        all_see_all=flags["full_attention_share"],
    )
    inside = by_level(parts().unet.cfg, flags["only_self_level"])
    return style_aligned(ops, refs, sharing, sites=None if one else inside)


def unit(case: Case):
    begin(case)
    said = case.settings["settings"]
    n = said["num_images"]
    ref = torch.tensor([0] * n + [n] * n)
    if case.has("in.feat"):
        x = case.input("in.feat")
        mean, std = token_stats(x)[0]
        within(case, "out.mean", mean[:, :, None])
        within(case, "out.std", std[:, :, None])
        within(case, "out.adain", adain(x, ref))
        within(case, "out.expand_first", x[ref])
        gain = torch.where(ref == torch.arange(2 * n), 1.0, said["concat_scale"])[:, None, None, None]
        within(case, "out.concat_first_scaled", torch.cat([x, x[ref] * gain], 2))
        return
    cfg, unet = parts().unet.cfg, parts().unet
    ops = style_aligned(TORCH, [0] * n, Sharing(attention=False, adain_q=False, adain_k=False,
                                               norms=said["share_group_norm"]))  # fmt: skip
    for key, x, out in (
        ("group_norm_module", "gn_x", "group_norm"),
        ("group_norm_tf_module", "gn_tf_x", "group_norm_tf"),
    ):
        block, _, leaf = said[key].rpartition(".")
        norm = unet.get_submodule(f"{sites.place(cfg, block).ours}.{leaf}" if block else "norm_out")
        assert block or leaf == "conv_norm_out", f"unknown module {said[key]}"
        args = norm.weight, norm.bias, norm.groups, norm.eps, False
        within(case, f"out.{out}", ops.group_norm(norm.site, case.input(f"in.{x}"), *args))
    block, _, leaf = said["layer_norm_module"].rpartition(".")
    module, _, index = block.rpartition(".transformer_blocks.")
    norm = unet.get_submodule(f"{sites.place(cfg, module).ours}.blocks.{index}.{leaf}")
    assert said["share_layer_norm"] in (True, False)
    within(case, "out.layer_norm", norm(case.input("in.ln_x")))


def attention(case: Case):
    begin(case)
    said, unet = case.settings["settings"], parts().unet
    site = sites.site(unet.cfg, said["module"])
    layer = unet.get_submodule(place_of(site)).self_attn
    n, x = said["num_images"], case.input("in.hidden_states")
    assert x.shape[:2] == (2 * n, said["tokens"])
    heard = []

    def attend(
        site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
    ) -> Tensor:
        heard.append((q, k, v, seen or Seen()))
        return TORCH.attend(site, q, k, v, bias, seen)

    within(case, "out.output", layer(x, x, knobs(said, [0] * n, replace(TORCH, attend=attend), one=True)))
    q, k, v, seen = heard[0]
    assert q.shape[1:] == (said["heads"], said["tokens"], said["head_dim"])
    if not any(case.has(f"out.{name}") for name in ("q", "k", "v", "probs")):
        return
    flags = said["style_aligned"]
    ref, tokens = torch.tensor([0] * n + [n] * n), q.shape[2]
    if seen.ref is not None:
        assert seen.ref.tolist() == ref.tolist()
        q, k = reference.adain(q, ref), reference.adain(k, ref)
    if flags["full_attention_share"]:  # one attention of all images of a half
        q, k, v = (y.unflatten(0, (2, n)).transpose(1, 2).flatten(2, 3) for y in (q, k, v))
    elif flags["share_attention"]:  # what was not put side by side
        gain = torch.where(ref == torch.arange(2 * n), 1.0, flags["shared_score_scale"])[:, None, None, None]
        k, v = torch.cat([k, k[ref] * gain], 2), torch.cat([v, v[ref]], 2)
    within(case, "out.q", q)
    within(case, "out.k", k)
    within(case, "out.v", v)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    shift = torch.zeros(k.shape[2])
    shift[tokens:] = 0.0 if flags["full_attention_share"] else flags["shared_score_shift"]
    within(case, "out.probs", (logits + shift).softmax(-1))


def place_of(site: Site) -> str:
    """The transformer block of a site, as a module of ours."""
    found = next(p for p in sites.places(parts().unet.cfg) if p.stage == site.stage and p.kind == "transformer")
    return f"{found.ours}.blocks.{site.depth}"


def said_of(case: Case) -> tuple[Entry, Tensor, list[Tensor], int]:
    """Settings, x, what conditions the UNet (t, context, pooled, ids), and the number of images."""
    begin(case)
    said, x = case.settings["settings"], case.input("in.sample")
    n = said["num_images"]
    assert x.shape == (2 * n, 4, *said["latent_hw"])
    t = case.input("in.timestep")
    assert t.tolist() == [said["timestep"]]
    names = ("in.encoder_hidden_states", "in.text_embeds", "in.time_ids")
    return said, x, [t.expand(2 * n), *(case.input(name).float() for name in names)], n


def forward(case: Case):
    said, x, inputs, n = said_of(case)
    unet, taps = parts().unet, {}
    with ExitStack() as stack:
        for name in sorted(key.removeprefix("out.tap.") for key in case.claims if key.startswith("out.tap.")):
            handle = unet.get_submodule(module_of(name)).register_forward_hook(
                lambda module, args, out, name=name: taps.__setitem__(name, out)
            )
            stack.callback(handle.remove)
        eps = unet(x, unet.embed(*inputs), knobs(said, [0] * n))
    for name, found in taps.items():
        within(case, f"out.tap.{name}", found)
    within(case, "out.noise_pred", eps)


def module_of(name: str) -> str:
    """Our module whose output is that of one of diffusers', which may be a whole block."""
    found = re.fullmatch(r"(down|up)_blocks\.\d+", name)
    if found is None:
        return "mid" if name == "mid_block" else sites.place(parts().unet.cfg, name).ours
    return [p for p in sites.places(parts().unet.cfg) if p.diffusers.startswith(f"{name}.")][-1].stage


def maps(case: Case):
    said, x, inputs, n = said_of(case)
    unet = parts().unet
    tokens = said["token_grid"][0] * said["token_grid"][1]
    watched: list[Site] = []
    flags = said["style_aligned"]
    sharing = by_level(unet.cfg, flags["only_self_level"])
    shared = SharedMaps(range(n), n, tokens=tokens, sites=sharing)
    ops = shared.watching(TORCH)

    def attend(site: Site, q: Tensor, *rest: object) -> Tensor:
        watched.extend([site] if site in sharing and q.shape[2] == tokens else [])
        return ops.attend(site, q, *rest)

    unet(x, unet.embed(*inputs), knobs(said, [0] * n, replace(ops, attend=attend)))
    assert watched == [sites.site(unet.cfg, name) for name in said["layers_execution_order"]]
    part = 1 / (1 + torch.tensor(flags["shared_score_shift"]).exp())
    first = shared.mean(0, tokens)  # the reference sees itself once; written out it has two copies of its keys
    average = torch.stack(
        [torch.cat([part * first, (1 - part) * first], 1)] + [shared.mean(i, tokens) for i in range(1, n)]
    )
    within(case, "out.avg_probs", average)
    within(case, "out.ref_mass", average[:, :, tokens:].sum(-1))
    left, values = principal(average[said["pca_image_index"]])
    within(case, "out.pca_projector", left @ left.T)
    within(case, "out.pca_singular_values", values[: case.input("out.pca_singular_values").numel()])


def scheduler(case: Case):
    alphas = case.input("alphas_cumprod").double()
    assert float((SCHEDULE.alphas - alphas).abs().max()) <= 1e-6
    for name in case.claims - {"alphas_cumprod"}:
        steps = int(name.removeprefix("timesteps_"))
        assert case.input(name).tolist() == [1000 // steps * k for k in reversed(range(steps))]


def switches(case: Case):
    said = case.settings
    said.get("description")
    for row in said["table"]:
        if row.get("raises"):
            try:
                plain(row["total"], row["level"])
            except ValueError:
                continue
            raise AssertionError(f"a level of {row['level']} of {row['total']} layers has no answer")
        assert plain(row["total"], row["level"]) == row["plain_layers"], f"{row['total']} layers at {row['level']}"
    for name, listed in said["layer_order"].value.items():
        cfg = {"tiny_28": parts().unet.cfg, "sdxl_70": SDXL, "sd1_16": SD15}[name]
        assert layers(cfg) == [sites.site(cfg, one) for one in listed]
        assert said["layer_order"][name] == listed

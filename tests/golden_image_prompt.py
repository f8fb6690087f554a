"""The cases of an instantstyle folder that need an image prompt: tokens, UNet, subtraction, and whole runs."""

from functools import cache, partial
from typing import Any

import torch
from diaphane.methods.instant_style import ImagePrompt, Pictures, image_prompt, instant_style, subtracted
from diaphane.methods.prompt import encode
from diaphane.methods.scales import scales
from diaphane.model.image_prompt import IPAdapter
from diaphane.model.latent import build
from diaphane.model.ops import TORCH, Ops
from diaphane.weights import ip_adapter
from torch import Tensor

from .golden_latent import TINY, kind_of, parts, whole_entry, within
from .golden_reader import Case, Entry, Folder
from .golden_sampling import alone, guides, runs

INPUTS = ("latents", "encoder_hidden_states", "text_embeds", "time_ids")
# the files in ip_adapter that a UNet case's json does not name
LINEAR, LINEAR_H, PLUS = (f"ip-adapter{name}.safetensors" for name in ("_sdxl", "_sdxl_vit-h", "-plus_sdxl_vit-h"))


def cases(folder: Folder) -> list[Case]:
    """One case a file."""
    found = []
    for path in sorted(folder.path.glob("*.safetensors")):
        kind, stem = kind_of(path.stem), path.stem
        if not kind:
            continue
        stored, said = frozenset(folder.tensors(stem)), whole_entry(folder, stem)
        if kind == "image_tokens":
            found.append(Case(f"{stem}-image", tokens, folder, stem, stored, said))
        elif kind == "unet_ip":
            mine = frozenset(name for name in stored if name != "eps_no_ip" and not name.startswith("dbg_"))
            found.append(Case(f"{stem}-image", forwards, folder, stem, mine, said))
        elif kind == "subtraction":
            unets = [p.stem for p in sorted(folder.path.glob("*.safetensors")) if kind_of(p.stem) == "unet_ip"]
            letters = {stem.split("_")[0].lstrip("0123456789"): stem for stem in reversed(unets)}
            beside = letters.get(stem.split("_")[0].lstrip("0123456789"), unets[0] if unets else "")
            skip = "" if beside else "it has the inputs of a unet_ip file, which is not in this folder"
            run = partial(subtraction, beside=beside)
            found.append(Case(f"{stem}-image", run, folder, stem, stored, said, skip=skip))
        elif kind in ("sample", "inpaint", "controlnet") and not alone(folder, stem):
            found += runs(folder, stem, spoken)
    return found


@cache
def adapter(file: str) -> IPAdapter:
    """One of the tiny model's adapters, in float32."""
    found = ip_adapter.load(TINY / "ip_adapter" / file)
    return build(found.family, found.config, found.tensors, dtype=torch.float32)


def plain(value: Any) -> Any:
    """An entry as the object it is, all of it read."""
    if isinstance(value, Entry):
        return {key: plain(value[key]) for key in value.value}
    return [plain(v) for v in value] if isinstance(value, list) else value


def tokens(case: Case):
    said, bound = case.settings["settings"], case.settings["tolerance"]["atol"]
    for name, prefix in (("linear", ""), ("vit_h_linear", "vit_h_")):
        net = adapter(said[name])
        within(case, f"{name}_tokens", net(case.input(f"{prefix}image_embeds")), bound)
        within(case, f"{name}_uncond_tokens", net(torch.zeros(1, net.cfg.reads)), bound)
    plus = adapter(said["plus"])
    assert (plus.cfg.heads, plus.cfg.head_dim) == (said["plus_heads"], said["plus_dim_head"])
    assert (plus.cfg.layers, plus.cfg.tokens) == (said["plus_depth"], said["plus_queries"])
    within(case, "plus_tokens", plus(case.input("vit_h_penultimate")), bound)
    within(case, "plus_uncond_tokens", plus(case.input("vit_h_zero_penultimate")), bound)


def seen(net: IPAdapter, embeds: Tensor, n: int = 1, guided: bool = True) -> Pictures:
    """Embeddings or states (2R, images, ...), those of no picture first, or unguided (R, images, ...) of pictures."""
    made = net(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])
    half = len(made) // 2 if guided else 0
    return Pictures(made[half:], made[:half] if half else made).repeated(n // (len(made) - half))


def prompted(net: IPAdapter, embeds: Tensor, scale: Any, n: int = 1, guided: bool = True, **more: Any) -> ImagePrompt:
    cfg = parts().unet.cfg
    return image_prompt(net, cfg, seen(net, embeds, n, guided), scales(cfg, scale), **more)


def pixels(masks: Tensor) -> Tensor:
    """Masks stored at the size of latents, as large as the pictures."""
    return masks.float().repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def forwards(case: Case):
    said, bound = plain(case.settings["settings"]), plain(case.settings["tolerance"])["atol"]
    x, context, pooled, ids = (case.input(name) for name in INPUTS)
    assert said["time_ids"] == ids[0].tolist()
    n, unet = len(x) // 2, parts().unet
    c = unet.embed(torch.full((len(x),), said["t"]), context, pooled, ids)
    # which adapter, what it sees, and how much of it where
    style, one = (LINEAR, "image_embeds"), said["scale"]
    both = [(*style, said["two_adapters_scale"][0]), (PLUS, "vit_h_penultimate", said["two_adapters_scale"][1])]
    kinds = {
        "eps_all_1": [(*style, one)],
        "eps_all_s": [(*style, said["s2"])],
        "eps_style": [(*style, said["style_scale"])],
        "eps_layout": [(*style, said["layout_scale"])],
        "eps_style_layout": [(*style, said["style_scale"] | said["layout_scale"])],
        "eps_custom": [(*style, said["custom_scale"])],
        "eps_multi_style": [(LINEAR, "multi_image_embeds", said["style_scale"])],
        "eps_vit_h_style": [(LINEAR_H, "vit_h_image_embeds", said["style_scale"])],
        "eps_plus_all": [(PLUS, "vit_h_penultimate", one)],
        "eps_plus_style": [(PLUS, "vit_h_penultimate", said["style_scale"])],
        "eps_two_adapters": both,
    }
    for name, spoken in kinds.items():
        if case.has(name):
            prompts = [prompted(adapter(file), case.input(what), scale, n) for file, what, scale in spoken]
            within(case, name, unet(x, c, instant_style(TORCH, prompts)), bound)
    if case.has("eps_masked"):
        rows, masks = said["image_rows"], pixels(case.input("masks"))
        these = [rows["multi_image_embeds"].index(i) for i in rows["masked"]]
        embeds = case.input("multi_image_embeds")[:, these]
        scale, size = {"all": said["masked_scales"]}, (x.shape[2], x.shape[3])
        prompt = prompted(adapter(LINEAR), embeds, scale, n, masks=masks, size=size)
        within(case, "eps_masked", unet(x, c, instant_style(TORCH, [prompt])), bound)
    if case.has("attn2_out"):
        made = seen(adapter(LINEAR), case.input("image_embeds"), n)
        within(case, "attn2_ip_tokens", torch.cat([made.nothing, made.tokens])[:, 0], bound)
        attn = unet.dec[1][1].blocks[0].cross_attn  # type: ignore[index,union-attr]
        ops = instant_style(TORCH, [prompted(adapter(LINEAR), case.input("image_embeds"), said["s2"], n)])
        within(case, "attn2_out", attn(case.input("attn2_in"), context, ops), bound)


def subtraction(case: Case, beside: str):
    said, bound = case.settings["settings"], case.settings["tolerance"]["atol"]
    linear, unet = adapter(LINEAR), parts().unet
    text = encode(parts(), said["content"]).pooled
    assert text is not None
    within(case, "content_pooled", text, bound)
    less = subtracted(linear, case.input("image_embeds"), [(text, said["content_scale"])])
    within(case, "subtracted", less, bound)
    within(case, "tokens", linear(less), bound)
    within(case, "uncond_tokens", linear(torch.zeros_like(less[:1])), bound)
    x, context, pooled, ids = (case.folder.floats(beside, name) for name in INPUTS)
    c = unet.embed(torch.full((len(x),), said["t"]), context, pooled, ids)
    embeds = torch.stack([torch.zeros_like(less), less])
    for name, scale in (("style", plain(said["style_scale"])), ("all", said.get("scale", 1.0))):
        ops = instant_style(TORCH, [prompted(linear, embeds, scale, len(x) // 2)])
        within(case, f"eps_{name}_subtracted", unet(x, c, ops), bound)


def spoken(case: Case, n: int) -> Ops:
    """What the UNet speaks in a run: every adapter that the settings name, with its pictures and scales."""
    said = case.settings["settings"]
    files, scale = plain(said["adapter"]), plain(said["ip_adapter_scale"])
    several = isinstance(files, list)
    scale = scale[0] if not several and isinstance(scale, list) and len(scale) == 1 else scale  # of the one adapter
    said.get("content"), said.get("content_scale")  # the stored embeddings are the subtracted ones
    prompts, guided = [], guides(said)
    for i, file in enumerate(files if several else [files]):
        mine, more = scale[i] if several and isinstance(scale, list) else scale, {}
        if masks := next((name for name in (f"masks_{i}", "masks") if case.has(name)), ""):
            latents = (said["height"] // 8, said["width"] // 8)
            more = {"masks": pixels(case.input(masks)), "size": latents}
            mine = {"all": mine} if isinstance(mine, list) else mine
        prompts.append(prompted(adapter(file), case.input(f"image_embeds_{i}"), mine, n, guided, **more))
    return instant_style(TORCH, prompts)

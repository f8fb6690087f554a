"""Every case of an instantstyle folder: tokens, towers, autoencoder, UNet, sampling; those with an image prompt apart.

A file is told by its name without the number, so that 08h_sample_other is one of the kind sample.  Settings and bounds
come from cases.json; a setting, tensor, key or file that no case takes fails by its name.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from diaphane.methods.prompt import encode, encode_ids
from diaphane.model.clip import VisionTower
from diaphane.model.latent import build
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.pixels import MEAN, STD, clip_pixels
from diaphane.model.tiling import tiled_decode
from diaphane.weights import latent
from PIL import Image
from torch import Tensor

from . import golden_image_prompt
from .golden_latent import TINY, TOLD, entry, kind_of, parts, whole_entry, within
from .golden_reader import Case, Folder, unclaimed, unknown
from .golden_sampling import alone, parts_of, plainly, runs

PROMPTED = ("image_tokens", "subtraction")  # kinds that are all image prompt
TEXTS = {"text", "ids_1", "ids_2", "unpadded_1", "unpadded_2"}


def cases(folder: Folder) -> list[Case]:
    """Files, tensors and json keys, each taken by a case or by one that fails."""
    found, stems = [], []
    for path in sorted(folder.path.iterdir()):
        stem, kind = path.stem, kind_of(path.stem)
        if path.suffix == ".json" and kind == "tokenizer":
            found.append(Case(stem, tokens, folder, stem))
        elif path.suffix == ".safetensors" and kind in ("text_encode", "vision", "vae"):
            claims = frozenset(folder.tensors(stem))
            found.append(Case(stem, ALONE[kind], folder, stem, claims, whole_entry(folder, stem)))
        elif path.suffix == ".safetensors" and kind == "unet_ip":
            found += unet_cases(folder, stem)
        elif path.suffix == ".safetensors" and kind in ("sample", "inpaint", "controlnet"):
            found += parts_of(folder, stem) + (runs(folder, stem, plainly) if alone(folder, stem) else [])
        elif path.name not in ("README.md", "cases.json") and not (path.suffix == ".safetensors" and kind in PROMPTED):
            found.append(unknown(folder, f"file {path.name}"))
            continue
        stems += [stem] if path.suffix == ".safetensors" else []
    found += golden_image_prompt.cases(folder)
    return found + unclaimed(folder, found, stems) + list(unread(folder, found, stems))


def unread(folder: Folder, found: list[Case], stems: list[str]) -> Iterable[Case]:
    """A failing case for every entry of cases.json that is of no file here, and every key in one that no case reads."""
    rows = folder.documents.get("cases", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        yield unknown(folder, "form of cases.json")
        return
    for row in rows:
        name = row["name"]
        if name not in stems and not kind_of(name):
            yield unknown(folder, f"case {name} in cases.json")
        elif name not in stems:
            why = f"{name}.safetensors is not in this folder"
            yield Case(name, lambda case: None, folder, skip=why)
        for key in row.keys() - TOLD - {"settings", "tolerance"}:
            yield unknown(folder, f"key {key} of {name} in cases.json")
        read = {"settings": set(), "tolerance": set()}
        for case in found:
            if case.stem == name and case.entry:
                for key in read:
                    read[key] |= set(case.entry.value[key])
        for kind, keys in read.items():
            for key in row.get(kind, {}).keys() - keys if name in stems else ():
                yield unknown(folder, f"{kind} {key} of {name}")


def tokens(case: Case):
    rows, pair = case.folder.documents[case.stem], parts().tokenizers
    for row in rows:
        assert set(row) <= TEXTS, f"{case.stem}: unknown key {', '.join(sorted(set(row) - TEXTS))}"
        for i, tokenizer in enumerate(pair, 1):
            assert tokenizer.ids(row["text"]) == row[f"unpadded_{i}"], f"{case.stem}: {row['text'][:60]!r}"
            assert tokenizer(row["text"]).tolist() == [row[f"ids_{i}"]], f"{case.stem}: {row['text'][:60]!r}"


def text(case: Case):
    said, bound = case.settings["settings"], case.settings["tolerance"]["atol"]
    first, second = parts().tokenizers
    for key in ("no_negative_prompt", "clip_skip_note"):
        said.get(key)
    within(case, "input_ids_1", first(said["texts"]), 0)
    within(case, "input_ids_2", second(said["texts"]), 0)

    def same(prompt: Any, context: str, pooled: str):
        within(case, context, prompt.context, bound)
        within(case, pooled, prompt.pooled, bound)

    one, no = said["prompt"], said["negative"]
    same(encode(parts(), one), "prompt_embeds", "pooled")
    same(encode(parts(), no), "negative_prompt_embeds", "negative_pooled")
    same(encode(parts(), one, said["prompt_2"]), "two_prompt_embeds", "two_prompt_pooled")
    same(encode(parts(), no, said["negative_2"]), "two_prompt_negative_embeds", "two_prompt_negative_pooled")
    same(encode(parts(), one, clip_skip=1), "clip_skip1_prompt_embeds", "pooled")
    same(encode(parts(), no), "clip_skip1_negative_prompt_embeds", "negative_pooled")  # it stays where it was
    both, width = encode(parts(), said["texts"]), parts().towers[0].cfg.width
    within(case, "clip_l_penultimate", both.context[..., :width], bound)
    same(both._replace(context=both.context[..., width:]), "clip_g_penultimate", "clip_g_pooled")
    again = encode_ids(parts(), [case.input("input_ids_1"), case.input("input_ids_2")])
    assert torch.equal(again.context, both.context)


@cache
def tower(folder: str) -> VisionTower:
    found = latent.load(TINY / folder, "image_encoder")
    return build(found.family, found.config, found.tensors, dtype=torch.float32).requires_grad_(False)


def vision(case: Case):
    said, tolerance = case.settings["settings"], case.settings["tolerance"]
    assert (tuple(said["mean"]), tuple(said["std"])) == (MEAN, STD)
    pixels = []
    for i, (height, width) in enumerate(said["image_sizes_hw"]):
        picture = case.folder.tensors(case.stem)[f"image_{i}"]
        case.read.add(f"image_{i}")
        assert picture.shape == (height, width, 3)
        pixels.append(clip_pixels(Image.fromarray(picture.numpy()), tower("image_encoder").cfg.size))
        within(case, f"pixel_values_{i}", pixels[-1], tolerance["pixel_values_atol"])
    for folder, prefix in (("image_encoder", ""), ("image_encoder_vit_h", "vit_h_")):
        net, bound = tower(folder), tolerance["atol"]
        found, nothing = net(torch.cat(pixels)), net(torch.zeros_like(pixels[0]))
        within(case, f"{prefix}image_embeds", found.pooled, bound)
        within(case, f"{prefix}penultimate", found.hidden[-2], bound)
        within(case, f"{prefix}zero_penultimate", nothing.hidden[-2], bound)


def autoencoder(case: Case):
    said, tolerance, vae = case.settings["settings"], case.settings["tolerance"], parts().vae
    bound, tile, overlap = tolerance["atol"], said["tile_latent_min_size"], said["tile_overlap_factor"]
    assert said["scaling_factor"] == vae.cfg.scaling
    assert said["tile_sample_min_size"] == 8 * tile
    low, high = said["logvar_clamp"]
    moments = vae.encode(case.input("image"))
    assert bool(((moments.logvar >= low) & (moments.logvar <= high)).all())
    within(case, "mean", moments.mean, bound)
    within(case, "logvar", moments.logvar, bound)
    within(case, "latents_scaled", vae.latents(case.input("image"), case.input("eps")), bound)
    within(case, "mode_latents_scaled", vae.latents(case.input("image")), bound)
    within(case, "decoded", vae.pictures(case.input("dec_latents")), bound)
    z = case.input("tile_latents") / vae.cfg.scaling
    within(case, "tile_decoded", tiled_decode(vae, z, tile=tile, overlap=overlap), tolerance["tile_decoded_atol"])


ALONE = {"text_encode": text, "vision": vision, "vae": autoencoder}
GIVEN = frozenset(("latents", "encoder_hidden_states", "text_embeds", "time_ids"))


def unet_cases(folder: Folder, stem: str) -> list[Case]:
    """The forward pass without an image prompt; the others need one."""
    stored = set(folder.tensors(stem))
    own = {name for name in stored if name == "eps_no_ip" or name.startswith("dbg_")}
    claims = frozenset(own | (GIVEN & stored))
    return [Case(f"{stem}-plain", forward, folder, stem, claims, entry(folder, stem, "t time_ids", "atol"))] * bool(own)


def forward(case: Case):
    said, bound, unet = case.settings["settings"], case.settings["tolerance"]["atol"], parts().unet
    x, ids = case.input("latents"), case.input("time_ids")
    if "time_ids" in said:
        assert said["time_ids"] == ids[0].tolist()
    c = unet.embed(
        torch.full((len(x),), said["t"]), case.input("encoder_hidden_states"), case.input("text_embeds"), ids
    )
    seen: dict[str, Tensor] = {}

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        seen[site.stage] = h
        return TORCH.join(site, h, skip)

    def out(site: Site, *args: Any) -> Tensor:
        if site.stage == "out":
            seen["out"] = args[0]
        return TORCH.group_norm(site, *args)

    h, skips = unet.encode(x, c)
    space = unet.middle(h, c)
    eps = unet.decode(space, skips, c, Ops(join=join, group_norm=out))
    blocks = {"down_0": skips[3], "down_1": skips[6], "down_2": skips[8], "mid": space}
    blocks |= {"up_0": seen["dec.3"], "up_1": seen["dec.6"], "up_2": seen["out"]}
    for name, ours in blocks.items():
        most = float(case.input(f"dbg_{name}").abs().max()) if case.has(f"dbg_{name}") else 0.0
        within(case, f"dbg_{name}", ours, bound * max(1.0, most))
    within(case, "eps_no_ip", eps, bound)

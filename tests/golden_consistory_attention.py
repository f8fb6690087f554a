"""ConsiStory's attention against the reference data: one layer, blended queries, and whole calls of the UNet."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diaphane.methods.anchors import cached
from diaphane.methods.consistory import Heard, Others, Told, consistory, named, others, places
from diaphane.methods.dift import Matches, plan, waves
from diaphane.methods.freeu import FreeU, freeu
from diaphane.methods.partly import to_attention
from diaphane.methods.scene import strength
from diaphane.methods.subject_masks import dropped
from diaphane.model import sites
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.unet import Attention
from torch import Tensor

from .golden_consistory_parts import exact, group_of, grouped, told
from .golden_latent import parts, within
from .golden_reader import Case, Entry, Folder


def attention_cases(folder: Folder, stem: str) -> list[Case]:
    """Subject-driven self-attention of one layer, with masks of the batch or with a cache."""
    return grouped(folder, stem, attention_case)


def layer(name: str) -> tuple[Attention, Site]:
    """A self-attention of the tiny SDXL by its name in the reference data."""
    unet = parts().unet
    site = sites.site(unet.cfg, name)
    module = unet.get_submodule(sites.place(unet.cfg, name.rpartition(".transformer_blocks.")[0]).ours)
    return module.blocks[site.depth].self_attn, site  # pyright: ignore


def attention_case(case: Case):
    said, at = case.settings, group_of(case)
    told(said, "fp64_gap")
    net, site = layer(said["module"])
    level = places(parts().unet.cfg).level[site.stage]
    if case.has(f"{at}cached_tokens"):
        cached_case(case, net, site, level)
        return
    hidden, mask = case.input(f"{at}hidden"), case.input(f"{at}mask").bool()
    assert hidden.shape[:2] == (2 * said["B"], said["res"] ** 2)
    known = ("plain", "full", "dropped", "empty", "emptied", "none")
    assert said["mask_mode"] in known, f"unknown mask_mode {said['mask_mode']}"
    if said["mask_mode"] == "dropped" or case.has(f"{at}uniform"):
        used = dropped(mask, case.input(f"{at}uniform"), said["dropout"])
    else:
        told(said, "dropout")
        used = mask if said["mask_mode"] in known[:2] else torch.zeros_like(mask)
    exact(case, f"{at}mask_used", used)
    sees = case.input(f"{at}mapping").bool().tolist()
    these = others(used, sees, 2)
    exact(case, f"{at}key_mask", keys_of(these, used, sees))
    if not acts(said):
        these = others(torch.zeros_like(used), sees, 2)
    within(case, f"{at}out", shared(net, hidden, said["B"], level, these), 1e-5)


def acts(said: Entry) -> bool:
    """Whether others are seen at a case's step: at the first there are no masks yet."""
    return said.get("curr_iter", 1) >= 1


def keys_of(these: Others, used: Tensor, sees: Sequence[Sequence[bool]]) -> Tensor:
    """Which of all keys, (B * N), each image has: its own, and those in its ranges."""
    n, tokens = used.shape
    assert these.kept is not None
    out = torch.zeros(n, n * tokens, dtype=torch.bool)
    for i, row in enumerate(these.sources.listed()[:n]):
        out[i, i * tokens : (i + 1) * tokens] = True
        for source in row:
            out[i, these.kept.index[source.start : source.stop]] = True
    return out


def shared(net: Attention, hidden: Tensor, images: int, level: int, these: Others, heard: Heard | None = None, **more):
    """One layer's output with what is seen of others."""
    words = torch.zeros(images, 1, dtype=torch.long)
    what = Told(images=images, tokens=words, seen={level: these}, **more)
    ops = consistory(TORCH, places(parts().unet.cfg), what, heard or Heard())
    return net(hidden, hidden, ops)


def cached_case(case: Case, net: Attention, site: Site, level: int):
    said, at = case.settings, group_of(case)
    n, used = said["n_anchors"], case.input(f"{at}mask_used").bool()
    hidden, extra = case.input(f"{at}anchor_hidden"), case.input(f"{at}extra_hidden")
    assert hidden.shape[:2] == (2 * n, said["res"] ** 2)
    told(said, "curr_iter")
    these, heard = others(used, [[True] * n] * n, 2, keep=n), Heard(keep_pools=True)
    assert these.kept is not None
    rows = hidden.unflatten(0, (2, n)).flatten(1, 2)[:, these.kept.index[: int(these.kept.edges[-1])]]
    exact(case, f"{at}cached_tokens", rows)
    within(case, f"{at}anchor_out", shared(net, hidden, n, level, these, heard), 1e-5)
    images = len(extra) // 2
    sees = cached(int(these.kept.edges[-1]), images, 2, torch.device("cpu"))
    within(case, f"{at}extra_out", shared(net, extra, images, level, sees, pools=heard.pools), 1e-5)


def blend_cases(folder: Folder, stem: str) -> list[Case]:
    """Queries of a plain pass mixed into those of one layer."""
    return grouped(folder, stem, blend_case)


def blend_case(case: Case):
    said, at = case.settings, group_of(case)
    told(said, "fp64_gap")
    net, site = layer(said["module"])
    level, n, used = places(parts().unet.cfg).level[site.stage], said["B"], case.input(f"{at}mask_used").bool()
    first, last = said["query_range"]
    assert (first, last) == (0, said["n_steps"] // 10)
    v = [strength(-i, 0, -last) for i in range(last + 1)]
    within(case, f"{at}strengths", torch.tensor(v, dtype=torch.float64), 1e-12)
    plain = case.input(f"{at}hidden_vanilla")
    assert plain.shape[:2] == (2 * n, said["res"] ** 2)
    heard, words = Heard(keep_queries=True), torch.zeros(n, 1, dtype=torch.long)
    where = places(parts().unet.cfg)
    out = net(plain, plain, consistory(TORCH, where, Told(images=n, tokens=words), heard))
    within(case, f"{at}vanilla_out", out, 1e-5)
    within(case, f"{at}vanilla_q", joined(heard.queries[named(site)]), 1e-5)
    hidden, these = case.input(f"{at}hidden_sdsa"), others(used, [[True] * n] * n, 2)
    for i in said["iters"]:
        more: dict[str, Any] = {"plain": heard.queries, "share": torch.tensor(v[i])} if 1 <= i <= last else {}
        more |= {"seen": {level: these}} if i >= 1 else {}
        queries: list[Tensor] = []

        def listening(site: Site, q: Tensor, *rest: Any, queries: list[Tensor] = queries) -> Tensor:
            queries.append(q)
            return TORCH.attend(site, q, *rest)

        what = Told(images=n, tokens=words, **more)
        ops = consistory(type(TORCH)(attend=listening), where, what, Heard())
        within(case, f"{at}out_it{i}", net(hidden, hidden, ops), 1e-5)
        within(case, f"{at}blended_q_it{i}", joined(queries[0]), 1e-5)


def joined(q: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return q.transpose(1, 2).flatten(2)


def unet_cases(folder: Folder, stem: str) -> list[Case]:
    """One call of the UNet with each feature in turn."""
    return grouped(folder, stem, unet_case)


def unet_case(case: Case):
    said, at = case.settings, group_of(case)
    told(said, "fp64_gap", "effect_vs_vanilla")
    unet, n = parts().unet, said["B"]
    where, x = places(unet.cfg), case.input(f"{at}latents")
    assert tuple(x.shape) == (n, 4, said["H"], said.get("W", said["H"]))
    rows, words = torch.cat([x, x]), case.input(f"{at}token_indices").T
    context = case.input(f"{at}ehs")
    assert context.shape[1] == said["L"]
    t = torch.full((2 * n,), float(said["timestep"]))
    c = unet.embed(t, context, case.input(f"{at}pooled"), case.input(f"{at}time_ids"))
    sees = [
        [bool(v) and i != j for j, v in enumerate(row)] for i, row in enumerate(case.input(f"{at}mapping").tolist())
    ]
    assert sees == [[j < said["n_anchors"] and i != j for j in range(n)] for i in range(n)]
    sizes = where.sizes((x.shape[2], x.shape[3]))
    masks = {level: case.input(f"{at}mask_{size[0]}").bool() for level, size in sizes.items()}
    seen = {level: others(mask, sees, 2) for level, mask in masks.items()} if acts(said) else {}
    pixel, distance = (
        case.input(f"{at}nn_map_{sizes[where.fine][0]}"),
        case.input(f"{at}nn_dist_{sizes[where.fine][0]}"),
    )
    found = Matches(pixel.long().clamp(min=0), distance.masked_fill(~torch.tensor(sees)[..., None], torch.inf))
    carried = {
        "carried": plan(found, masks[where.fine]),
        "order": tuple(waves(sees)),
        "alpha": said["injection"]["alpha"],
    }
    first, last = said["injection"]["range"]
    if not first <= said.get("curr_iter", first) <= last:
        carried = {}
    plain = Heard(keep_maps=False, keep_queries=True)
    quiet = consistory(TORCH, where, Told(images=n, tokens=words), plain)
    h, skips = unet.encode(rows, c)
    to_attention(unet, unet.middle(h, c), skips, c, quiet, where.last)
    windows = said["n_steps"] // 10
    v = strength(-said["query_iter"], 0, -windows)
    blended = {"plain": plain.queries, "share": torch.tensor(v)} if 1 <= said["query_iter"] <= windows else {}
    factors = FreeU(**{name: said["freeu"][name] for name in FreeU._fields}) if said["freeu"] else FreeU(1, 1, 1, 1)
    free = freeu(TORCH, unet.cfg, factors)
    calls: dict[str, tuple[Ops, dict[str, Any]]] = {
        "vanilla": (TORCH, {}),
        "sdsa": (TORCH, {"seen": seen}),
        "sdsa_freeu": (free, {"seen": seen}),
        "sdsa_query": (TORCH, {"seen": seen, **blended}),
        "sdsa_inject": (TORCH, {"seen": seen, **carried}),
        "sdsa_inject_freeu": (free, {"seen": seen, **carried}),
    }
    bounds = {"sdsa_freeu": 2e-4, "sdsa_inject": 2e-4, "sdsa_inject_freeu": 2e-4}
    for name, (ops, more) in calls.items():
        if any(claim.startswith(f"{at}{name}.") for claim in case.claims):
            heard = Heard()
            what = consistory(ops, where, Told(images=n, tokens=words, **more), heard)
            outputs: dict[str, Tensor] = {}
            eps = unet(rows, c, recording(what, outputs, n))
            within(case, f"{at}{name}.eps", eps, bounds.get(name, 1e-4))
            within(case, f"{at}{name}.up0_at_store", heard.feature[0][-n:], 1e-4)
            altered = heard.feature[0][-n:].clone()
            altered[:, : altered.shape[1] // 2] *= factors.b2 if ops is free else 1
            within(case, f"{at}{name}.up0_as_read", altered, 1e-4)
            for claim in sorted(case.claims):
                module = claim.removeprefix(f"{at}{name}.")
                if claim != module and module.endswith((".attn1", ".attn2")):
                    within(case, claim, outputs[str(sites.site(unet.cfg, module))], 1e-4)
            if case.has(f"{at}{name}.mean_cross_map"):
                all_words = torch.arange(said["L"]).expand(n, -1)
                listening = Heard()
                unet(rows, c, consistory(ops, where, Told(images=n, tokens=all_words, **more), listening))
                within(case, f"{at}{name}.mean_cross_map", torch.stack(listening.maps).mean(0), 1e-5)


def recording(ops: Ops, into: dict[str, Tensor], images: int) -> Ops:
    """Verbs that write down what every attention adds."""

    def add(site: Any, x: Tensor, dx: Tensor) -> Tensor:
        if site.kind in ("self", "cross"):
            into[str(site)] = dx
        return ops.add(site, x, dx)

    return replace(ops, add=add)

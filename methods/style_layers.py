"""Which self-attentions of a UNet share with the reference: by name, or by the published rule of StyleAligned."""

import math
from collections.abc import Iterable

from ..model.ops import Site
from ..model.sites import KINDS, SiteError, level, places, site, stage
from ..model.unet import UNetConfig


def layers(cfg: UNetConfig) -> list[Site]:
    """Every self-attention, in diffusers' order of modules: down, then up, then mid (of execution mid is second)."""
    order = {"enc": 0, "dec": 1, "mid": 2}
    found = [p.stage for p in places(cfg) if p.kind == "transformer"]
    found.sort(key=lambda name: order[name.partition(".")[0]])
    depth = {name: cfg.mid_depth if name == "mid" else cfg.depth[level(cfg, name)] for name in found}
    return [Site(name, i, "self") for name in found for i in range(depth[name])]


def plain(total: int, share: float) -> list[int]:
    """Which of `total` layers keep plain self-attention: the `only_self_level` of Hertz et al. 2024's code.

    0 keeps none, 1 all of them.  In between every p-th layer is kept (or every p-th shares, above 0.5), with
    p = total // int(share * total): coarse, 0.4, 0.5 and 0.6 of 70 layers keep 35 each.  A ValueError is raised for a
    share outside 0 ... 1, and for one of less than a layer, for which the published rule has no answer.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of plain layers lies in 0 ... 1; got {share}")
    if share in (0, 1):
        return list(range(total)) if share else []
    most = share > 0.5
    few = int((1 - share if most else share) * total)
    if few == 0:
        least = math.ceil(1000 / total) / 1000
        raise ValueError(
            f"a share of {share:g} is less than one of {total} layers: give 0, {least:g} ... {1 - least:g}, or 1"
        )
    every = total // few
    return [i for i in range(total) if (i % every == 0) != most]


def by_level(cfg: UNetConfig, share: float) -> frozenset[Site]:
    """The self-attentions that share where a `share` of all stays plain, by the published rule.

    The paper's "x % shared attention" is 1 - share.  Raises ValueError as `plain` does.
    """
    found = layers(cfg)
    kept = set(plain(len(found), share))
    return frozenset(place for i, place in enumerate(found) if i not in kept)


def by_name(cfg: UNetConfig, names: Iterable[str]) -> frozenset[Site]:
    """The self-attentions of stages, modules or single layers, in any of the three spellings (`model.sites`).

    "dec.1", "up_blocks.0.attentions.1", "output_blocks.1.1.3.self"; a whole block too, as in "up_blocks.0".  Raises
    SiteError for a name that no place has, and for a place without self-attention.
    """
    every, found = layers(cfg), set()
    for name in names:
        inside = {p.stage for p in places(cfg) if p.diffusers.startswith(f"{name}.")}
        if inside:
            here = [place for place in every if place.stage in inside]
        elif name.rpartition(".")[2] in KINDS:
            one = site(cfg, name)
            here = [one] if one in every else []
        else:
            where = stage(cfg, name)
            here = [place for place in every if place.stage == where]
        if not here:
            stages = ", ".join(dict.fromkeys(place.stage for place in every))
            raise SiteError(f"{name} has no self-attention: it is in {stages}")
        found.update(here)
    return frozenset(found)

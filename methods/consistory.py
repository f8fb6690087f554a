"""ConsiStory (Tewel et al. 2024): one subject in several pictures, without training, inside one call of the network.

Subject-driven self-attention (eq. 1 to 3): in the decoder, picture i sees besides its own keys those of the subject in
the pictures that it may look at, some of them dropped at random (section 3.1):

    K+ = [K_1 ... K_N],  V+ = [V_1 ... V_N],  M+_i = [M_1 ... M_i-1, 1, M_i+1 ... M_N]
    h_i = softmax(Q_i K+^T / sqrt(d) + log M+_i) V+

Only what the mask keeps is gathered, and `kernels.source_attention` reads it beside the own keys: nothing is masked and
nothing put side by side.  Early on the queries are pulled back to those of a plain pass, which keeps the layouts
diverse (section 3.2): q = v q_plain + (1 - v) q.  And self-attention's output is carried from picture to picture along
matches of a diffusion feature (section 3.3, `dift`).  `story` walks all of it over the timesteps.

Both halves of a guided batch see their own half's keys by the masks of the conditional one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.compact import Kept, compact, gather
from ..kernels.sources import Seen, Sources, also
from ..model import sites
from ..model.ops import Ops, Site
from ..model.unet import UNetConfig
from .dift import Plan, injected
from .subject_masks import Size, token_maps


class Places(NamedTuple):
    """Where in a UNet the method acts; SDXL: maps at 32², feature and injection at 64²."""

    level: dict[str, int]  # of each stage, 0 the finest
    shared: tuple[int, ...]  # levels of the decoder's self-attentions, coarse to fine
    maps: int  # level of the cross-attentions that are read: the coarsest that has any
    fine: int  # level of the injection and of the feature
    feature: str  # the stage that takes the feature over: what the coarsest attending block of the decoder hands on
    last: Site  # the decoder's last self-attention
    last_map: Site  # and its last cross-attention that is read

    def sizes(self, latents: Size) -> dict[int, Size]:
        """The tokens, (height, width), of each level that is shared, and of the one that is read."""
        levels = dict.fromkeys((*self.shared, self.maps, self.fine))
        return {level: (-(-latents[0] // 2**level), -(-latents[1] // 2**level)) for level in levels}


def places(cfg: UNetConfig) -> Places:
    """The places of a UNet.  Raises ValueError for one without attention at two levels, one above the other."""
    per, levels = cfg.blocks + 1, len(cfg.channels)
    shared = tuple(level for level in reversed(range(levels)) if cfg.depth[level])
    if len(shared) < 2 or shared[1] != shared[0] - 1:
        raise ValueError(f"ConsiStory takes a UNet with attention at two adjacent levels; depth is {cfg.depth}")
    stages = [f"enc.{i}" for i in range(per * levels)] + ["mid"] + [f"dec.{i}" for i in range(per * levels)]
    block = levels - shared[0]  # blocks of the decoder up to and with the coarsest that attends
    end = (levels - shared[-1]) * per - 1
    return Places(
        {name: sites.level(cfg, name) for name in stages},
        shared,
        shared[0],
        shared[1],
        f"dec.{block * per}",
        Site(f"dec.{end}", cfg.depth[shared[-1]] - 1, "self"),
        Site(f"dec.{block * per - 1}", cfg.depth[shared[0]] - 1, "cross"),
    )


@dataclass(frozen=True)
class Others:
    """The kept tokens at one level, and who sees them."""

    sources: Sources
    kept: Kept | None = None  # where they are in the batch; None where keys come from a cache
    owner: Tensor | None = None  # int64 (K,) the image of each, where keys are to be aligned


def others(
    masks: Tensor, sees: Sequence[Sequence[bool]], halves: int = 1, *, align: bool = False, keep: int = 0
) -> Others:
    """masks bool (B, N): the tokens that each image shows; sees[i][j]: whether image i looks at image j.

    An image never sees its own tokens twice.  Those of the first `keep` images are there though nobody looks at them.
    It waits for the device once, for the number of tokens.
    """
    looked = [j < keep or any(row[j] and i != j for i, row in enumerate(sees)) for j in range(len(masks))]
    kept = compact(masks & torch.tensor(looked, device=masks.device)[:, None])
    sources = kept.sources(sees, halves)
    if not align:
        return Others(sources, kept)
    own = sources.segments[:, [0, 0, 2, 3]]  # a pool for each row
    sources = replace(sources, segments=own, pool_images=halves * len(sees) if len(own) else 0)
    return Others(sources, kept, torch.div(kept.index, kept.tokens, rounding_mode="floor"))


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one call of the network is told; without anything it changes nothing and only listens."""

    images: int  # B, of the conditional half; the batch has any multiple of it
    tokens: Tensor  # int64 (B, T) the subject's words in each prompt, -1: not there
    seen: Mapping[int, Others] = field(default_factory=dict)  # by level
    pools: Mapping[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # cached keys and values by site, in the place of the batch's
    align: bool = False  # keys that are seen take the statistics of the keys of who sees them (appendix E)
    plain: Mapping[str, Tensor] = field(default_factory=dict)  # queries of a plain pass by site
    share: Tensor | None = None  # v, (), how much of them
    carried: Plan | None = None  # of injection
    order: tuple[tuple[int, int], ...] = ()
    alpha: float = 0.8
    rows: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # cached outputs (K, C) by site that are carried, in the place of the batch's


@dataclass
class Heard:
    """What one call of the network lets be heard."""

    keep_maps: bool = True
    keep_queries: bool = False
    keep_pools: bool = False
    keep_outputs: bool = False
    maps: list[Tensor] = field(default_factory=list)  # (B, N, T) of each cross-attention that is read
    feature: list[Tensor] = field(default_factory=list)  # the DIFT feature (rows, C, H, W)
    queries: dict[str, Tensor] = field(default_factory=dict)
    pools: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # self-attention after injection (B, N, C)


def consistory(ops: Ops, where: Places, told: Told, heard: Heard) -> Ops:
    """Verbs for one call of the network: what is `told` happens, and what is `heard` is written down.

    `attend` adds the others' subject tokens to what is seen and mixes plain queries in, in the decoder's
    self-attentions; `add` carries self-attention's outputs, before they are added, in the conditional rows at the fine
    level of encoder and decoder; `join` hears the feature.
    """
    n = told.images

    def attend(
        site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
    ) -> Tensor:
        level = where.level[site.stage]
        if heard.keep_maps and site.kind == "cross" and level == where.maps:
            heard.maps.append(token_maps(q[-n:], k[-n:], told.tokens, None if bias is None else bias[-n:]))
        if site.kind != "self" or not site.stage.startswith("dec"):
            return ops.attend(site, q, k, v, bias, seen)
        name = named(site)
        if heard.keep_queries:  # of a plain pass, which ends with the last of them
            heard.queries[name] = q
            if site == where.last:
                return q
        if name in told.plain and told.share is not None:
            share = told.share.to(q)
            q = share * told.plain[name].to(q) + (1 - share) * q
        if level not in told.seen:
            return ops.attend(site, q, k, v, bias, seen)
        these = told.seen[level]
        pool = told.pools[name] if name in told.pools else gathered(k, v, these, n)
        if heard.keep_pools:
            heard.pools[name] = pool
        return ops.attend(site, q, k, v, bias, also(seen, Seen(these.sources, pool), k, v))

    def add(site: Site, x: Tensor, dx: Tensor) -> Tensor:
        inside = site.kind == "self" and site.stage != "mid" and where.level[site.stage] == where.fine
        if inside and told.carried is not None:
            out = injected(dx[-n:], told.carried, told.order, told.alpha, told.rows.get(named(site)))
            dx = torch.cat([dx[:-n], out])
        if inside and heard.keep_outputs:
            heard.outputs[named(site)] = dx[-n:]
        return ops.add(site, x, dx)

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        if site.stage == where.feature:
            heard.feature.append(h)
        return ops.join(site, h, skip)

    return replace(ops, attend=attend, add=add, join=join)


def named(site: Site) -> str:
    """A site of its kind as a word: "dec.1.3"."""
    return f"{site.stage}.{site.depth}"


def gathered(k: Tensor, v: Tensor, these: Others, images: int) -> tuple[Tensor, Tensor]:
    """The kept tokens' keys and values, 2 x (halves, H, K, D); aligned, a pool for each row that sees: (rows, H, K, D).

    Aligned keys have AdaIN towards the keys of who sees them (appendix E of the paper): k_j of a picture j becomes
    (k_j - mean_j) / std_j std_i + mean_i for picture i, statistics over all tokens of each head and channel.
    """
    halves = len(k) // images
    assert these.kept is not None, "keys that are seen are of the batch or of a cache"
    keys, values = gather(k, these.kept, halves), gather(v, these.kept, halves)
    if these.owner is None:
        return keys, values
    mean, std = (s.unflatten(0, (halves, images)) for s in reference.token_stats(k))  # (halves, B, H, D)
    theirs = [s[:, these.owner].transpose(1, 2) for s in (mean, std)]  # (halves, H, K, D)
    whitened = (keys - theirs[0]) / theirs[1]
    aligned = whitened[:, None] * std[:, :, :, None] + mean[:, :, :, None]
    return aligned.flatten(0, 1), values[:, None].expand(-1, images, -1, -1, -1).flatten(0, 1)

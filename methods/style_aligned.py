"""StyleAligned (Hertz et al. 2024): pictures drawn together in one style, by attention to a reference among them.

In every self-attention an image's queries and keys take the token statistics of its reference's (AdaIN), and it sees
the reference's keys and values besides its own:

    Attention(Q̂_t, K_rt, V_rt),  K_rt = [K_r; K̂_t],  V_rt = [V_r; V_t]                           (eq. 4)
    Q̂_t = AdaIN(Q_t, Q_r),  K̂_t = AdaIN(K_t, K_r)                                                (eq. 5)
    AdaIN(x, y) = σ(y) (x - μ(x)) / σ(x) + μ(y),  statistics over tokens, of each head and channel

Nothing is put side by side: `kernels.source_attention` reads both places.  The reference sees itself alone, so that it
never depends on the others, and a set of any size may be drawn a few pictures at a time.

The paper and the authors' code: the norms' statistics, the shift and the rule for a part of the layers are in the code
only, and its layer norms that are "shared" are layer norms, whose statistics are of one token.  The paper's scale
multiplies scores, the code's the reference's keys: the same.  The code's σ has 1e-5 under the root.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.adain import adain
from ..kernels.sources import Seen, Source, Sources, SourcesError, also, everyone, shared
from ..model.ops import Ops, Site

Sites = Callable[[Site], bool] | Collection[Site]
Refs = Sequence[int | Sequence[int]]  # of each image its reference, or its references


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What an image takes from its reference; the defaults are the paper's."""

    attention: bool = True  # sees the reference's keys and values; without, only AdaIN is left
    adain_q: bool = True
    adain_k: bool = True
    adain_v: bool = False
    scale: float = 1.0  # of the reference's logits, 0 ... 1: below 1 against copies of famous pictures (section 5.3)
    shift: float = 0.0  # added to them, in nats: ln 2 doubles the weight of a real picture's style
    norms: bool = False  # group norms take the statistics of both pictures together
    all_see_all: bool = False  # the ablation of eq. 1: each sees every image of its group, without AdaIN, scale, shift

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0 and math.isfinite(self.shift)):
            raise ValueError(f"scale is finite and at least 0, shift finite; got {self.scale} and {self.shift}")

    @property
    def attends(self) -> bool:
        """Whether any self-attention is another one than without."""
        return self.sees or self.adain_q or self.adain_k or self.adain_v

    @property
    def sees(self) -> bool:
        """Whether an image sees others."""
        return self.attention or self.all_see_all


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one of the authors' notebooks; all walk DDIM with steps at 980, 960, ... 0."""

    sharing: Sharing
    guidance: float = 5.0
    steps: int = 50
    invert_guidance: float = 2.0  # while a real picture is inverted
    offset: int = 0  # where in its trajectory the reference begins


BOTH = Sharing(norms=True)
PRESETS = {
    "sdxl": Preset(sharing=Sharing()),
    "defaults": Preset(sharing=BOTH),
    "transfer": Preset(sharing=replace(BOTH, shift=math.log(2)), guidance=10.0, offset=5),
    "famous": Preset(sharing=replace(BOTH, scale=0.5), guidance=10.0, offset=5),
    "controlnet": Preset(sharing=Sharing()),
    "sd1": Preset(sharing=BOTH, guidance=7.5),
    "panorama": Preset(sharing=BOTH, guidance=7.5),
}


def grouped(groups: Sequence[Sequence[int]]) -> list[int]:
    """Groups of images, the reference first in each -> the reference of each image.

    [[0, 1, 2], [3, 4]] -> [0, 0, 0, 3, 3].  SourcesError: groups that do not part 0 ... n-1.
    """
    order = sorted(i for group in groups for i in group)
    if not order or order != list(range(len(order))) or not all(groups):
        raise SourcesError(f"groups hold every image of the batch once; got {[list(g) for g in groups]}")
    head = {i: group[0] for group in groups for i in group}
    return [head[i] for i in order]


def style_aligned(
    ops: Ops,
    refs: Refs,
    sharing: Sharing | None = None,
    *,
    sites: Sites | None = None,
    device: torch.device | str = "cpu",
) -> Ops:
    """Verbs in which image i of a batch takes the style of image refs[i]; refs[i] = i is a reference, or a free image.

    Of several references, refs[i] = (r, ...), all are seen, and the first gives the statistics: the paper has one.
    `refs` has n entries, for batches of n images, of 2n (guidance: negative rows first) or any multiple.  `sites`, a
    set of sites or a predicate, are the self-attentions that share, by default all of them (`style_layers` names
    them); norms share everywhere, as in the authors' code.  `device` is where the network computes.

    With every image its own reference nothing changes, bit for bit, and the reference's own row is as without, up to
    rounding, but for `all_see_all`.  SourcesError: a reference outside the batch or with another reference; another
    number of rows.
    """
    sharing = sharing or Sharing()
    tables = {copies: Table.of(refs, sharing, copies, device) for copies in (1, 2)}
    if all(r == i for i, r in enumerate(refs)):
        return ops
    inside = chosen(sites)
    folded = sharing.adain_q and sharing.adain_k and not sharing.all_see_all
    altered = sharing.adain_v or (sharing.adain_k and not folded)

    def table(rows: int) -> Table:
        copies, rest = divmod(rows, len(refs))
        if rest:
            raise SourcesError(f"references are of {len(refs)} images, which do not go into a batch of {rows} rows")
        return tables[copies] if copies in tables else Table.of(refs, sharing, copies, device)

    def attend(
        site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
    ) -> Tensor:
        if site.kind != "self" or not inside(site):
            return ops.attend(site, q, k, v, bias, seen)
        mine = table(len(q))
        if not sharing.all_see_all:
            if altered and seen is not None and seen.sources is not None and seen.pool is None:
                seen = seen._replace(pool=(k, v))  # another method's sources are what they were before AdaIN
            if not folded:
                q = adain(q, mine.ref) if sharing.adain_q else q
                k = adain(k, mine.ref) if sharing.adain_k else k
            v = adain(v, mine.ref) if sharing.adain_v else v  # eq. 5, of which a reference is a fixed point
        more = Seen(mine.sources(k.shape[2]) if sharing.sees else None, None, mine.ref if folded else None)
        return ops.attend(site, q, k, v, bias, also(seen, more, k, v))

    def group_norm(
        site: Site,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        ref: Tensor | None = None,
    ) -> Tensor:
        mine = table(len(x)).ref
        if ref is not None and ref is not mine and not torch.equal(ref, mine):
            raise SourcesError(f"two methods pool the norms at {site} with different images: give both the same ones")
        return ops.group_norm(site, x, weight, bias, groups, eps, silu, mine)

    verbs = {"attend": attend} if sharing.attends else {}
    return replace(ops, **(verbs | {"group_norm": group_norm} if sharing.norms else verbs))


def chosen(sites: Sites | None) -> Callable[[Site], bool]:
    """Whether a site is among those; without any, all are."""
    return (lambda site: True) if sites is None else sites if callable(sites) else frozenset(sites).__contains__


@dataclass(frozen=True)
class Table:
    """Who refers to whom in a batch, and who sees whom, for attentions of any number of tokens."""

    ref: Tensor  # (B,)
    one: Sources  # for one token
    column: Tensor  # (S, 4), 1 where a segment ends

    @classmethod
    def of(cls, refs: Refs, sharing: Sharing, copies: int, device: torch.device | str) -> "Table":
        """The table of n images, `copies` times one after the other."""
        n, each = len(refs), [[r] if isinstance(r, int) else list(r) for r in refs]
        if not all(each):
            raise SourcesError("an image has one reference or more; its own number is none but itself")
        rows = [[r + n * j for r in several] for j in range(copies) for several in each]
        ref = [several[0] for several in rows]
        one = shared(ref, 1, sharing.scale, sharing.shift, device)  # which checks them
        if sharing.all_see_all:
            one = everyone([[i for i, r in enumerate(ref) if r == head] for head in dict.fromkeys(ref)], 1, device)
        elif any(len(several) > 1 for several in rows):
            for i, several in enumerate(rows):
                if len(set(several)) < len(several) or not all(0 <= r < len(ref) and rows[r] == [r] for r in several):
                    raise SourcesError(
                        f"the references of image {i % n} are others, which have none; got {each[i % n]}"
                    )
            seen = [[Source(r, 0, 1, sharing.scale, sharing.shift) for r in several if r != i]
                    for i, several in enumerate(rows)]  # fmt: skip
            one = Sources.of(seen, device)
        return cls.around(torch.tensor(ref, device=device), one)

    @classmethod
    def around(cls, ref: Tensor, one: Sources) -> "Table":
        """The table of sources of one token each."""
        column = torch.zeros_like(one.segments)
        column[:, 3] = 1
        return cls(ref, one, column)

    def sources(self, tokens: int) -> Sources:
        """Who sees whom among images of that many tokens; the host is not asked."""
        segments = torch.add(self.one.segments, self.column, alpha=tokens - 1)
        return Sources(self.one.offsets, segments, self.one.gains, self.one.images, self.one.pool_images, tokens)

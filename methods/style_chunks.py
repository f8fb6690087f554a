"""Sets of any size in one style, a few pictures at a time: exact, since references never depend on their targets.

Memory is that of one chunk whatever the set, but for x and eps, and what `make` holds of texts.  The references are
drawn along with every chunk, or once a step, and their keys, values and statistics kept for the others: for SDXL at
1024² 0.84 GB in half precision for a step, 42 GB for a whole walk of 50, which is why it is a step's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.adain import token_stats
from ..kernels.device import dual
from ..kernels.sources import Seen, Source, Sources, SourcesError, also
from ..model.ops import TORCH, Ops, Site
from ..samplers.parameterisation import Denoise
from .style_aligned import Sharing, Sites, Table, chosen, style_aligned
from .style_targets import references

Make = Callable[[list[int], Ops], Denoise]


def chunked(
    make: Make,
    refs: Sequence[int],
    sharing: Sharing | None = None,
    *,
    size: int = 4,
    kept: bool = False,
    ops: Ops = TORCH,
    sites: Sites | None = None,
    device: torch.device | str = "cpu",
) -> Denoise:
    """x (n, ...), t (n,) -> eps, as of `style_aligned(ops, refs, sharing)` on all n images, `size` targets at a time.

    `make(rows, ops)` is the network of some images of the set, in that order, with prompts, ids and guidance of their
    own and those verbs.  `kept` draws the references once a step and keeps what others see of them.
    SourcesError: `all_see_all`, where references do depend on their targets; a batch of another size.
    """
    sharing = sharing or Sharing()
    if sharing.all_see_all:
        raise SourcesError("where all see all, no part of a set can be drawn without the rest")
    if size < 1:
        raise SourcesError(f"targets are drawn at least one at a time; got {size}")
    Table.of(refs, sharing, 1, device)  # which checks them
    heads = references(refs)
    others = [i for i in range(len(refs)) if i not in heads]
    parts = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    calls: list[tuple[list[int], list[int], Denoise]] = []  # rows, how many of the first are not new, the network
    if kept and heads:
        held = Kept(sharing, sites)
        calls.append((heads, heads, make(heads, held.keeping(ops))))
        for part in parts:
            local = [heads.index(refs[i]) if refs[i] != i else None for i in part]
            calls.append((part, part, make(part, held.seeing(ops, local, len(heads), device))))
    else:
        for k, part in enumerate(parts):
            used = sorted({refs[i] for i in part if refs[i] != i}) if k else heads
            rows = [*used, *part]
            mine = style_aligned(ops, [rows.index(refs[i]) for i in rows], sharing, sites=sites, device=device)
            calls.append((rows, part if k else rows, make(rows, mine)))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if len(x) != len(refs):
            raise SourcesError(f"references are of {len(refs)} images; got a batch of {len(x)}")
        order, found = [], []
        for rows, new, denoise in calls:
            eps = denoise(x[rows], t[rows])
            order += new
            found.append(eps[len(rows) - len(new) :])
        return torch.cat(found)[torch.tensor(order, device=x.device).argsort()]

    return predict


@dataclass
class Kept:
    """What the references of one step leave for their targets; filled by each call with `keeping`."""

    sharing: Sharing
    sites: Sites | None
    attentions: dict[Site, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)
    norms: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keeping(self, ops: Ops) -> Ops:
        """Verbs for the references: what others would see is noted."""
        inside = chosen(self.sites)

        def attend(
            site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
        ) -> Tensor:
            if site.kind == "self" and inside(site):
                self.attentions[site] = k, v, torch.stack([statistics(q), statistics(k)]), statistics(v)
            return ops.attend(site, q, k, v, bias, seen)

        def group_norm(site: Site, x: Tensor, w: Tensor, b: Tensor, groups: int, *rest: object) -> Tensor:
            self.norms[site] = moments(x, groups)
            return ops.group_norm(site, x, w, b, groups, *rest)

        return replace(ops, attend=attend, group_norm=group_norm if self.sharing.norms else ops.group_norm)

    def seeing(self, ops: Ops, refs: Sequence[int | None], heads: int, device: torch.device | str) -> Ops:
        """Verbs for n targets, each of which sees reference refs[i] of `heads`, or none.

        Norms are computed here, not by the verb beneath: its statistics are of the batch alone.
        """
        n, sharing, inside = len(refs), self.sharing, chosen(self.sites)
        if not n:
            return ops
        alone = torch.tensor([r is None for r in refs], device=device)
        tables = {copies: self.table(refs, heads, copies, device) for copies in (1, 2)}

        def table(rows: int) -> Table:
            if rows % n or rows // n not in tables:
                raise SourcesError(f"references are of {n} images, in a batch of {n} or {2 * n} rows; got {rows}")
            return tables[rows // n]

        def attend(
            site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, seen: Seen | None = None
        ) -> Tensor:
            if site.kind != "self" or not inside(site):
                return ops.attend(site, q, k, v, bias, seen)
            mine = table(len(q))
            their_k, their_v, (their_q_stats, their_k_stats), their_v_stats = self.attentions[site]
            if seen is not None and seen.sources is not None and seen.pool is None:
                seen = seen._replace(pool=(k, v))
            skip = alone.repeat(len(q) // n)
            q = towards(q, their_q_stats[:, mine.ref], skip) if sharing.adain_q else q
            k = towards(k, their_k_stats[:, mine.ref], skip) if sharing.adain_k else k
            v = towards(v, their_v_stats[:, mine.ref], skip) if sharing.adain_v else v
            if not sharing.attention:
                return ops.attend(site, q, k, v, bias, seen)
            more = Seen(mine.sources(their_k.shape[2]), (their_k, their_v))
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
            if ref is not None:
                raise SourcesError(f"two methods pool the norms at {site}, one of them with images that are elsewhere")
            mine = table(len(x)).ref
            mean, var = moments(x, groups)
            both_mean, both_var = pooled(mean, var, *(y[mine] for y in self.norms[site]))
            skip = alone.repeat(len(x) // n)[:, None]
            mean, var = torch.where(skip, mean, both_mean), torch.where(skip, var, both_var)
            y = (x.unflatten(1, (groups, -1)).to(mean) - wide(mean)) * wide((var + eps).rsqrt())
            y = torch.addcmul(bias[:, None, None], y.flatten(1, 2).to(x.dtype), weight[:, None, None])
            return F.silu(y) if silu else y

        return replace(ops, attend=attend, group_norm=group_norm if sharing.norms else ops.group_norm)

    def table(self, refs: Sequence[int | None], heads: int, copies: int, device: torch.device | str) -> Table:
        """Rows of the pool, the references of each half of the batch."""
        rows = [None if r is None else r + heads * j for j in range(copies) for r in refs]
        gains = self.sharing.scale, self.sharing.shift
        one = Sources.of([[] if r is None else [Source(r, 0, 1, *gains)] for r in rows], device)
        return Table.around(torch.tensor([r or 0 for r in rows], device=device), one)


def towards(x: Tensor, stats: Tensor, skip: Tensor) -> Tensor:
    """AdaIN of x (B, H, N, D) to known statistics (2, B, H, D); rows of `skip` stay."""
    mean, std = statistics(x)
    gain, offset = torch.where(skip[:, None, None], 1, stats[1] / std), torch.where(skip[:, None, None], mean, stats[0])
    if dual(x):
        mean, gain, offset = (y[:, :, None] for y in (mean, gain, offset))
        return (x - mean) * gain + offset
    return torch.ops.diaphane.centred_affine(x, mean, gain, offset)


def statistics(x: Tensor) -> Tensor:
    """Mean and deviation over tokens.  (B, H, N, D) -> (2, B, H, D)."""
    return token_stats(x)[0]


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels, (B, groups), float32 or better."""
    y = x.flatten(2).unflatten(1, (groups, -1)).flatten(2)
    var, mean = torch.var_mean(y.to(torch.promote_types(x.dtype, torch.float32)), dim=2, correction=0)
    return mean, var


def pooled(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of two sets of equal size, from those of each."""
    return (mean + other_mean) / 2, (var + other_var) / 2 + (mean - other_mean) ** 2 / 4


def wide(y: Tensor) -> Tensor:
    """(B, groups) -> (B, groups, 1, 1, 1)."""
    return y[:, :, None, None, None]

"""A case of source attention as its rivals see it, with its definition, its least work and its judge."""

from functools import cached_property

import torch
from torch import Tensor

from . import reference
from .cases import Case, inputs
from .contests import Work, distance, limit


class Problem:
    """A case as its rivals see it: q, k, v (B, H, N or M, D), and which rows of all keys, (B M), each image sees."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device):
        made = inputs(case, dtype, device)
        self.case, self.device, self.m = case, device, case.keys or case.tokens
        self.q, self.k, self.v, self.ref = made["q"], made["k"], made["v"], made.get("ref")
        self.scale = case.dim**-0.5
        self.per_half = case.batch // case.halves
        self.kept = torch.ones(self.per_half, self.m, dtype=torch.bool)
        if case.sees == "kept":
            order = (
                torch.rand(self.per_half, self.m, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1)
            )
            self.kept = order < torch.tensor(case.kept)[:, None]
        self.rows = [torch.cat([self._own(i), *self._foreign(i)]).to(device) for i in range(case.batch)]
        self.plain = case.scale == 1 and case.shift == 0

    def _own(self, i: int) -> Tensor:
        return torch.arange(i * self.m, (i + 1) * self.m)

    def sees(self, i: int) -> list[int]:
        """The images besides i of which i sees keys."""
        case, half = self.case, i // self.per_half * self.per_half
        if case.sees == "own":
            return []
        if case.sees == "kept":
            return [half + j for j in range(self.per_half) if half + j != i and case.kept[j]]
        if case.sees == "shared":
            return [case.refs[i]] if case.refs[i] != i else []
        return [j for j in range(case.batch) if j != i and case.refs[j] == case.refs[i]]

    def _foreign(self, i: int) -> list[Tensor]:
        return [j * self.m + self.kept[j % self.per_half].nonzero()[:, 0] for j in self.sees(i)]

    @cached_property
    def allowed(self) -> Tensor:
        """Whether image i sees row j: bool (B, B M)."""
        seen = torch.zeros(self.case.batch, self.case.batch * self.m, dtype=torch.bool, device=self.device)
        for i, rows in enumerate(self.rows):
            seen[i, rows] = True
        return seen

    def aligned(self) -> tuple[Tensor, Tensor]:
        """q and k under AdaIN, as the methods' own code has them in memory."""
        if self.ref is None:
            return self.q, self.k
        return reference.adain(self.q, self.ref), reference.adain(self.k, self.ref)

    def work(self) -> Work:
        """Every key once: a reference is one source, though its own formulation shows it to itself twice."""
        case = self.case
        pairs = sum(len(rows) for rows in self.rows) * case.heads * case.tokens
        size = sum(x.numel() * x.element_size() for x in (self.q, self.q, self.k, self.v))
        return Work(4.0 * pairs * case.dim, pairs, size)

    def written_out(self, dtype: torch.dtype, heads: list[int]) -> tuple[Tensor, float]:
        """Some heads by the definition, keys side by side, and the largest log-sum-exp of their logits."""
        q, k, v = (x[:, heads].to(dtype) for x in (self.q, self.k, self.v))
        own_q, own_k = (q, k) if self.ref is None else (reference.adain(q, self.ref), reference.adain(k, self.ref))
        every, values = (x.transpose(0, 1).flatten(1, 2) for x in (k, v))
        outs, peak = [], 0.0
        for i, rows in enumerate(self.rows):
            keys = torch.cat([own_k[i], every[:, rows[self.m :]]], 1)
            logits = own_q[i] @ keys.transpose(-2, -1) * self.scale
            near, far = logits.split([self.m, len(rows) - self.m], -1)
            logits = torch.cat([near, far * self.case.scale + self.case.shift], -1)
            peak = max(peak, logits.logsumexp(-1).abs().max().item())
            outs.append(logits.softmax(-1) @ values[:, rows])
        return torch.stack(outs), peak

    def judge(self, found: Tensor) -> tuple[float, float]:
        """The error of the heads that are looked at, and the most."""
        heads, true, most = self._truth
        return distance(found[:, heads], true), most

    @cached_property
    def _truth(self) -> tuple[list[int], Tensor, float]:
        every = list(range(self.case.heads))
        heads = every if self.device.type == "cuda" else sorted({0, len(every) // 2, len(every) - 1})
        parts = [[self.written_out(t, [h]) for h in heads] for t in (torch.float64, self.q.dtype)]
        true, plain = (torch.cat([out for out, _ in part], 1) for part in parts)
        lost = max(peak for _, peak in parts[0]) * torch.finfo(torch.float32).eps  # where exp(logit - lse) rounds both
        return heads, true, max(limit(plain, true), lost)

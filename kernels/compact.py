"""Where masks are true, as a list that is built once, and the rows of keys and values that it picks, as custom ops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .device import dual, refuse, takes_triton
from .sources import Sources, compacted


@dataclass(frozen=True)
class Kept:
    """The kept tokens of B images of `tokens` tokens each, image by image and in order."""

    index: Tensor  # int64 (T,): rows of the flattened mask; 0 past the last edge
    edges: Tensor  # int32 (B + 1,): those of image i are edges[i] to edges[i + 1] of the index
    tokens: int

    def sources(self, sees: Sequence[Sequence[bool]], halves: int = 1, apart: bool = False) -> Sources:
        """Image i sees the kept tokens of every image j with sees[i][j], as `kernels.sources.compacted` has it.

        The tables are made on the device, in as many segments whatever is kept: nothing waits, and nothing compiled is
        compiled again.
        """
        return compacted(self.edges.diff(), sees, halves, apart=apart, rows=len(self.index))


def compact(mask: Tensor, padded: bool = False) -> Kept:
    """The positions where a mask is true, built once per step and resolution for all layers.

    bool (B, N) -> T of them, which one wait for the device counts; `padded`, nothing waits, and T is B N, at every step
    the same.  T is 2 at least, if B N is: torch.compile takes sizes of 0 and 1 for other shapes.

    Reads the mask once, B N bytes (its kernel, which has a program an image, at most B times) and writes 8 B N.
    Triton on Nvidia devices since Ampere, torch anywhere else.  ValueError: a mask that is not bool, or not (B, N).
    """
    if mask.ndim != 2 or mask.dtype != torch.bool or 0 in mask.shape:
        raise ValueError(f"compact takes a mask bool (B, N), neither of them 0; got {mask.dtype} {tuple(mask.shape)}")
    index, edges = torch.ops.diaphane.compact(mask)
    return Kept(index if padded else index[: max(2, int(edges[-1]))], edges, mask.shape[1])


def gather(x: Tensor, kept: Kept, halves: int = 1) -> Tensor:
    """The kept rows of keys, or of values, side by side: a pool for the sources of the same tokens.

    (halves B, H, N, D) -> (halves, H, T, D), in memory (halves, T, H, D); rows past the last kept token are 0.  Every
    half of the batch (guidance makes two) keeps the same tokens.  Gradients reach x; one derivative.

    Reads the kept rows once, and writes halves T H D elements.  Triton on Nvidia devices since Ampere for heads up to
    256, torch anywhere else.  ValueError: an x of other images or tokens than the mask's, or elsewhere.
    """
    images = len(kept.edges) - 1
    if x.ndim != 4 or halves < 1 or (x.shape[0], x.shape[2]) != (halves * images, kept.tokens):
        want = f"({halves * images}, H, {kept.tokens}, D), {halves} halves of {images} images"
        raise ValueError(f"the mask kept tokens of {want}; got {tuple(x.shape)}")
    if x.device != kept.index.device:
        raise ValueError(f"the mask is on {kept.index.device}, what it picks from on {x.device}; build it there")
    if dual(x):
        inside = torch.arange(len(kept.index), device=x.device) < kept.edges[-1]
        return torch.where(inside[:, None], reference.gather(x, kept.index, halves), 0.0)
    return torch.ops.diaphane.gather(x, kept.index, kept.edges, halves)


@torch.library.custom_op("diaphane::compact", mutates_args=(), schema="(Tensor mask) -> (Tensor, Tensor)")
def _compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padded: int64 (B N,), int32 (B + 1,)."""
    if takes_triton(mask, (torch.bool,), mask.shape[-1]):
        from . import compact_triton

        return compact_triton.compact(mask)
    flat = mask.flatten()
    edges = torch.cat([flat.new_zeros(1, dtype=torch.int32), mask.sum(1).cumsum(0).int()])
    to = torch.where(flat, flat.cumsum(0) - 1, flat.numel())  # what is not kept goes past the end, all to one place
    rows = torch.arange(flat.numel(), device=mask.device)
    return rows.new_zeros(flat.numel() + 1).scatter_(0, to, rows)[:-1].clone(), edges


@_compact.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    images, tokens = mask.shape
    return mask.new_empty(images * tokens, dtype=torch.int64), mask.new_empty(images + 1, dtype=torch.int32)


@torch.library.custom_op(
    "diaphane::gather", mutates_args=(), schema="(Tensor x, Tensor index, Tensor edges, int halves) -> Tensor"
)
def _gather(x: Tensor, index: Tensor, edges: Tensor, halves: int) -> Tensor:
    if takes_triton(x):
        from . import compact_triton

        return compact_triton.gather(x, index, edges, halves)
    rows = x.unflatten(0, (halves, -1)).transpose(2, 3).flatten(1, 2)
    if x.device.type == "cpu":
        kept = int(edges[-1])
        out = rows.index_select(1, index[:kept])
        if kept < len(index):
            out = torch.cat([out, out.new_zeros((halves, len(index) - kept, *out.shape[2:]))], 1)
        return out.transpose(1, 2)
    inside = torch.arange(len(index), device=x.device) < edges[-1]
    return torch.where(inside[:, None, None], rows.index_select(1, index), 0.0).transpose(1, 2)


@_gather.register_fake
def _(x: Tensor, index: Tensor, edges: Tensor, halves: int) -> Tensor:
    _, h, _, d = x.shape
    return x.new_empty((halves, index.shape[0], h, d)).transpose(1, 2)


@torch.library.custom_op(
    "diaphane::scatter",
    mutates_args=(),
    schema="(Tensor g, Tensor index, Tensor edges, int tokens) -> Tensor",
)
def _scatter(g: Tensor, index: Tensor, edges: Tensor, tokens: int) -> Tensor:
    """What `gather` took, put back where it came from, and 0 elsewhere.  (halves, H, T, D) -> (halves B, H, N, D)."""
    if takes_triton(g):
        from . import compact_triton

        return compact_triton.scatter(g, index, edges, tokens)
    halves, h, _, d = g.shape
    inside = torch.arange(len(index), device=g.device) < edges[-1]
    value = torch.where(inside[:, None, None], g.transpose(1, 2), 0.0)
    rows = g.new_zeros((halves, (len(edges) - 1) * tokens, h, d)).index_add_(1, index, value)
    return rows.unflatten(1, (-1, tokens)).flatten(0, 1).transpose(1, 2)


@_scatter.register_fake
def _(g: Tensor, index: Tensor, edges: Tensor, tokens: int) -> Tensor:
    halves, h, _, d = g.shape
    return g.new_empty((halves * (edges.shape[0] - 1), tokens, h, d)).transpose(1, 2)


_scatter.register_autograd(refuse("scatter", "gather"))


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, index, edges, _ = inputs
    ctx.save_for_backward(index, edges)
    ctx.tokens = x.shape[2]


def _gradients(ctx: Any, g: Tensor) -> tuple:
    return torch.ops.diaphane.scatter(g, *ctx.saved_tensors, ctx.tokens), None, None, None


_gather.register_autograd(_gradients, setup_context=_context)

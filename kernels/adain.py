"""Token statistics, and AdaIN by them: custom ops with a Triton kernel on CUDA and torch everywhere else."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .device import dual, integers, refuse, takes_triton

CACHED = 1 << 20  # numbers of x, of which a CPU's cache holds a few copies


def token_stats(q: Tensor, k: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Mean over tokens and sqrt(variance + eps), of q and, where it is given, k, in one launch.

    (B, H, N, D), (B, H, M, D) -> float32 (2, 2, B, H, D), or (1, 2, B, H, D) without k: [which][mean, deviation].  The
    variance has N - 1 in its denominator, as in Hertz et al. 2024's code, and is of centred values: a large mean
    costs no digits.  float64 gives float64.  ValueError: not four axes, no tokens, no floating type, or q and k unlike.

    Reads each input once; 4 FLOP an element.
    """
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.ndim != 4 or x.shape[2] == 0 or not x.is_floating_point()):
            raise ValueError(f"token_stats takes {name} (B, H, N, D), floating, N > 0; got {x.dtype} {tuple(x.shape)}")
    if k is not None and (k.shape[0], k.shape[1], k.shape[3], k.dtype) != (q.shape[0], q.shape[1], q.shape[3], q.dtype):
        raise ValueError(f"token_stats takes k like q {tuple(q.shape)} {q.dtype}; got {tuple(k.shape)} {k.dtype}")
    if dual(q, k):
        return torch.stack([torch.stack(reference.token_stats(x, eps)) for x in (q, k) if x is not None])
    return torch.ops.diaphane.token_stats(q, k, eps)


def adain(x: Tensor, ref: Tensor, eps: float = 1e-5) -> Tensor:
    """Every image takes the token statistics of image ref[i] (Huang & Belongie 2017, eq. 8).

    (B, H, N, D), integers (B,) -> (B, H, N, D), statistics per image, head and channel.  ValueError: as `token_stats`,
    or a ref that is not integers, one an image.

    Reads x twice and writes it once, where the written-out form makes seven passes; 3 FLOP an element.
    """
    if ref.shape != x.shape[:1] or not integers(ref):
        raise ValueError(f"ref has one integer per image of x {tuple(x.shape)}; got {ref.dtype} {tuple(ref.shape)}")
    if dual(x):
        return reference.adain(x, ref, eps)
    mean, std = token_stats(x, eps=eps)[0]
    i = ref.long()
    return torch.ops.diaphane.centred_affine(x, mean, std[i] / std, mean[i])


def accumulator(x: Tensor) -> torch.dtype:
    """The type in which sums over x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def stats_gradient(g: Tensor, x: Tensor, stats: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by x and by (mean, std) = stats of AdaIN, (x - mean) / std * std[ref] + mean[ref], from that by it.

    (B, H, N, D), (B, H, N, D), (2, B, H, D), (B,) -> (B, H, N, D), (2, B, H, D).
    """
    mean, std = stats
    i = ref.long()
    gain = std[i] / std
    total, weighted = torch.ops.diaphane.moments(g, x, mean)
    zero = torch.zeros_like(mean)
    by_mean = zero.index_add(0, i, total) - total * gain
    by_std = zero.index_add(0, i, weighted / std) - weighted * gain / std
    return torch.ops.diaphane.centred_affine(g, zero, gain, zero).to(x.dtype), torch.stack([by_mean, by_std])


@torch.library.custom_op("diaphane::token_stats", mutates_args=(), schema="(Tensor q, Tensor? k, float eps) -> Tensor")
def _stats(q: Tensor, k: Tensor | None, eps: float) -> Tensor:
    if takes_triton(q):
        from . import adain_triton

        return adain_triton.token_stats(q, k, eps)
    rows = []
    for x in (q, k):
        if x is not None:
            n, row = x.shape[-2], []
            for part in x.split(few(x)):
                part = part.to(accumulator(x))
                mean = part.mean(-2)
                centred = part - mean[..., None, :]
                off = centred.mean(-2)  # what rounding left in the mean
                squares = centred.square_().sum(-2) - n * off.square()
                row.append(torch.stack([mean + off, (squares / max(n - 1, 1) + eps).sqrt()]))
            rows.append(torch.cat(row, 1))
    return torch.stack(rows)


def few(x: Tensor) -> int:
    """How many images at a time let what is between two passes over them stay in a CPU's cache."""
    return max(1, CACHED * len(x) // max(1, x.numel()))


@_stats.register_fake
def _(q: Tensor, k: Tensor | None, eps: float) -> Tensor:
    b, h, _, d = q.shape
    return q.new_empty((1 if k is None else 2, 2, b, h, d), dtype=accumulator(q))


def _stats_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, _ = inputs
    ctx.save_for_backward(q, k, output)


def _stats_backward(ctx: Any, g: Tensor) -> tuple:
    q, k, stats = ctx.saved_tensors
    grads: list[Tensor | None] = []
    for i, x in enumerate((q, k)):
        if x is None:
            grads.append(None)
            continue
        n = x.shape[-2]
        (mean, std), (by_mean, by_std) = stats[i], g[i]
        # d mean / d x = 1 / N and d std / d x = (x - mean) / ((N - 1) std), where rounding leaves something in the mean
        slope = by_std / (std * max(n - 1, 1))
        off = torch.ops.diaphane.moments(torch.ones_like(x[:, :, :1]).expand_as(x), x, mean)[1] / n
        grads.append(torch.ops.diaphane.centred_affine(x, mean, slope, by_mean / n - slope * off))
    return *grads, None


_stats.register_autograd(_stats_backward, setup_context=_stats_context)


@torch.library.custom_op(
    "diaphane::centred_affine",
    mutates_args=(),
    schema="(Tensor x, Tensor centre, Tensor gain, Tensor offset) -> Tensor",
)
def _affine(x: Tensor, centre: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """(x - centre) * gain + offset, per image, head and channel."""
    if takes_triton(x):
        from . import adain_triton

        return adain_triton.centred_affine(x, centre, gain, offset)
    y = token_major(x)
    parts = (v.split(few(x)) for v in (y, x, *(c[..., None, :] for c in (centre, gain, offset))))
    for to, part, mean, scale, level in zip(*parts, strict=True):
        torch.addcmul(level, part.to(accumulator(x)) - mean, scale, out=to)
    return y


@_affine.register_fake
def _(x: Tensor, centre: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return token_major(x)


def token_major(x: Tensor) -> Tensor:
    """Empty, shaped like x (B, H, N, D), and (B, N, H, D) in memory, as the projections of a transformer are."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def rows(x: Tensor) -> Tensor:
    """x with its channels next to each other, copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _affine_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, centre, gain, _ = inputs
    ctx.save_for_backward(x, centre, gain)


def _affine_backward(ctx: Any, g: Tensor) -> tuple:
    x, centre, gain = ctx.saved_tensors
    total, weighted = torch.ops.diaphane.moments(g, x, centre)
    zero = torch.zeros_like(gain)
    return torch.ops.diaphane.centred_affine(g, zero, gain, zero), -total * gain, weighted, total


_affine.register_autograd(_affine_backward, setup_context=_affine_context)


@torch.library.custom_op("diaphane::moments", mutates_args=(), schema="(Tensor g, Tensor x, Tensor centre) -> Tensor")
def _moments(g: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Over tokens: the sum of g, and of g (x - centre).  2 x (B, H, N, D), (B, H, D) -> (2, B, H, D)."""
    if takes_triton(x):
        from . import adain_triton

        return adain_triton.moments(g, x, centre)
    g = g.to(accumulator(x))
    return torch.stack([g.sum(-2), (g * (x.to(g.dtype) - centre[..., None, :])).sum(-2)])


@_moments.register_fake
def _(g: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    b, h, _, d = x.shape
    return x.new_empty((2, b, h, d), dtype=accumulator(x))


_moments.register_autograd(refuse("moments", "token_stats and adain"))

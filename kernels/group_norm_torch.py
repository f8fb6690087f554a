"""GroupNorm with pooled statistics in torch: the closed form, with no images side by side, and its gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, laid out as x, and the mean and variance of every group, (2, B, G)."""
    work, like, c = wide(x), x, x.shape[1]
    x, weight, bias = x.to(work), weight.to(work), bias.to(work)
    unit, level, size, stats = _centred(x, groups) if channels_last(x) else _normalised(x, groups, eps)
    centre, factor = normalisers(stats, eps, ref)
    gain, offset = channels(factor * size, c) * weight, channels((level - centre) * factor, c) * weight + bias
    y = torch.addcmul(spread(offset, x), unit, spread(gain, x))
    return laid_out(F.silu(y, inplace=True) if silu else y, like), stats


def _normalised(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x as level + size * unit, and its statistics, from one pass of torch's own."""
    (b, c), eps = x.shape[:2], max(eps, 1e-12)  # an image of one colour may have a reference that is not
    unit, mean, rstd = torch.native_group_norm(x.contiguous(), None, None, b, c, x[0, 0].numel(), groups, eps)
    return unit, mean, rstd.reciprocal(), torch.stack([mean, rstd.square().reciprocal() - eps])


def _centred(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for channels last, of which torch's own squares the mean."""
    pixels = tuple(range(2, x.ndim))
    level = x.mean(pixels).unflatten(1, (groups, -1)).mean(-1)
    unit = x - spread(channels(level, x.shape[1]), x)
    off, squares = (y.mean(pixels).unflatten(1, (groups, -1)).mean(-1) for y in (unit, unit.square()))
    return unit, level, torch.ones_like(level), torch.stack([level + off, squares - off.square()])


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    ref: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, by the weight and by the bias."""
    work, like, c = stats.dtype, x, x.shape[1]
    last, count = channels_last(x), x[0].numel() // groups
    g, x, w = g.to(work), x.to(work), weight.to(work)
    if not last:
        g, x = g.contiguous(), x.contiguous()
    mean, rstd = normalisers(stats, eps, ref)
    if silu:
        gain = channels(rstd, c) * w
        z = torch.addcmul(spread(bias.to(work) - channels(mean, c) * gain, x), x, spread(gain, x))
        g = torch.ops.aten.silu_backward(g, z)
    dx, sums, taken = (_plain_sums if last else _own_backward)(g, x, w, mean, rstd)
    level, slope = slopes(sums, w, stats, eps, ref, count) - taken / count
    if last or ref is not None:
        level = level - slope * stats[0] + taken[1] / count * (mean - stats[0])
        dx = dx + torch.addcmul(spread(channels(level, c), x), x, spread(channels(slope, c), x))
    return laid_out(dx, like), sums[1].sum(0).to(weight.dtype), sums[0].sum(0).to(bias.dtype)


def _own_backward(g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient by x, the sums of `slopes`, and the slopes that it holds already, of torch's own backward.

    It is told the statistics that were used, and every image apart.
    """
    b, c, groups, pixels = *x.shape[:2], rstd.shape[1], x[0, 0].numel()
    flat = (1, b * c, pixels)
    dx, weighted, total = torch.ops.aten.native_group_norm_backward(
        g.view(flat), x.view(flat), mean.reshape(1, -1), rstd.reshape(1, -1), w.repeat(b),
        1, b * c, pixels, b * groups, [True, True, True],
    )  # fmt: skip
    sums = torch.stack([total.view(b, c), weighted.view(b, c)])
    return dx.view(x.shape), sums, parts(sums, w, rstd)


def _plain_sums(g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same written out, which holds no slopes."""
    pixels, c = tuple(range(2, x.ndim)), x.shape[1]
    factor = channels(rstd, c)
    weighted = (g * (x - spread(channels(mean, c), x))).sum(pixels) * factor
    return g * spread(factor * w, x), torch.stack([g.sum(pixels), weighted]), torch.zeros_like(rstd).expand(2, -1, -1)


def normalisers(stats: Tensor, eps: float, ref: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is subtracted from a group, and what multiplies it then.  (2, B, G) -> 2 x (B, G)."""
    mean, var = stats
    if ref is not None:
        i = ref.long()
        var = (var + var[i]) / 2 + ((mean - mean[i]) / 2).square()
        mean = mean + (mean[i] - mean) / 2
    return mean, (var + eps).rsqrt()


def parts(sums: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The gradients by the mean and, twice, by the variance of a group as it was used.  (2, B, C) -> (2, B, G)."""
    total, weighted = (sums * weight).unflatten(-1, (rstd.shape[-1], -1)).sum(-1)
    return torch.stack([-rstd * total, -rstd.square() * weighted])


def slopes(sums: Tensor, weight: Tensor, stats: Tensor, eps: float, ref: Tensor | None, count: int) -> Tensor:
    """The two numbers of a group that its `count` pixels' gradients have in common: (2, B, G).

    sums (2, B, C) are those, over pixels, of the gradient g before the activation and of g times the normalised x.
    The gradient of a pixel is g weight rstd + slopes[0] + (x - m) slopes[1], where m is the mean of its own image: what
    reaches it through that mean and variance, from its own image and from those that refer to it.
    """
    mean = stats[0]
    by_mean, by_var = parts(sums, weight.to(sums.dtype), normalisers(stats, eps, ref)[1])
    if ref is not None:
        i = ref.long()
        away = by_var * (mean - mean[i]) / 4
        by_mean = (by_mean / 2 + away).index_add(0, i, by_mean / 2 - away)
        by_var = (by_var / 2).index_add(0, i, by_var / 2)
    return torch.stack([by_mean, by_var]) / count


def channels(v: Tensor, c: int) -> Tensor:
    """Numbers of groups as numbers of channels.  (B, G) -> (B, C)."""
    return v.repeat_interleave(c // v.shape[1], 1)


def spread(v: Tensor, x: Tensor) -> Tensor:
    """Numbers of channels (B or 1, C) with the axes of x."""
    return v.view(*v.shape, *[1] * (x.ndim - 2))


def wide(x: Tensor) -> torch.dtype:
    """The type in which statistics of x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> bool:
    """x (B, C, ...) has its channels next to each other, and its images dense."""
    return x.movedim(1, -1).is_contiguous() and not x.is_contiguous()


def empty(x: Tensor) -> Tensor:
    """Empty, shaped like x (B, C, ...), with its channels last in memory if they are so in x, and contiguous if not."""
    if channels_last(x):
        return torch.empty_like(x.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """y in the type of x and in the memory layout of `empty(x)`, itself where it is so."""
    y = y.to(x.dtype)
    dense = y.movedim(1, -1) if channels_last(x) else y
    return y if dense.is_contiguous() else empty(x).copy_(y)

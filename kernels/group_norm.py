"""GroupNorm, then SiLU, with the statistics of one image or of two: a custom op, Triton on CUDA and torch elsewhere."""

from typing import Any

import torch
from torch import Tensor

from . import group_norm_torch, reference
from .device import SINGLE, dual, integers, on_nvidia, refuse
from .group_norm_torch import empty, wide

MOST_IMAGES, WIDEST = 65_535, 4096  # of a launch; channels of a group


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = False,
    ref: Tensor | None = None,
) -> Tensor:
    """GroupNorm (Wu & He 2018), then x * sigmoid(x) if `silu`.  (B, C, ...), 2 x (C,) -> (B, C, ...), laid out as x.

    With ref (B,), integers, image i takes the mean and the variance of its own pixels and those of image ref[i]
    together (Hertz et al. 2024's code, "share group norm"), from those of each (docs/kernels.md, eq. N1).  Statistics
    are float32, float64 for float64.  Gradients reach x, also through the reference's statistics, weight and bias; one
    derivative, reverse mode, where a kernel or `ref` is used.

    Reads x twice and writes it once, where a group fits no cache, in three launches; a group of 65,536 elements or
    fewer in one, and its second reading from cache.  About 15 FLOP an element, and an exponential.  Backward reads x
    and its gradient twice and writes once.

    A ref outside the batch is an error of torch's, and NaN where a kernel meets it.
    ValueError: x of fewer than three axes, channels that are no multiple of groups, a weight, bias or ref that does not
    fit.
    """
    _check(x, weight, bias, groups, ref)
    if dual(x, weight, bias) or (ref is None and not takes_kernel(x, groups)):
        return reference.group_norm(x, weight, bias, groups, eps, silu, ref)
    return torch.ops.diaphane.group_norm(x, weight, bias, groups, eps, silu, ref)[0]


def takes_kernel(x: Tensor, groups: int) -> bool:
    """A device and a type with a kernel, and a shape that it is written for."""
    return on_nvidia(x, SINGLE) and x.numel() > 0 and len(x) <= MOST_IMAGES and x.shape[1] <= groups * WIDEST


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, ref: Tensor | None) -> None:
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"group_norm takes x (B, C, pixels ...) of {groups} groups of channels; got {tuple(x.shape)}")
    for name, v in (("weight", weight), ("bias", bias)):
        if v.shape != (x.shape[1],) or v.device != x.device:
            got = f"{tuple(v.shape)} on {v.device}"
            raise ValueError(f"{name} has one entry per channel, {x.shape[1]}, on {x.device}; got {got}")
    if ref is not None and (ref.shape != (len(x),) or not integers(ref) or ref.device != x.device):
        got = f"{tuple(ref.shape)} {ref.dtype} on {ref.device}"
        raise ValueError(f"ref is {len(x)} integers on {x.device}; got {got}")


_INPUTS = "Tensor x, Tensor weight, Tensor bias"
_REST = "int groups, float eps, bool silu, Tensor? ref"


@torch.library.custom_op("diaphane::group_norm", mutates_args=(), schema=f"({_INPUTS}, {_REST}) -> (Tensor, Tensor)")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and the mean and variance of every group, (2, B, G)."""
    if takes_kernel(x, groups):
        from . import group_norm_triton

        return group_norm_triton.forward(x, weight, bias, groups, eps, silu, ref)
    if x.numel() == 0:
        return empty(x), x.new_zeros((2, len(x), groups), dtype=wide(x))
    return group_norm_torch.forward(x, weight, bias, groups, eps, silu, ref)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty(x), x.new_empty((2, x.shape[0], groups), dtype=wide(x))


@torch.library.custom_op(
    "diaphane::group_norm_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_INPUTS}, Tensor stats, {_REST}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
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
    """Gradients by x, by the weight and by the bias."""
    if takes_kernel(x, groups):
        from . import group_norm_triton

        return group_norm_triton.backward(g, x, weight, bias, stats, groups, eps, silu, ref)
    if x.numel() == 0:
        return empty(x), torch.zeros_like(weight), torch.zeros_like(bias)
    return group_norm_torch.backward(g, x, weight, bias, stats, groups, eps, silu, ref)


@_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), torch.empty_like(weight), torch.empty_like(bias)


_backward.register_autograd(refuse("group_norm_backward", "group_norm"))


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, ctx.eps, ctx.silu, ref = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1], ref)


def _gradients(ctx: Any, g: Tensor, _: Tensor | None) -> tuple:
    x, weight, bias, stats, ref = ctx.saved_tensors
    rest = (ctx.groups, ctx.eps, ctx.silu, ref)
    grads = torch.ops.diaphane.group_norm_backward(g, x, weight, bias, stats, *rest)
    return *grads, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_context)

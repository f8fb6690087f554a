"""Where a Triton kernel can run, and what is said where it, or a derivative of it, cannot."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRITON_INSTALLED = find_spec("triton") is not None
SINGLE = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)


def on_nvidia(x: Tensor, dtypes: tuple[torch.dtype, ...] = SINGLE) -> bool:
    """On an Nvidia device since Ampere, and in one of the types."""
    if not (TRITON_INSTALLED and torch.version.cuda and x.is_cuda and x.dtype in dtypes):
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8


def takes_triton(x: Tensor, dtypes: tuple[torch.dtype, ...] = SINGLE, widest: int = 256) -> bool:
    """On an Nvidia device since Ampere, in one of the types, and with a head, the last axis, that is no wider."""
    return 0 < x.shape[-1] <= widest and on_nvidia(x, dtypes)


def integers(x: Tensor) -> bool:
    """Numbers of images, or of keys: not booleans, which torch would take for a mask."""
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def dual(*inputs: Tensor | None) -> bool:
    """Whether one carries a tangent of `torch.func.jvp`, of which a custom op would know nothing, without a word.

    Where a graph is traced inside of one, every tensor is taken to carry it.
    """
    if torch.compiler.is_compiling():
        return _within_forward_mode()
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs if x is not None and x.is_floating_point())


@torch.compiler.assume_constant_result
def _within_forward_mode() -> bool:
    """torch compiles a function again where this has changed."""
    return forward_ad._current_level >= 0


def refuse(op: str, of: str) -> Callable[..., NoReturn]:
    """The backward of an op that has none: an error that names it."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"diaphane::{op} has no derivative: {of} can be differentiated once")

    return backward

"""LoRA (Hu et al. 2022): W + w (alpha / r) up down, merged into new weights, or beside them with a w a picture."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.components import Components

N = TypeVar("N", bound=nn.Module)


class Factors(Protocol):
    """The product that is added to one weight."""

    @property
    def down(self) -> Tensor: ...  # (r, in), or (r, in, k, k)
    @property
    def up(self) -> Tensor: ...  # (out, r), or (out, r, 1, 1)
    @property
    def scale(self) -> float: ...  # alpha / r


def delta(factors: Factors, dtype: torch.dtype = torch.float32) -> Tensor:
    """(alpha / r) up down, in the shape of the weight."""
    down, up = factors.down.to(dtype), factors.up.to(dtype)
    return factors.scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def sharing(net: N) -> N:
    """A network of new modules around the very parameters of another."""
    held = {id(p): p for p in (*net.parameters(), *net.buffers())}
    return copy.deepcopy(net, held)


def merged(net: N, factors: Mapping[str, Factors], weight: float = 1.0) -> N:
    """A network with W + weight * delta in the place of each named W; the others are shared, `net` stays as it is.

    Sums are taken in float32 or better and rounded once.  With weight 0 nothing changes.  Raises ValueError for a
    name or shape that the network does not have.
    """
    new = sharing(net)
    for name, found in factors.items():
        module, leaf = owner(new, name)
        if isinstance(module, Beside):
            raise ValueError(f"{name} has another LoRA beside it: merge first, then put others beside")
        w: Tensor = getattr(module, leaf)
        wide = torch.promote_types(w.dtype, torch.float32)
        change = delta(found, wide).to(w.device)
        if change.shape != w.shape:
            raise ValueError(f"{name} is {tuple(w.shape)}, its LoRA {tuple(change.shape)}")
        setattr(module, leaf, nn.Parameter((w.to(wide) + weight * change).to(w.dtype), requires_grad=w.requires_grad))
    return new


def beside(net: N, factors: Mapping[str, Factors], weight: float | Tensor = 1.0) -> N:
    """A network in which each named layer adds weight * (alpha / r) up (down x); parameters are shared.

    `weight` may be (B,), one a picture: x then has B rows, or a multiple of B in which they come over and over, as in
    a doubled batch.  It may carry gradients.  Raises ValueError as `merged` does, and for layers of other kinds.
    """
    new = sharing(net)
    for name, found in factors.items():
        module, leaf = owner(new, name)
        at = name.removesuffix(f".{leaf}")
        new.set_submodule(at, Beside(module, found, weight))
    return new


def owner(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a weight, and what it calls it.  Raises ValueError if there is none."""
    at, _, leaf = name.rpartition(".")
    try:
        return net.get_submodule(at), leaf
    except AttributeError as e:
        raise ValueError(f"the network has no {name}: the LoRA was matched with another") from e


class Beside(nn.Module):
    """A linear layer or convolution, and two thin ones beside it."""

    down: Tensor  # buffers: they go where the layer goes
    up: Tensor

    def __init__(self, base: nn.Module, factors: Factors, weight: float | Tensor):
        super().__init__()
        inner = base.inner if isinstance(base, Beside) else base
        if not isinstance(inner, nn.Linear | nn.Conv2d):
            raise ValueError(f"LoRA is for linear layers and convolutions, not {type(inner).__name__}")
        shape = (factors.up.shape[0], *factors.down.shape[1:])
        if shape != tuple(inner.weight.shape):
            raise ValueError(f"a layer is {tuple(inner.weight.shape)}, its LoRA {shape}")
        self.base, self.inner, self.scale = base, inner, factors.scale
        for name in ("down", "up"):
            self.register_buffer(name, getattr(factors, name).to(inner.weight), persistent=False)
        self.strength = weight

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        """What the layer gives, and the product's share.  `rest` is what the layer takes besides."""
        if isinstance(self.inner, nn.Conv2d):
            conv = self.inner
            side = F.conv2d(F.conv2d(x, self.down, None, conv.stride, conv.padding, conv.dilation), self.up)
        else:
            side = F.linear(F.linear(x, self.down), self.up)
        weight = self.strength
        if isinstance(weight, Tensor):
            if weight.ndim != 1 or len(x) % len(weight):
                raise ValueError(f"weights are (B,), one a picture; got {tuple(weight.shape)} for a batch of {len(x)}")
            weight = weight.to(x).repeat(len(x) // len(weight)).view(-1, *[1] * (side.ndim - 1))
        return self.base(x, *rest) + self.scale * weight * side


def with_lora(
    parts: Components, factors: Mapping[str, Mapping[str, Factors]], weight: float | Tensor = 1.0, *, merge: bool = True
) -> Components:
    """A model with the LoRA of each of its parts, merged or beside.  Raises ValueError for parts that it lacks."""
    if strange := [part for part in factors if part not in ("unet", *parts.texts)]:
        raise ValueError(f"the model has no {strange[0]}: it has unet, {', '.join(parts.texts)}")
    if merge and isinstance(weight, Tensor):
        raise ValueError("a weight for each picture cannot be merged: give merge=False")

    def changed(net: N, name: str) -> N:
        found = factors.get(name, {})
        if isinstance(weight, Tensor) or not merge:
            return beside(net, found, weight)
        return merged(net, found, weight)

    towers = tuple(changed(tower, name) for tower, name in zip(parts.towers, parts.texts, strict=True))
    return replace(parts, unet=changed(parts.unet, "unet"), towers=towers)

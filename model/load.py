"""A network of any family around tensors that are already there: built on the meta device, nothing allocated."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .adm import ADM, ADMConfig
from .blocks import ThreeLists
from .ddpm import DDPM, DDPMConfig
from .ddpmpp import DDPMpp, DDPMppConfig

FAMILIES = {"ddpm": (DDPM, DDPMConfig), "adm": (ADM, ADMConfig), "ddpmpp": (DDPMpp, DDPMppConfig)}


def build(
    family: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ThreeLists:
    """The network, in evaluation mode, its parameters being `tensors` themselves where neither dtype nor device differ.

    `config` is the keyword arguments of the family's configuration.  Without `dtype` nothing is cast, and then all
    tensors have to be of one floating type.  Raises ValueError for an unknown family or setting, tensors that do not
    fit, mixed types, and values that `dtype` cannot hold.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}: it is one of {', '.join(FAMILIES)}")
    network, settings = FAMILIES[family]
    if strange := [name for name in config if name not in {f.name for f in fields(settings)}]:
        raise ValueError(f"{settings.__name__} has no {strange[0]}")
    tensors = {name: moved(name, tensor, dtype, device) for name, tensor in tensors.items()}
    if len(kinds := {tensor.dtype: name for name, tensor in tensors.items()}) > 1:
        mixed = " and ".join(f"{name} is {str(kind).removeprefix('torch.')}" for kind, name in list(kinds.items())[:2])
        raise ValueError(f"{mixed}: give one dtype= for all")
    with uncollected(), Unfilled():
        unet = network(settings(**config))
        try:
            unet.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as e:
            raise ValueError(f"the tensors are not this network's: {misfit(unet, tensors)}") from e
    return unet.eval().requires_grad_(False)


class Unfilled(TorchFunctionMode):
    """While it is on, parameters are made on the meta device and nothing initialises them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        if func in (torch.empty, torch.ones, torch.zeros):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: a thousand lasting objects would set off one of all that torch has imported."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def misfit(unet: ThreeLists, tensors: Mapping[str, Tensor]) -> str:
    """The first tensor that is missing, too many, or of another shape."""
    want = {name: tuple(t.shape) for name, t in unet.state_dict().items()}
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    name = next(name for name in (*want, *have) if have.get(name) != want.get(name))
    return f"{name} should be {want.get(name, 'absent')}, and is {have.get(name, 'absent')}"


def moved(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """A tensor in another type and place.  Raises ValueError if finite values become infinite on the way."""
    cast = tensor.to(device=device, dtype=dtype)
    if cast.dtype != tensor.dtype and cast.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name} has values that float16 cannot hold: take bfloat16 or float32")
    return cast

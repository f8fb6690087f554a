"""A network of any family around tensors that are already there: built on the meta device, nothing allocated."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adm import ADM, ADMConfig
from .blocks import ThreeLists
from .ddpm import DDPM, DDPMConfig
from .ddpmpp import DDPMpp, DDPMppConfig

Net = TypeVar("Net", bound=nn.Module)
COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LATENT = ("unet", "controlnet", "vae", "clip_text", "clip_vision")  # of model/latent.py
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
    if family in LATENT:
        raise ValueError(f"{family} is a part of a latent diffusion model: diaphane.model.latent.build makes it")
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}: it is one of {', '.join(FAMILIES)}")
    network, settings = FAMILIES[family]
    return assembled(network, settings, config, tensors, dtype=dtype, device=device)


def assembled(
    network: Callable[[Any], Net],
    settings: type,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Net:
    """`build` for one class of networks and that of its configuration."""
    if strange := [name for name in config if name not in {f.name for f in fields(settings)}]:
        raise ValueError(f"{settings.__name__} has no {strange[0]}")
    if dtype is not None and dtype not in COMPUTES:
        raise ValueError(f"dtype is torch.float16, bfloat16, float32 or float64, not {dtype!r}")
    tensors = {name: moved(name, tensor, dtype, device) for name, tensor in tensors.items()}
    narrow = next((tensor.dtype for tensor in tensors.values() if tensor.dtype not in COMPUTES), None)
    if narrow is not None:
        raise ValueError(
            f"the tensors are stored as {narrow}, in which nothing computes: give dtype=torch.float16, say"
        )
    if len(kinds := {tensor.dtype: name for name, tensor in tensors.items()}) > 1:
        mixed = " and ".join(f"{name} is {str(kind).removeprefix('torch.')}" for kind, name in list(kinds.items())[:2])
        raise ValueError(f"{mixed}: give one dtype= for all")
    with uncollected(), Unfilled():
        net = network(settings(**config))
        want = {name: tuple(p.shape) for name, p in net.named_parameters()}
        have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if have != want:
            name = next(name for name in (*want, *have) if have.get(name) != want.get(name))
            misfit = f"{name} should be {want.get(name, 'absent')}, and is {have.get(name, 'absent')}"
            raise ValueError(f"the tensors are not this network's: {misfit}")
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            net.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return net.eval()


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


def moved(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """A tensor in another type and place.  Raises ValueError if finite values become infinite on the way."""
    cast = tensor.to(device=device, dtype=dtype)
    if cast.dtype != tensor.dtype and cast.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name} has values that float16 cannot hold: take bfloat16 or float32")
    return cast

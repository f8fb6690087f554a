"""A network of any family around tensors that are already there: built on the meta device, nothing allocated."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

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
    with torch.device("meta"):
        unet = network(settings(**config))
    tensors = {name: moved(name, tensor, dtype, device) for name, tensor in tensors.items()}
    if len(kinds := {tensor.dtype: name for name, tensor in tensors.items()}) > 1:
        mixed = " and ".join(f"{name} is {str(kind).removeprefix('torch.')}" for kind, name in list(kinds.items())[:2])
        raise ValueError(f"{mixed}: give one dtype= for all")
    have, want = set(tensors), set(unet.state_dict())
    if have != want:
        raise ValueError(f"{len(want - have)} tensors are missing and {len(have - want)} too many: {min(want ^ have)}")
    try:
        unet.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as e:
        raise ValueError(f"tensors do not fit: {str(e).splitlines()[-1].strip()}") from e
    return unet.eval().requires_grad_(False)


def moved(name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """A tensor in another type and place.  Raises ValueError if finite values become infinite on the way."""
    cast = tensor.to(device=device, dtype=dtype)
    if cast.dtype != tensor.dtype and cast.dtype == torch.float16 and not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name} has values that float16 cannot hold: take bfloat16 or float32")
    return cast

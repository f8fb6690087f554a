"""The parts of a latent diffusion model around tensors that are already there."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .clip import TextConfig, TextTower, VisionConfig, VisionTower
from .controlnet import ControlNet, ControlNetConfig
from .load import Unfilled, moved, uncollected
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

PARTS: dict[str, tuple[type[nn.Module], type]] = {
    "unet": (UNet, UNetConfig),
    "controlnet": (ControlNet, ControlNetConfig),
    "vae": (VAE, VAEConfig),
    "clip_text": (TextTower, TextConfig),
    "clip_vision": (VisionTower, VisionConfig),
}


def build(
    family: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The part, in evaluation mode, its parameters being `tensors` themselves where neither dtype nor device differ.

    `config` is the keyword arguments of its configuration.  Without `dtype` nothing is cast.  Raises ValueError for
    an unknown part or setting, tensors that do not fit, and values that `dtype` cannot hold.
    """
    if family not in PARTS:
        raise ValueError(f"there is no part {family!r}: it is one of {', '.join(PARTS)}")
    network, settings = PARTS[family]
    if strange := [name for name in config if name not in {f.name for f in fields(settings)}]:
        raise ValueError(f"{settings.__name__} has no {strange[0]}")
    tensors = {name: moved(name, tensor, dtype, device) for name, tensor in tensors.items()}
    with uncollected(), Unfilled():
        net = network(settings(**config))
        try:
            net.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as e:
            raise ValueError(f"the tensors are not this {family}'s: {str(e).splitlines()[-1].strip()}") from e
    return net.eval().requires_grad_(False)

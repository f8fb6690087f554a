"""The parts of a latent diffusion model around tensors that are already there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .clip import TextConfig, TextTower, VisionConfig, VisionTower
from .controlnet import ControlNet, ControlNetConfig
from .image_prompt import IPAdapter, IPAdapterConfig
from .load import FAMILIES, assembled
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

PARTS: dict[str, tuple[type[nn.Module], type]] = {
    "unet": (UNet, UNetConfig),
    "controlnet": (ControlNet, ControlNetConfig),
    "vae": (VAE, VAEConfig),
    "clip_text": (TextTower, TextConfig),
    "clip_vision": (VisionTower, VisionConfig),
    "ip_adapter": (IPAdapter, IPAdapterConfig),
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

    `config` is the keyword arguments of its configuration.  Without `dtype` nothing is cast, and then all tensors have
    to be of one floating type.  Raises ValueError for an unknown part or setting, tensors that do not fit, mixed types,
    and values that `dtype` cannot hold.
    """
    if family in FAMILIES:
        raise ValueError(f"{family} is a pixel network: diaphane.model.load.build makes it")
    if family not in PARTS:
        raise ValueError(f"there is no part {family!r}: it is one of {', '.join(PARTS)}")
    network, settings = PARTS[family]
    return assembled(network, settings, config, tensors, dtype=dtype, device=device)

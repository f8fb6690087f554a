"""The parts of a latent diffusion model in hand, and where they are between uses."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .clip import TextTower
from .latent import build
from .swap import swapped
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE, VAEConfig

TEXTS = ("text_encoder", "text_encoder_2")


class Part(Protocol):
    """A network as files give it."""

    @property
    def family(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Components:
    """A UNet, its autoencoder, and text towers with their tokenisers, in the order of their states side by side."""

    unet: UNet
    vae: VAE
    towers: tuple[TextTower, ...]
    tokenizers: tuple[Tokenizer, ...]  # as many as towers, or none where there is no vocabulary
    texts: tuple[str, ...]  # the towers' names: text_encoder, text_encoder_2

    @property
    def xl(self) -> bool:
        """Whether the UNet takes pooled text and size ids."""
        return self.unet.vector is not None

    @property
    def factor(self) -> int:
        """Pixels a latent's side."""
        return self.vae.multiple


def components(
    parts: Mapping[str, Part],
    words: Mapping[str, tuple[str | PathLike[str] | None, str | PathLike[str], str]] | None = None,
    *,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cut_pad: bool = True,
) -> Components:
    """The networks around tensors that are there: parts under the names of diffusers' folders (unet, vae, ...).

    `words` gives each text encoder's vocabulary (None: what the merges give), merges and padding token; `cut_pad` is
    as in `Tokenizer`.  Without `dtype` each part computes in the type that it was stored in, and nothing is copied.
    `vae_dtype` is the autoencoder's own; without it one that overflows float16 (`VAEConfig.upcast`) is made float32
    beside float16 parts.
    Raises ValueError as `model.load.build` does, and for a tokeniser of more or fewer tokens than its tower has.
    """
    if lost := [name for name in ("unet", "vae") if name not in parts]:
        raise ValueError(f"there is no {lost[0]} among the parts ({', '.join(parts)})")
    texts = [name for name in TEXTS if name in parts]
    networks = {}
    for name in ("unet", "vae", *texts):
        part, kind = parts[name], dtype
        if name == "vae":
            narrow = dtype == torch.float16 and part.config.get("upcast", VAEConfig.upcast)
            kind = vae_dtype or (torch.float32 if narrow else dtype)
        try:
            networks[name] = build(part.family, part.config, part.tensors, dtype=kind, device=device)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
    words = words or {}
    tokenizers = []
    for name in texts if all(text in words for text in texts) else ():
        vocabulary, merges, pad = words[name]
        cfg = networks[name].cfg
        tokenizers.append(Tokenizer(vocabulary, merges, pad=pad, cut_pad=cut_pad, length=cfg.positions))
        if (size := tokenizers[-1].size) != cfg.vocabulary:
            raise ValueError(f"{name} has {cfg.vocabulary} tokens, its tokeniser {vocabulary or merges} has {size}: "
                             "they are of different models")  # fmt: skip
    towers = tuple(networks[name] for name in texts)
    return Components(networks["unet"], networks["vae"], towers, tuple(tokenizers), tuple(texts))


def placed(device: torch.device | str, *networks: nn.Module) -> AbstractContextManager[None]:
    """Networks on another device meanwhile, and afterwards around the very tensors that they were made of."""
    return swapped(lambda tensor: tensor.to(device), *networks)

"""ConsiStory of a real subject (Tewel et al. 2024, appendix E): inverted pictures in the place of the anchors.

Each picture is inverted with edit-friendly DDPM (Huberman-Spiegelglas et al. 2024) under a text that says the subject,
guidance 2, 100 steps.  Its latents at every timestep are then what the others look at; the pictures do not look at each
other, and their keys take the statistics of the keys of who looks (AdaIN).  The paper releases no code of it: the
statistics here are over all tokens of each head and channel, and a picture's latents are the stored ones, which is
what walking it again with its own noise maps gives.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..samplers.edit_friendly import NoiseMaps, noise_maps
from ..samplers.noise import Noise
from ..samplers.parameterisation import Denoise
from ..samplers.schedule import Schedule
from .scene import SceneError, anchored


def inverted(
    denoise: Denoise, x0: Tensor, schedule: Schedule, path: Sequence[float], noise: Noise, *, chunk: int = 1
) -> NoiseMaps:
    """Latents x0 (R, C, H, W) of real pictures at every timestep of a path, by a `denoise` of their texts."""
    return noise_maps(denoise, x0, schedule, path, noise=noise, eta=1.0, chunk=chunk)


def beside_real(maps: NoiseMaps, x: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
    """x_T of real pictures and of x (B, C, H, W) behind them, and what `Story` is to be told besides.

    SceneError: latents of another size.
    """
    if maps.xs.shape[2:] != x.shape[1:]:
        raise SceneError(f"the real pictures' latents are {tuple(maps.xs.shape[2:])}, the others' {tuple(x.shape[1:])}")
    real = maps.xs.shape[1]
    at: dict[float, Tensor] = {float(t): known for t, known in zip(maps.path, maps.xs, strict=True)}
    pinned: Callable[[float], Tensor] = at.__getitem__
    more = {"sees": anchored(real + len(x), real, apart=True), "pinned": pinned, "align": True}
    return torch.cat([maps.xs[0].to(x), x]), more

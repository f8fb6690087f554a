"""Noise that depends on the image's seed alone, not on its batch nor on the device; or noise that is known."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]  # x (B, ...) -> standard normal noise, like x


def seeded(seeds: Sequence[int]) -> Noise:
    """One generator per image, drawn on the CPU in float32; each call goes on where the last one stopped."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(x: Tensor) -> Tensor:
        if len(x) != len(generators):
            raise ValueError(f"a batch of {len(x)} images needs {len(x)} seeds; got {len(generators)}")
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)

    return noise


def replayed(noises: Iterable[Tensor]) -> Noise:
    """Stored noise, (B, ...) a step, in the order of the steps; a ValueError where it ends or does not fit."""
    values = iter(noises)

    def noise(x: Tensor) -> Tensor:
        z = next(values, None)
        if z is None or z.shape != x.shape:
            raise ValueError(f"stored noise {'has ended' if z is None else tuple(z.shape)}; x is {tuple(x.shape)}")
        return z.to(x)

    return noise

"""What each block does with a picture: InstantStyle's figure 7 (Wang et al. 2024) for any network, and in numbers."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ops import Ops
from ..model.sites import Place, places
from ..model.unet import UNetConfig
from ..samplers.parameterisation import Denoise


class Effect(NamedTuple):
    """How much one block changes, each as |with - without| / |without|."""

    eps: float  # of the guided prediction at the same x, the mean over the timesteps that were looked at
    latents: float  # at the end of a walk of its own
    picture: float  # of pixels about grey


def blocks(cfg: UNetConfig) -> list[Place]:
    """The modules that attend to text, in order of execution: one picture each in figure 7."""
    return [place for place in places(cfg) if place.kind == "transformer"]


def relative(y: Tensor, plain: Tensor) -> float:
    """|y - plain| / |plain|, both whole tensors; 0 where they are equal."""
    return float((y - plain).double().norm() / plain.double().norm().clamp(min=1e-30))


def looking(
    make: Callable[[Ops], Denoise], ops: Ops, others: Mapping[str, Ops], at: Collection[float], seen: dict[str, list]
) -> Denoise:
    """The denoiser `make(ops)`, which at the timesteps `at` also asks what each of the others says of the same x.

    `seen` gets a number (`relative`) for each name and timestep; a timestep that comes again is not looked at again.
    """
    plain, made = make(ops), {name: make(other) for name, other in others.items()}
    done: set[float] = set()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        eps, now = plain(x, t), float(t.flatten()[0])
        if now in at and now not in done:
            done.add(now)
            for name, other in made.items():
                seen.setdefault(name, []).append(relative(other(x, t), eps))
        return eps

    return denoise


def spread(path: list[float], count: int) -> list[float]:
    """About `count` timesteps of a path's steps, evenly far from one another, in the middle of as many parts."""
    steps = path[:-1]
    at = torch.linspace(0, len(steps), 2 * min(count, len(steps)) + 1)[1::2]
    return [steps[int(i)] for i in at]

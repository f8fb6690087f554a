"""When to edit and when to boost, from perceptual distances (Kwon et al. 2023, section 3.3 and 3.4)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..samplers.ddim import ddim
from ..samplers.parameterisation import Denoise
from ..samplers.path import upward
from ..samplers.schedule import Schedule

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches (B, C, H, W) in [-1, 1] -> (B,), for example LPIPS


class Table(NamedTuple):
    """Mean perceptual distances to the image along its inversion, by timestep reached."""

    x0: dict[int, float]  # of P_t, the predicted clean image
    x: dict[int, float]  # of x_t itself


@torch.no_grad()
def table(denoise: Denoise, images: Tensor, schedule: Schedule, path: list[int], distance: Distance) -> Table:
    """Invert images (B, C, H, W) along `path` and measure.  The authors average 100 images over 1000 steps."""
    x0, x = {}, {}
    for step in ddim(denoise, images, schedule, upward(path)):
        x0[step.s] = float(distance(step.x0, images).mean())
        x[step.s] = float(distance(step.x, images).mean())
    return Table(x0, x)


def first_reaching(distances: Mapping[int, float], threshold: float) -> int:
    """The first timestep, from below, whose distance is at least `threshold`; a table need not be monotonic."""
    for t in sorted(distances):
        if distances[t] >= threshold:
            return t
    raise ValueError(
        f"no timestep reaches {threshold:.3f}: the table ends at {max(distances.values(), default=0.0):.3f}"
    )


def t_edit(x0: Mapping[int, float], cosine: float = 1.0, threshold: float = 0.33) -> int:
    """Edit down to where LPIPS(x, P_t) = 0.33 cos(source text, target text): the paper's 0.33 - δ."""
    return first_reaching(x0, threshold * cosine)


def t_boost(x: Mapping[int, float], threshold: float = 1.2) -> int:
    """Boost from where LPIPS(x, x_t) = 1.2; the authors' code can also take 0.1 on the table of P_t."""
    return first_reaching(x, threshold)

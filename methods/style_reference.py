"""A picture that is there already as StyleAligned's reference: its trajectory of noisy latents, and walks held to it.

The reference's rows are not drawn: at every step the network is shown the picture at that timestep (Hertz et al. 2024,
section 5.2 and figure 9).  The trajectory comes from DDIM inversion, or from noise added outright, cheaper and less
faithful; any other of the same shape may be given.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..samplers.ddim import Step, step
from ..samplers.parameterisation import Denoise, noised, times
from ..samplers.schedule import Schedule
from .text_to_image import Walk


def inverted(denoise: Denoise, x0: Tensor, schedule: Schedule, path: Sequence[float]) -> Iterator[Tensor]:
    """DDIM inversion as in the authors' code: the latents reached at each timestep up `path`, a downward one, read
    backwards.

    The step to s takes eps at (x_t, s), where Song et al. 2021 take it at (x_t, t) (`samplers.inversion.invert`).
    x0 (R, C, H, W) -> n times (R, C, H, W), in float32 at least; the authors round to float16.  A path that ends in
    timestep 0 twice, theirs, has one step that changes nothing, for which the network is not asked.
    """
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    for t, s in pairwise(reversed(path)):
        if s != t:
            x = step(x, denoise(x, times(s, x)), schedule(t), schedule(s))[0]
        yield x


def trajectory(x0: Tensor, reached: Iterator[Tensor], path: Sequence[float]) -> Tensor:
    """x0 (R, C, H, W), and what it becomes up the path -> (n + 1, R, C, H, W), the noisiest first, x0 last.

    The authors' `zts`.  A ValueError is raised for another number of steps than the path has.
    """
    rows = [x0, *reached]
    if len(rows) != len(path):
        raise ValueError(f"a path of {len(path) - 1} steps takes as many latents; got {len(rows) - 1}")
    return torch.stack([row.to(rows[-1]) for row in reversed(rows)])


def noised_outright(x0: Tensor, noise: Tensor, schedule: Schedule, path: Sequence[float]) -> Tensor:
    """The trajectory by one and the same noise at every timestep, in the place of inversion: no call of the network.

    2 x (R, C, H, W) -> (n + 1, R, C, H, W), the noisiest first, x0 last.
    """
    return torch.stack([*(noised(x0, noise, schedule(t)) for t in path[:-1]), x0])


def drawn(steps: Iterator[Step], x: Tensor, rows: Sequence[int] = (0,)) -> Tensor:
    """The trajectory of a reference that is drawn itself: where a walk from x is at each step.  -> (n + 1, R, C, H, W).

    It lets a set begin later, or at another size (`multidiffusion`), with the very reference.
    """
    chosen = list(rows)
    return torch.stack([x[chosen], *(one.x[chosen] for one in steps)])


class Trajectory:
    """Latents (n + 1, R, C, H, W) of R references along a path of n steps, the noisiest first.

    `offset` o begins less noisy, as the authors do (5): call i of the network sees latents o for i = 0, max(o + 1, i)
    for later ones; after step i the reference is max(o + 1, i + 1).  A ValueError is raised for an offset outside the
    path.
    """

    def __init__(self, latents: Tensor, path: Sequence[float], offset: int = 0):
        if latents.ndim != 5 or len(latents) != len(path):
            want = f"({len(path)}, R, C, H, W), one for each timestep of the path"
            raise ValueError(f"a trajectory is {want}; got {tuple(latents.shape)}")
        if not 0 <= offset < len(path) - 1:
            raise ValueError(f"the offset lies in 0 ... {len(path) - 2}, within the path; got {offset}")
        self.latents, self.times = latents, torch.tensor(path[:-1], dtype=torch.float64)
        first = torch.tensor([offset])
        self.shown = torch.cat([first, torch.arange(1, len(path)).clamp(min=offset + 1)])

    def at(self, t: Tensor) -> Tensor:
        """What the network is shown at t (B,), one timestep for all: (R, C, H, W).  The device is not waited for."""
        known = self.times.to(t)
        i = (known > t[0]).sum()
        return self.latents.to(t.device)[self.shown.to(t.device)[i]]

    def after(self, i: int) -> Tensor:
        """What the references are after step i, counted from 0."""
        return self.latents[int(self.shown[i + 1])]


def held(denoise: Denoise, references: Trajectory, rows: Sequence[int] = (0,)) -> Denoise:
    """A network that sees the references at `rows` of x, whatever x has there.

    Samplers with a history need nothing else: what they keep of the targets is the targets' alone, and what they make
    of the references' rows is never seen.
    """
    index = list(rows)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return denoise(placed(x, references.at(t).to(x), index), t)

    return predict


def transferred(
    walk: Walk,
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    references: Trajectory,
    rows: Sequence[int] = (0,),
) -> Iterator[Step]:
    """A walk whose references are held to their trajectory: x after each step has them in the place of what was drawn.

    x (B, C, H, W) begins with them too, and ends in the pictures that they are.
    """
    index = list(rows)
    start = placed(x, references.latents[int(references.shown[0])].to(x), index)
    for i, one in enumerate(walk(held(denoise, references, index), start, schedule, path)):
        yield one._replace(x=placed(one.x, references.after(i).to(x), index))


def placed(x: Tensor, references: Tensor, rows: list[int]) -> Tensor:
    """x with other latents at some rows.  (B, ...), (R, ...) -> (B, ...)."""
    where = torch.tensor(rows, device=x.device)
    return x.index_copy(0, where, references)

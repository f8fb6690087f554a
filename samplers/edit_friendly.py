"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024): noise maps with which DDPM gives the picture back.

The noisy pictures x_t are drawn independently of each other; the noise of every step is then what leads from one to
the next.  It is far from normal, it carries the picture's structure, and it may be used with another text.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .ddim import spread, step
from .noise import Noise
from .parameterisation import Denoise, noised, over
from .schedule import Schedule


class NoiseMaps(NamedTuple):
    """A picture as noise: walk `path[skip:]` from xs[skip] with `ddim(..., eta=eta, noise=replayed(zs[skip:]))`."""

    path: tuple[float, ...]  # downward, n + 1 timesteps
    xs: Tensor  # (n + 1, B, C, H, W)  the noisy picture at each of them, the picture itself at the end
    zs: Tensor  # (n, B, C, H, W)      the noise of each step, 0 for the last
    eta: float


@torch.no_grad()
def noise_maps(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    *,
    noise: Noise,
    eta: float = 1.0,
    chunk: int = 1,
) -> NoiseMaps:
    """x0 (B, C, H, W) -> its noise maps over a downward `path` (Huberman-Spiegelglas et al. 2024, algorithm 1).

    z_t = (x_s - mu(x_t)) / sigma_t, in float32 at least; x_s then becomes mu(x_t) + sigma_t z_t, what the way back will
    compute.  `noise` is drawn once a timestep, the lowest first.  With `chunk` timesteps at once `denoise` sees
    chunk * B rows, the images varying fastest.  One at a time, the way back repeats every xs bit for bit and misses
    the picture by its last step alone, whose z is 0 by definition; with more at once it also drifts by the rounding
    that the network amplifies.
    Raises ValueError for a path that does not fall, for eta = 0 and for a chunk below 1.
    """
    if any(s >= t for t, s in pairwise(path)) or len(path) < 2:
        raise ValueError(f"a path of two timesteps or more falls to the clean image; got {list(path)}")
    if eta <= 0 or chunk < 1:
        raise ValueError(f"eta is above 0 and the chunk at least 1; got {eta} and {chunk}")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    noisy = [noised(x0, noise(x0), schedule(t)) for t in reversed(path[:-1])]
    xs, zs = [*reversed(noisy), x0], []
    alphas = schedule(torch.tensor(path, dtype=torch.float64))
    for first in range(0, len(path) - 1, chunk):
        n = min(chunk, len(path) - 1 - first)
        a_t, a_s = (alphas[k : k + n].repeat_interleave(len(x0)) for k in (first, first + 1))
        x, there = torch.cat(xs[first : first + n]), torch.cat(xs[first + 1 : first + n + 1])
        t = torch.tensor(path[first : first + n], dtype=x.dtype, device=x.device).repeat_interleave(len(x0))
        eps, sigma = denoise(x, t), over(spread(a_t, a_s, eta), x)
        mean, _ = step(x, eps, a_t, a_s, eta=eta, noise=torch.zeros_like)
        z = (there - mean) / sigma
        zs.extend(z.split(len(x0)))
        xs[first + 1 : first + n + 1] = (mean + sigma * z).split(len(x0))
    return NoiseMaps(tuple(path), torch.stack([*xs[:-1], x0]), torch.stack([*zs[:-1], torch.zeros_like(x0)]), eta)

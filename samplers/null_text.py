"""Null-text inversion (Mokady et al. 2023): an unconditional text for every step, with which guidance comes back.

Here the text that is optimised is read by the decoder alone, while the encoder and the middle read the null text as it
was.  So x_t is encoded once a timestep and no iteration runs, or stores, more than half the network; and the gradient
is that of the very function that is minimised, not a shortened one.  The price: the text's other way into the picture,
cross-attention in the encoder and the middle, is not adjusted, as it is in the paper.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .ddim import Step, step
from .parameterisation import Denoise, Prediction, as_eps, times
from .schedule import Schedule

Decode = Callable[[Tensor], Tensor]  # null text (B, M, D) -> the guided prediction (B, C, H, W), differentiable
Halfway = Callable[[Tensor, Tensor], Decode]  # x_t, t (B,), both encoded without gradients -> what is left to do


class NullStep(NamedTuple):
    """One step down, and the null text that made it."""

    t: float
    s: float
    x: Tensor  # (B, C, H, W)  the sample at s
    null: Tensor  # (B, M, D)
    loss: Tensor  # (B,) mean square distance of x from the inverted one


def null_text(
    halfway: Halfway,
    pivots: Sequence[Tensor],
    schedule: Schedule,
    path: Sequence[float],
    null: Tensor,
    *,
    kind: Prediction = "eps",
    iterations: int = 10,
    rate: float = 1e-2,
    stop: float = 1e-5,
) -> Iterator[NullStep]:
    """Walk down `path` near the `pivots`, one null text a step (Mokady et al. 2023, algorithm 1).

    `pivots` are x (B, C, H, W) at each timestep of `path`, from an inversion with scale 1.  `null` (B, M, D) is where
    the first step begins; each later one begins where the last ended.  Adam makes at most `iterations` updates, at a
    rate that falls by a hundredth of `rate` a step, and leaves an image alone once its loss is below stop + 2 stop i at
    step i: the authors' settings.  `kind` is what the network predicts.
    Raises ValueError for pivots that are not as many as the path's timesteps, and for a negative number of iterations.
    """
    if len(pivots) != len(path):
        raise ValueError(f"a path of {len(path)} timesteps needs as many pivots; got {len(pivots)}")
    if iterations < 0:
        raise ValueError(f"the number of iterations is 0 or more; got {iterations}")
    x, null = pivots[0], null.detach()
    for i, (t, s) in enumerate(pairwise(path)):
        decode, want = halfway(x, times(t, x)), pivots[i + 1]

        def reached(text: Tensor, x: Tensor = x, t: float = t, s: float = s, decode: Decode = decode) -> Tensor:
            return step(x, as_eps(lambda x, t: decode(text), schedule, kind)(x, times(t, x)), schedule(t), schedule(s))[
                0
            ]

        first = second = torch.zeros_like(null)
        for k in range(iterations):
            with torch.enable_grad():
                leaf = null.detach().requires_grad_(True)
                loss = distance(reached(leaf), want)
                (slope,) = torch.autograd.grad(loss.sum(), leaf)
            going = loss.detach() >= stop * (1 + 2 * i)
            if not bool(going.any()):
                break
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            size = (second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8
            moved = null - rate * max(1 - i / 100, 0) * first / (1 - 0.9 ** (k + 1)) / size
            null = torch.where(going.view(-1, 1, 1), moved, null)
        with torch.no_grad():
            x = reached(null)
            loss = distance(x, want)
        yield NullStep(t, s, x, null, loss)


def with_nulls(
    halfway: Halfway,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[float],
    nulls: Sequence[Tensor],
    *,
    kind: Prediction = "eps",
) -> Iterator[Step]:
    """DDIM down `path` with the null text (B, M, D) of each step, under any text that `halfway` is conditioned on."""
    if len(nulls) != len(path) - 1:
        raise ValueError(f"a path of {len(path) - 1} steps needs as many null texts; got {len(nulls)}")
    for (t, s), null in zip(pairwise(path), nulls, strict=True):
        decode = halfway(x, times(t, x))
        predict: Denoise = lambda x, t, decode=decode, null=null: decode(null)  # noqa: E731
        eps = as_eps(predict, schedule, kind)(x, times(t, x))
        x, x0 = step(x, eps, schedule(t), schedule(s))
        yield Step(t, s, x, x0, eps)


def distance(x: Tensor, want: Tensor) -> Tensor:
    """Mean square difference of each image.  2 x (B, C, H, W) -> (B,)."""
    return (x - want).square().flatten(1).mean(1)

"""DDIM with h and the skips in hand: the walk that every h-space method starts from."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.blocks import Cond, ThreeLists
from ..model.ops import TORCH, Ops
from ..samplers.ddim import Step, step
from ..samplers.parameterisation import times
from ..samplers.path import upward
from ..samplers.schedule import Schedule

Embed = Callable[[Tensor], Cond]  # t (B,) -> Cond


class Tap(NamedTuple):
    """One step, and what the network held at its timestep t."""

    step: Step
    h: Tensor  # (B, C, H, W) what `middle` returned
    skips: list[Tensor]  # fine to coarse; the last one is the papers' g_t, which the decoder joins to h first


def look(
    unet: ThreeLists, x: Tensor, t: int, embed: Embed | None = None, ops: Ops = TORCH
) -> tuple[Tensor, list[Tensor]]:
    """h and the skips of x (B, C, H, W) at one timestep; the decoder does not run."""
    c = (embed or unet.embed)(times(t, x))
    h, skips = unet.encode(x, c, ops)
    return unet.middle(h, c, ops), skips


def tapped(
    unet: ThreeLists,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[int],
    *,
    embed: Embed | None = None,
    ops: Ops = TORCH,
) -> Iterator[Tap]:
    """DDIM with eta = 0 along `path`, up or down, yielding h and the skips of every network call."""
    for t, s in pairwise(path):
        ts = times(t, x)
        c = (embed or unet.embed)(ts)
        deep, skips = unet.encode(x, c, ops)
        h = unet.middle(deep, c, ops)
        eps = unet.predict(h, skips, c, x, ts, ops)
        x, x0 = step(x, eps, schedule(t), schedule(s))
        yield Tap(Step(t, s, x, x0, eps), h, skips)


class Inverted(NamedTuple):
    """An image as the h-space methods use it: where its inversion ends, and h on the way."""

    x_T: Tensor  # (B, C, H, W) at the top timestep
    h: dict[int, Tensor]  # timestep -> (B, C, H, W), for every timestep at which the network was called


@torch.no_grad()
def invert(
    unet: ThreeLists,
    x0: Tensor,
    schedule: Schedule,
    path: list[int],
    *,
    embed: Embed | None = None,
    ops: Ops = TORCH,
    watch: Callable[[Iterator[Tap]], Iterator[Tap]] = iter,
) -> Inverted:
    """Invert x0 (B, C, H, W) along the noisy timesteps of `path`, keeping h at each.

    `watch` may wrap the walk, for example in a progress bar.
    """
    x_T, held = x0, {}
    for tap in watch(tapped(unet, x0, schedule, upward(path), embed=embed, ops=ops)):
        held[tap.step.t], x_T = tap.h, tap.step.x
    return Inverted(x_T, held)


def closest(t: int, held: dict[int, Tensor]) -> Tensor:
    """What is held for the timestep nearest to t; the later one of two equally near."""
    if not held:
        raise ValueError("no timestep is held: invert an image first")
    return held[min(held, key=lambda u: (abs(u - t), -u))]


def rows(v: Tensor, n: int) -> Tensor:
    """v (B, ...) over and over, n rows in all: what is given for B pictures, for both halves of a guided batch."""
    if n % len(v):
        raise ValueError(f"what is given for {len(v)} pictures does not go into a batch of {n}")
    return v if len(v) == n else v.repeat(n // len(v), *[1] * (v.ndim - 1))

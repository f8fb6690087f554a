"""Heun's method in sigma (Karras et al. 2022, algorithm 1 without churn): Euler's step, corrected by a second look."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .ddim import Step, Steps, step
from .parameterisation import Denoise, times
from .schedule import Schedule


def heun(denoise: Denoise, x: Tensor, schedule: Schedule, path: Sequence[float]) -> Steps:
    """Walk x (B, C, H, W) along `path`, downward or upward, two calls of the network a step.

    A step from or to the clean image, where eps has no meaning, stays Euler's.  A Step holds the x0 and eps of the
    first call, at t.
    """
    for t, s in pairwise(path):
        a_t, a_s = schedule(t), schedule(s)
        eps = denoise(x, times(t, x))
        y, x0 = step(x, eps, a_t, a_s)
        x = y if a_s == 1 else step(x, (eps + denoise(y, times(s, y))) / 2, a_t, a_s)[0]
        sent = yield Step(t, s, x, x0, eps)
        x = x if sent is None else sent

"""Asyrp (Kwon et al. 2023): edit h in the predicted-x0 term of a DDIM step only; the direction term stays as it was."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ..model.blocks import Cond, ThreeLists
from ..model.ops import TORCH, Ops
from ..samplers.ddim import Step, step
from ..samplers.noise import Noise
from ..samplers.parameterisation import times
from ..samplers.schedule import Schedule
from .taps import Embed

Edit = Callable[[Tensor, int, Cond], Tensor]  # (h (B, C, H, W), t, c) -> edited h
DeltaF = Callable[[Tensor, Tensor], Tensor]  # (h, time embedding (B, E)) -> Δh, both (B, C, H, W)


def asyrp(
    unet: ThreeLists,
    x: Tensor,
    schedule: Schedule,
    path: Sequence[int],
    edit: Edit,
    *,
    t_edit: int = 400,
    t_boost: int = 0,
    eta: float = 1.0,
    noise: Noise | None = None,
    embed: Embed | None = None,
    ops: Ops = TORCH,
) -> Iterator[Step]:
    """The asymmetric reverse process: x_s = sqrt(a_s) P_t(eps(x_t | edited h)) + D_t(eps(x_t | h)) (eq. 6).

    h is edited where t >= t_edit; the encoder and the middle run once for both predictions.  Where t < t_boost the
    step has `eta` (quality boosting, section 3.4; `noise` is then needed).  x: (B, C, H, W) at path[0].
    A yielded Step holds the unedited eps and the edited x0.
    """
    for t, s in pairwise(path):
        ts = times(t, x)
        c = (embed or unet.embed)(ts)
        deep, skips = unet.encode(x, c, ops)
        h = unet.middle(deep, c, ops)
        eps = unet.predict(h, skips, c, x, ts, ops)
        edited = unet.predict(edit(h, t, c), skips, c, x, ts, ops) if t >= t_edit else eps
        boost = eta if t < t_boost else 0.0
        x, x0 = step(x, edited, schedule(t), schedule(s), eps_dir=eps, eta=boost, noise=noise)
        yield Step(t, s, x, x0, eps)


def deltas(fs: Sequence[DeltaF], coefficients: Sequence[float], origin: float = 1.0) -> Edit:
    """h -> origin h + sum of coefficient_i f_i(h, t); every f sees the unedited h (eq. 8 and section 5.3)."""
    if len(fs) != len(coefficients):
        raise ValueError(f"{len(fs)} directions need as many coefficients; got {len(coefficients)}")

    def edit(h: Tensor, t: int, c: Cond) -> Tensor:
        edited = origin * h
        for f, coefficient in zip(fs, coefficients, strict=True):
            edited = edited + coefficient * f(h, c.emb)
        return edited

    return edit


def coefficients(user: Sequence[float], *, n_train: int, n_test: int, strength: float = 1.0) -> list[float]:
    """The authors' scaling: user_i · n_train / n_test · strength / sqrt(N) for N attributes.

    n_train / n_test keeps the sum of Δh over a walk when it has more or fewer steps than training had (section 5.3).
    """
    if not user:
        raise ValueError("name at least one coefficient")
    return [u * n_train / n_test * strength / len(user) ** 0.5 for u in user]

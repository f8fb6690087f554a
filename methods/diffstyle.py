"""DiffStyle / InjectFusion (Jeong et al. 2024): a content image's h, injected while a style image is regenerated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.blocks import Cond, ThreeLists
from ..model.ops import TORCH, Ops
from ..samplers.ddim import Step, step
from ..samplers.noise import Noise
from ..samplers.parameterisation import over, times, x0_from_eps
from ..samplers.schedule import Schedule
from .asyrp import Edit
from .blend import Blend, norm_matched_slerp
from .taps import Embed, closest, rows


class Content(NamedTuple):
    """What to inject: h by timestep from the content's inversion, how much of it, and where."""

    h: dict[int, Tensor]  # timestep -> (B or 1, C, H, W)
    gamma: float = 0.3
    mask: Tensor | None = None  # (B or 1, 1, H', W') in [0, 1], any resolution; None is everywhere


@dataclass(frozen=True, kw_only=True)
class AuthorsCode:
    """What the authors' code does beside or against the paper; the defaults are the paper."""

    inject_at: Sequence[int] | None = None  # inject, calibrate and boost at these timesteps only (content_replace_step)
    dt_lambda: float = 1.0  # scales the direction term of uncalibrated injected steps ...
    dt_end: int = 950  # ... where t >= dt_end; eta is then 0


def inject(contents: Sequence[Content], blend: Blend = norm_matched_slerp) -> Edit:
    """h -> h with every content blended in where its mask is (eq. 4; local mixing, section 3.4).

    The mask is applied to both maps before blending and the result is put into the rest of h.  Masks of several
    contents must not overlap.  Each content takes the h of the nearest timestep that it holds.
    """

    def edit(h: Tensor, t: int, c: Cond) -> Tensor:
        edited = h
        for content in contents:
            other = rows(closest(t, content.h).to(h), len(h))
            if content.mask is None:
                return blend(h, other, content.gamma)
            mask = rows(at_h(content.mask, h), len(h))
            edited = edited - mask * h + blend(mask * h, mask * other, content.gamma)
        return edited

    return edit


def at_h(mask: Tensor, h: Tensor) -> Tensor:
    """A mask at the resolution of h, each value the mean of the area it covers.  -> (B or 1, 1, H, W)."""
    if mask.shape[-2:] == h.shape[-2:]:
        return mask.to(h)
    return F.adaptive_avg_pool2d(mask.to(h), (h.shape[-2], h.shape[-1]))


def check(contents: Sequence[Content], h: Tensor, pictures: int) -> None:
    """Raise ValueError for contents that cannot be injected into h (B, C, H, W), which guidance may have doubled."""
    if not contents:
        raise ValueError("nothing to inject: give at least one content")
    for content in contents:
        held = closest(0, content.h)
        if held.shape[1:] != h.shape[1:] or len(held) not in (1, pictures, len(h)):
            raise ValueError(
                f"content h is {tuple(held.shape)}, the style's {tuple(h.shape)}: batch may differ only if 1"
            )
        mask = content.mask
        if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or len(mask) not in (1, pictures)):
            raise ValueError(f"a mask is (1, 1, H, W) or ({pictures}, 1, H, W); got {tuple(mask.shape)}")
        if mask is not None and bool(((mask < 0) | (mask > 1)).any()):
            raise ValueError("a mask lies in [0, 1]")
    if len(contents) > 1:
        masks = [content.mask for content in contents if content.mask is not None]
        if len(masks) < len(contents):
            raise ValueError("several contents need a mask each")
        if bool((torch.stack([at_h(m, h).expand(pictures, -1, -1, -1) for m in masks]).sum(0) > 1 + 1e-4).any()):
            raise ValueError("the masks of several contents overlap")


def calibrated(x: Tensor, eps: Tensor, edited: Tensor, a: Tensor, omega: float) -> Tensor:
    """Style calibration: the x_t whose plain prediction is the edited one (section 3.3, eq. 8-10).

    P' is the edited P~ with the spread of the unedited P; x' = x + sqrt(a) (P' - P) + omega sqrt(1 - a) (eps~ - eps).
    The paper's equation uses absolute values; this takes standard deviations over C, H, W, as the authors' code does.
    """
    p, p_edited = x0_from_eps(x, eps, a), x0_from_eps(x, edited, a)
    mean = p_edited.mean((1, 2, 3), keepdim=True)
    ratio = p.std((1, 2, 3), keepdim=True) / p_edited.std((1, 2, 3), keepdim=True)
    matched = mean + (p_edited - mean) * ratio
    return x + over(a.sqrt(), x) * (matched - p) + omega * over((1 - a).sqrt(), x) * (edited - eps)


def diffstyle(
    unet: ThreeLists,
    x: Tensor,
    contents: Sequence[Content],
    schedule: Schedule,
    path: Sequence[int],
    *,
    blend: Blend = norm_matched_slerp,
    omega: float = 0.3,
    t_edit: int = 400,
    t_boost: int = 200,
    eta: float = 1.0,
    noise: Noise | None = None,
    embed: Embed | None = None,
    ops: Ops = TORCH,
    authors: AuthorsCode | None = None,
) -> Iterator[Step]:
    """Regenerate the style image from its x_T (B, C, H, W) at path[0], injecting the contents' h where t >= t_edit.

    omega = 0 takes the asymmetric step of Asyrp; otherwise the step is calibrated, at one more network call where h
    was edited.  Where t <= t_boost the step is boosted: it has `eta` and draws from `noise`, except the last, which
    adds none.  The encoder is shared between the edited and the unedited prediction.
    """
    authors = authors or AuthorsCode()
    edit = inject(contents, blend)
    if noise is None and eta > 0 and any(t <= t_boost and s >= 0 for t, s in pairwise(path)):
        raise ValueError("quality boosting draws noise; pass noise=seeded([...]) or t_boost=0")
    for i, (t, s) in enumerate(pairwise(path)):
        ts = times(t, x)
        c = (embed or unet.embed)(ts)
        a_t, a_s = schedule(t), schedule(s)
        deep, skips = unet.encode(x, c, ops)
        h = unet.middle(deep, c, ops)
        if i == 0:
            check(contents, h, len(x))
        eps = unet.predict(h, skips, c, x, ts, ops)
        injected = authors.inject_at is None or t in authors.inject_at
        edited = unet.predict(edit(h, t, c), skips, c, x, ts, ops) if injected and t >= t_edit else eps
        boost = eta if injected and t <= t_boost and s >= 0 else 0.0
        if edited is not eps and omega != 0:
            x = calibrated(x, eps, edited, a_t, omega)
            deep, skips = unet.encode(x, c, ops)
            eps = edited = unet.predict(unet.middle(deep, c, ops), skips, c, x, ts, ops)
            x, x0 = step(x, eps, a_t, a_s, eta=boost, noise=noise)
        elif injected and omega == 0 and authors.dt_lambda != 1 and t >= authors.dt_end:
            x0 = x0_from_eps(x, edited, a_t)
            x = over(a_s.sqrt(), x) * x0 + authors.dt_lambda * over((1 - a_s).sqrt(), x) * eps
        else:
            x, x0 = step(x, edited, a_t, a_s, eps_dir=eps, eta=boost, noise=noise)
        yield Step(t, s, x, x0, eps)

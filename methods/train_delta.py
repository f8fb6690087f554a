"""Training Δh with the directional CLIP loss (Kwon et al. 2023, section 3.2; StyleGAN-NADA, Gal et al. 2022)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.blocks import ThreeLists
from ..model.ops import TORCH, Ops
from ..samplers.ddim import step
from ..samplers.parameterisation import times
from ..samplers.schedule import Schedule
from .asyrp import Edit
from .taps import Embed

Encode = Callable[[Tensor], Tensor]  # images (B, C, H, W) in [-1, 1] -> features (B, F)


class Loss(NamedTuple):
    """The terms of one optimiser step."""

    t: int
    total: float
    clip: float  # -log((2 - direction) / 2)
    direction: float  # 1 - cos(image change, text change)
    l1: float  # mean |P_edited - P|


def text_direction(source: Tensor, target: Tensor) -> Tensor:
    """Mean over templates of unit target - unit source, then unit length.  2 x (templates, F) -> (1, F)."""
    change = (F.normalize(target, dim=-1) - F.normalize(source, dim=-1)).mean(0, keepdim=True)
    return F.normalize(change, dim=-1)


def directional_loss(edited: Tensor, source: Tensor, text: Tensor) -> Tensor:
    """1 - cos(E(edited) - E(source), text change), features on the unit sphere.  2 x (B, F), (1, F) -> ()."""
    change = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    change = change / (change.norm(dim=-1, keepdim=True) + 1e-7)
    return (1 - F.cosine_similarity(change, text.expand_as(change), dim=-1)).mean()


def training_path(n_train: int, t_edit: int, top: int = 999) -> list[int]:
    """The trained timesteps, downward, then -1: linspace(0, top, n_train) without what lies below t_edit."""
    every = torch.linspace(0, 1, n_train, dtype=torch.float64) * top
    kept = [int(t) for t in reversed(every.tolist()) if t >= t_edit]
    if not kept:
        raise ValueError(f"no timestep of {n_train} steps lies at or above t_edit = {t_edit}")
    return [*kept, -1]


def train_delta(
    unet: ThreeLists,
    images: Sequence[tuple[Tensor, Tensor]],
    schedule: Schedule,
    path: Sequence[int],
    edit: Edit,
    optimiser: torch.optim.Optimizer,
    encode: Encode,
    text: Tensor,
    *,
    w_clip: float = 0.8,
    w_l1: float = 3.0,
    text_cosine: float = 1.0,
    embed: Embed | None = None,
    ops: Ops = TORCH,
) -> Iterator[Loss]:
    """One pass over pairs (x0, x_T) of (B, C, H, W): at every timestep, one optimiser step on what `edit` holds.

    loss = w_clip · (-log((2 - L_direction) / 2)) + w_l1 · text_cosine · mean|P_edited - P|.  The edited and the
    unedited walk both start at x_T; x is detached between steps.  The logarithm is the authors' code, not their
    paper's formula; the source image is the real x0 as in their code (the paper has the unedited P_t).
    Yields one Loss per step; schedule the learning rate between passes.
    """
    for x0, x_T in images:
        with torch.no_grad():
            source = encode(x0)
        x = plain = x_T
        for t, s in pairwise(path):
            c = (embed or unet.embed)(times(t, x))
            with torch.no_grad():
                eps_plain = unet(plain, c, ops)[:, : x.shape[1]]
                plain, p_plain = step(plain, eps_plain, schedule(t), schedule(s))
                deep, skips = unet.encode(x, c, ops)
                h = unet.middle(deep, c, ops)
                eps = unet.decode(h, skips, c, ops)[:, : x.shape[1]]
            edited = unet.decode(edit(h, t, c), skips, c, ops)[:, : x.shape[1]]
            x, p = step(x, edited, schedule(t), schedule(s), eps_dir=eps)
            direction = directional_loss(encode(p), source, text)
            clip = -torch.log((2 - direction) / 2)
            l1 = (p - p_plain).abs().mean()
            loss = w_clip * clip + w_l1 * text_cosine * l1
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            x = x.detach()
            yield Loss(t, loss.item(), clip.item(), direction.item(), l1.item())

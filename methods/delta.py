"""What can stand for Δh: Asyrp's implicit f(h, t), free values per timestep, and means over images and time."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.blocks import Cond
from .asyrp import DeltaF, Edit
from .taps import closest, rows


class DeltaBlock(nn.Module):
    """f(h, t) beside a DDPM: 1x1 conv, + time, GroupNorm, SiLU, 1x1 conv (Kwon et al. 2023, figure 3)."""

    def __init__(self, channels: int, embedding: int, *, groups: int = 32):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.emb = nn.Linear(embedding, channels)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, h: Tensor, emb: Tensor | None) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        y = self.conv1(h)
        if emb is not None:
            y = y + self.emb(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm(y)))


class ADMDeltaBlock(nn.Module):
    """f(h, t) beside an ADM or iDDPM: GroupNorm, SiLU, 1x1 conv, + time, GroupNorm, SiLU, 1x1 conv."""

    def __init__(self, channels: int, embedding: int, *, groups: int = 32):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.emb = nn.Linear(embedding, channels)

    def forward(self, h: Tensor, emb: Tensor | None) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C, H, W)
        y = self.conv1(F.silu(self.norm1(h)))
        if emb is not None:
            y = y + self.emb(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y)))


def delta_block(tensors: Mapping[str, Tensor], *, groups: int = 32) -> DeltaBlock | ADMDeltaBlock:
    """A block of either kind around tensors under its own names, which tell the kind and the widths."""
    kind = ADMDeltaBlock if "norm1.weight" in tensors else DeltaBlock
    channels, embedding = tensors["emb.weight"].shape
    with torch.device("meta"):
        block = kind(channels, embedding, groups=groups)
    block.load_state_dict(dict(tensors), strict=True, assign=True)
    return block


def timeless(f: nn.Module) -> DeltaF:
    """f with its time term left out (the authors' `ignore_timesteps`)."""
    return lambda h, emb: f(h, None)


class FreeDelta(nn.Module):
    """Free Δh: one parameter per timestep, or one for all; the nearest trained timestep serves the others.

    shape: (C, H, W) of h.  Starts as the authors' 0.2 randn, or at zero.
    """

    def __init__(self, shape: Sequence[int], path: Sequence[int] = (0,), *, std: float = 0.2, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = {str(t): nn.Parameter(std * torch.randn(*shape, generator=generator)) for t in path if t >= 0}
        self.deltas = nn.ParameterDict(start)

    def at(self, t: int) -> Tensor:
        """Δh at timestep t: (C, H, W)."""
        return closest(t, {int(u): delta for u, delta in self.deltas.items()})


def given(delta: Tensor | Mapping[int, Tensor] | FreeDelta, coefficient: float = 1.0, origin: float = 1.0) -> Edit:
    """h -> origin h + coefficient Δh, for a Δh (B or 1, C, H, W) or (C, H, W) given outright or per timestep."""

    def edit(h: Tensor, t: int, c: Cond) -> Tensor:
        if isinstance(delta, FreeDelta):
            value = delta.at(t)
        else:
            value = delta if isinstance(delta, Tensor) else closest(t, dict(delta))
        value = value.to(h)
        return origin * h + coefficient * (rows(value, len(h)) if value.ndim == h.ndim else value)

    return edit


def mean_delta(per_image: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Δh_t^mean: the mean over images of each timestep's Δh (Kwon et al. 2023, section 5.3).  (B, ...) -> (1, ...)."""
    return {t: delta.mean(0, keepdim=True) for t, delta in per_image.items()}


def global_delta(mean: Mapping[int, Tensor]) -> Tensor:
    """Δh^global: the mean over timesteps of Δh_t^mean (section 5.3)."""
    return torch.stack(list(mean.values())).mean(0)

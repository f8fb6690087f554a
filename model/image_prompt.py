"""IP-Adapter (Ye et al. 2023): what projects a picture's CLIP states to tokens, and keys and values of them a site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import Picture, VisionTower
from .ops import TORCH, Ops, Site
from .sites import level, places
from .unet import SD15, SDXL, UNetConfig

ENCODERS = {1280: "CLIP bigG (sdxl_models/image_encoder)", 1024: "CLIP ViT-H (models/image_encoder)"}


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    kind: Literal["linear", "plus", "full"] = "linear"
    reads: int = 1280  # linear: width of a picture's embedding; plus, full: width of the tower's states
    tokens: int = 4  # linear and plus: tokens a picture; full: as many as states
    context_dim: int = 2048  # width of a token, as of the UNet's text tokens
    width: int = 1280  # plus: of the resampler
    layers: int = 4
    heads: int = 20
    head_dim: int = 64
    mlp: int = 5120  # plus, full: of the feed-forward layers
    sites: tuple[int, ...] = ()  # channels of each attention to text, in the order of `text_sites`

    def __post_init__(self):
        if self.kind not in PROJECTIONS:
            raise ValueError(f"kind is {' or '.join(PROJECTIONS)}, not {self.kind!r}")


def text_sites(cfg: UNetConfig) -> list[tuple[Site, int]]:
    """Every attention to text and its channels, in the order of adapters' files: encoder, decoder, bottleneck."""
    found: dict[str, list[tuple[Site, int]]] = {"enc": [], "dec": [], "mid": []}
    for place in places(cfg):
        if place.kind == "transformer":
            at = level(cfg, place.stage)
            depth = cfg.mid_depth if place.stage == "mid" else cfg.depth[at]
            rows = [(Site(place.stage, i, "cross"), cfg.channels[at]) for i in range(depth)]
            found[place.stage.partition(".")[0]] += rows
    return [*found["enc"], *found["dec"], *found["mid"]]


def widths(cfg: UNetConfig) -> tuple[int, ...]:
    """The channels of `text_sites`."""
    return tuple(channels for _, channels in text_sites(cfg))


class Linear(nn.Module):
    """The embedding times a matrix, cut into tokens, under a layer norm."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        self.linear = nn.Linear(cfg.reads, cfg.tokens * cfg.context_dim)
        self.norm = nn.LayerNorm(cfg.context_dim)
        self.tokens = cfg.tokens

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, E) -> (B, N, D)
        return self.norm(self.linear(x).unflatten(-1, (self.tokens, -1)))


class Full(nn.Module):
    """Every state by itself through two layers."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(cfg.reads, cfg.mlp), nn.Linear(cfg.mlp, cfg.context_dim)
        self.norm = nn.LayerNorm(cfg.context_dim)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, T, C) -> (B, T, D)
        return self.norm(self.fc2(F.gelu(self.fc1(x))))


class ResamplerLayer(nn.Module):
    """Queries attend to the states and to themselves; then a feed-forward layer."""

    def __init__(self, cfg: IPAdapterConfig, i: int):
        super().__init__()
        inner, self.heads, self.site = cfg.heads * cfg.head_dim, cfg.heads, Site(f"resampler.{i}", 0, "cross")
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(cfg.width) for _ in range(3))
        self.q = nn.Linear(cfg.width, inner, bias=False)
        self.kv = nn.Linear(cfg.width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, cfg.width, bias=False)
        self.fc1, self.fc2 = nn.Linear(cfg.width, cfg.mlp, bias=False), nn.Linear(cfg.mlp, cfg.width, bias=False)

    def forward(self, x: Tensor, y: Tensor, ops: Ops) -> Tensor:  # (B, T, C), (B, N, C) -> (B, N, C)
        z = self.norm2(y)
        k, v = self.kv(torch.cat([self.norm1(x), z], dim=1)).chunk(2, dim=-1)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (self.q(z), k, v))
        y = y + self.out(ops.attend(self.site, q, k, v).transpose(1, 2).flatten(2))
        return y + self.fc2(F.gelu(self.fc1(self.norm3(y))))


class Resampler(nn.Module):
    """Learned queries that gather the states into a few tokens."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.width))
        self.proj_in, self.proj_out = nn.Linear(cfg.reads, cfg.width), nn.Linear(cfg.width, cfg.context_dim)
        self.layers = nn.ModuleList(ResamplerLayer(cfg, i) for i in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.context_dim)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:  # (B, T, C) -> (B, N, D)
        x, y = self.proj_in(x), self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            y = layer(x, y, ops)
        return self.norm(self.proj_out(y))


PROJECTIONS = {"linear": Linear, "plus": Resampler, "full": Full}


class IPAdapter(nn.Module):
    """A projection, and for each attention to text two matrices that make keys and values of tokens."""

    def __init__(self, cfg: IPAdapterConfig):
        super().__init__()
        self.cfg = cfg
        self.proj = PROJECTIONS[cfg.kind](cfg)
        self.k, self.v = (nn.ModuleList(nn.Linear(cfg.context_dim, n, bias=False) for n in cfg.sites) for _ in range(2))

    def forward(self, x: Tensor, ops: Ops = TORCH) -> Tensor:
        """What it reads of pictures, (B, E) embeddings or (B, T, C) states -> tokens (B, N, D).

        A ValueError is raised for what another encoder says.
        """
        want = 2 if self.cfg.kind == "linear" else 3
        if x.ndim != want or x.shape[-1] != self.cfg.reads:
            form = f"(B, {self.cfg.reads})" if want == 2 else f"(B, T, {self.cfg.reads})"
            raise ValueError(f"a {self.cfg.kind} adapter reads {form}; got {tuple(x.shape)}")
        return self.proj(x.to(next(self.parameters())), ops)

    def read(self, picture: Picture) -> Tensor:
        """What it reads of pictures: their embedding, not normalised, or the last but one layer's states."""
        return picture.pooled if self.cfg.kind == "linear" else picture.hidden[-2]

    def nothing(self, tower: VisionTower) -> Tensor:
        """What stands for no picture, as it was dropped in training: a zero embedding, or the states of zero pixels."""
        if self.cfg.kind == "linear":
            return torch.zeros(1, self.cfg.reads, device=tower.cls.device, dtype=tower.cls.dtype)
        side = tower.cfg.size
        return self.read(tower(torch.zeros(1, 3, side, side, device=tower.cls.device, dtype=tower.cls.dtype)))

    def fits(self, cfg: UNetConfig, tower: VisionTower | None = None) -> None:
        """Raises ValueError where it is made for another UNet, or for another image encoder."""
        if self.cfg.context_dim != cfg.context_dim:
            raise ValueError(f"the adapter's tokens are {self.cfg.context_dim} wide, the UNet reads "
                             f"{cfg.context_dim}: it is for {family(self.cfg.context_dim)}")  # fmt: skip
        have, want = self.cfg.sites, widths(cfg)
        if have != want:
            raise ValueError(f"the adapter has keys and values of {len(have)} attentions ({runs(have)}), the UNet has "
                             f"{len(want)} ({runs(want)}): it is for another UNet")  # fmt: skip
        if tower is None:
            return
        found, what = tower.cfg.width, "states"
        if self.cfg.kind == "linear":
            found, what = tower.cfg.projection or tower.cfg.width, "embeddings"
        if found != self.cfg.reads:
            near = ENCODERS.get(self.cfg.reads, "")
            if self.cfg.kind != "linear" and self.cfg.reads == 1280:
                near = ENCODERS[1024]  # its states are 1280 wide
            hint = f": {near} fits" if near else ""
            raise ValueError(f"the adapter reads {what} of {self.cfg.reads}, the image encoder gives {found}{hint}")


def family(context_dim: int) -> str:
    """The networks whose text tokens are so wide."""
    return {2048: "Stable Diffusion XL", 768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}.get(
        context_dim, "another UNet"
    )


def runs(numbers: Sequence[int]) -> str:
    """Numbers in a row, equal neighbours told once: 4 x 640, 20 x 1280."""
    starts = [i for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]
    counts = [b - a for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ", ".join(f"{count} x {numbers[start]}" for start, count in zip(starts, counts, strict=True)) or "none"


SDXL_LINEAR = IPAdapterConfig(sites=widths(SDXL))  # 351,285,248 parameters
SDXL_LINEAR_H = IPAdapterConfig(reads=1024, sites=widths(SDXL))
SDXL_PLUS = IPAdapterConfig(kind="plus", tokens=16, sites=widths(SDXL))
SD15_LINEAR = IPAdapterConfig(reads=1024, context_dim=768, sites=widths(SD15))
SD15_PLUS = IPAdapterConfig(
    kind="plus", tokens=16, context_dim=768, width=768, heads=12, mlp=3072, sites=widths(SD15)
)  # fmt: skip
SD15_FULL = IPAdapterConfig(kind="full", tokens=257, context_dim=768, mlp=1280, sites=widths(SD15))

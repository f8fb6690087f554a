"""CLIP's two towers (Radford et al. 2021): text L, H and bigG, pictures H and bigG, with every layer's output."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import TORCH, Ops, Site


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    width: int = 1280
    layers: int = 32
    heads: int = 20
    mlp: int = 5120
    act: Literal["gelu", "quick_gelu"] = "gelu"  # exact, or x sigmoid(1.702 x)
    projection: int | None = 1280  # width of the space shared with pictures; None: the tower ends before it
    vocabulary: int = 49408
    positions: int = 77
    eos: int | None = (
        None  # the id whose first place is pooled; None: the place of the largest id, as published files say
    )

    def __post_init__(self):
        divides(self.width, self.heads, self.act)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp: int = 8192
    act: Literal["gelu", "quick_gelu"] = "gelu"
    projection: int | None = 1280
    size: int = 224  # of pictures, in pixels
    patch: int = 14

    def __post_init__(self):
        divides(self.width, self.heads, self.act)
        if self.size % self.patch:
            raise ValueError(f"pictures of {self.size} pixels do not divide into patches of {self.patch}")


def divides(width: int, heads: int, act: str) -> None:
    """Raises ValueError for heads that do not divide the width, and for an unknown activation."""
    if width % heads:
        raise ValueError(f"{width} channels do not divide into {heads} heads")
    if act not in ACTS:
        raise ValueError(f"act is {' or '.join(ACTS)}, not {act!r}")


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
TEXT_G = TextConfig()  # 694,659,840 parameters; the second text encoder of SDXL
TEXT_H = replace(TEXT_G, width=1024, layers=24, heads=16, mlp=4096, projection=1024)  # Stable Diffusion 2
TEXT_L = replace(TEXT_G, width=768, layers=12, heads=12, mlp=3072, act="quick_gelu", projection=None)  # 123,060,480
VISION_G = VisionConfig()  # 1,844,907,264 parameters; sdxl_models/image_encoder of IP-Adapter
VISION_H = replace(VISION_G, width=1280, layers=32, mlp=5120, projection=1024)  # 632,076,800; models/image_encoder


class Text(NamedTuple):
    """What the text tower says of a batch of texts."""

    hidden: list[Tensor]  # (B, M, C): the embeddings, then each layer's output; hidden[-2] is what SDXL reads
    last: Tensor  # (B, M, C): the last of them under the final norm
    pooled: Tensor  # (B, P): the last at the end of the text, projected where the tower projects

    def skipped(self, skip: int = 0) -> Tensor:
        """hidden[-2 - skip]: the penultimate layer's output, or that of one `skip` layers before it ("clip skip").

        A ValueError is raised where there is no such layer.
        """
        if not 0 <= skip <= len(self.hidden) - 2:
            raise ValueError(f"clip skip is 0...{len(self.hidden) - 2} in a tower of this depth, not {skip}")
        return self.hidden[-2 - skip]


class Picture(NamedTuple):
    """What the vision tower says of a batch of pictures."""

    hidden: list[Tensor]  # (B, 1 + patches, C): the normed embeddings, then each layer's output
    pooled: Tensor  # (B, P): the class token under the final norm, projected where the tower projects; not normalised


class Layer(nn.Module):
    """Self-attention and a feed-forward layer, each over a layer norm and added."""

    def __init__(self, cfg: TextConfig | VisionConfig, i: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.q, self.k, self.v, self.out = (nn.Linear(cfg.width, cfg.width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(cfg.width, cfg.mlp), nn.Linear(cfg.mlp, cfg.width)
        self.heads, self.act = cfg.heads, ACTS[cfg.act]
        self.attn_site, self.ff_site = Site(f"layer.{i}", 0, "self"), Site(f"layer.{i}", 0, "ff")

    def forward(self, x: Tensor, bias: Tensor | None, ops: Ops) -> Tensor:  # (B, N, C) -> (B, N, C)
        y = self.norm1(x)
        q, k, v = (proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y = ops.attend(self.attn_site, q, k, v, bias).transpose(1, 2).flatten(2)
        x = ops.add(self.attn_site, x, self.out(y))
        return ops.add(self.ff_site, x, self.fc2(self.act(self.fc1(self.norm2(x)))))


class TextTower(nn.Module):
    """Token ids to states, each token seeing those before it."""

    def __init__(self, cfg: TextConfig = TEXT_G):
        super().__init__()
        self.cfg = cfg
        self.token = nn.Embedding(cfg.vocabulary, cfg.width)
        self.position = nn.Parameter(torch.zeros(cfg.positions, cfg.width))
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.projection = nn.Linear(cfg.width, cfg.projection, bias=False) if cfg.projection else None

    def forward(self, ids: Tensor, ops: Ops = TORCH) -> Text:
        """Token ids (B, M), M at most 77 -> every layer's states and the pooled text.

        A ValueError is raised for more tokens than positions, ids outside the vocabulary, and texts without an end.
        """
        n, vocabulary = self.cfg.positions, self.token.num_embeddings
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= n:
            raise ValueError(f"token ids are (B, M) with M in 1...{n}; got {tuple(ids.shape)}")
        if bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise ValueError(f"token ids are in 0...{vocabulary - 1}; got {int(ids.min())}...{int(ids.max())}")
        x = self.token(ids) + self.position[: ids.shape[1]]
        bias = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], bias, ops))
        last = self.norm(hidden[-1])
        pooled = last[torch.arange(len(ids), device=ids.device), self.end(ids)]
        return Text(hidden, last, self.projection(pooled) if self.projection is not None else pooled)

    def end(self, ids: Tensor) -> Tensor:
        """The place of each text's end, (B,): of the first `eos`, or of the first of the largest ids."""
        if self.cfg.eos is None:
            return ids.argmax(dim=1)
        here = ids == self.cfg.eos
        if not bool(here.any(dim=1).all()):
            raise ValueError(f"every text has to end with the id {self.cfg.eos}")
        return here.int().argmax(dim=1)


class VisionTower(nn.Module):
    """Pictures to states of patches, the class token first."""

    def __init__(self, cfg: VisionConfig = VISION_G):
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Conv2d(3, cfg.width, cfg.patch, stride=cfg.patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(cfg.width))
        self.position = nn.Parameter(torch.zeros(1 + (cfg.size // cfg.patch) ** 2, cfg.width))
        self.norm_in, self.norm = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.layers))
        self.projection = nn.Linear(cfg.width, cfg.projection, bias=False) if cfg.projection else None

    def forward(self, pixels: Tensor, ops: Ops = TORCH) -> Picture:
        """Normalised pictures (B, 3, 224, 224) -> every layer's states and the embedding.

        A ValueError is raised for pictures of another size.
        """
        side = self.cfg.size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(f"pictures are (B, 3, {side}, {side}); got {tuple(pixels.shape)}")
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + self.position
        hidden = [self.norm_in(x)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], None, ops))
        pooled = self.norm(hidden[-1][:, 0])
        return Picture(hidden, self.projection(pooled) if self.projection is not None else pooled)

"""The shapes of masked maps, of the match by cosine and of compaction that tests share, with the reason for each."""

from typing import NamedTuple

import torch
from torch import Tensor


class MapsCase(NamedTuple):
    """Cross-attention of B images of `heads` heads, `tokens` queries to `keys`, and the keys whose maps are wanted."""

    name: str
    why: str
    batch: int
    heads: int
    tokens: int
    dim: int = 64
    keys: int = 77
    chosen: tuple[tuple[int, ...], ...] = ((2, 5),)  # one row for each image, or one for all
    layout: str = "tokens"  # in memory (B, N, H, D) | heads (B, H, N, D) | apart, channels not side by side
    size: float = 1.0  # of q and k


class MatchCase(NamedTuple):
    """The rows of `targets` images sought among the masked rows of `sources`."""

    name: str
    why: str
    sources: int
    targets: int
    rows: int  # of a source
    tokens: int  # of a target
    channels: int
    share: float | None = 0.3  # of a source's rows inside its mask; None: no mask
    size: float = 1.0
    layout: str = "rows"  # rows | columns, channels not side by side | sliced, every other row
    twins: bool = False  # every row of a source twice
    zeros: bool = False  # some rows of both sides are 0
    empty: bool = False  # the last mask is


class KeptCase(NamedTuple):
    """Keys of `halves` times `images` images, of which each half keeps the same tokens."""

    name: str
    why: str
    images: int
    heads: int
    tokens: int
    dim: int = 64
    halves: int = 2
    share: float = 0.3
    layout: str = "tokens"  # as of MapsCase
    empty: tuple[int, ...] = ()  # images that keep nothing


MAPS_SDXL = [
    MapsCase("maps-4096", "ConsiStory, 4 images, guidance, a subject", 8, 10, 4096, chosen=((5,),)),
    MapsCase("maps-1024", "ConsiStory, 4 images, guidance, two subjects", 8, 20, 1024),
    MapsCase("maps-words", "every word of a prompt", 2, 20, 1024, chosen=(tuple(range(77)),)),
]
MAPS_EDGES = [
    MapsCase("maps", "two images with words of their own", 2, 3, 130, chosen=((1, 76, -1), (0, 0, 7))),
    MapsCase("maps-all", "every key", 1, 2, 40, keys=77, chosen=(tuple(range(77)),)),
    MapsCase("maps-none", "no key at all", 2, 1, 20, chosen=((-1,),)),
    MapsCase("maps-long", "more keys than a tile", 1, 2, 33, keys=300, chosen=((299, 17, 128),)),
    MapsCase("maps-one", "one query, one key", 1, 1, 1, keys=1, chosen=((0,),)),
    MapsCase("maps-40", "Stable Diffusion 1.5", 2, 2, 70, dim=40, chosen=((3,), (9,))),
    MapsCase("maps-128", "a full wide tile", 1, 2, 70, dim=128),
    MapsCase("maps-heads", "strides of (B, H, N, D)", 2, 2, 70, layout="heads"),
    MapsCase("maps-apart", "channels that are not side by side", 2, 2, 70, layout="apart"),
    MapsCase("maps-huge", "logits in the thousands", 2, 2, 70, size=20.0),
]
MATCH_SDXL = [
    MatchCase("match-4096", "DIFT at 64 x 64, 4 images, 2 anchors", 2, 4, 4096, 4096, 1280),
    MatchCase("match-1024", "DIFT at 32 x 32, 4 images, 2 anchors", 2, 4, 1024, 1024, 1280),
]
MATCH_EDGES = [
    MatchCase("match", "two sources, three targets", 2, 3, 200, 130, 96),
    MatchCase("match-all", "no mask", 2, 1, 130, 33, 40, share=None),
    MatchCase("match-empty", "an empty mask", 3, 1, 70, 20, 16, empty=True),
    MatchCase("match-twins", "every row twice: the first is taken", 1, 1, 300, 70, 64, share=None, twins=True),
    MatchCase("match-zeros", "rows that have no direction", 2, 2, 60, 60, 24, zeros=True),
    MatchCase("match-one", "one row each", 1, 1, 1, 1, 1, share=None),
    MatchCase("match-sparse", "tiles with no row inside the mask", 1, 1, 1000, 20, 16, share=0.002),
    MatchCase("match-columns", "channels that are not side by side", 2, 2, 50, 60, 24, layout="columns"),
    MatchCase("match-sliced", "every other row", 2, 2, 50, 60, 24, layout="sliced"),
    MatchCase("match-huge", "products beyond float16", 2, 2, 50, 60, 24, size=1000.0),
    MatchCase("match-small", "products below float16", 2, 2, 50, 60, 24, size=1e-3),
]
KEPT_SDXL = [
    KeptCase("kept-4096", "ConsiStory, 2 anchors of 4 images, guidance, p 0.3, dropout 0.5", 4, 10, 4096, share=0.15),
    KeptCase("kept-1024", "ConsiStory, 4 images, guidance, p 0.3, dropout 0.5", 4, 20, 1024, share=0.15),
]
KEPT_EDGES = [
    KeptCase("kept", "three images, two halves", 3, 2, 100),
    KeptCase("kept-gap", "an image in between keeps nothing", 3, 2, 70, empty=(1,)),
    KeptCase("kept-nothing", "every mask empty", 2, 1, 30, share=0.0),
    KeptCase("kept-all", "every mask full", 2, 1, 30, share=1.0),
    KeptCase("kept-one", "one token, one half", 1, 1, 1, halves=1, share=1.0),
    KeptCase("kept-long", "more tokens than a tile", 2, 1, 5000, dim=8, halves=1),
    KeptCase("kept-40", "Stable Diffusion 1.5", 2, 2, 70, dim=40),
    KeptCase("kept-160", "Stable Diffusion 1.5", 2, 1, 33, dim=160),
    KeptCase("kept-heads", "strides of (B, H, N, D)", 2, 2, 70, layout="heads"),
    KeptCase("kept-apart", "channels that are not side by side", 2, 2, 70, dim=32, layout="apart"),
]


def maps_inputs(case: MapsCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """q, k, v and tokens, int64 (B, T) or (T,)."""
    g = torch.Generator().manual_seed(0)
    made = {}
    for name, n in (("q", case.tokens), ("k", case.keys), ("v", case.keys)):
        x = torch.randn(case.batch, n, case.heads, case.dim, generator=g, dtype=torch.float64)
        made[name] = _laid_out((x * (1 if name == "v" else case.size)).to(device, dtype), case.layout)
    tokens = torch.tensor(case.chosen, device=device)
    return made | {"tokens": tokens[0] if len(tokens) == 1 else tokens}


def match_inputs(case: MatchCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
    """src (S, M, C), tgt (B, N, C), and mask bool (S, M), or None."""
    g = torch.Generator().manual_seed(0)
    made: dict[str, Tensor | None] = {}
    for name, images, rows in (("src", case.sources, case.rows), ("tgt", case.targets, case.tokens)):
        x = torch.randn(images, rows, case.channels, generator=g, dtype=torch.float64) * case.size
        if case.twins and name == "src":
            x = torch.cat([x[:, : rows // 2], x[:, : rows - rows // 2]], 1)
        if case.zeros:
            x[:, ::7] = 0
        x = x.to(device, dtype)
        if case.layout == "columns":
            x = x.mT.contiguous().mT
        made[name] = x.repeat_interleave(2, 1)[:, ::2] if case.layout == "sliced" else x
    mask = None if case.share is None else torch.rand(case.sources, case.rows, generator=g) < case.share
    if mask is not None and case.empty:
        mask[-1] = False
    return made | {"mask": None if mask is None else mask.to(device)}


def kept_inputs(case: KeptCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """x (halves images, H, N, D) and mask bool (images, N)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(case.halves * case.images, case.tokens, case.heads, case.dim, generator=g, dtype=torch.float64)
    mask = torch.rand(case.images, case.tokens, generator=g) < case.share
    mask[list(case.empty)] = False
    return _laid_out(x.to(device, dtype), case.layout), mask.to(device)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """(B, N, H, D) -> (B, H, N, D), in memory as the case has it."""
    x = x.transpose(1, 2)
    if layout == "heads":
        return x.contiguous()
    return x.mT.contiguous().mT if layout == "apart" else x

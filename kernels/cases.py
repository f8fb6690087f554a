"""The shapes that tests and benchmarks of the kernels share, with the reason for each."""

from typing import NamedTuple

import torch
from torch import Tensor

from .sources import Source, Sources, compacted, everyone, shared


class Case(NamedTuple):
    """One call of source attention: B images of `heads` heads, `tokens` queries each, `dim` channels a head."""

    name: str
    why: str
    batch: int
    heads: int
    tokens: int
    dim: int
    keys: int | None = None  # where they are not the tokens
    sees: str = "own"  # own | shared | everyone | kept (a pool of compacted tokens) | listed
    refs: tuple[int, ...] = ()  # shared: one per image
    adain: bool = False
    scale: float = 1.0
    shift: float = 0.0
    kept: tuple[int, ...] = ()  # kept: tokens per image of one half
    halves: int = 1
    listed: tuple[tuple[Source, ...], ...] = ()
    layout: str = (
        "tokens"  # in memory (B, N, H, D) | heads (B, H, N, D) | sliced, every other channel block of a wider row
    )
    mean: float = 0.0  # of q and k, in units of their deviation
    size: float = 1.0  # of q and k
    steep: bool = False  # keys that vary by a hundredth, aligned to keys that vary by 20: a gain that half cannot hold


_PAIR, _FOUR = (0, 0, 2, 2), (0, 0, 0, 0, 4, 4, 4, 4)

SDXL = [
    Case("plain-4096", "SDXL, 64 x 64 tokens, 10 of 70 layers", 2, 10, 4096, 64),
    Case("plain-1024", "SDXL, 32 x 32 tokens, 60 of 70 layers", 2, 20, 1024, 64),
    Case("cross-4096", "SDXL, text of 77 tokens", 2, 10, 4096, 64, keys=77),
    Case("cross-1024", "SDXL, text of 77 tokens", 2, 20, 1024, 64, keys=77),
    Case("style-4096", "StyleAligned, 4 images, guidance", 8, 10, 4096, 64, sees="shared", refs=_FOUR, adain=True),
    Case("style-1024", "StyleAligned, 4 images, guidance", 8, 20, 1024, 64, sees="shared", refs=_FOUR, adain=True),
    Case(
        "style-shift-1024", "transfer from a photo: shift ln 2",
        8, 20, 1024, 64, sees="shared", refs=_FOUR, adain=True, shift=0.6931,
    ),
    Case("style-pair-4096", "StyleAligned, an image at a time", 4, 10, 4096, 64, sees="shared", refs=_PAIR, adain=True),
    Case("everyone-1024", "full sharing, the ablation", 8, 20, 1024, 64, sees="everyone", refs=_FOUR),
    Case(
        "anchors-4096", "ConsiStory: 2 anchors, p 0.3, dropout 0.5",
        8, 10, 4096, 64, sees="kept", kept=(614, 614, 0, 0), halves=2,
    ),
    Case(
        "anchors-1024", "ConsiStory: 2 anchors, p 0.3, dropout 0.5",
        8, 20, 1024, 64, sees="kept", kept=(154, 154, 0, 0), halves=2,
    ),
    Case("sd15-4096", "Stable Diffusion 1.5, 40 channels a head", 2, 8, 4096, 40),
    Case("sd15-1024", "Stable Diffusion 1.5, 80 channels a head", 2, 8, 1024, 80),
    Case("sd15-256", "Stable Diffusion 1.5, 160 channels a head", 2, 8, 256, 160),
]  # fmt: skip

_ONE = (0, 0, 0, 0)

CPU = [
    Case("cpu-style", "StyleAligned, 4 images, no guidance", 4, 10, 1024, 64, sees="shared", refs=_ONE, adain=True),
    Case("cpu-style-pair", "StyleAligned, 2 images", 2, 10, 1024, 64, sees="shared", refs=(0, 0), adain=True),
    Case(
        "cpu-style-shift", "transfer from a photo: shift ln 2",
        4, 10, 1024, 64, sees="shared", refs=_ONE, adain=True, shift=0.6931,
    ),
    Case("cpu-kept", "ConsiStory: all see all, p 0.25", 4, 10, 1024, 64, sees="kept", kept=(256, 256, 256, 256)),
]  # fmt: skip

EDGES = [
    Case("own", "no source at all", 2, 2, 128, 64),
    Case("style", "the method: two references, AdaIN", 4, 1, 128, 64, sees="shared", refs=_PAIR, adain=True),
    Case(
        "style-knobs", "a scale and a shift",
        2, 2, 96, 64, sees="shared", refs=(0, 0), adain=True, scale=0.8, shift=1.3,
    ),
    Case("style-bare", "no AdaIN", 2, 2, 128, 64, sees="shared", refs=(1, 1)),
    Case("between", "a reference that is not the first", 3, 1, 64, 64, sees="shared", refs=(1, 1, 1), adain=True),
    Case("one-image", "a reference alone", 1, 1, 64, 64, sees="shared", refs=(0,), adain=True),
    Case("everyone", "several sources an image", 3, 1, 70, 64, sees="everyone", refs=(0, 0, 0)),
    Case("odd", "token counts that fill no tile", 2, 1, 77, 64, sees="shared", refs=(0, 0), adain=True),
    Case("one-token", "a deviation of nothing", 2, 1, 1, 64, sees="shared", refs=(0, 0), adain=True),
    Case("cross", "77 keys for 130 queries", 2, 1, 130, 64, keys=77),
    Case("kept", "ragged pool, an empty mask", 4, 1, 100, 64, sees="kept", kept=(33, 0, 70, 5), halves=1),
    Case("kept-halves", "two halves, a pool each", 4, 1, 64, 64, sees="kept", kept=(9, 64), halves=2),
    Case("none-kept", "every mask empty", 2, 1, 64, 64, sees="kept", kept=(0, 0)),
    Case(
        "mixed", "sources of unlike scale and shift, overlapping, one twice",
        2, 1, 64, 64, sees="listed",
        listed=(
            (Source(1, 3, 40, 0.5, -1.0), Source(1, 30, 64, 2.0, 0.5), Source(0, 0, 0)),
            (Source(0, 63, 64, 0.0, 3.0), Source(0, 63, 64, 1.0, 0.0)),
        ),
    ),
    Case("dim-32", "half a tile of channels", 2, 1, 70, 32, sees="shared", refs=(0, 0), adain=True),
    Case("dim-40", "Stable Diffusion 1.5", 2, 1, 70, 40, sees="shared", refs=(0, 0), adain=True),
    Case("dim-80", "Stable Diffusion 1.5", 2, 1, 70, 80, sees="shared", refs=(0, 0), adain=True),
    Case("dim-128", "a full wide tile", 2, 1, 64, 128, sees="shared", refs=(0, 0), adain=True),
    Case("dim-160", "Stable Diffusion 1.5", 2, 1, 150, 160, sees="shared", refs=(0, 0), adain=True),
    Case("head-major", "strides of (B, H, N, D)", 2, 2, 70, 64, sees="shared", refs=(0, 0), adain=True, layout="heads"),
    Case("sliced", "q, k, v as slices of one tensor", 2, 2, 70, 64, sees="shared", refs=(0, 0), layout="sliced"),
    Case("far", "means of 20 deviations", 2, 1, 128, 64, sees="shared", refs=(0, 0), adain=True, mean=20.0),
    Case("huge", "logits in the thousands", 2, 1, 64, 64, sees="shared", refs=(0, 0), adain=True, size=20.0),
    Case("steep", "a folded gain beyond float16", 2, 1, 64, 64, sees="shared", refs=(0, 0), adain=True, steep=True),
]  # fmt: skip


class NormCase(NamedTuple):
    """One call of group_norm: B images of `channels` channels, `pixels` pixels each."""

    name: str
    why: str
    batch: int
    channels: int
    pixels: tuple[int, ...]
    groups: int = 32
    silu: bool = True
    refs: tuple[int, ...] = ()  # one per image, or none
    last: bool = False  # channels last in memory
    mean: float = 0.0  # of x, in deviations
    size: float = 1.0  # of x
    layout: str = "dense"  # dense | images, the first half of the channels of wider images | strided, every other pixel


NORM_SDXL = [
    NormCase("norm-128", "SDXL, 128 x 128 pixels, one image, guidance", 2, 320, (128, 128)),
    NormCase("norm-128-last", "the same, channels last", 2, 320, (128, 128), last=True),
    NormCase("norm-128-wide", "SDXL's decoder: h and a skip", 2, 960, (128, 128)),
    NormCase("norm-64", "SDXL, 64 x 64 pixels", 2, 640, (64, 64)),
    NormCase("norm-64-wide", "SDXL's decoder: h and a skip", 2, 1920, (64, 64)),
    NormCase("norm-32", "SDXL, 32 x 32 pixels", 2, 1280, (32, 32)),
    NormCase("norm-32-wide", "SDXL's decoder: h and a skip", 2, 2560, (32, 32)),
    NormCase("norm-32-last", "SDXL, channels last", 2, 1280, (32, 32), last=True),
    NormCase("norm-entry", "before a transformer: no SiLU", 2, 640, (64, 64), silu=False),
    NormCase("norm-four", "four images, guidance", 8, 320, (128, 128)),
    NormCase("norm-style", "StyleAligned, 4 images, guidance", 8, 320, (128, 128), refs=_FOUR),
    NormCase("norm-style-64", "StyleAligned, 4 images, guidance", 8, 640, (64, 64), refs=_FOUR),
    NormCase("norm-style-32", "StyleAligned, 4 images, guidance", 8, 1280, (32, 32), refs=_FOUR),
    NormCase("norm-vae", "the decoder of pixels, 512 x 512", 1, 128, (512, 512)),
]

NORM_EDGES = [
    NormCase("plain", "no SiLU, groups of 10 channels", 2, 40, (8, 8), 4, silu=False),
    NormCase("silu", "a tile of 256 pixels", 2, 32, (16, 16), 4),
    NormCase("style", "two references", 4, 16, (12, 12), 4, refs=(0, 0, 2, 2)),
    NormCase("ragged", "pixels that fill no tile, a reference that is not the first", 3, 20, (9, 7), 4, refs=(2, 2, 2)),
    NormCase("chain", "a reference with a reference of its own", 3, 8, (5, 5), 4, refs=(0, 0, 1)),
    NormCase("last", "channels last, 30 of them in a group", 2, 120, (9, 9), 4, last=True),
    NormCase(
        "last-style", "channels last, more than a tile, more than a chunk", 2, 96, (17, 16), 32, refs=(0, 0), last=True
    ),
    NormCase("long", "a group that one program does not hold", 2, 8, (181, 183), 2, refs=(0, 0)),
    NormCase("one-pixel", "a group of one image's channels", 2, 32, (1, 1), 8),
    NormCase("constant", "a group of one number: a deviation of nothing", 2, 6, (1, 1), 6, silu=False),
    NormCase("line", "three axes", 2, 12, (50,), 3, refs=(1, 1)),
    NormCase("one-group", "every channel in one group", 2, 24, (6, 6), 1),
    NormCase("far", "means of 30 deviations", 2, 32, (16, 16), 4, refs=(0, 0), mean=30.0),
    NormCase("far-last", "means of 30 deviations, channels last", 2, 32, (16, 16), 4, mean=30.0, last=True),
    NormCase("huge", "activations in the thousands", 2, 32, (16, 16), 4, refs=(0, 0), size=3000.0),
    NormCase("images", "channels of a wider tensor", 2, 24, (8, 8), 4, layout="images"),
    NormCase("strided", "every other pixel", 2, 24, (8, 8), 4, refs=(1, 1), layout="strided"),
]

GATES = [(2, 4096, 5120), (2, 1024, 10240)]  # SDXL's feed-forward layers, at 64 x 64 and at 32 x 32 tokens
GATE_EDGES = [(2, 7, 18), (5, 600), (3, 2, 5, 34), (9, 1024), (1, 2)]


def sources(case: Case, device: torch.device | str = "cpu") -> Sources | None:
    """The sources of a case."""
    if case.sees == "shared":
        return shared(case.refs, case.keys or case.tokens, case.scale, case.shift, device)
    if case.sees == "everyone":
        groups = [[i for i, r in enumerate(case.refs) if r == ref] for ref in sorted(set(case.refs))]
        return everyone(groups, case.keys or case.tokens, device)
    if case.sees == "kept":
        seen = [[j != i and case.kept[j] > 0 for j in range(len(case.kept))] for i in range(len(case.kept))]
        return compacted(case.kept, seen, case.halves, device)
    return Sources.of(case.listed, device) if case.sees == "listed" else None


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """q, k, v and, where the case has them, the pool (pk, pv) and ref; every channel has its own mean and deviation."""
    g = torch.Generator().manual_seed(seed)
    b, h, d, m = case.batch, case.heads, case.dim, case.keys or case.tokens
    made = {}
    for name, n, images in (("q", case.tokens, b), ("k", m, b), ("v", m, b)):
        x = torch.randn(images, n, h * d, generator=g, dtype=torch.float64)
        if name != "v":
            spread = torch.rand(images, 1, h * d, generator=g, dtype=torch.float64) + 0.5
            x = (x * spread + case.mean * torch.randn(images, 1, h * d, generator=g, dtype=torch.float64)) * case.size
        if case.steep and name != "v":
            x = x * 30 if name == "q" else torch.cat([x[:1] * 20, x[1:] * 1e-2 + 10])
        made[name] = x.unflatten(-1, (h, d)).transpose(1, 2)
    if case.sees == "kept":
        shape = (case.halves, sum(case.kept), h, d)
        made |= {name: torch.randn(shape, generator=g, dtype=torch.float64).transpose(1, 2) for name in ("pk", "pv")}
    made = {name: x.to(device, dtype) for name, x in made.items()}
    if case.layout == "heads":
        made = {name: x.contiguous() for name, x in made.items()}
    if case.layout == "sliced":
        wide = torch.cat([made[name].transpose(1, 2) for name in ("q", "k", "v")], -1)
        made |= {name: part.transpose(1, 2) for name, part in zip(("q", "k", "v"), wide.split(d, -1), strict=True)}
    if case.adain:
        made["ref"] = torch.tensor(case.refs, dtype=torch.int32, device=device)
    return made


def norm_inputs(
    case: NormCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """x, weight, bias, the gradient g of the output and, where the case has one, ref; every group has its own mean."""
    noise = torch.Generator().manual_seed(seed)
    b, c = case.batch, case.channels

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    x, axes = draw(b, c, *case.pixels), [1] * len(case.pixels)
    level = (1 + 0.3 * draw(b, case.groups)).repeat_interleave(c // case.groups, 1)
    x = (x * (0.5 + draw(b, 1).abs()).view(b, 1, *axes) + case.mean * level.view(b, c, *axes)) * case.size
    made = {"x": x, "weight": 1 + 0.3 * draw(c), "bias": 0.3 * draw(c), "g": draw(b, c, *case.pixels)}
    made = {name: v.to(device, dtype) for name, v in made.items()}
    if case.last:
        made |= {name: made[name].movedim(1, -1).contiguous().movedim(-1, 1) for name in ("x", "g")}
    if case.layout == "images":
        made["x"] = torch.cat([made["x"], made["g"]], 1)[:, :c]
    if case.layout == "strided":
        made["x"] = made["x"].repeat_interleave(2, -1)[..., ::2]
    if case.refs:
        made["ref"] = torch.tensor(case.refs, device=device)
    return made

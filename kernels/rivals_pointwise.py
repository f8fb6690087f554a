"""AdaIN, GroupNorm and GEGLU beside torch's own, eager and compiled: kernels whose time is the memory's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .adain import adain
from .contests import OURS, Contest, Entry, Work, compiled, judged
from .geglu import geglu
from .group_norm import group_norm
from .timing import Way

ON_CHIP = 200_000  # bytes: statistics of more than a multiprocessor holds cost a second reading of their input


class Tokens(NamedTuple):
    """(B, H, N, D), in memory (B, N, H, D), or for GEGLU (B, N, 2C)."""

    name: str
    why: str
    shape: tuple[int, ...]
    refs: tuple[int, ...] = ()


class Pixels(NamedTuple):
    """(B, C, H, W)."""

    name: str
    why: str
    shape: tuple[int, int, int, int]
    refs: tuple[int, ...] = ()  # statistics pooled with those of another image
    groups: int = 32
    last: bool = False  # channels last in memory


_FOUR = (0, 0, 0, 0, 4, 4, 4, 4)
ADAIN = [
    Tokens("tokens-4096", "StyleAligned, 4 images, guidance: 10 of 70 layers", (8, 10, 4096, 64), _FOUR),
    Tokens("tokens-1024", "StyleAligned, 4 images, guidance: 60 of 70 layers", (8, 20, 1024, 64), _FOUR),
    Tokens("cpu-tokens", "4 images", (4, 10, 1024, 64), _FOUR[:4]),
    Tokens("tiny", "to see that it runs", (2, 2, 33, 8), (0, 0)),
]
GROUP_NORM = [
    Pixels("pixels-128", "SDXL at 1024: 128 x 128, 4 images, guidance", (8, 320, 128, 128)),
    Pixels("pixels-64", "64 x 64", (8, 640, 64, 64)),
    Pixels("pixels-32", "32 x 32, most of its norms", (8, 1280, 32, 32)),
    Pixels("joined-64", "behind a skip", (8, 1920, 64, 64)),
    Pixels("joined-32", "behind a skip", (8, 2560, 32, 32)),
    Pixels("last-64", "channels last", (8, 640, 64, 64), last=True),
    Pixels("pooled-128", "StyleAligned's shared norm", (8, 320, 128, 128), _FOUR),
    Pixels("pooled-32", "StyleAligned's shared norm", (8, 1280, 32, 32), _FOUR),
    Pixels("cpu-pixels", "an image of a small network", (1, 320, 64, 64)),
    Pixels("cpu-pooled", "StyleAligned's shared norm, 4 images", (4, 320, 32, 32), _FOUR[:4]),
    Pixels("tiny", "to see that it runs", (2, 8, 5, 5), groups=4),
    Pixels("tiny-pooled", "to see that it runs", (2, 8, 5, 5), (0, 0), groups=4),
]
GEGLU = [
    Tokens("gate-4096", "SDXL, 4 images, guidance: 10 of 70 layers", (8, 4096, 5120)),
    Tokens("gate-1024", "SDXL, 4 images, guidance: 60 of 70 layers", (8, 1024, 10240)),
    Tokens("cpu-gate", "an image", (1, 1024, 5120)),
    Tokens("tiny", "to see that it runs", (2, 7, 16)),
]


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.5).to(device, dtype)


def _three(
    kernel: str, case: Any, work: Work, ours: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, *rest: Any
) -> Contest:
    """Ours, the definition eager, and the definition compiled, each called with x and the rest."""

    def compile_it() -> Way:
        run = compiled(plain)
        return Way(lambda: run(x, *rest))

    def definition(dtype: torch.dtype) -> tuple[Tensor]:
        return (plain(*(_in(y, dtype) for y in (x, *rest))),)

    ways = {
        OURS: lambda: Way(lambda: ours(x, *rest)),
        "torch": lambda: Way(lambda: plain(x, *rest)),
        "torch, compiled": compile_it,
    }
    return Contest(kernel, case.name, case.why, work, ways, judged(definition, x.dtype))


def _in(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _passes(x: Tensor, parts: int) -> int:
    """How often x is moved, at least, when its statistics are over that many parts of it: in, out, and in again."""
    return 2 if x.numel() * x.element_size() <= ON_CHIP * parts else 3


def adain_contest(case: Tokens, dtype: torch.dtype, device: torch.device) -> Contest:
    """AdaIN of one tensor."""
    b, h, n, d = case.shape
    x = _drawn((b, n, h, d), dtype, device).transpose(1, 2)
    work = Work(7.0 * x.numel(), 0, _passes(x, b * h) * x.numel() * x.element_size())
    return _three("adain", case, work, adain, reference.adain, x, torch.tensor(case.refs, device=device))


def group_norm_contest(case: Pixels, dtype: torch.dtype, device: torch.device) -> Contest:
    """GroupNorm and SiLU."""
    x, (b, c, *_) = _drawn(case.shape, dtype, device), case.shape
    weight, bias = _drawn((2, c), dtype, device)
    if case.last:
        x = x.contiguous(memory_format=torch.channels_last)
    ref = torch.tensor(case.refs, device=device) if case.refs else None
    work = Work(15.0 * x.numel(), x.numel(), _passes(x, b * case.groups) * x.numel() * x.element_size())
    rest = (weight, bias, case.groups, 1e-5, True, ref)
    return _three("group_norm", case, work, group_norm, reference.group_norm, x, *rest)


def geglu_contest(case: Tokens, dtype: torch.dtype, device: torch.device) -> Contest:
    """The gate of a feed-forward layer."""
    x = _drawn(case.shape, dtype, device)
    work = Work(12.0 * x.numel(), 0, 1.5 * x.numel() * x.element_size())
    return _three("geglu", case, work, geglu, reference.geglu, x)


def _entry(kernel: str, cases: list[Any], contest: Callable[..., Contest]) -> Entry:
    names = [case.name for case in cases]
    cpu = tuple(n for n in names if n.startswith("cpu-"))
    cuda = tuple(n for n in names if not n.startswith(("cpu-", "tiny")))
    return Entry(kernel, dict(zip(names, cases, strict=True)), {"cuda": cuda, "cpu": cpu}, contest)


ENTRIES = (
    _entry("adain", ADAIN, adain_contest),
    _entry("group_norm", GROUP_NORM, group_norm_contest),
    _entry("geglu", GEGLU, geglu_contest),
)

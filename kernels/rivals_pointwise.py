"""AdaIN, GroupNorm and GEGLU beside torch's own, eager and compiled: kernels whose time is the memory's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .adain import adain
from .cases import CPU, EDGES, GATE_EDGES, GATES, NORM_EDGES, NORM_SDXL, SDXL, Case, NormCase, inputs, norm_inputs
from .contests import OURS, Contest, Work, compiled, entry, judged
from .geglu import geglu
from .group_norm import group_norm
from .timing import Way

ON_CHIP = 200_000  # bytes: statistics of more than a multiprocessor holds cost a second reading of their input


class Gate(NamedTuple):
    """The input of GEGLU, (..., 2C)."""

    name: str
    why: str
    shape: tuple[int, ...]


def _named(shapes: list[tuple[int, ...]], why: str) -> list[Gate]:
    return [Gate("gate-" + "x".join(map(str, shape)), why, shape) for shape in shapes]


ADAIN = [[case for case in cases if case.adain] for cases in (SDXL, CPU, EDGES)]
NORM_CPU = [
    NormCase("cpu-norm", "an image of a small network", 1, 320, (64, 64)),
    NormCase("cpu-norm-style", "StyleAligned's shared norm, 4 images", 4, 320, (32, 32), refs=(0, 0, 0, 0)),
]
GATE = [_named(GATES, "SDXL's feed-forward layers"), _named([(1, 1024, 5120)], "an image"), _named(GATE_EDGES, "odd")]
GATE[1] = [gate._replace(name="cpu-gate") for gate in GATE[1]]


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


def adain_contest(case: Case, dtype: torch.dtype, device: torch.device) -> Contest:
    """AdaIN of the queries of a case of source attention."""
    made = inputs(case, dtype, device)
    x = made["q"]
    work = Work(7.0 * x.numel(), 0, _passes(x, case.batch * case.heads) * x.numel() * x.element_size())
    return _three("adain", case, work, adain, reference.adain, x, made["ref"])


def group_norm_contest(case: NormCase, dtype: torch.dtype, device: torch.device) -> Contest:
    """GroupNorm, with SiLU where the case has it."""
    made = norm_inputs(case, dtype, device)
    x = made["x"]
    moved = _passes(x, case.batch * case.groups) * x.numel() * x.element_size()
    work = Work(15.0 * x.numel(), x.numel() * case.silu, moved)
    rest = (made["weight"], made["bias"], case.groups, 1e-5, case.silu, made.get("ref"))
    return _three("group_norm", case, work, group_norm, reference.group_norm, x, *rest)


def geglu_contest(case: Gate, dtype: torch.dtype, device: torch.device) -> Contest:
    """The gate of a feed-forward layer."""
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    work = Work(12.0 * x.numel(), 0, 1.5 * x.numel() * x.element_size())
    return _three("geglu", case, work, geglu, reference.geglu, x)


ENTRIES = (
    entry("adain", ADAIN[0], ADAIN[1], ADAIN[2], adain_contest),
    entry("group_norm", NORM_SDXL, NORM_CPU, NORM_EDGES, group_norm_contest),
    entry("geglu", GATE[0], GATE[1], GATE[2], geglu_contest),
)

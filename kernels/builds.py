"""How kernels are configured, by a fixed table per architecture, launched, and compiled with no GPU."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

# bytes of shared memory that a block may take: 80 stands for every card since Ampere, the smallest of which has 101,376
SHARED = {80: 101_376, 90: 232_448}


class Config(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Build(NamedTuple):
    """A kernel with everything that its compilation depends on."""

    name: str
    kernel: Any
    types: dict[str, str]  # argument -> "*fp16", "i32", "fp32"
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments divisible by 16
    warps: int
    stages: int
    tensor_cores: bool


def architecture(capability: tuple[int, int]) -> int:
    """The table for a compute capability: Hopper's, and Blackwell's with as much shared memory, or everyone's."""
    return 90 if capability[0] in (9, 10) else 80


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """kernel[grid](*args) on `device`, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def block(channels: int) -> int:
    """The tile that holds a head: 64, 128 or 256 channels."""
    return 64 if channels <= 64 else 128 if channels <= 128 else 256

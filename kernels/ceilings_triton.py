"""The rate of the exponential unit, as a kernel that does nothing else."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .builds import launch

BLOCK, STEPS = 2048, 2048  # numbers of a program, and exponentials of each


@triton.jit
def exponentials_kernel(X, Y, steps, BLOCK: tl.constexpr):
    """y = x under `steps` times x <- 2^-x, which keeps to (0, 1] and cannot be shortened."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at)
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(Y + at, x)


def exponentials(
    device: torch.device, programs: int | None = None, steps: int = STEPS
) -> tuple[Callable[[], Tensor], int]:
    """A call that takes `programs` x 2048 x steps exponentials, and that number; by default eight programs a
    multiprocessor."""
    blocks: int = programs or 8 * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.linspace(0, 1, blocks * BLOCK, device=device)
    y = torch.empty_like(x)

    def run() -> Tensor:
        launch(exponentials_kernel, (blocks,), device, x, y, steps, BLOCK, num_warps=4)
        return y

    return run, blocks * BLOCK * steps

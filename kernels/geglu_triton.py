"""Triton kernels of the gate, forward and backward, and their launches."""
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .builds import Build, launch

ROWS, COLUMNS, WARPS = 8, 256, 4  # of a tile of the output


@triton.jit
def _halves(X, rows, columns, n, C, step):
    """Two tiles, a and b, of the halves of rows in float32, and which of it there is."""
    at = rows[:, None].to(tl.int64) * step + columns[None, :]
    inside = (rows < n)[:, None] & (columns < C)[None, :]
    a = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(X + at + C, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def geglu_kernel(X, Y, n, C, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """a b Phi(b), Phi the normal distribution."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    a, b, inside = _halves(X, rows, columns, n, C, step)
    y = a * (0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476)))
    tl.store(Y + rows[:, None].to(tl.int64) * C + columns[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def geglu_gradient_kernel(G, X, DX, n, C, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """g b Phi(b) and g a (Phi(b) + b phi(b)), phi the normal density."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    a, b, inside = _halves(X, rows, columns, n, C, step)
    at = rows[:, None].to(tl.int64) * C + columns[None, :]
    g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    phi = 0.5 * (1.0 + tl.erf(b * 0.7071067811865476))
    slope = phi + b * (0.3989422804014327 * tl.exp(-0.5 * b * b))
    to = DX + rows[:, None].to(tl.int64) * (2 * C) + columns[None, :]
    tl.store(to, (g * b * phi).to(DX.dtype.element_ty), mask=inside)
    tl.store(to + C, (g * a * slope).to(DX.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """(..., 2C) -> (..., C), contiguous."""
    rows, n, c = flat(x)
    y = x.new_empty((*x.shape[:-1], c))
    grid = (-(-n // ROWS), -(-c // COLUMNS))
    launch(geglu_kernel, grid, x.device, rows, y, n, c, rows.stride(0), ROWS, COLUMNS, num_warps=WARPS)
    return y


def backward(g: Tensor, x: Tensor) -> Tensor:
    """(..., C), (..., 2C) -> (..., 2C), contiguous."""
    rows, n, c = flat(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (-(-n // ROWS), -(-c // COLUMNS))
    launch(
        geglu_gradient_kernel, grid, x.device,
        g.contiguous(), rows, dx, n, c, rows.stride(0), ROWS, COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return dx


def flat(x: Tensor) -> tuple[Tensor, int, int]:
    """x as rows of numbers that are next to each other, a view where it can be one; how many, and half of a row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous(), len(rows), x.shape[-1] // 2


def builds(arch: int) -> Iterator[Build]:
    """Every configuration that is launched; they are the same on every architecture."""
    for kernel, pointers in ((geglu_kernel, ("X", "Y")), (geglu_gradient_kernel, ("G", "X", "DX"))):
        for half in ("fp16", "fp32"):
            types = dict.fromkeys(pointers, f"*{half}") | dict.fromkeys(("n", "C", "step"), "i32")
            constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
            yield Build(
                f"{kernel.__name__} {half}", kernel, types, constants, (*pointers, "C", "step"), WARPS, 3, False
            )

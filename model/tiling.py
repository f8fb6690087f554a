"""Large pictures through an autoencoder tile by tile, the seams blended."""

from collections.abc import Callable

import torch
from torch import Tensor

from .ops import TORCH, Ops
from .vae import VAE, Moments


def tiled_decode(
    vae: VAE, z: Tensor, *, tile: int = 128, overlap: float = 0.25, ops: Ops = TORCH, checked: bool = False
) -> Tensor:
    """`vae.decode(z)` by tiles of `tile`² latents that share `overlap` of a side.  (B, 4, H, W) -> (B, 3, 8H, 8W).

    Tiles differ where the decoder looks far (its norms and its attention), so the result is near `decode`, not equal;
    a z of one tile is decoded whole.  A ValueError is raised for tiles whose overlap is not whole; `checked` is as in
    `decode`.
    """
    return tiles(lambda part: vae.decode(part, ops, checked=checked), z, tile, tile * vae.multiple, overlap)


def tiled_encode(vae: VAE, x: Tensor, *, tile: int = 1024, overlap: float = 0.25, ops: Ops = TORCH) -> Moments:
    """`vae.encode(x)` by tiles of `tile`² pixels.  (B, 3, H, W) -> mean and log variance (B, 4, H / 8, W / 8)."""
    whole = tiles(lambda part: torch.cat(vae.encode(part, ops), dim=1), x, tile, tile // vae.multiple, overlap)
    return Moments(*whole.chunk(2, dim=1))


def tiles(run: Callable[[Tensor], Tensor], x: Tensor, side: int, out: int, overlap: float) -> Tensor:
    """`run` over tiles of `side`², each of which becomes one of `out`²; neighbours fade linearly into each other."""
    if side < 1:
        raise ValueError(f"a tile is at least 1 wide, not {side}")
    step, seam = round(side * (1 - overlap)), round(out * overlap)
    if not 0 <= overlap < 1 or step * out != (out - seam) * side or side * overlap % 1 or out * overlap % 1:
        raise ValueError(f"tiles of {side} and {out} do not overlap by {overlap} in whole pixels: try 64 and 0.25")
    if max(x.shape[2:]) <= side:
        return run(x)
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for i in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for j in range(0, x.shape[3], step):
            part = run(x[:, :, i : i + side, j : j + side])
            part = faded(above[len(row)], part, seam, 2) if above else part
            row.append(faded(row[-1], part, seam, 3) if row else part)
        rows.append(torch.cat([part[:, :, : out - seam, : out - seam] for part in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def faded(before: Tensor, part: Tensor, seam: int, dim: int) -> Tensor:
    """A tile whose first `seam` rows (dim 2) or columns (dim 3) begin as the last ones of the tile before it."""
    n = min(before.shape[dim], part.shape[dim], seam)
    wide = torch.promote_types(part.dtype, torch.float32)  # bfloat16 counts to 256
    weight = (torch.arange(n, device=part.device, dtype=wide) / max(n, 1)).to(part.dtype)
    weight = weight[:, None] if dim == 2 else weight
    end, begin = before.narrow(dim, before.shape[dim] - n, n), part.narrow(dim, 0, n)
    return torch.cat([end * (1 - weight) + begin * weight, part.narrow(dim, n, part.shape[dim] - n)], dim=dim)

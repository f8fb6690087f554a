"""Directions in h-space without training: differences of means, principal components, and the decoder's Jacobian."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.blocks import Cond, ThreeLists
from ..model.ops import JVP, Ops


def mean_difference(source: Mapping[int, Tensor], target: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Mean h of one set of images minus mean h of another, by timestep (B differs freely).  -> (1, C, H, W) each."""
    if source.keys() != target.keys():
        raise ValueError("both sets must be inverted along the same path")
    return {t: target[t].mean(0, keepdim=True) - source[t].mean(0, keepdim=True) for t in source}


class Components(NamedTuple):
    """Principal components of a set of h: directions of unit norm and the variance along each."""

    mean: Tensor  # (1, C, H, W)
    directions: Tensor  # (K, C, H, W)
    variances: Tensor  # (K,)


def pca(h: Tensor, k: int) -> Components:
    """The k leading principal components of h (B, C, H, W), largest first (Haas et al. 2024, section 3)."""
    if not 1 <= k < len(h):
        raise ValueError(f"{len(h)} samples have 1 ... {len(h) - 1} components; got k = {k}")
    mean = h.mean(0, keepdim=True)
    _, s, v = torch.linalg.svd((h - mean).flatten(1), full_matrices=False)
    return Components(mean, v[:k].unflatten(1, h.shape[1:]), s[:k] ** 2 / (len(h) - 1))


class Singular(NamedTuple):
    """The top singular triples of the Jacobian d eps / d h at one point."""

    directions: Tensor  # (K, B, C, H, W) in h, orthonormal per image
    effects: Tensor  # (K, B, C', H', W') in eps, orthonormal per image
    values: Tensor  # (K, B), largest first


def jacobian(
    unet: ThreeLists,
    h: Tensor,
    skips: Sequence[Tensor],
    c: Cond,
    *,
    k: int = 3,
    iterations: int = 20,
    seed: int = 0,
    ops: Ops = JVP,
) -> Singular:
    """Leading right singular vectors of d eps / d h, by subspace iteration (Haas et al. 2024, section 4).

    Each iteration takes k forward-mode products J v and k reverse-mode products J^T u; J itself never exists.  Both
    modes must be defined for the verbs in `ops`.  h: (B, C, H, W); images of a batch do not mix.
    """
    if not 1 <= k <= h[0].numel():
        raise ValueError(f"h has 1 ... {h[0].numel()} directions; got k = {k}")

    def decode(h: Tensor) -> Tensor:
        return unet.decode(h, list(skips), c, ops)[:, : unet.in_channels]

    def orthonormal(v: Tensor) -> tuple[Tensor, Tensor]:
        """(K, B, ...) -> the same span per image with orthonormal rows, and the triangular factor's diagonal (K, B)."""
        q, r = torch.linalg.qr(v.flatten(2).permute(1, 2, 0))  # (B, N, K)
        return q.permute(2, 0, 1).unflatten(2, v.shape[2:]), r.diagonal(dim1=1, dim2=2).abs().T

    generator = torch.Generator().manual_seed(seed)
    v, _ = orthonormal(torch.randn(k, *h.shape, generator=generator).to(h))
    pull = torch.func.vjp(decode, h)[1]
    for _ in range(iterations):
        u = torch.stack([torch.func.jvp(decode, (h,), (row,))[1] for row in v])
        v, _ = orthonormal(torch.stack([pull(row)[0] for row in u]))
    # Rayleigh-Ritz: the exact singular triples of J within the span that was found.
    u = torch.stack([torch.func.jvp(decode, (h,), (row,))[1] for row in v])  # (K, B, ...)
    left, values, right = torch.linalg.svd(
        u.flatten(2).permute(1, 2, 0), full_matrices=False
    )  # (B, N, K) (B, K) (B, K, K)
    directions = torch.einsum("bkj,jbn->kbn", right, v.flatten(2)).unflatten(2, h.shape[1:])
    effects = left.permute(2, 0, 1).unflatten(2, u.shape[2:])
    return Singular(directions.detach(), effects.detach(), values.T.detach())

"""Four ways to mix the h of two images: slerp, lerp, addition, replacement (Jeong et al. 2024, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor

Blend = Callable[[Tensor, Tensor, float], Tensor]  # (h, content h, gamma) -> mixed h, all (B, C, H, W)


def match_norm(content: Tensor, h: Tensor) -> Tensor:
    """content at h's norm, each taken as one vector per image; an all-zero content stays zero."""
    length, wanted = norm(content), norm(h)
    return content * torch.where(length > 0, wanted / length.where(length > 0, 1.0), 0.0)


def slerp(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """Spherical interpolation of whole maps, one angle per image; gamma = 0 gives h.

    sin((1 - gamma) θ) / sin θ · h + sin(gamma θ) / sin θ · content.  Where the two point the same way (or one is
    zero, or they are opposite) the angle defines no arc, and the weights are those of lerp.
    """
    length = norm(h) * norm(content)
    u = h / norm(h).where(length > 0, 1.0)
    v = content / norm(content).where(length > 0, 1.0)
    angle = 2 * torch.atan2(norm(u - v), norm(u + v))  # exact for small angles, where acos of a dot product is not
    sine = angle.sin()
    arc = (sine > 1e-6) & (length > 0)
    sine = sine.where(arc, 1.0)  # no division by zero, in the gradients either
    weight = torch.where(arc, ((1 - gamma) * angle).sin() / sine, 1 - gamma)
    weight_content = torch.where(arc, (gamma * angle).sin() / sine, gamma)
    return weight * h + weight_content * content


def norm_matched_slerp(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """The paper's injection: content at h's norm, then slerp, so that |mixed h| = |h| (eq. 4)."""
    return slerp(h, match_norm(content, h), gamma)


def lerp(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """(1 - gamma) h + gamma content: the ablation without the sphere."""
    return (1 - gamma) * h + gamma * content


def addition(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """h + gamma content: the ablation that lets the norm grow."""
    return h + gamma * content


def replacement(h: Tensor, content: Tensor, gamma: float) -> Tensor:
    """content in h's place, whatever gamma > 0 is: the analysis of section 3.1."""
    return content.expand_as(h) if gamma > 0 else h


def norm(x: Tensor) -> Tensor:
    """L2 norm of each image's map taken as one vector.  (B, C, H, W) -> (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


BLENDS: dict[str, Blend] = {
    "slerp": norm_matched_slerp,
    "lerp": lerp,
    "addition": addition,
    "replacement": replacement,
}

"""What tests of StyleAligned share: a tiny text-conditioned UNet, inputs, and the published attention written out."""

from functools import cache

import torch
from diaphane.kernels import reference
from diaphane.methods.prompt import Prompt
from diaphane.methods.text_to_image import denoiser
from diaphane.model.ops import TORCH, Ops
from diaphane.model.unet import UNet, UNetConfig
from diaphane.samplers.parameterisation import Denoise
from diaphane.samplers.schedule import scaled_linear
from torch import Tensor

F64 = torch.float64
CFG = UNetConfig(
    channels=(16, 32), depth=(1, 1), mid_depth=2, blocks=1, head_dim=8, context_dim=12, pooled_dim=10, id_dim=6,
    groups=8,
)  # fmt: skip
SCHEDULE = scaled_linear()


@cache
def net(dtype: torch.dtype = F64) -> UNet:
    torch.manual_seed(3)
    unet = UNet(CFG).eval().requires_grad_(False)
    for p in unet.parameters():
        p.copy_(p + 0.05 * torch.randn(p.shape))
    return unet.to(dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def prompts(n: int, dtype: torch.dtype = F64) -> tuple[Prompt, Prompt]:
    """n texts and n negative texts, each another."""
    return tuple(
        Prompt(drawn(n, 5, CFG.context_dim, seed=s, dtype=dtype), drawn(n, 10, seed=s + 1, dtype=dtype))
        for s in (10, 12)
    )  # type: ignore[return-value]


def told(rows: list[int], ops: Ops = TORCH, guidance: float = 3.0, dtype: torch.dtype = F64, of: int = 9) -> Denoise:
    """The network of some of nine images, with texts of their own."""
    positive, negative = (Prompt(p.context[rows], p.pooled[rows]) for p in prompts(of, dtype))
    ids = torch.full((len(rows), 6), 64.0)
    return denoiser(net(dtype), positive, negative, schedule=SCHEDULE, ids=ids, guidance=guidance, ops=ops)


def at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32))


def published(
    q: Tensor, k: Tensor, v: Tensor, ref: Tensor, adain: str, scale: float, shift: float, attention: bool = True
) -> Tensor:
    """Equations 4 and 5 with everything side by side, as the authors' code has it."""
    q, k, v = (reference.adain(x, ref) if name in adain else x for name, x in (("q", q), ("k", k), ("v", v)))
    if not attention:
        return reference.softmax_attention(q, k, v)
    own = torch.arange(len(q)) == ref
    gain = torch.where(own, 1.0, scale).to(k)[:, None, None, None]
    keys, values = torch.cat([k, k[ref] * gain], 2), torch.cat([v, v[ref]], 2)
    logits = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5
    logits[..., k.shape[2] :] += shift
    return logits.softmax(-1) @ values

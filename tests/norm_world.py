"""What tests of GroupNorm and of the gate share: outputs and gradients beside the definitions', and how far off."""

import torch
from diaphane.kernels import cases, reference
from diaphane.kernels.geglu import geglu
from diaphane.kernels.group_norm import group_norm
from torch import Tensor

EPS = 1e-5


def results(run, case: cases.NormCase, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of a call on `made`, and the gradients, d<input>."""
    leaves = {name: made[name].detach().requires_grad_() for name in ("x", "weight", "bias")}
    out = run(*leaves.values(), case.groups, EPS, case.silu, made.get("ref"))
    grads = torch.autograd.grad(out, list(leaves.values()), made["g"])
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def cast(made: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: v if name == "ref" else v.to(dtype) for name, v in made.items()}


def errors(case: cases.NormCase, dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of the output and of every gradient that is not zero: its distance from float64, and the most that may be."""
    made = cases.norm_inputs(case, dtype, device)
    true = results(reference.group_norm, case, cast(made, torch.float64))
    return compared(results(group_norm, case, made), results(reference.group_norm, case, made), true, dtype)


def gate_errors(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """The same for the gate, with some numbers large, and x the second half of a wider tensor."""
    noise = torch.Generator().manual_seed(len(shape))
    x = (3 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=noise)).to(device, dtype)[..., shape[-1] :]
    x = x.where(torch.arange(shape[-1], device=device) % 7 > 0, x * 30)
    g = torch.randn((*shape[:-1], shape[-1] // 2), generator=noise).to(device, dtype)
    found = []
    for run, kind in ((geglu, dtype), (reference.geglu, dtype), (reference.geglu, torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        out = run(leaf)
        found.append({"out": out.detach(), "dx": torch.autograd.grad(out, leaf, g.to(kind))[0]})
    return compared(*found, dtype)


def compared(ours: dict, plain: dict, true: dict, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """It may err twice as much as torch in the same type, or by twice the type's precision."""
    held = {name: exact for name, exact in true.items() if exact.norm() > 1e-6}
    floor = 2 * torch.finfo(dtype).eps
    return {name: (error(ours[name], t), max(2 * error(plain[name], t), floor)) for name, t in held.items()}


def error(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference in units of the truth's; NaN is infinite."""
    worst = ((found.double() - true).norm() / true.norm()).item()
    return worst if worst == worst else float("inf")

"""What tests of kernels share: a case's outputs and gradients beside its definition, in its type and in float64."""

from math import isfinite

import torch
from diaphane.kernels import cases, reference
from diaphane.kernels.source_attention import source_attention
from torch import Tensor


def results(run, case: cases.Case, made: dict[str, Tensor], use: tuple[float, float] = (1.0, 1.0)) -> dict[str, Tensor]:
    """out and lse of a call on `made`, and gradients, d<input>, of a weighting of the two that the case decides."""
    leaves = {n: x.detach().requires_grad_() for n, x in made.items() if n != "ref"}
    pool = (leaves["pk"], leaves["pv"]) if "pk" in leaves else None
    seen = cases.sources(case, made["q"].device)
    out, lse = run(leaves["q"], leaves["k"], leaves["v"], seen, pool=pool, ref=made.get("ref"))
    wanted = [(i, x) for i, x in enumerate((out, lse)) if use[i]]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) * use[i] for i, x in wanted]
    grads = torch.autograd.grad([x for _, x in wanted], list(leaves.values()), weights, allow_unused=True)
    found = {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | found


def cast(made: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers in another type; strides are kept."""
    return {n: x if n == "ref" else x.to(dtype) for n, x in made.items()}


def error(found: Tensor, true: Tensor) -> float:
    """Root mean square of the difference in units of the truth's, of 1 at least for log-sum-exps; NaN is infinite."""
    unit = true.double().norm() if true.ndim == 4 else max(true.double().norm(), true.numel() ** 0.5)
    worst = ((found.double() - true.double()).norm() / unit).item()
    return worst if worst == worst else float("inf")


def errors(case: cases.Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of every output and gradient that is not zero and that the type can hold: its distance from float64, the most.

    It may err twice as much as the definition in the same type, or by twice the type's precision where the definition
    is exact, or by what a probability exp(logit - lse) loses when the two are rounded in float32; by four times that
    much where the definition is not finite.
    """
    made = cases.inputs(case, dtype, device)
    ours = results(source_attention, case, made)
    plain = results(reference.source_attention, case, made)
    true = results(reference.source_attention, case, cast(made, torch.float64))
    floor = max(2 * torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * true["lse"].abs().max().item())
    held = {n: exact for n, exact in true.items() if exact.norm() > 1e-6 and exact.abs().max() < torch.finfo(dtype).max}
    most = {n: 2 * error(plain[n], exact) for n, exact in held.items()}
    return {
        name: (error(ours[name], exact), max(most[name], floor) if isfinite(most[name]) else 4 * floor)
        for name, exact in held.items()
    }

"""Forward-mode derivatives: every kernel's front gives them by its definition, and none loses a tangent in silence."""

import pytest
import torch
from diaphane.kernels import adain, geglu, group_norm, masked_maps
from diaphane.kernels.compact import compact, gather
from diaphane.kernels.match import match
from diaphane.kernels.source_attention import source_attention
from diaphane.kernels.sources import shared
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REF, W, B = torch.tensor([0, 0, 1]), draw(8, seed=5), draw(8, seed=6)
K, V, TOKENS = draw(3, 2, 5, 4, seed=1), draw(3, 2, 5, 4, seed=2), torch.tensor([[0, 2], [1, -1], [3, 4]])
KEPT = compact(torch.tensor([[0, 1, 0, 1, 1], [0] * 5, [1, 0, 0, 0, 1]]).bool(), padded=True)
FRONTS = {
    "source attention": (lambda x: source_attention(x, K, V, shared([0, 0, 0], 5, 0.5, 0.25))[0], (3, 2, 6, 4)),
    "aligned attention": (lambda x: source_attention(x, x, x, shared([0, 0, 0], 6), ref=REF * 0)[0], (3, 2, 6, 4)),
    "its sums": (lambda x: source_attention(x, K, V, shared([0, 0, 0], 5))[1], (3, 2, 6, 4)),
    "AdaIN": (lambda x: adain.adain(x, REF), (3, 2, 6, 4)),
    "token statistics": (lambda x: adain.token_stats(x, 2 * x), (3, 2, 6, 4)),
    "group norm": (lambda x: group_norm.group_norm(x, W, B, 4, silu=True), (3, 8, 4, 3)),
    "pooled group norm": (lambda x: group_norm.group_norm(x, W, B, 4, silu=True, ref=REF), (3, 8, 4, 3)),
    "geglu": (lambda x: geglu.geglu(x), (3, 8)),
    "masked maps": (lambda x: masked_maps.masked_maps(x, K, V, TOKENS)[1], (3, 2, 6, 4)),
    "kept tokens": (lambda x: gather(x, KEPT), (3, 2, 5, 4)),
    "a match": (lambda x: match(K[:, 0], x)[1], (3, 6, 4)),
    "maps alone": (lambda x: masked_maps.token_maps(x, K, TOKENS), (3, 2, 6, 4)),
}


@pytest.mark.parametrize("name", FRONTS)
def test_a_tangent_is_the_derivative(name: str):
    front, shape = FRONTS[name]
    x, v = draw(*shape, seed=3), draw(*shape, seed=4)
    _, tangent = torch.func.jvp(front, (x,), (v,))
    numeric = (front(x + 1e-6 * v) - front(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in FRONTS if "norm" not in name])
def test_a_compiled_tangent_is_the_derivative_too(name: str):
    front, shape = FRONTS[name]
    x, v = draw(*shape, seed=3), draw(*shape, seed=4)
    torch._dynamo.reset()
    tangent = torch.compile(lambda x, v: torch.func.jvp(front, (x,), (v,))[1], backend="eager")
    torch.testing.assert_close(tangent(x, v), torch.func.jvp(front, (x,), (v,))[1], rtol=1e-9, atol=1e-9)


def test_a_tangent_of_statistics_that_are_given_is_an_error():
    q, stats = draw(3, 2, 6, 4), adain.token_stats(draw(3, 2, 6, 4), K)
    with pytest.raises(ValueError, match="leave stats out"):
        torch.func.jvp(lambda x: source_attention(x, K, V, ref=REF, stats=stats)[0], (q,), (q,))

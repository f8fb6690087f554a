"""Every network is differentiable from taps to eps, in both modes, and compiles to one graph."""

import pytest
import torch
from diaphane.model import adm, ddpm, ddpmpp
from diaphane.model.blocks import Cond, ThreeLists
from diaphane.model.ops import JVP, TORCH
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SMALL = {"resolution": 8, "mult": (1, 2), "blocks": 1, "attention": (4,)}
BUILD = {
    "ddpm": lambda: ddpm.DDPM(ddpm.DDPMConfig(base=8, groups=4, **SMALL)),
    "adm": lambda: adm.ADM(adm.ADMConfig(base=32, head_dim=16, **SMALL)),
    "ddpmpp": lambda: ddpmpp.DDPMpp(ddpmpp.DDPMppConfig(base=8, **SMALL)),
}


@pytest.fixture(params=BUILD)
def net(request: pytest.FixtureRequest) -> ThreeLists:
    torch.manual_seed(3)
    return BUILD[request.param]().double().eval().requires_grad_(False)


def taps(net: ThreeLists) -> tuple[Tensor, list[Tensor], Cond]:
    c = net.embed(torch.tensor([300.0, 4.0]))
    h, skips = net.encode(torch.randn(2, 3, 8, 8, dtype=torch.float64), c)
    return net.middle(h, c), skips, c


def test_eps_has_a_gradient_to_h_and_to_every_skip(net: ThreeLists):
    h, skips, c = taps(net)
    leaves = [tap.requires_grad_() for tap in (h, *(s.clone() for s in skips))]
    grads = torch.autograd.grad(net.decode(leaves[0], leaves[1:], c).square().sum(), leaves)
    assert all(g.isfinite().all() and g.abs().amax() > 0 for g in grads)


def test_eps_has_a_gradient_to_the_image_and_to_every_parameter(net: ThreeLists):
    net.requires_grad_(True)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    net(x, net.embed(torch.tensor([300.0, 4.0]))).square().sum().backward()
    assert x.grad is not None
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_the_jvp_from_h_to_eps_is_the_difference_quotient_and_the_adjoint_of_the_vjp(net: ThreeLists):
    h, skips, c = taps(net)
    v = torch.randn_like(h)
    eps, along = torch.func.jvp(lambda h: net.decode(h, skips, c, JVP), (h,), (v,))
    step = 1e-5
    ahead, behind = (net.decode(h + sign * step * v, skips, c) for sign in (1, -1))
    torch.testing.assert_close(along, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    assert along.abs().amax() > 1e-3

    for ops in (TORCH, JVP):
        again, pull = torch.func.vjp(lambda h, ops=ops: net.decode(h, skips, c, ops), h)
        torch.testing.assert_close(again, eps, rtol=1e-10, atol=1e-10)
        u = torch.randn_like(eps)
        torch.testing.assert_close((pull(u)[0] * v).sum(), (along * u).sum(), rtol=1e-9, atol=1e-10)


def test_the_jvp_of_the_encoder_goes_through_the_middle(net: ThreeLists):
    c = net.embed(torch.tensor([300.0, 4.0]))
    x, v = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)

    def h(x: Tensor) -> Tensor:
        return net.middle(net.encode(x, c, JVP)[0], c, JVP)

    along, step = torch.func.jvp(h, (x,), (v,))[1], 1e-5
    torch.testing.assert_close(along, (h(x + step * v) - h(x - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_fused_attention_has_no_forward_mode_but_torchs_unfused_backend_has(net: ThreeLists):
    """The reason for `JVP`; should the first half ever fail, torch has learned it and `JVP` can go."""
    h, skips, c = taps(net)
    v = torch.randn_like(h)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda h: net.decode(h, skips, c), (h,), (v,))
    with sdpa_kernel(SDPBackend.MATH):
        unfused = torch.func.jvp(lambda h: net.decode(h, skips, c), (h,), (v,))[1]
    ours = torch.func.jvp(lambda h: net.decode(h, skips, c, JVP), (h,), (v,))[1]
    torch.testing.assert_close(unfused, ours, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ops", [TORCH, JVP], ids=["fused", "written out"])
def test_encode_middle_and_decode_each_compile_to_one_graph(net: ThreeLists, ops):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    c = net.embed(torch.tensor([300.0, 4.0]))

    def compiled(part):
        return torch.compile(part, fullgraph=True, backend="aot_eager")

    torch.compiler.reset()
    h, skips = compiled(net.encode)(x, c, ops)
    eps = compiled(net.decode)(compiled(net.middle)(h, c, ops), skips, c, ops)
    torch.testing.assert_close(eps, net(x, c, ops), rtol=1e-10, atol=1e-10)


def test_an_unused_seam_leaves_nothing_in_the_graph():
    net = BUILD["ddpm"]().eval().requires_grad_(False)
    x, c, graphs = torch.randn(1, 3, 8, 8), net.embed(torch.tensor([5.0])), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    torch.compiler.reset()
    torch.compile(net, fullgraph=True, backend=keep)(x, c)
    called = [getattr(target, "__name__", str(target)) for target in graphs[0]]
    assert len(graphs) == 1
    assert called.count("scaled_dot_product_attention") == sum(isinstance(m, ddpm.Attention) for m in net.modules())
    assert called.count("cat") == len(net.dec)
    assert not [name for name in called if "diaphane" in name or "site" in name.lower()]


def test_the_middle_compiles_with_the_default_compiler():
    torch.manual_seed(0)
    net = BUILD["adm"]().eval().requires_grad_(False)
    c = net.embed(torch.tensor([300.0]))
    h = net.encode(torch.randn(1, 3, 8, 8), c)[0]
    torch.compiler.reset()
    compiled = torch.compile(net.middle, fullgraph=True)(h, c)
    torch.testing.assert_close(compiled, net.middle(h, c), rtol=1e-4, atol=1e-5)

"""The text-conditioned UNet: diffusers' numbers, the reference data, the contract, and what it refuses."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from diaphane.kernels.reference import source_attention
from diaphane.kernels.sources import Seen, shared
from diaphane.model import unet
from diaphane.model.blocks import Cond
from diaphane.model.ops import JVP, TORCH, Ops, Site, triton
from diaphane.weights import unet as table
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

F64 = torch.float64
LDM_PREFIX = "model.diffusion_model."


def inputs(cfg: unet.UNetConfig, size: tuple[int, int] = (16, 24)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and the conditioning of three images that are not square, in float64."""
    x, t = torch.randn(3, cfg.in_channels, *size, dtype=F64), torch.tensor([0, 417, 999])
    cond = {"context": torch.randn(3, 7, cfg.context_dim, dtype=F64)}
    if cfg.pooled_dim:
        ids = torch.randint(0, 1500, (3, cfg.ids)).double()
        cond |= {"pooled": torch.randn(3, cfg.pooled_dim, dtype=F64), "ids": ids}
    return x, t, cond


def random_net(cfg: unet.UNetConfig) -> unet.UNet:
    """One of our networks with random weights, in float64."""
    torch.manual_seed(5)
    net = unet.UNet(cfg).double().eval().requires_grad_(False)
    twins.randomised(net)
    return net


SIZES = {"even": (16, 24), "9x13": (9, 13), "10x7": (10, 7), "1x3": (1, 3)}


@pytest.mark.parametrize(("linear", "size"), [(False, "even"), *((True, size) for size in SIZES)])
@pytest.mark.parametrize("name", twins.CONFIGS)
def test_the_unet_is_diffusers_unet2dconditionmodel(name: str, linear: bool, size: str):
    torch.manual_seed(11)
    cfg = twins.CONFIGS[name]
    twin = twins.diffusers_unet(cfg, linear=linear)
    twins.randomised(twin)
    net = unet.UNet(cfg).eval()
    net.load_state_dict(twins.ours(twin.state_dict(), table, table.DIFFUSERS), strict=True, assign=True)
    x, t, cond = inputs(cfg, SIZES[size])

    def both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = {name: value.to(dtype) for name, value in cond.items()}
        added = {"text_embeds": c["pooled"], "time_ids": c["ids"]} if cfg.pooled_dim else None
        want = twin(x.to(dtype), t, c["context"], added_cond_kwargs=added).sample
        return net(x.to(dtype), net.embed(t.to(dtype) if dtype == F64 else t, **c)), want

    got, want = both(torch.float32)
    assert (got - want).abs().amax() < 1e-5 * want.abs().amax()
    net, twin = net.double(), twins.in_float64(twin, cfg)
    got, want = both(F64)
    assert got.dtype == F64
    assert (got - want).abs().amax() < 1e-10 * want.abs().amax()


def tiny(folder: str = "unet") -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_file(twins.TINY / folder / "diffusion_pytorch_model.safetensors").items()}


def single_file(prefix: str) -> dict[str, Tensor]:
    """The tensors of the tiny single file that begin so, without their beginning."""
    tensors = load_file(twins.TINY / "single_file.safetensors")
    return {key.removeprefix(prefix): t.float() for key, t in tensors.items() if key.startswith(prefix)}


TINY_CFG = unet.UNetConfig(
    channels=(32, 64, 96), depth=(0, 2, 3), mid_depth=3, head_dim=16, context_dim=64, pooled_dim=40, id_dim=8
)


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(twins.CASES / "06_unet_ip.safetensors")


@pytest.fixture(scope="module")
def golden() -> unet.UNet:
    net = unet.UNet(TINY_CFG).eval().requires_grad_(False)
    net.load_state_dict(twins.ours(tiny(), table, table.DIFFUSERS), strict=True, assign=True)
    return net


def settings(name: str) -> dict[str, Any]:
    return next(c for c in json.loads((twins.CASES / "cases.json").read_text()) if c["name"] == name)


def test_the_tiny_sdxl_has_the_reference_eps_and_every_tap_on_the_way(golden: unet.UNet, case: dict[str, Tensor]):
    said = settings("06_unet_ip")
    t = torch.full((2,), said["settings"]["t"])
    c = golden.embed(t, case["encoder_hidden_states"], case["text_embeds"], case["time_ids"])
    seen: dict[str, Tensor] = {}

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        seen[site.stage] = h
        return TORCH.join(site, h, skip)

    h, skips = golden.encode(case["latents"], c)
    space = golden.middle(h, c)
    eps = golden.decode(space, skips, c, Ops(join=join))
    blocks = {"down_0": skips[3], "down_1": skips[6], "down_2": skips[8], "mid": space}
    blocks |= {"up_0": seen["dec.3"], "up_1": seen["dec.6"]}
    for name, got in blocks.items():
        assert (got - case[f"dbg_{name}"]).abs().amax() < 1e-4 * case[f"dbg_{name}"].abs().amax(), name
    assert (eps - case["eps_no_ip"]).abs().amax() < said["tolerance"]["atol"]


def test_the_single_file_and_the_folder_are_the_same_network():
    folder = twins.ours(tiny(), table, table.DIFFUSERS)
    single = twins.ours(single_file(LDM_PREFIX), table, table.LDM)
    assert list(folder) == list(single)
    assert all(torch.equal(folder[name], single[name]) for name in folder)


@pytest.mark.parametrize("name", twins.CONFIGS)
def test_encode_middle_and_decode_composed_are_the_forward_pass(name: str):
    cfg = twins.CONFIGS[name]
    net = random_net(cfg)
    x, t, cond = inputs(cfg)
    c = net.embed(t, **cond)
    h, skips = net.encode(x, c)
    assert torch.equal(h, skips[-1])
    assert len(skips) == len(net.dec) == len(cfg.channels) * (cfg.blocks + 1)
    assert torch.equal(net.decode(net.middle(h, c), skips, c), net(x, c))


@pytest.mark.parametrize("name", twins.CONFIGS)
def test_every_verb_is_spoken_at_a_site_of_its_own_in_order(name: str):
    cfg, sites = twins.CONFIGS[name], []
    net = random_net(cfg)
    x, t, cond = inputs(cfg)

    def heard(verb: str) -> Any:
        def speak(site: Site, *args: Any) -> Tensor:
            sites.append((verb, site))
            return getattr(TORCH, verb)(site, *args)

        return speak

    ops = Ops(**{verb: heard(verb) for verb in ("attend", "group_norm", "join", "add")})
    assert torch.equal(net(x, net.embed(t, **cond), ops), net(x, net.embed(t, **cond)))
    assert len(sites) == len(set(sites))
    depths: dict[tuple[str, str, str], list[int]] = {}
    for verb, site in sites:
        depths.setdefault((verb, site.stage, site.kind), []).append(site.depth)
    assert all(seen == list(range(len(seen))) for seen in depths.values())
    attention = {site.stage for verb, site in sites if verb == "attend"}
    assert "mid" in attention
    assert depths["attend", "mid", "cross"] == list(range(cfg.mid_depth))


def test_the_text_reaches_only_cross_attention():
    cfg = twins.XL
    net = random_net(cfg)
    x, t, cond = inputs(cfg)
    keys = []

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        keys.append((site.kind, k.shape[2]))
        return TORCH.attend(site, q, k, v, bias)

    net(x, net.embed(t, **cond), Ops(attend=attend))
    assert {kind for kind, tokens in keys if tokens == 7} == {"cross"}
    assert {kind for kind, tokens in keys if tokens != 7} == {"self"}


PUBLISHED = {
    "SDXL": (2_567_463_684, 1680, (1280, 32), 9, 128),
    "SDXL_INPAINT": (2_567_478_084, 1680, (1280, 32), 9, 128),
    "SDXL_REFINER": (2_259_526_660, 1220, (1536, 16), 12, 128),
    "SD15": (859_520_964, 686, (1280, 8), 12, 64),
    "SD15_INPAINT": (859_535_364, 686, (1280, 8), 12, 64),
    "SD21": (865_910_724, 686, (1280, 12), 12, 96),
    "SD21_INPAINT": (865_925_124, 686, (1280, 8), 12, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_its_parameters_its_skips_and_its_h(name: str):
    parameters, tensors, (width, side), skips, latent = PUBLISHED[name]
    cfg: unet.UNetConfig = getattr(unet, name)
    with torch.device("meta"):
        net = unet.UNet(cfg)
        pooled = (torch.empty(1, cfg.pooled_dim), torch.empty(1, cfg.ids)) if cfg.pooled_dim else ()
        c = net.embed(torch.empty(1), torch.empty(1, 77, cfg.context_dim), *pooled)
        h, emitted = net.encode(torch.empty(1, cfg.in_channels, latent, latent), c)
    state = net.state_dict()
    assert (sum(p.numel() for p in state.values()), len(state)) == (parameters, tensors)
    assert (tuple(h.shape), len(emitted)) == ((1, width, side, side), skips)


def test_a_text_that_was_read_before_and_one_of_zeros_that_was_not_give_the_same():
    net, (x, t, cond) = random_net(twins.XL), inputs(twins.XL)
    cond["context"] = torch.cat([torch.zeros_like(cond["context"][:2]), cond["context"][2:]])
    c = net.embed(t, **cond)
    eps = net(x, c)
    read = c._replace(words=unet.words(net, cond["context"]))
    assert torch.equal(net(x, read), eps)
    half = c._replace(words=unet.words(net, cond["context"], silent=2))
    assert float((net(x, half) - eps).abs().max()) <= 1e-5 * float(eps.abs().max())
    assert half.words is not None
    alone = Cond(c.emb[2:], words=half.words.last(1))
    assert float((net(x[2:], alone) - eps[2:]).abs().max()) <= 1e-5 * float(eps.abs().max())


def test_missing_and_misshapen_conditioning_is_an_error_that_names_it():
    net, (_, t, cond) = random_net(twins.XL), inputs(twins.XL)
    plain, (_, _, other) = random_net(twins.SD1), inputs(twins.SD1)
    for wrong, what in (
        ({"pooled": None}, r"pooled is \(3, 10\); got None"),
        ({"ids": cond["ids"][:, :5]}, r"ids is \(3, 6\); got \(3, 5\)"),
        ({"context": cond["context"][:1]}, r"context is \(3, tokens, 24\); got \(1, 7, 24\)"),
        ({"context": other["context"]}, r"context is \(3, tokens, 24\); got \(3, 7, 20\)"),
    ):
        with pytest.raises(ValueError, match=what):
            net.embed(t, **(cond | wrong))
    with pytest.raises(ValueError, match="pooled is for networks of the XL kind"):
        plain.embed(t, other["context"], cond["pooled"], cond["ids"])


def test_a_network_without_its_text_and_x_and_skips_that_do_not_fit_are_errors():
    net, (x, t, cond) = random_net(twins.XL), inputs(twins.XL)
    c = net.embed(t, **cond)
    with pytest.raises(ValueError, match=r"c\.context is None"):
        net(x, Cond(c.emb))
    for wrong in (x[:, :3], x[:, :, :0], x[0]):
        with pytest.raises(ValueError, match=r"^the network takes x \(B, 4, H, W\); got \("):
            net(wrong, c)
    h, skips = net.encode(x, c)
    skips[:3] = [skip[:, :, :-3] for skip in skips[:3]]
    with pytest.raises(ValueError, match=r"a skip of \(13, 24\) cannot follow what is doubled from \(8, 12\)"):
        net.decode(h, skips, c)


@pytest.mark.parametrize("size", [(9, 13), (10, 7), (16, 24)])
def test_a_level_of_n_pixels_halves_to_the_next_integer_and_comes_back_to_n(size: tuple[int, int]):
    net = random_net(twins.REFINER)
    x, t, cond = inputs(twins.REFINER, size)
    c = net.embed(t, **cond)
    h, skips = net.encode(x, c)
    sides = [size]
    while len(sides) < 4:
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    assert [tuple(skip.shape[2:]) for skip in skips] == [sides[k] for k in (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)]
    assert tuple(h.shape[2:]) == sides[3]
    assert tuple(net.decode(net.middle(h, c), skips, c).shape[2:]) == size


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"depth": (0, 1)}, "depth has 2 levels, channels 3"),
        ({"head_dim": 7}, "32 channels at enc.4 do not divide into heads of 7"),
        ({"groups": 5}, "do not divide into 5 groups"),
    ],
)
def test_a_configuration_that_does_not_add_up_is_an_error(wrong: dict[str, Any], what: str):
    with pytest.raises(ValueError, match=what):
        unet.UNet(replace(twins.XL, **wrong))


@pytest.mark.parametrize("ops", [TORCH, JVP, triton()], ids=["torch", "softmax", "triton"])
def test_logits_that_float16_cannot_hold_are_no_harm_to_any_attention(ops: Ops):
    site, gen = Site("mid", 0, "self"), torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, 24, 16, generator=gen).half() for _ in range(3))
    q, k = 300 * q, 300 * k
    true = (q.double() @ k.double().mT / 4).clone()
    assert true.abs().amax() > 3 * 65504
    weights = true.softmax(-1)
    assert (ops.attend(site, q, k, v).double() - weights @ v.double()).abs().amax() < 2e-3
    bias = torch.where(torch.arange(24) % 3 == 0, -torch.inf, 0.0).half()
    want = (true + bias).softmax(-1) @ v.double()
    assert (ops.attend(site, q, k, v, bias.expand(24, 24)).double() - want).abs().amax() < 2e-3
    seen = Seen(shared([0, 0], 24))
    want = source_attention(q.double(), k.double(), v.double(), seen.sources)[0]
    assert (ops.attend(site, q, k, v, None, seen).double() - want).abs().amax() < 2e-3


@pytest.mark.parametrize("ops", [TORCH, JVP], ids=["torch", "softmax"])
def test_stable_diffusion_2_whose_logits_overflow_float16_is_finite_in_it(ops: Ops):
    net, (x, t, cond) = random_net(twins.SD2), inputs(twins.SD2)
    for module in net.modules():
        if isinstance(module, unet.Attention):
            module.q.weight.mul_(500)
            module.k.weight.mul_(500)
    most = []

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        most.append(float((q.double() @ k.double().mT).abs().amax()))
        return ops.attend(site, q, k, v, *rest)

    net = net.half()
    c = net.embed(t, cond["context"].half())
    assert torch.isfinite(net(x.half(), c, Ops(attend=attend))).all()
    assert max(most) > 65504


def test_h_has_derivatives_forward_and_backward():
    cfg = twins.XL
    net, (x, t, cond) = random_net(cfg), inputs(cfg)
    c = net.embed(t, **cond)
    h, skips = net.encode(x, c)
    h, v = net.middle(h, c), torch.randn(h.shape, dtype=F64)

    def eps(h: Tensor) -> Tensor:
        return net.decode(h, skips, c, JVP)

    out, forward = torch.func.jvp(eps, (h,), (v,))
    step = 1e-5
    assert torch.allclose(forward, (eps(h + step * v) - eps(h - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)
    w = torch.randn_like(out)
    (back,) = torch.autograd.grad((net.decode(leaf := h.clone().requires_grad_(), skips, c) * w).sum(), leaf)
    assert torch.allclose((back * v).sum(), (forward * w).sum(), rtol=1e-10)


@pytest.mark.parametrize("size", [(16, 24), (7, 10)])
def test_a_step_with_its_taps_is_one_graph(size: tuple[int, int]):
    cfg = replace(twins.XL, channels=(16, 32), depth=(0, 1), mid_depth=1, blocks=1)
    net, (x, t, cond) = random_net(cfg), inputs(cfg, size)

    def step(x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = net.embed(t, context, pooled, ids)
        h, skips = net.encode(x, c)
        h = net.middle(h, c)
        return net.decode(h, skips, c), h, skips[1]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for got, want in zip(compiled(x, t, **cond), step(x, t, **cond), strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)

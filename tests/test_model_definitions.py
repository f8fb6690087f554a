"""ADM and DDPM++ against plain definitions of their own, in float64."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diaphane.model import adm, ddpm, ddpmpp
from diaphane.model.blocks import Cond, Stage, ThreeLists
from torch import Tensor

F64 = torch.float64


def randomised(net: ThreeLists) -> ThreeLists:
    """The network in float64 with every parameter, norms included, away from where it starts."""
    torch.manual_seed(11)
    net = net.double().eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.2 * torch.randn_like(p) / math.sqrt(p[0].numel()))
    return net


# ---- what both definitions below are made of -----------------------------------------------------------------------

Weights = dict[str, Tensor]


def conv(x: Tensor, w: Weights, name: str, stride: int = 1) -> Tensor:
    weight = w[name + ".weight"]
    return F.conv2d(x, weight, w[name + ".bias"], stride, padding=weight.shape[-1] // 2)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def group_norm(x: Tensor, w: Weights, name: str, groups: int, eps: float) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
    x = ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)
    return x * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def smaller(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def larger(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 3 x (B, H, D, N) -> (B, H, D, N)
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k).div(math.sqrt(q.shape[2])).softmax(-1)
    return torch.einsum("bhnm,bhdm->bhdn", weights, v)


# ---- ADM: guided-diffusion's network by guided-diffusion's key names -----------------------------------------------


def guided_names(net: adm.ADM) -> Weights:
    """The network's weights under guided-diffusion's names and shapes."""
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1", "norm2": "out_layers.0"}
    inside |= {"conv2": "out_layers.3", "skip": "skip_connection", "out": "proj_out"}
    outside = {"enc": "input_blocks", "mid": "middle_block", "dec": "output_blocks", "time": "time_embed"}
    outside |= {"label": "label_emb", "norm_out": "out.0", "conv_out": "out.2"}
    w = {}
    for name, p in net.state_dict().items():
        first, *rest = name.split(".")
        w[".".join([outside[first], *(inside.get(word, word) for word in rest)])] = p
    return w


def plain_adm(w: Weights, cfg: adm.ADMConfig, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Dhariwal & Nichol's UNet in float64, walking the key names."""

    def res(x: Tensor, at: str, change=lambda x: x) -> Tensor:
        h = conv(change(silu(group_norm(x, w, at + ".in_layers.0", 32, 1e-5))), w, at + ".in_layers.2")
        e = linear(silu(emb), w, at + ".emb_layers.1")[:, :, None, None]
        if cfg.scale_shift:
            scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
            h = group_norm(h, w, at + ".out_layers.0", 32, 1e-5) * (1 + scale) + shift
        else:
            h = group_norm(h + e, w, at + ".out_layers.0", 32, 1e-5)
        h = conv(silu(h), w, at + ".out_layers.3")
        x = change(x)
        return h + (conv(x, w, at + ".skip_connection") if at + ".skip_connection.weight" in w else x)

    def attend(x: Tensor, at: str) -> Tensor:
        b, ch, height, width = x.shape
        heads = ch // cfg.head_dim if cfg.head_dim else cfg.heads
        y = group_norm(x, w, at + ".norm", 32, 1e-5).reshape(b, ch, -1)
        y = w[at + ".qkv.weight"] @ y + w[at + ".qkv.bias"][:, None]
        if cfg.qkv == "legacy":
            q, k, v = (y.reshape(b, heads, 3, ch // heads, -1)[:, :, i] for i in range(3))
        else:
            q, k, v = (y.reshape(b, 3, heads, ch // heads, -1)[:, i] for i in range(3))
        y = w[at + ".proj_out.weight"] @ attention(q, k, v).reshape(b, ch, -1) + w[at + ".proj_out.bias"][:, None]
        return x + y.reshape(b, ch, height, width)

    def resample(x: Tensor, at: str, change) -> Tensor:
        if cfg.updown:
            return res(x, at, change)
        if not cfg.resample_conv:
            return change(x)
        return conv(x, w, at + ".conv", 2) if change is smaller else conv(larger(x), w, at + ".conv")

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(cfg.base // 2, dtype=F64) / (cfg.base // 2))
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    emb = linear(silu(linear(emb, w, "time_embed.0")), w, "time_embed.2")
    if label is not None:
        emb = emb + torch.stack([w["label_emb.weight"][i] for i in label.tolist()])

    levels, resolution = len(cfg.mult), cfg.resolution
    h = conv(x, w, "input_blocks.0.0")
    held, n = [h], 0
    for level in range(levels):
        for _ in range(cfg.blocks):
            n += 1
            h = res(h, f"input_blocks.{n}.0")
            if resolution in cfg.attention:
                h = attend(h, f"input_blocks.{n}.1")
            held.append(h)
        if level < levels - 1:
            n += 1
            h = resample(h, f"input_blocks.{n}.0", smaller)
            resolution //= 2
            held.append(h)
    h = res(attend(res(h, "middle_block.0"), "middle_block.1"), "middle_block.2")
    n = -1
    for level in reversed(range(levels)):
        for i in range(cfg.blocks + 1):
            n, m = n + 1, 1
            h = res(torch.cat([h, held.pop()], 1), f"output_blocks.{n}.0")
            if resolution in cfg.attention:
                h, m = attend(h, f"output_blocks.{n}.1"), 2
            if level and i == cfg.blocks:
                h = resample(h, f"output_blocks.{n}.{m}", larger)
                resolution *= 2
    return conv(silu(group_norm(h, w, "out.0", 32, 1e-5)), w, "out.2")


ADM_LIKE = adm.ADMConfig(resolution=8, base=64, mult=(0.5, 1, 1.5), blocks=1, attention=(4, 2), head_dim=16)
ADMS = {
    "published shape": ADM_LIKE,
    "two blocks a level": replace(ADM_LIKE, base=32, mult=(1, 2), blocks=2, attention=(8, 4), head_dim=32),
    "new order of q, k, v": replace(ADM_LIKE, qkv="new"),
    "four heads, time added": replace(ADM_LIKE, head_dim=None, scale_shift=False),
    "classes, convolutions resample": replace(ADM_LIKE, updown=False, classes=5, out_channels=3),
    "nothing but pooling": replace(ADM_LIKE, updown=False, resample_conv=False, qkv="new", head_dim=None),
}


@pytest.mark.parametrize("name", ADMS)
def test_adm_is_its_plain_definition(name: str):
    cfg = ADMS[name]
    net = randomised(adm.ADM(cfg))
    assert isinstance(net, adm.ADM)
    x, t = torch.randn(3, 3, 8, 12, dtype=F64), torch.tensor([0.0, 417.5, 999.0], dtype=F64)
    for label in (None, torch.tensor([4, 0, 2])) if cfg.classes else (None,):
        want = plain_adm(guided_names(net), cfg, x, t, label)
        got = net(x, net.embed(t, label))
        assert (got - want).abs().amax() < 1e-10 * want.abs().amax()


# ---- DDPM++: score_sde's network as the flat list of modules it is ---------------------------------------------------


def score_sde_list(net: ddpmpp.DDPMpp) -> Iterator[Weights]:
    """The network's modules in order of execution, as score_sde's `all_modules` lists them, under its names."""
    res = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "emb": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
    res |= {"skip": "Conv_2"}
    attention = {"norm": "GroupNorm_0", "q": "NIN_0", "k": "NIN_1", "v": "NIN_2", "out": "NIN_3"}
    stages = [*net.enc, net.mid, *net.dec]
    members = [m for stage in stages if isinstance(stage, Stage) for m in stage]
    for module in (net.time[0], net.time[2], *members, net.norm_out, net.conv_out):
        names = attention if isinstance(module, ddpmpp.Attention) else res
        state = {re.sub(r"^\w+(?=\.)", lambda m: names[m[0]], k): p for k, p in module.state_dict().items()}  # noqa: B023
        yield {"." + k: p for k, p in state.items()} if "weight" in state else state


def plain_ddpmpp(modules: Iterator[Weights], cfg: ddpmpp.DDPMppConfig, x: Tensor, t: Tensor) -> Tensor:
    """Song et al.'s network in float64: the next module of the list, and the next."""

    def norm(x: Tensor, w: Weights, name: str) -> Tensor:
        return group_norm(x, w, name, min(x.shape[1] // 4, 32), 1e-6)

    def res(x: Tensor, change=lambda x: x) -> Tensor:
        w = next(modules)
        h = conv(change(silu(norm(x, w, "GroupNorm_0"))), w, "Conv_0")
        h = h + linear(silu(emb), w, "Dense_0")[:, :, None, None]
        h = conv(silu(norm(h, w, "GroupNorm_1")), w, "Conv_1")
        x = change(x)
        changed = x.shape != h.shape or change in (smaller, larger)
        assert changed == ("Conv_2.weight" in w)
        return ((conv(x, w, "Conv_2") if changed else x) + h) / math.sqrt(2)

    def attend(x: Tensor) -> Tensor:
        w, (b, ch, height, width) = next(modules), x.shape
        y = norm(x, w, "GroupNorm_0").permute(0, 2, 3, 1)

        def nin(y: Tensor, i: int) -> Tensor:
            return linear(y, w, f"NIN_{i}")

        q, k, v = (nin(y, i).reshape(b, 1, height * width, ch).transpose(2, 3) for i in range(3))
        y = nin(attention(q, k, v).reshape(b, ch, height, width).permute(0, 2, 3, 1), 3)
        return (x + y.permute(0, 3, 1, 2)) / math.sqrt(2)

    frequencies = torch.exp(-math.log(10000) * torch.arange(cfg.base // 2, dtype=F64) / (cfg.base // 2 - 1))
    angles = t[:, None] * frequencies
    emb = linear(torch.cat([angles.sin(), angles.cos()], 1), next(modules), "")
    emb = linear(silu(emb), next(modules), "")
    held = [conv(x, next(modules), "")]
    resolution = cfg.resolution
    for level in range(len(cfg.mult)):
        for _ in range(cfg.blocks):
            h = res(held[-1])
            held.append(attend(h) if resolution in cfg.attention else h)
        if level < len(cfg.mult) - 1:
            held.append(res(held[-1], smaller))
            resolution //= 2
    h = res(attend(res(held[-1])))
    for level in reversed(range(len(cfg.mult))):
        for _ in range(cfg.blocks + 1):
            h = res(torch.cat([h, held.pop()], 1))
        if resolution in cfg.attention:
            h = attend(h)
        if level:
            h = res(h, larger)
            resolution *= 2
    h = conv(silu(norm(h, next(modules), "")), next(modules), "")
    assert next(modules, None) is None
    assert not held
    return h


DDPMPPS = {
    "published shape": ddpmpp.DDPMppConfig(resolution=16, base=16, mult=(1, 2, 2), blocks=2, attention=(8,)),
    "wide groups": ddpmpp.DDPMppConfig(resolution=4, base=128, mult=(1, 2), blocks=1, attention=(2,)),
    "attention everywhere": ddpmpp.DDPMppConfig(resolution=8, base=8, mult=(1, 3, 2), blocks=1, attention=(8, 4, 2)),
    "one level": ddpmpp.DDPMppConfig(resolution=8, base=16, mult=(2,), blocks=3, attention=(), in_channels=1),
}


@pytest.mark.parametrize("name", DDPMPPS)
def test_ddpmpp_is_its_plain_definition(name: str):
    cfg = DDPMPPS[name]
    net = randomised(ddpmpp.DDPMpp(cfg))
    assert isinstance(net, ddpmpp.DDPMpp)
    side = 2 * net.multiple
    x, t = torch.randn(3, cfg.in_channels, side, 2 * side, dtype=F64), torch.tensor([0.0, 417.5, 999.0], dtype=F64)
    want = plain_ddpmpp(score_sde_list(net), cfg, x, t)
    got = net(x, net.embed(t))
    assert (got - want).abs().amax() < 1e-10 * want.abs().amax()


@pytest.mark.parametrize(
    "build",
    [
        lambda: ddpm.DDPM(ddpm.DDPMConfig(resolution=8, base=16, mult=(1, 2), blocks=1, attention=(), groups=8)),
        lambda: adm.ADM(ADM_LIKE),
        lambda: ddpmpp.DDPMpp(DDPMPPS["one level"]),
    ],
    ids=["ddpm", "adm", "ddpmpp"],
)
def test_time_reaches_every_residual_block_by_its_own_layer(build: Callable[[], ThreeLists]):
    net = randomised(build())
    c, x = net.embed(torch.tensor([500.0], dtype=F64)), torch.randn(1, net.in_channels, 8, 8, dtype=F64)
    eps = net(x, c)
    assert not torch.allclose(net(x, Cond(torch.zeros_like(c.emb))), eps)
    for block in (m for m in net.modules() if isinstance(m, ddpm.ResBlock | adm.ResBlock | ddpmpp.ResBlock)):
        kept = block.emb.weight.clone()
        block.emb.weight.zero_()
        assert not torch.allclose(net(x, c), eps)
        block.emb.weight.copy_(kept)

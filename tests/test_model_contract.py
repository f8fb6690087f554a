"""The contract of three lists and five verbs, held by every pixel family on tiny networks."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from diaphane.kernels import reference
from diaphane.model import adm, ddpm, ddpmpp
from diaphane.model.blocks import Norm, ThreeLists, Up, denoiser, double, half, sinusoid
from diaphane.model.ops import JVP, TORCH, Ops, Site
from torch import Tensor, nn

ADM_TINY = adm.ADMConfig(resolution=8, base=64, mult=(0.5, 1, 1.5), blocks=1, attention=(4, 2), head_dim=16)
IDDPM_TINY = replace(ADM_TINY, head_dim=None, heads=4, scale_shift=False, updown=False, qkv="new")
BARE_TINY = replace(IDDPM_TINY, resample_conv=False, classes=7, out_channels=3)
DDPM_TINY = ddpm.DDPMConfig(resolution=8, base=16, mult=(1, 2, 2), blocks=1, attention=(4,), groups=8)
DDPMPP_TINY = ddpmpp.DDPMppConfig(resolution=8, base=16, mult=(1, 2, 3), blocks=1, attention=(8, 4))

BUILD: dict[str, Callable[[], ThreeLists]] = {
    "ddpm": lambda: ddpm.DDPM(DDPM_TINY),
    "adm": lambda: adm.ADM(ADM_TINY),
    "iddpm": lambda: adm.ADM(IDDPM_TINY),
    "bare": lambda: adm.ADM(BARE_TINY),
    "ddpmpp": lambda: ddpmpp.DDPMpp(DDPMPP_TINY),
}
RESIDUAL = (ddpm.ResBlock, adm.ResBlock, ddpmpp.ResBlock)
ATTENTION = (ddpm.Attention, adm.Attention, ddpmpp.Attention)


class Case(NamedTuple):
    net: ThreeLists
    x: Tensor
    t: Tensor


@pytest.fixture(params=BUILD)
def case(request: pytest.FixtureRequest) -> Case:
    """A tiny network in float64 with random weights everywhere, three images that are not square, three times."""
    torch.manual_seed(7)
    net = BUILD[request.param]().double().eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.1 * torch.randn_like(p))
    return Case(net, torch.randn(3, 3, 8, 12, dtype=torch.float64), torch.tensor([0, 371, 999]))


def test_the_four_methods_composed_are_the_forward_pass(case: Case):
    c = case.net.embed(case.t)
    h, skips = case.net.encode(case.x, c)
    h = case.net.middle(h, c)
    assert torch.equal(case.net.decode(h, skips, c), case.net(case.x, c))


def test_h_is_what_the_middle_returns_at_the_coarsest_resolution(case: Case):
    c = case.net.embed(case.t)
    h, skips = case.net.encode(case.x, c)
    assert torch.equal(h, skips[-1])  # g of the papers: the skip that matches h
    h_space, coarse = case.net.middle(h, c), (case.x.shape[2] // 4, case.x.shape[3] // 4)
    assert h_space.shape == h.shape
    assert h_space.shape[2:] == coarse
    assert not torch.equal(h_space, h)


def test_every_encoder_stage_emits_a_skip_and_every_decoder_stage_takes_one(case: Case):
    c, joined = case.net.embed(case.t), []

    def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
        joined.append((site, skip))
        return TORCH.join(site, h, skip)

    h, skips = case.net.encode(case.x, c)
    assert len(skips) == len(case.net.enc) == len(case.net.dec)
    case.net.decode(case.net.middle(h, c), skips, c, Ops(join=join))
    assert [site for site, _ in joined] == [Site(f"dec.{i}", 0, "join") for i in range(len(skips))]
    assert all(taken is emitted for (_, taken), emitted in zip(joined, reversed(skips), strict=True))


def test_a_wrong_number_of_skips_is_an_error_that_says_how_many_there_are(case: Case):
    c, n = case.net.embed(case.t), len(case.net.dec)
    h, skips = case.net.encode(case.x, c)
    for wrong in (skips[:-1], [*skips, h], []):
        with pytest.raises(ValueError, match=rf"^decode takes {n} skips.* got {len(wrong)}$"):
            case.net.decode(h, wrong, c)


def test_an_image_the_network_cannot_halve_down_to_h_is_an_error_in_one_line(case: Case):
    c = case.net.embed(case.t)
    for shape in ((3, 4, 8, 8), (3, 3, 10, 8), (3, 3, 8, 9), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"^the network takes x \(B, 3, H, W\) .*multiples of 4; got \(3, [^\n]*$"):
            case.net(torch.zeros(shape, dtype=torch.float64), c)


def test_held_taps_are_not_changed_by_what_comes_after(case: Case):
    c = case.net.embed(case.t)
    x, t, emb = case.x.clone(), case.t.clone(), c.emb.clone()
    h0, skips = case.net.encode(case.x, c)
    held = [h0.clone(), *(s.clone() for s in skips)]
    h = case.net.middle(h0, c)
    h_held = h.clone()
    first = case.net.decode(h, skips, c)
    assert all(torch.equal(a, b) for a, b in zip(held, [h0, *skips], strict=True))
    assert torch.equal(h, h_held)
    assert all(torch.equal(a, b) for a, b in ((x, case.x), (t, case.t), (emb, c.emb)))
    assert torch.equal(first, case.net.decode(h, skips, c))


def test_every_image_of_a_batch_is_what_it_is_alone(case: Case):
    together = case.net(case.x, case.net.embed(case.t))
    for i in range(len(case.x)):
        alone = case.net(case.x[i : i + 1], case.net.embed(case.t[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_an_empty_batch_is_an_empty_answer():
    net = BUILD["adm"]().eval()
    assert net(torch.zeros(0, 3, 8, 8), net.embed(torch.zeros(0))).shape == (0, 6, 8, 8)


def spoken(net: ThreeLists, x: Tensor, t: Tensor) -> list[tuple[str, Site]]:
    """Which verbs a network speaks where, in order."""
    said: list[tuple[str, Site]] = []

    def noted(verb: str) -> Callable[..., Tensor]:
        def speak(site: Site, *args, **kwargs) -> Tensor:
            said.append((verb, site))
            return getattr(TORCH, verb)(site, *args, **kwargs)

        return speak

    ops = Ops(**{verb: noted(verb) for verb in ("attend", "group_norm", "join", "add")})
    assert torch.equal(net(x, net.embed(t), ops), net(x, net.embed(t)))  # wrapping changes nothing
    return said


def test_every_module_speaks_its_verb_and_wrapping_every_verb_changes_no_bit(case: Case):
    said = [verb for verb, _ in spoken(*case)]
    modules = list(case.net.modules())
    attentions = sum(isinstance(m, ATTENTION) for m in modules)
    assert attentions >= 3
    assert said.count("attend") == attentions
    assert said.count("add") == attentions + sum(isinstance(m, RESIDUAL) for m in modules)
    assert said.count("group_norm") == sum(isinstance(m, Norm) for m in modules)
    assert said.count("join") == len(case.net.dec)


def test_no_two_verbs_share_a_site_and_depths_count_from_zero_in_order_of_execution(case: Case):
    said = spoken(*case)
    assert len(set(said)) == len(said)
    depths: dict[tuple[str, str, str], list[int]] = {}
    for verb, site in said:
        depths.setdefault((verb, site.stage, site.kind), []).append(site.depth)
    assert all(found == list(range(len(found))) for found in depths.values())
    stages = {f"enc.{i}" for i in range(1, len(case.net.enc))} | {f"dec.{i}" for i in range(len(case.net.dec))}
    silent = {f"enc.{i}" for i, s in enumerate(case.net.enc) if isinstance(s[0], ddpm.Down | adm.Down | adm.Resample)}
    assert {site.stage for _, site in said} == stages - silent | {"mid", "out"}


@pytest.mark.parametrize(
    "ops",
    [
        Ops(attend=lambda site, q, k, v, bias=None: v),
        Ops(group_norm=lambda site, x, weight, bias, groups, eps, silu: x),
        Ops(join=lambda site, h, skip: torch.cat([h, 0 * skip], dim=1)),
        Ops(add=lambda site, x, dx: x + 0.5 * dx),
    ],
    ids=["attend", "group_norm", "join", "add"],
)
def test_every_verb_can_be_replaced(case: Case, ops: Ops):
    c = case.net.embed(case.t)
    eps, other = case.net(case.x, c), case.net(case.x, c, ops)
    assert other.shape == eps.shape
    assert (other - eps).abs().amax() > 1e-3 * eps.abs().amax()


def test_attention_written_out_is_attention(case: Case):
    c = case.net.embed(case.t)
    torch.testing.assert_close(case.net(case.x, c, JVP), case.net(case.x, c), rtol=1e-10, atol=1e-10)
    q, k, v, bias = (torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((5, 8), (7, 8), (7, 6), (5, 7)))
    want = reference.attention(q, k, v, bias)
    torch.testing.assert_close(reference.softmax_attention(q, k, v, bias), want, rtol=1e-12, atol=1e-12)


def test_networks_run_in_bfloat16_near_what_they_are_in_float32(case: Case):
    x = case.x.float()
    want = case.net.float()(x, case.net.embed(case.t))
    net = case.net.bfloat16()
    got = net(x.bfloat16(), net.embed(case.t))
    assert (want.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    assert (got.float() - want).square().mean().sqrt() < 0.05 * want.square().mean().sqrt()


def test_float64_stays_float64_and_agrees_with_float32(case: Case):
    want = case.net(case.x, case.net.embed(case.t.double()))
    got = case.net.float()(case.x.float(), case.net.embed(case.t.float()))
    assert want.dtype == torch.float64
    assert (got - want).abs().amax() < 1e-4 * want.abs().amax()


def test_dropout_is_for_training_only():
    net = ddpmpp.DDPMpp(DDPMPP_TINY)
    x, c = torch.randn(1, 3, 8, 8), net.embed(torch.tensor([5.0]))
    assert not torch.equal(net(x, c), net(x, c))
    net.eval()
    assert torch.equal(net(x, c), net(x, c))


def test_a_sampler_sees_eps_without_the_variance_channels_unless_it_asks_for_them(case: Case):
    out = case.net(case.x, case.net.embed(case.t))
    assert torch.equal(denoiser(case.net)(case.x, case.t), out[:, :3])
    assert torch.equal(denoiser(case.net, variance=True)(case.x, case.t), out)
    other = case.net.embed(case.t.flip(0))
    assert torch.equal(denoiser(case.net, lambda t: other)(case.x, case.t), case.net(case.x, other)[:, :3])
    doubled = denoiser(case.net, ops=Ops(add=lambda site, x, dx: x + 2 * dx))(case.x, case.t)
    assert not torch.equal(doubled, out[:, :3])


def test_a_timestep_without_a_batch_is_an_error(case: Case):
    with pytest.raises(ValueError, match=r"^t is \(B,\), one timestep an image; got \(\)$"):
        case.net.embed(torch.tensor(5))


def test_learned_sigma_is_twice_the_channels():
    assert adm.ADM_256.learned_sigma
    assert not BARE_TINY.learned_sigma


def test_a_label_is_added_where_there_are_classes_and_refused_where_it_cannot_be():
    net = adm.ADM(BARE_TINY).eval()
    t, label = torch.tensor([3.0, 4.0]), torch.tensor([0, 6])
    assert isinstance(net.label, nn.Embedding)
    torch.testing.assert_close(net.embed(t, label).emb - net.embed(t).emb, net.label.weight[label])
    for wrong in ([0, 7], [-1, 0]):
        with pytest.raises(ValueError, match=r"^label is in 0\.\.\.6; got \[.*\]$"):
            net.embed(t, torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"^label is for networks with classes; this one has none$"):
        adm.ADM(ADM_TINY).embed(t, label)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: replace(ADM_TINY, qkv="old"), "qkv is 'legacy' or 'new', not 'old'"),
        (
            lambda: adm.ADM(replace(ADM_TINY, head_dim=24)),
            "64 channels at enc.3 do not divide into heads of 24",
        ),
        (lambda: adm.ADM(replace(IDDPM_TINY, heads=5)), "64 channels at enc.3 do not divide into 5 heads"),
        (lambda: adm.ADM(replace(ADM_TINY, base=48)), "24 channels do not divide into 32 groups of a group norm"),
        (lambda: ddpm.DDPM(replace(DDPM_TINY, groups=0)), "16 channels do not divide into 0 groups of a group norm"),
        (lambda: ddpmpp.DDPMpp(replace(DDPMPP_TINY, base=3)), "3 channels do not divide into 0 groups"),
    ],
)
def test_a_configuration_that_cannot_be_built_says_so_in_one_line(build: Callable[[], object], message: str):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_sinusoid_is_its_definition():
    t = torch.tensor([0.0, 1.0, 19.5, 999.0], dtype=torch.float64)
    for last, bottom in ((True, 3), (False, 4)):
        angle = torch.stack([t / 10000 ** (i / bottom) for i in range(4)], dim=1)
        want = torch.cat([angle.sin(), angle.cos()], dim=1)
        for cos_first in (True, False):
            got = sinusoid(t, 8, cos_first=cos_first, last_exponent=last)
            torch.testing.assert_close(got.roll(4 * cos_first, 1), want, rtol=1e-12, atol=1e-12)
    assert sinusoid(t.float(), 9, cos_first=False, last_exponent=True).shape == (4, 9)
    assert sinusoid(torch.tensor([3]), 8, cos_first=False, last_exponent=True).dtype == torch.float32


def test_doubling_then_halving_is_nothing():
    x = torch.randn(1, 4, 6, 8)
    up = Up(4)
    nn.init.dirac_(up.conv.weight)
    nn.init.zeros_(up.conv.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(half(up(x, None, TORCH)), x)


def test_doubling_to_a_size_is_doubling_without_the_last_row_or_column():
    for n in (1, 2, 3, 7, 67, 135):
        x, up = torch.randn(1, 1, n, n + 1), Up(1)
        whole = double(x)
        for height in (2 * n - 1, 2 * n):
            for width in (2 * n + 1, 2 * n + 2):
                assert torch.equal(up(x, None, TORCH, (height, width)), up.conv(whole[:, :, :height, :width]))

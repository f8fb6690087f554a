"""FreeU: nothing at 1, diffusers' own with random weights, and the filter by its definition."""

import pytest
import torch
from diaphane.methods.freeu import PRESETS, FreeU, freeu, lowered
from diaphane.model.ops import TORCH
from diaphane.model.unet import UNet
from diaphane.weights import unet as table

from . import latent_twins as twins


def test_at_ones_the_verbs_are_the_same():
    assert freeu(TORCH, twins.XL, FreeU(1, 1, 1, 1)) is TORCH


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 3), (1, 4), (1, 1)])
def test_the_filter_scales_the_middle_of_the_shifted_spectrum(size: tuple[int, int]):
    skip = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip, dim=(-2, -1)), dim=(-2, -1))
    top, left = (max(n // 2 - 1, 0) for n in size)
    mask = torch.ones(size, dtype=torch.float64)
    mask[top : size[0] // 2 + 1, left : size[1] // 2 + 1] = 0.3
    want = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real
    assert torch.allclose(lowered(skip, 0.3), want, atol=1e-12)


@pytest.mark.parametrize("name", ["xl", "sd1"])
@pytest.mark.parametrize("factors", [PRESETS["consistory"], FreeU(1.3, 1.4, 0.9, 0.2)])
def test_a_network_is_diffusers_with_enable_freeu(name: str, factors: FreeU):
    torch.manual_seed(3)
    cfg = twins.CONFIGS[name]
    twin = twins.diffusers_unet(cfg)
    net = UNet(cfg).eval()
    with torch.no_grad():
        twins.randomised(twin)
        net.load_state_dict(twins.ours(twin.state_dict(), table, table.DIFFUSERS), strict=True, assign=True)
        twin.enable_freeu(**factors._asdict())
        x, t = torch.randn(2, cfg.in_channels, 16, 24), torch.tensor([417, 20])
        more = {"pooled": torch.randn(2, cfg.pooled_dim), "ids": torch.rand(2, cfg.ids)} if cfg.pooled_dim else {}
        c = net.embed(t, torch.randn(2, 5, cfg.context_dim), **more)
        got, plain = net(x, c, freeu(TORCH, cfg, factors)), net(x, c)
        added = {"text_embeds": more["pooled"], "time_ids": more["ids"]} if more else None
        want = twin(x, t, c.context, added_cond_kwargs=added).sample
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())
    assert float((plain - want).abs().max()) > 0.01 * float(want.abs().max())


def test_gradients_flow_through_the_filter():
    skip = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: lowered(y, 0.2), skip)


def test_factors_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        freeu(TORCH, twins.XL, FreeU(float("nan"), 1, 1, 1))

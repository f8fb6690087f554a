"""The published configurations: how many parameters they have, which skips they emit, what h is."""

import pytest
import torch
from diaphane.model import adm, ddpm, ddpmpp
from diaphane.model.blocks import ThreeLists


def table(text: str) -> list[tuple[int, int]]:
    """(channels, side) of every skip, from "channelsxside*times" words."""
    words = (word.partition("*") for word in text.split())
    return [pair for shape, _, n in words for pair in [tuple(map(int, shape.split("x")))] * int(n or 1)]


PUBLISHED = {
    "ddpm-256": (ddpm.DDPM, ddpm.DDPM_256, 113_673_219, 450, (512, 8),
                 "128x256*3 128x128*3 128x64 256x64*2 256x32*3 256x16 512x16*2 512x8*3"),
    "ddpm-cifar10": (ddpm.DDPM, ddpm.DDPM_CIFAR10, 35_746_307, 328, (256, 4),
                     "128x32*3 128x16 256x16*2 256x8*3 256x4*3"),
    "p2-256": (adm.ADM, adm.P2_256, 93_563_910, 362, (512, 8),
               "128x256*2 128x128*2 128x64 256x64 256x32*2 256x16 512x16 512x8*2"),
    "adm-256": (adm.ADM, adm.ADM_256, 552_814_086, 566, (1024, 8),
                "256x256*3 256x128*3 256x64 512x64*2 512x32*3 512x16 1024x16*2 1024x8*3"),
    "adm-512": (adm.ADM, adm.ADM_512, 558_997_638, 645, (1024, 8),
                "128x512*3 128x256 256x256*2 256x128*3 256x64 512x64*2 512x32*3 512x16 1024x16*2 1024x8*3"),
    "adm-lsun": (adm.ADM, adm.LSUN, 552_814_086, 566, (1024, 8),
                 "256x256*3 256x128*3 256x64 512x64*2 512x32*3 512x16 1024x16*2 1024x8*3"),
    "ddpmpp-cifar10": (ddpmpp.DDPMpp, ddpmpp.CIFAR10, 61_804_419, 564, (256, 4),
                       "128x32*5 128x16 256x16*4 256x8*5 256x4*5"),
    "ddpmpp-cifar10-deep": (ddpmpp.DDPMpp, ddpmpp.CIFAR10_DEEP, 106_632_579, 956, (256, 4),
                            "128x32*9 128x16 256x16*8 256x8*9 256x4*9"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_its_parameters_its_skips_and_its_h(name: str):
    build, cfg, parameters, tensors, h_shape, skip_table = PUBLISHED[name]
    with torch.device("meta"):
        net: ThreeLists = build(cfg)
        x, t = torch.empty(2, 3, cfg.resolution, cfg.resolution), torch.empty(2)
    state = net.state_dict()
    assert (sum(p.numel() for p in state.values()), len(state)) == (parameters, tensors)
    assert len(state) == len(list(net.parameters()))  # no buffers: a file is parameters and nothing else
    c = net.embed(t)
    h, skips = net.encode(x, c)
    assert [tuple(s.shape[1:3]) for s in skips] == table(skip_table)
    h = net.middle(h, c)
    assert tuple(h.shape) == (2, h_shape[0], h_shape[1], h_shape[1])
    assert net.decode(h, skips, c).shape == (2, cfg.out_channels, cfg.resolution, cfg.resolution)

"""Ho's DDPM against diffusers' UNet2DModel: the same random weights, the same numbers."""

import math

import pytest
import torch
from diaphane.model import ddpm
from diaphane.model.blocks import sinusoid
from diffusers import UNet2DModel
from torch import Tensor, nn

F64 = torch.float64


DDPMS = {
    "published shape": ddpm.DDPMConfig(resolution=32, base=32, mult=(1, 1, 2, 2), blocks=2, attention=(8,)),
    "one level": ddpm.DDPMConfig(resolution=8, base=16, mult=(1,), blocks=1, attention=(8,), groups=8),
    "attention everywhere": ddpm.DDPMConfig(resolution=16, base=8, mult=(1, 2, 3), attention=(16, 8, 4), groups=4),
    "attention nowhere": ddpm.DDPMConfig(resolution=16, base=24, mult=(1, 2), blocks=3, attention=(), groups=12),
    "other channels": ddpm.DDPMConfig(
        resolution=16, base=16, mult=(1, 2), blocks=1, in_channels=1, out_channels=5, groups=16
    ),
}


def diffusers_twin(net: ddpm.DDPM) -> UNet2DModel:
    """diffusers' network of the same configuration with the same weights."""
    cfg, levels = net.cfg, len(net.cfg.mult)
    attends = [cfg.resolution >> level in cfg.attention for level in range(levels)]
    twin = UNet2DModel(
        sample_size=cfg.resolution,
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        block_out_channels=tuple(cfg.base * m for m in cfg.mult),
        layers_per_block=cfg.blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=cfg.groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()
    places = {"time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2", "norm_out": "conv_norm_out"}
    places |= {"enc.0.0": "conv_in", "conv_out": "conv_out"}
    places |= {"mid.0": "mid_block.resnets.0", "mid.1": "mid_block.attentions.0", "mid.2": "mid_block.resnets.1"}
    stage = 0
    for level in range(levels):
        for j in range(cfg.blocks):
            stage += 1
            places[f"enc.{stage}.0"] = f"down_blocks.{level}.resnets.{j}"
            places[f"enc.{stage}.1"] = f"down_blocks.{level}.attentions.{j}"
        stage += 1
        places[f"enc.{stage}.0"] = f"down_blocks.{level}.downsamplers.0"
    for stage in range(levels * (cfg.blocks + 1)):
        block, j = divmod(stage, cfg.blocks + 1)
        places[f"dec.{stage}.0"] = f"up_blocks.{block}.resnets.{j}"
        attention, up = f"up_blocks.{block}.attentions.{j}", f"up_blocks.{block}.upsamplers.0"
        members = [attention, up] if attends[levels - 1 - block] else [up]
        places |= {f"dec.{stage}.{m}": name for m, name in enumerate(members, start=1)}
    inside = {"emb": "time_emb_proj", "skip": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    theirs = {}
    for name, p in net.state_dict().items():
        place = max((place for place in places if name.startswith(place + ".")), key=len)
        head, *rest = name[len(place) + 1 :].split(".")
        head = (attention if "attentions" in places[place] else inside).get(head, head)
        theirs[".".join([places[place], head, *rest])] = p
    twin.load_state_dict(theirs, strict=True)
    return twin.to(next(net.parameters()).dtype).requires_grad_(False)


class Sinusoid(nn.Module):
    """Our timestep embedding, in the place of diffusers' own."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return sinusoid(t, self.dim, cos_first=False, last_exponent=True)


@pytest.mark.parametrize("name", DDPMS)
def test_ddpm_is_diffusers_unet2dmodel(name: str):
    torch.manual_seed(11)
    net = ddpm.DDPM(DDPMS[name]).double().eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.2 * torch.randn_like(p) / math.sqrt(p[0].numel()))
    twin = diffusers_twin(net)
    side = 4 * net.multiple
    x, t = torch.randn(3, net.cfg.in_channels, side, side + net.multiple, dtype=F64), torch.tensor([0, 417, 999])

    want, got = twin.float()(x.float(), t).sample, net.float()(x.float(), net.embed(t))
    assert (got - want).abs().amax() < 1e-5 * want.abs().amax()

    twin.time_proj = Sinusoid(net.cfg.base)  # in float64; theirs is float32 whatever the network is
    want, got = twin.double()(x, t.double()).sample, net.double()(x, net.embed(t.double()))
    assert got.dtype == F64
    assert (got - want).abs().amax() < 1e-10 * want.abs().amax()

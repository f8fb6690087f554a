"""A styled UNet by the Triton kernels in Triton's interpreter, in a process of its own: errors as lines of JSON."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import json

import torch
from diaphane.kernels import adain, device, source_attention, source_attention_triton
from diaphane.methods.style_aligned import Sharing, style_aligned
from diaphane.model.ops import TORCH
from diaphane.model.unet import UNet, UNetConfig
from torch import Tensor

CFG = UNetConfig(
    channels=(16, 32), depth=(0, 1), mid_depth=1, blocks=1, head_dim=16, context_dim=12, pooled_dim=None, groups=8
)
WAYS = {
    "folded": Sharing(scale=0.75, shift=0.5),
    "of q and v": Sharing(adain_k=False, adain_v=True, norms=True),
    "all see all": Sharing(all_see_all=True),
}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet(CFG).eval()
    x, context = torch.randn(4, 4, 4, 4), torch.randn(4, 3, 12)

    def eps(sharing: Sharing | None, dtype: torch.dtype) -> Tensor:
        net = unet.to(dtype)
        ops = TORCH if sharing is None else style_aligned(TORCH, [0, 0], sharing)
        return net(x.to(dtype), net.embed(torch.full((4,), 500.0), context.to(dtype)), ops)

    want = {name: eps(sharing, torch.float64) for name, sharing in WAYS.items()}
    plain, torches = eps(None, torch.float64), {name: eps(sharing, torch.float32) for name, sharing in WAYS.items()}
    launches = []
    source_attention.takes_triton = adain.takes_triton = lambda y, *limits: y.dtype in device.SINGLE
    forward = source_attention_triton.forward
    source_attention_triton.forward = lambda *args: launches.append(1) or forward(*args)
    assert source_attention_triton.INTERPRETED
    for name, sharing in WAYS.items():
        launches.clear()
        got = eps(sharing, torch.float32)
        moved = float((want[name] - plain)[1].abs().max())
        rows = {way: float((y - want[name]).abs().max()) for way, y in (("triton", got), ("torch", torches[name]))}
        print(json.dumps({"way": name, "launches": len(launches), "moved": moved, **rows}), flush=True)


if __name__ == "__main__":
    main()

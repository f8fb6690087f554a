"""The parts beside the large UNet: CLIP's towers and the VAE against transformers and diffusers, a tiny UNet's step,
and what it costs to have the verbs, and to keep h and every skip.

python benchmarks/latent.py out/bench            # full-size random weights are written there once: 1.9 GB
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diaphane.model import latent as model
from diaphane.model.ops import Ops, attend, concat, geglu, group_norm
from diaphane.model.ops import add as plus
from diaphane.model.unet import Attention, ResBlock, Transformer, TransformerBlock, UNet, UNetConfig
from diaphane.weights import latent as weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from timing import conditions, interleaved, ratio, timing, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                        projection_dim=768, bos_token_id=49406, eos_token_id=49407)  # fmt: skip
VISION_H = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                            patch_size=14, image_size=224, hidden_act="gelu", projection_dim=1024)  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
UNET = {
    "block_out_channels": (160, 320, 640),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 3),
    "attention_head_dim": (3, 5, 10),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 640 + 6 * 256,
}
MIDDLE = UNetConfig(channels=(160, 320, 640), depth=(0, 1, 3), mid_depth=3, pooled_dim=640, context_dim=1024)


def pair(folder: Path, name: str, make: Callable[[], Any], kind: type) -> tuple[Any, Any]:
    """A network of theirs with random weights, written once, and ours from its file."""
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        make().save_pretrained(path)
    found = weights.load(path)
    theirs = kind.from_pretrained(path, torch_dtype=torch.float32).eval()
    return model.build(found.family, found.config, found.tensors, dtype=torch.float32), theirs


def row(case: str, rivals: dict[str, Callable[[], Tensor]], rounds: int, limit: float, **more: Any) -> dict:
    """The first rival against the second, after a check that both say the same."""
    us, them = rivals
    outs = [rival().double() for rival in rivals.values()]
    error = float((outs[0] - outs[1]).abs().max() / outs[1].std().clamp(min=1e-6))
    if not error < limit:
        raise SystemExit(f"{case}: the two differ by {error:.2e}: no timing is worth printing")
    seconds = interleaved(rivals, rounds)
    mine, other = timing(seconds[us]), timing(seconds[them])
    found = {"case": case, "against": them, "ratio": ratio(seconds[us], seconds[them]), "seconds": mine.median}
    found |= {"low": mine.low, "high": mine.high, "theirs": other.median, "their_low": other.low}
    return found | {"their_high": other.high, "difference": error} | more | conditions()


def towers(folder: Path, rounds: int) -> Iterator[dict]:
    """CLIP's text and vision towers, and the VAE."""
    ids = torch.randint(0, 49405, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 40:] = 49406, 49407
    ours, theirs = pair(folder, "clip-l", lambda: CLIPTextModel(TEXT_L), CLIPTextModel)
    yield row(
        "CLIP-L text, 2 x 77 tokens",
        {
            "ours": lambda: ours(ids).hidden[-2],
            "transformers": lambda: theirs(ids, output_hidden_states=True).hidden_states[-2],
        },
        rounds,
        1e-3,
    )
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    ours_v, theirs_v = pair(
        folder, "clip-vision-h", lambda: CLIPVisionModelWithProjection(VISION_H), CLIPVisionModelWithProjection
    )
    yield row(
        "CLIP-H vision, one picture",
        {"ours": lambda: ours_v(pixels).pooled, "transformers": lambda: theirs_v(pixels).image_embeds},
        rounds,
        1e-3,
    )
    z = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    picture = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3)).tanh()
    vae, twin = pair(folder, "vae", lambda: AutoencoderKL(**VAE), AutoencoderKL)
    yield row(
        "VAE, latents to 256²",
        {"ours": lambda: vae.decode(z), "diffusers": lambda: twin.decode(z).sample},
        rounds,
        1e-3,
    )
    yield row(
        "VAE, 256² to latents",
        {"ours": lambda: vae.encode(picture).mean, "diffusers": lambda: twin.encode(picture).latent_dist.mean},
        rounds,
        1e-3,
    )


class Calls(TorchDispatchMode):
    """Every call of PyTorch's operators, as it was made; each can be made again without the code around it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, args, kwargs in self.made:
            func(*args, **kwargs)


def beyond(rivals: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """What a step takes more than the calls of operators in it, made again one after the other: ms of each rival."""
    found = {}
    with torch.inference_mode():
        for name, rival in rivals.items():
            with Calls() as calls:
                rival()
            seconds = interleaved({"step": rival, "again": calls.again}, rounds, 3)
            found[f"{name} beyond, ms"] = 1e3 * (timing(seconds["step"]).median - timing(seconds["again"]).median)
    return found


def tiny(path: Path, rounds: int, side: int = 16, n: int = 2) -> dict:
    """One step of the tiny UNet of the tests, n pictures of side x side latents."""
    found = weights.load(path)
    ours = model.build(found.family, found.config, found.tensors, dtype=torch.float32)
    theirs = UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32).eval()
    cfg, draw = ours.cfg, torch.Generator().manual_seed(0)
    x, context = torch.randn(n, 4, side, side, generator=draw), torch.randn(n, 9, cfg.context_dim, generator=draw)
    pooled, ids = torch.randn(n, cfg.pooled_dim, generator=draw), torch.full((n, 6), 128.0)
    t, added = torch.tensor([500] * n), {"text_embeds": pooled, "time_ids": ids}
    rivals = {
        "ours": lambda: ours(x, ours.embed(t, context, pooled, ids)),
        "diffusers": lambda: theirs(x, t, context, added_cond_kwargs=added).sample,
    }
    case = f"step of a tiny UNet, {n} x {side}² latents"
    return row(case, rivals, 10 * rounds, 1e-3, **beyond(rivals, 10 * rounds))


def forward(folder: Path, rounds: int, frozen: bool) -> Iterator[dict]:
    """A UNet of an eighth of SDXL's size in bfloat16 at 512², eager; and ours compiled with its weights packed."""
    ours, theirs = pair(folder, "unet-middle", lambda: UNet2DConditionModel(**UNET), UNet2DConditionModel)
    ours, theirs, draw = ours.bfloat16(), theirs.bfloat16(), torch.Generator().manual_seed(0)
    x, context = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((1, 4, 64, 64), (1, 77, 1024)))
    pooled, ids, t = torch.randn(1, 640, generator=draw).bfloat16(), torch.full((1, 6), 512.0), torch.tensor([500])
    added = {"text_embeds": pooled, "time_ids": ids.bfloat16()}

    def diffusers() -> Tensor:
        return theirs(x, t, context, added_cond_kwargs=added).sample

    ways: dict[str, Callable[[], Tensor]] = {"eager": lambda: ours(x, ours.embed(t, context, pooled, ids))}
    if frozen:
        torch._inductor.config.freezing = True
        fast = torch.compile(ours)
        ways["compiled, weights frozen"] = lambda: fast(x, ours.embed(t, context, pooled, ids))
    for name, way in ways.items():
        case = f"forward of a smaller UNet, 512², bfloat16, {name}"
        yield row(case, {"ours": way, "diffusers": diffusers}, rounds, 0.2)


def inlined(net: UNet) -> UNet:
    """The same network with every verb written out where it is spoken, as if there were none."""
    net = copy.deepcopy(net)

    def norm(self: Any, x: Tensor) -> Tensor:
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(y) if self.silu else y

    def res(self: Any, x: Tensor, c: Any, ops: Any) -> Tensor:
        h = self.conv1(norm(self.norm1, x)) + self.emb(F.silu(c.emb))[:, :, None, None]
        return self.skip(x) + self.conv2(norm(self.norm2, h))

    def attention(self: Any, x: Tensor, context: Tensor, ops: Any) -> Tensor:
        parts = (self.q(x), self.k(context), self.v(context))
        q, k, v = (y.view(*y.shape[:2], *self.split).transpose(1, 2) for y in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def block(self: Any, x: Tensor, context: Tensor, ops: Any) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y, ops)
        x = x + self.cross_attn(self.norm2(x), context, ops)
        a, b = self.ff_in(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff_out(a * F.gelu(b))

    def transformer(self: Any, x: Tensor, c: Any, ops: Any) -> Tensor:
        y = self.proj_in(norm(self.norm, x).flatten(2).transpose(1, 2))
        for one in self.blocks:
            y = one(y, c.context, ops)
        return x + self.proj_out(y).transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self: Any, x: Tensor, c: Any) -> Tensor:
        skips = []
        for stage in self.enc:
            for module in stage:
                x = module(x, c, None)
            skips.append(x)
        for module in self.mid:
            x = module(x, c, None)
        for stage in self.dec:
            x = torch.cat([x, skips.pop()], dim=1)
            for module in stage:
                x = module(x, c, None)
        return self.conv_out(norm(self.norm_out, x))

    plain = {ResBlock: res, Attention: attention, TransformerBlock: block, Transformer: transformer, UNet: forward}
    for module in net.modules():
        if type(module) in plain:
            module.forward = MethodType(plain[type(module)], module)
    return net


def taps(rounds: int) -> Iterator[dict]:
    """The verbs unused, wrapped by a method that does nothing, and h and every skip of a walk kept."""
    torch.manual_seed(0)
    net = UNet(MIDDLE).eval()
    bare = inlined(net)
    x, context, pooled = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 1024), torch.randn(1, 640)
    c = net.embed(torch.tensor([500]), context, pooled, torch.full((1, 6), 256.0))
    nothing = Ops(
        attend=lambda *a: attend(*a),
        group_norm=lambda *a: group_norm(*a),
        geglu=lambda *a: geglu(*a),
        join=lambda *a: concat(*a),
        add=lambda *a: plus(*a),
    )

    def kept() -> Tensor:
        deep, skips = net.encode(x, c)
        h = net.middle(deep, c)
        held.append((h, skips))
        if len(held) > 10:
            held.clear()
        return net.decode(h, skips, c)

    held: list[tuple[Tensor, list[Tensor]]] = []
    rivals = {
        "verbs unused": lambda: net(x, c),
        "every verb wrapped": lambda: net(x, c, nothing),
        "h and all skips kept": kept,
    }
    for case, ours in rivals.items():
        yield row(case, {"ours": ours, "verbs written out": lambda: bare(x, c)}, rounds, 1e-4)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frozen", action="store_true", help="also compile with frozen weights; takes minutes")
    parser.add_argument("--tiny", type=Path, default=Path(__file__).parents[1] / "tests/golden/tiny-sdxl/unet")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    rows = [
        *taps(args.rounds),
        tiny(args.tiny, args.rounds),
        tiny(args.tiny, args.rounds, 8, 1),
        *towers(args.folder, args.rounds),
    ]
    rows += forward(args.folder, args.rounds, args.frozen)
    write([found | {"threads": args.threads} for found in rows], args.folder / "latent.csv")


if __name__ == "__main__":
    main()

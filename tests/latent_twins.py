"""diffusers' networks of a tiny configuration, and ours around the same random weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diaphane.model.blocks import sinusoid
from diaphane.model.unet import UNetConfig
from diaphane.weights.names import rename
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny-sdxl"
CASES = HERE / "golden" / "instantstyle"

XL = UNetConfig(
    channels=(16, 32, 48), depth=(0, 1, 2), mid_depth=2, head_dim=8, context_dim=24, pooled_dim=10, id_dim=6, groups=8
)
REFINER = replace(XL, channels=(16, 24, 48, 48), depth=(0, 2, 1, 0), mid_depth=3, ids=5, in_channels=5)
SD1 = UNetConfig(
    channels=(16, 32, 48, 48), depth=(1, 1, 1, 0), mid_depth=1, head_dim=None, heads=4, context_dim=20,
    pooled_dim=None, groups=8,
)  # fmt: skip
SD2 = replace(SD1, head_dim=8, in_channels=9, blocks=1)
CONFIGS = {"xl": XL, "refiner": REFINER, "sd1": SD1, "sd2": SD2}


def diffusers_settings(cfg: UNetConfig, *, linear: bool) -> dict[str, Any]:
    """The same configuration in UNet2DConditionModel's terms."""
    heads = [ch // cfg.head_dim if cfg.head_dim else cfg.heads for ch in cfg.channels]
    kinds = ["DownBlock2D" if depth is None else "CrossAttnDownBlock2D" for depth in cfg.transformers]
    depth = [cfg.mid_depth if d is None else d for d in cfg.transformers]  # the last is the bottleneck's
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": cfg.id_dim,
        "projection_class_embeddings_input_dim": (cfg.pooled_dim or 0) + cfg.ids * cfg.id_dim,
    }
    return {
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "block_out_channels": cfg.channels,
        "layers_per_block": cfg.blocks,
        "down_block_types": tuple(kinds),
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        "transformer_layers_per_block": depth,
        "attention_head_dim": heads,
        "cross_attention_dim": cfg.context_dim,
        "norm_num_groups": cfg.groups,
        "use_linear_projection": linear,
        **(xl if cfg.pooled_dim else {}),
    }


def diffusers_unet(cfg: UNetConfig, *, linear: bool = True) -> UNet2DConditionModel:
    """diffusers' network of the same configuration."""
    settings = diffusers_settings(cfg, linear=linear)
    return UNet2DConditionModel(**settings).eval().requires_grad_(False)


def diffusers_controlnet(cfg: UNetConfig, hint: tuple[int, ...], *, linear: bool = True) -> ControlNetModel:
    """diffusers' ControlNet of the same configuration."""
    settings = {k: v for k, v in diffusers_settings(cfg, linear=linear).items() if k not in ("out_channels",)}
    settings.pop("up_block_types")
    settings |= {"mid_block_type": "UNetMidBlock2D"} if cfg.plain_mid else {}
    return ControlNetModel(conditioning_embedding_out_channels=hint, **settings).eval().requires_grad_(False)


def randomised(net: nn.Module, scale: float = 0.3) -> None:
    """Random numbers everywhere, zero-initialised layers and norms too."""
    for p in net.parameters():
        p.copy_(p + scale * torch.randn_like(p) / math.sqrt(p[0].numel() if p.ndim > 1 else 1))


def ours(tensors: Mapping[str, Tensor], tables: ModuleType, column: int) -> dict[str, Tensor]:
    """A state dictionary in a layout under our names."""
    plan = tables.plan({key: tuple(t.shape) for key, t in tensors.items()}, column)
    return rename(tensors, tables.table(plan, column), tables.want(plan))


class Sinusoid(nn.Module):
    """Our timestep embedding in float64, in the place of diffusers', which is float32 whatever the network is."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return sinusoid(t.double(), self.dim, cos_first=True, last_exponent=False)


def in_float64(twin: Any, cfg: UNetConfig) -> Any:
    """A network of diffusers that computes in float64 from beginning to end."""
    twin.time_proj = Sinusoid(cfg.channels[0])
    if cfg.pooled_dim:
        twin.add_time_proj = Sinusoid(cfg.id_dim)
    return twin.double()


def scheduled(path: Path, change: dict[str, Any]) -> Path:
    """The tiny model under another scheduler_config.json."""
    (path / "scheduler").mkdir(parents=True)
    for part in TINY.iterdir():
        if part.name != "scheduler":
            (path / part.name).symlink_to(part)
    config = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | change))
    return path

"""What tensors cannot say: from a config.json, from the caller, or from the conventions of the published networks.

The conventions, in one place, for what neither the caller nor a config.json gives:

- resolution: in DDPM and DDPM++ the finest attention is at 16 x 16; in ADM the bottleneck is 8 x 8.  It only gives
  levels their names; the network is the same.
- groups of a norm: 32 (DDPM++: a quarter of the channels, at most 32).
- ADM: heads of 64 channels, rows of qkv in the legacy order (ImageNet 64 x 64 alone has the new one).  Networks whose
  resolution is changed by convolutions have no convention for heads: they have to be given.
- dropout: none; it matters in training only.
"""

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .layout import ADM_DIFFUSERS, Layout
from .names import Shape
from .plan import Plan, agree, attention_at_16, bottleneck_of_8, divides

FREE = {
    "ddpm": ("resolution", "groups", "dropout"),
    "adm": ("resolution", "head_dim", "heads", "qkv", "dropout"),
    "ddpmpp": ("resolution", "dropout"),
}

# UNet2DModel's defaults (they hold for what its config.json leaves out), and what the networks here do
UNET2D: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_dim": (None, (None,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "act_fn": ("silu", ("silu", "swish")),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
}
UNET2D_DDPM: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "time_embedding_type": ("positional", ("positional",)),
    "flip_sin_to_cos": (True, (False,)),
    "freq_shift": (0, (1,)),
    "downsample_padding": (1, (0,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "norm_eps": (1e-5, (1e-6,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "num_class_embeds": (None, (None,)),
}
UNET2D_ADM: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "time_embedding_type": ("positional", ("positional", "adm")),
    "flip_sin_to_cos": (True, (True,)),
    "freq_shift": (0, (0,)),
    "downsample_padding": (1, (1,)),
    "norm_eps": (1e-5, (1e-5,)),
    "norm_num_groups": (32, (32,)),
}


def settings(layout: Layout, plan: Plan, config: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the family's configuration.

    `config` is what a config.json says, in Asyrp's, guided-diffusion's or diffusers' terms; `given` what the caller
    says, in ours.  Raises ConfigError where they contradict the tensors or ask for what the network does not do.
    """
    said = read(config, layout, plan) if config else {}
    for source, where in ((said, "config.json"), (given, "the caller")):
        check(source, where)
    free = {name: value for name in FREE[layout.family] if (value := given.get(name, said.get(name))) is not None}
    if given.get("heads") is not None and given.get("head_dim") is None:
        free.pop("head_dim", None)
    found = plan.config(
        free.get("resolution") or (bottleneck_of_8 if layout.family == "adm" else attention_at_16)(plan)
    )
    if layout.family == "adm":
        found |= {name: getattr(plan, name) for name in ("classes", "scale_shift", "updown", "resample_conv")}
    known = {**found, **dict.fromkeys(FREE[layout.family])}
    if strange := [name for name in given if name not in known]:
        raise ConfigError(f"{layout.family} has no setting {strange[0]}; it has {', '.join(known)}")
    for source, where in ((said, "config.json"), (given, "the caller")):
        told = {name: value for name, value in source.items() if name not in FREE[layout.family]}
        if (levels := told.get("attention")) is not None:  # in any order, and those of other levels mean nothing
            here = [found["resolution"] >> level for level in plan.levels]
            told["attention"] = tuple(r for r in here if r in levels)
        agree(told, found, where)
    if layout.family == "adm":
        free = heads(free, plan, found)
    want: dict[str, Shape] = layout.tables.want(plan)
    if layout.family != "ddpmpp":
        divides(free.get("groups", 32), want, "give groups=" if layout.family == "ddpm" else "ADM has no others")
    return found | {name: value for name, value in free.items() if name != "resolution"}


def heads(free: dict[str, Any], plan: Plan, found: Mapping[str, Any]) -> dict[str, Any]:
    """ADM's free settings with heads and qkv order filled in by convention, and checked against the widths."""
    free = dict(free)
    if "head_dim" not in free and "heads" not in free:
        if not plan.updown:
            raise ConfigError("the tensors do not say how many attention heads there are: give heads= or head_dim=")
        free["head_dim"] = 64
    elif "head_dim" not in free:
        free["head_dim"] = None
    divisor, what = (free["head_dim"], "channels a head") if free["head_dim"] else (free["heads"], "heads")
    for width in {plan.widths[level] for level in (*plan.attention, plan.levels[-1])}:
        if width % divisor:
            raise ConfigError(f"{width} channels do not divide into {divisor} {what}: give heads= or head_dim=")
    if "qkv" not in free:
        imagenet_64 = (plan.base, found["mult"], plan.blocks, plan.classes) == (192, (1, 2, 3, 4), 3, 1000)
        free["qkv"] = "new" if imagenet_64 else "legacy"
    return free


def check(said: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a value of the wrong kind."""
    for name, value in said.items():
        if value is None:
            continue
        match name:
            case "resolution" | "groups" | "heads" | "head_dim":
                good = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20
            case "mult" | "attention":
                good = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
            case "qkv":
                good = value in ("legacy", "new")
            case "dropout":
                good = isinstance(value, int | float) and 0 <= value < 1
            case _:
                good = True  # compared with what the tensors say
        if not good:
            raise ConfigError(f"{where} says {name} = {value!r}, which is no such number or choice")


def read(config: Mapping[str, Any], layout: Layout, plan: Plan) -> dict[str, Any]:
    """A config.json in our terms, whichever of the three kinds it is."""
    try:
        if "block_out_channels" in config or "_class_name" in config:
            return read_diffusers(config, layout, plan)
        if isinstance(config.get("model"), Mapping):
            return read_asyrp(config)
        if "model_channels" in config or "num_channels" in config:
            return read_guided(config)
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"config.json is malformed: {type(e).__name__} {e}") from e
    raise ConfigError(
        "config.json is none of diffusers', guided-diffusion's or Asyrp's: pass config={} to do without it"
    )


def read_asyrp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Asyrp's and pesser's: sections `model` and `data`; attention in resolutions."""
    model = config["model"]
    if model.get("resamp_with_conv", True) is not True:
        raise ConfigError("config.json says resamp_with_conv = false; DDPM here resamples with convolutions only")
    return {
        "resolution": config.get("data", {}).get("image_size", model.get("resolution")),
        "in_channels": model.get("in_channels"),
        "out_channels": model.get("out_ch"),
        "base": model.get("ch"),
        "mult": model.get("ch_mult"),
        "blocks": model.get("num_res_blocks"),
        "attention": model.get("attn_resolutions"),
        "dropout": model.get("dropout"),
    }


def read_guided(config: Mapping[str, Any]) -> dict[str, Any]:
    """guided-diffusion's: the model's arguments (attention as factors), or the scripts' flags (as resolutions)."""
    resolution, attention, mult = (config.get(k) for k in ("image_size", "attention_resolutions", "channel_mult"))
    if isinstance(attention, str):
        attention = [int(r) for r in attention.split(",")]
    elif attention is not None:
        attention = [resolution // factor for factor in attention]
    if isinstance(mult, str):
        mult = [float(m) for m in mult.split(",")] if mult else None
    count, width, upsample = (config.get(k, -1) for k in ("num_heads", "num_head_channels", "num_heads_upsample"))
    if upsample not in (-1, None, count):
        raise ConfigError(f"config.json says num_heads_upsample = {upsample}; ADM here has the same heads everywhere")
    new = config.get("use_new_attention_order")
    return {
        "resolution": resolution,
        "in_channels": config.get("in_channels"),
        "out_channels": config.get("out_channels"),
        "base": config.get("model_channels", config.get("num_channels")),
        "mult": mult,
        "blocks": config.get("num_res_blocks"),
        "attention": attention,
        "classes": config.get("num_classes"),
        "head_dim": None if width == -1 else width,
        "heads": None if count == -1 else count,
        "scale_shift": config.get("use_scale_shift_norm"),
        "updown": config.get("resblock_updown"),
        "qkv": None if new is None else "new" if new else "legacy",
        "dropout": config.get("dropout"),
    }


def read_diffusers(config: Mapping[str, Any], layout: Layout, plan: Plan) -> dict[str, Any]:
    """diffusers': UNet2DModel's arguments; what the network here does not do is refused by name."""
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ConfigError(f"config.json is of a {config['_class_name']}; UNet2DModel is read here")
    for name, (default, does) in (UNET2D | (UNET2D_ADM if layout.family == "adm" else UNET2D_DDPM)).items():
        if name in ("flip_sin_to_cos", "freq_shift") and config.get("time_embedding_type") == "adm":
            continue  # an embedding of its own
        if (value := config.get(name, default)) not in (
            *does,
            *([4 * plan.base] if name == "time_embedding_dim" else []),
        ):
            raise ConfigError(f"config.json says {name} = {value!r}; {layout.family} here does {does[0]!r} only")
    groups, size, width = (
        config.get("norm_num_groups", 32),
        config.get("sample_size"),
        config.get("attention_head_dim", 8),
    )
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise ConfigError("config.json says attn_norm_num_groups is not norm_num_groups; here they are one")
    attending = {plan.widths[level] for level in (*plan.attention, plan.levels[-1])}
    if layout.family == "ddpm" and width is not None and attending != {width}:
        raise ConfigError(f"config.json says attention_head_dim = {width}; ddpm here has one head as wide as its level")
    attention = [i for i, kind in enumerate(config.get("down_block_types", ())) if "Attn" in kind]
    if "down_block_types" in config and tuple(attention) != plan.attention:
        raise ConfigError(f"config.json says levels {attention} have attention, the tensors say {list(plan.attention)}")
    agree({"block_out_channels": config.get("block_out_channels")}, {"block_out_channels": plan.widths}, "config.json")
    said = {
        "resolution": max(size) if isinstance(size, list) else size,
        "in_channels": config.get("in_channels", 3),
        "out_channels": config.get("out_channels", 3),
        "blocks": config.get("layers_per_block", 2),
        "dropout": config.get("dropout", 0.0),
    }
    if layout.family == "ddpm":
        return said | {"groups": groups}
    if layout is ADM_DIFFUSERS and width is None:
        raise ConfigError(
            "config.json says attention_head_dim = null, a head as wide as its level; ADM has equal heads"
        )
    legacy = config.get("attention_legacy_order", False)  # stock diffusers splits q, k and v first, then heads
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    return said | {"head_dim": width, "qkv": "legacy" if legacy else "new", "scale_shift": scale_shift}

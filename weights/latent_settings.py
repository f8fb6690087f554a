"""What the tensors of a latent diffusion model cannot say: from a config.json, the caller, or the published networks.

The conventions, in one place, for what neither the caller nor a config.json gives:

- heads: 8 in Stable Diffusion 1 (text tokens of 768), else 64 channels a head; CLIP's by its width.
- groups of a norm: 32.
- micro-conditioning: sinusoids of 256; five numbers where the pooled text is then as wide as a token (the refiner,
  which reads one text encoder), else six.
- a ControlNet that reads no text (SDXL's small ones) is taken for SDXL's, whose tokens are 2048 wide.
- CLIP's activation by its width and kind; its texts end at the largest id.
- the autoencoder's scaling has no convention: single files imply it, others need a config.json or scaling=.  One
  scaled by 0.13025 (SDXL's) overflows float16, others do not.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from .clip import Plan as ClipPlan
from .errors import ConfigError
from .plan import agree, divides
from .unet import Plan as UNetPlan

UNET = ("head_dim", "heads", "groups", "pooled_dim", "ids", "id_dim")
FREE = {
    "unet": UNET,
    "controlnet": (*UNET, "context_dim"),
    "vae": ("scaling", "upcast", "groups"),
    "clip_text": ("heads", "act", "eos"),
    "clip_vision": ("heads", "act"),
}
# what the networks here do, where diffusers' and transformers' configurations can ask for something else
DOES: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "_class_name": ("UNet2DConditionModel",),
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None, "text_time"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim_type": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "norm_eps": (1e-5,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1, None),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "time_cond_proj_dim": (None,),
        "time_embedding_type": ("positional",),
    },
    "vae": {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "clip_text": {"layer_norm_eps": (1e-5,), "hidden_act": ("gelu", "quick_gelu")},
    "clip_vision": {"layer_norm_eps": (1e-5,), "hidden_act": ("gelu", "quick_gelu"), "num_channels": (3,)},
}
DOES["controlnet"] = DOES["unet"] | {
    "_class_name": ("ControlNetModel",),
    "controlnet_conditioning_channel_order": ("rgb",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "global_pool_conditions": (False,),
}
# transformers' names for settings of CLIP, and its defaults (they hold for what a config.json leaves out)
CLIP_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "size": "image_size",
    "patch": "patch_size",
    "heads": "num_attention_heads",
    "act": "hidden_act",
}
CLIP: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
CLIP_TEXT = CLIP | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "eos_token_id": 49407,
}
CLIP_VISION = CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
    "num_attention_heads": 12,
}
# (kind, width) -> heads and activation of the published towers
TOWERS = {
    ("clip_text", 768): (12, "quick_gelu"),  # L
    ("clip_text", 1024): (16, "gelu"),  # H
    ("clip_text", 1280): (20, "gelu"),  # bigG
    ("clip_vision", 1024): (16, "quick_gelu"),  # L
    ("clip_vision", 1280): (16, "gelu"),  # H
    ("clip_vision", 1664): (16, "gelu"),  # bigG
}


def settings(
    family: str, plan: Any, config: Mapping[str, Any], given: Mapping[str, Any], implied: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of the family's configuration.

    `config` is a config.json, `given` what the caller says in our terms, `implied` what a single file does.  Raises
    ConfigError where they contradict the tensors, ask for what the network does not do, or do not say enough.
    """
    found: dict[str, Any] = plan.config()
    for name, does in DOES[family].items():
        if name in config and config[name] not in does:
            raise ConfigError(f"config.json says {name} = {config[name]!r}; {family} here does {does[0]!r} only")
    try:
        said = READ[family](config, plan) if config else {}
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise (
            e if isinstance(e, ConfigError) else ConfigError(f"config.json is malformed: {type(e).__name__} {e}")
        ) from e
    if strange := [name for name in given if name not in (*FREE[family], *found)]:
        raise ConfigError(f"{family} has no setting {strange[0]}; it has {', '.join((*FREE[family], *found))}")
    for source, where in ((said, "config.json"), (given, "the caller")):
        agree({name: value for name, value in source.items() if name in found}, found, where)
        check(source, where)
    free = {name: value for name, value in {**implied, **said}.items() if name in FREE[family] and value is not None}
    told = {name: value for name, value in given.items() if name in FREE[family] and value is not None}
    if {"heads", "head_dim"} & set(told):
        free = {name: value for name, value in free.items() if name not in ("heads", "head_dim")}
    return found | COMPLETE[family](free | told, plan)


def check(said: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a value of the wrong kind."""
    for name, value in said.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        whole = number and isinstance(value, int) and 0 < value <= 1 << 20
        good = {"scaling": number and value > 0, "act": value in ("gelu", "quick_gelu"), "eos": whole or value == 0,
                "upcast": isinstance(value, bool)}  # fmt: skip
        if value is not None and not good.get(name, whole if name in (*UNET, "context_dim") else True):
            raise ConfigError(f"{where} says {name} = {value!r}, which is no such number or choice")


def read_unet(config: Mapping[str, Any], plan: UNetPlan) -> dict[str, Any]:
    """UNet2DConditionModel's and ControlNetModel's; their attention_head_dim is a number of heads."""
    counts = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    counts = [counts] * len(plan.channels) if isinstance(counts, int) else list(counts)
    by_level = list(zip(plan.channels, counts, strict=True))
    pairs = [pair for i, pair in enumerate(by_level) if plan.depth[i] or i in plan.hollow]
    pairs.append((plan.channels[-1], counts[-1]))  # the bottleneck's
    dims = {ch // count if ch % count == 0 else None for ch, count in pairs}
    heads: dict[str, Any] = {"heads": pairs[0][1]}
    if len({count for _, count in pairs}) > 1:
        if len(dims) > 1 or None in dims:
            raise ConfigError(
                f"config.json says attention_head_dim = {counts}; here heads are alike in width or in number"
            )
        heads = {"head_dim": dims.pop()}
    depth = config.get("transformer_layers_per_block", 1)
    depths = [depth] * len(plan.channels) if isinstance(depth, int) else list(depth)
    here = [(want, have) for want, have in zip(depths, plan.depth, strict=True) if have]
    if any(want != have for want, have in here):
        raise ConfigError(f"config.json says transformer_layers_per_block = {depth}, the tensors {list(plan.depth)}")
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if (kind == "UNetMidBlock2D") != plan.plain_mid:
        raise ConfigError(f"config.json says mid_block_type = {kind}, the tensors have another bottleneck")
    return heads | {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "channels": config.get("block_out_channels"),
        "blocks": config.get("layers_per_block", 2),
        "context_dim": config.get("cross_attention_dim", 1280),
        "groups": config.get("norm_num_groups", 32),
        "id_dim": config.get("addition_time_embed_dim"),
        "hint": config.get("conditioning_embedding_out_channels"),
        "hint_channels": config.get("conditioning_channels"),
    }


def read_vae(config: Mapping[str, Any], plan: Any) -> dict[str, Any]:
    """AutoencoderKL's."""
    return {
        "in_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "channels": config.get("block_out_channels"),
        "blocks": config.get("layers_per_block", 1),
        "groups": config.get("norm_num_groups", 32),
        "scaling": config.get("scaling_factor", 0.18215),
        "upcast": config.get("force_upcast"),
    }


def read_clip(config: Mapping[str, Any], plan: ClipPlan) -> dict[str, Any]:
    """CLIPTextConfig's and CLIPVisionConfig's; an eos_token_id of 2 is older than the token's true number."""
    config = (CLIP_VISION if plan.vision else CLIP_TEXT) | dict(config)
    said = {ours: config[theirs] for ours, theirs in CLIP_NAMES.items() if theirs in config}
    return said if plan.vision or config["eos_token_id"] == 2 else said | {"eos": config["eos_token_id"]}


def complete_unet(free: Mapping[str, Any], plan: UNetPlan) -> dict[str, Any]:
    """The free settings of a UNet with conventions for those not given, checked against the widths."""
    out: dict[str, Any] = {"groups": 32, **free}
    attending = {ch for i, ch in enumerate(plan.channels) if plan.depth[i] or i in plan.hollow} | {plan.channels[-1]}
    if plan.context_dim is None:
        out.setdefault("context_dim", 2048)
    if "heads" not in free and "head_dim" not in free:
        out |= {"heads": 8} if plan.context_dim == 768 and not plan.vector_dim else {"head_dim": 64}
    if "head_dim" not in out:
        out["head_dim"] = None
    divisor, what = (out["head_dim"], "channels a head") if out["head_dim"] else (out["heads"], "heads")
    for width in sorted(attending):
        if width % divisor:
            raise ConfigError(f"{width} channels do not divide into {divisor} {what}: give heads= or head_dim=")
    divides(out["groups"], {f"norm.{ch}.weight": (ch,) for ch in plan.channels}, "give groups=")
    if plan.vector_dim is None:
        if wrong := [name for name in ("pooled_dim", "ids") if name in free]:
            raise ConfigError(f"the tensors have no pooled text and no ids: leave {wrong[0]} out")
        return {name: value for name, value in out.items() if name != "id_dim"} | {"pooled_dim": None}
    id_dim = out.setdefault("id_dim", 256)
    ids = out.setdefault("ids", 5 if plan.vector_dim - 5 * id_dim == plan.context_dim else 6)
    pooled = plan.vector_dim - ids * id_dim
    if pooled <= 0 or out.setdefault("pooled_dim", pooled) != pooled:
        told = f"{plan.vector_dim} numbers beside the time, and {ids} ids of {id_dim} leave {pooled}"
        raise ConfigError(f"the tensors take {told} for the pooled text: give ids=, id_dim= or pooled_dim=")
    return out


def complete_vae(free: Mapping[str, Any], plan: Any) -> dict[str, Any]:
    """The free settings of an autoencoder; the scaling has to be there."""
    if "scaling" not in free:
        raise ConfigError(
            "the tensors do not say the latents' scaling: give scaling=0.13025 (SDXL) or 0.18215 (SD 1, 2)"
        )
    out = {"groups": 32, "upcast": free["scaling"] == 0.13025, **free}
    divides(out["groups"], {f"norm.{ch}.weight": (ch,) for ch in plan.channels}, "give groups=")
    return out


def complete_clip(free: Mapping[str, Any], plan: ClipPlan) -> dict[str, Any]:
    """The free settings of a tower with those of the published tower of its width."""
    heads, act = TOWERS.get(("clip_vision" if plan.vision else "clip_text", plan.width), (None, None))
    out = {"heads": heads, "act": act, **free}
    if out["heads"] is None or out["act"] is None:
        raise ConfigError(f"no published tower is {plan.width} wide: give heads= and act= (gelu or quick_gelu)")
    if plan.width % out["heads"]:
        raise ConfigError(f"{plan.width} channels do not divide into {out['heads']} heads: give heads=")
    return out


READ: dict[str, Callable[..., dict[str, Any]]] = {
    "unet": read_unet,
    "controlnet": read_unet,
    "vae": read_vae,
    "clip_text": read_clip,
    "clip_vision": read_clip,
}
COMPLETE: dict[str, Callable[..., dict[str, Any]]] = {
    "unet": complete_unet,
    "controlnet": complete_unet,
    "vae": complete_vae,
    "clip_text": complete_clip,
    "clip_vision": complete_clip,
}

"""Which layout a set of keys is in: told from the keys and shapes alone, never from a file's name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from . import adm, ddpm, ddpmpp
from .errors import LayoutError
from .names import Shape


@dataclass(frozen=True)
class Layout:
    """A family's module with its tables, and the column of a layout in them."""

    name: str
    family: str  # ddpm | adm | ddpmpp
    tables: ModuleType
    column: int
    keys: str  # what its keys begin with


DIFFUSERS_KEYS = (
    r"(time_embedding\.linear_[12]|class_embedding|conv_in|down_blocks\.\d+\.(resnets|attentions|downsamplers)"
    r"|mid_block\.(resnets|attentions)|up_blocks\.\d+\.(resnets|attentions|upsamplers)|conv_norm_out|conv_out)\."
)
HO = Layout(
    "Ho DDPM (.ckpt of SDEdit and Asyrp)", "ddpm", ddpm, ddpm.HO,
    r"(temb\.dense\.[01]|conv_in|down\.\d+\.(block|attn|downsample)|mid\.(block|attn)_[12]"
    r"|up\.\d+\.(block|attn|upsample)|norm_out|conv_out)\.",
)  # fmt: skip
DIFFUSERS = Layout("diffusers UNet2DModel", "ddpm", ddpm, ddpm.DIFFUSERS, DIFFUSERS_KEYS)
DIFFUSERS_2022 = Layout(
    "diffusers UNet2DModel, attention names of 2022", "ddpm", ddpm, ddpm.DIFFUSERS_2022, DIFFUSERS_KEYS
)
GUIDED = Layout(
    "guided-diffusion (.pt)", "adm", adm, adm.GUIDED,
    r"(time_embed\.[02]|label_emb|input_blocks\.\d+\.\d|middle_block\.\d|output_blocks\.\d+\.\d|out\.[02])\.",
)  # fmt: skip
ADM_DIFFUSERS = Layout("ADM in diffusers' names", "adm", adm, adm.DIFFUSERS, DIFFUSERS_KEYS)
SCORE_SDE = Layout("score_sde DDPM++ (.pth)", "ddpmpp", ddpmpp, ddpmpp.SCORE_SDE, r"all_modules\.\d+\.")
LAYOUTS = (HO, DIFFUSERS, DIFFUSERS_2022, GUIDED, ADM_DIFFUSERS, SCORE_SDE)

# networks that are often mistaken for these, by a key that none of these has
FOREIGN = {
    r"(model\.)?diffusion_model\.|.*\.transformer_blocks\.\d": "a latent diffusion UNet with text (Stable Diffusion)",
    r"all_modules\.0\.W$": "a variance-exploding NCSN++",
    r"(encoder\.(down|mid|conv_in)|decoder\.(up|mid|conv_in)|first_stage_model)": "an autoencoder",
    r"(.*\.)?(lora_(down|up|A|B|unet)|lora_te)": "a LoRA",
    r"(block\d+\.|\d+\.)?(temb_proj|norm2|in_layers\.[02]|emb_layers\.1|out_layers\.[03])\.": "Asyrp's delta blocks",
    r"(text_model|vision_model|visual)\.": "a CLIP model",
}
ELSEWHERE = {
    "a latent diffusion UNet with text (Stable Diffusion)": "`diaphane generate` draws with such models, "
    "diaphane.weights.pipeline.load and latent.load read them",
    "an autoencoder": "diaphane.weights.latent.load reads autoencoders",
    "a CLIP model": "diaphane.weights.latent.load reads CLIP",
    "a LoRA": "`diaphane generate --lora` takes it",
    "Asyrp's delta blocks": "`diaphane asyrp --delta` takes them",
}
PREFIXES = ("state_dict.", "ema.", "model_ema.", "module.", "model.")
WRAPPERS = ("ema", "model_ema", "state_dict", "model")  # the first that is there: averaged weights before raw ones


def detect(shapes: Mapping[str, Shape]) -> Layout:
    """The layout of most of the keys.  Raises LayoutError, naming the nearest, if it has less than half of them."""
    fits: dict[Layout, int] = {}
    for layout in (DIFFUSERS, HO, GUIDED, SCORE_SDE):
        begins = re.compile(layout.keys, re.ASCII)
        fits[layout] = sum(begins.match(key) is not None for key in shapes)
        if fits[layout] == len(shapes):
            break
    layout = max(fits, key=lambda fit: fits[fit])
    if 2 * fits[layout] <= len(shapes):
        near = f"the nearest is {layout.name}, with {fits[layout]} of {len(shapes)} keys" if fits[layout] else ""
        strange = [key for key in shapes if not re.match(layout.keys, key)]
        raise LayoutError(f"no known layout has such keys; {near or 'none comes near'}", unexpected=strange)
    if layout is not DIFFUSERS:
        return layout
    emb, conv = (shapes.get(f"down_blocks.0.resnets.0.{leaf}.weight", (0,))[:1] for leaf in ("time_emb_proj", "conv1"))
    doubled = emb == tuple(2 * c for c in conv) != (0,)
    if doubled or any(
        re.match(r"down_blocks\.0\.downsamplers\.0\.(norm|conv)\d\.|class_embedding\.", key) for key in shapes
    ):
        return ADM_DIFFUSERS
    return DIFFUSERS_2022 if any(re.search(r"\.attentions\.\d\.query\.", key) for key in shapes) else DIFFUSERS


def foreign(keys: Iterable[str]) -> str:
    """What the keys are of, if it is a network often mistaken for one of these; else nothing."""
    keys = list(keys)
    return next((what for pattern, what in FOREIGN.items() if any(re.match(pattern, key) for key in keys)), "")


def state(content: Any) -> dict[str, Tensor]:
    """The named tensors in what a file holds, without wrappers and prefixes; averaged weights (EMA) before raw ones.

    Raises LayoutError if there are none, or if score_sde's list of averages does not fit its names.
    """
    if isinstance(content, Mapping):
        if isinstance(ema := content.get("ema"), Mapping) and "shadow_params" in ema:
            return averaged(ema["shadow_params"], state(content.get("model")))
        for wrapper in WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                return state(content[wrapper])
    if not isinstance(content, Mapping) or not content:
        raise LayoutError(f"there are no named tensors in it, but {type(content).__name__}")
    if strange := [
        str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]:
        raise LayoutError("not all of it is named tensors", unexpected=strange)
    return stripped(dict(content))


def stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the prefixes that all of them have; of averaged and raw weights side by side, the averaged."""
    begins = [prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)]
    if not begins or not all(key.startswith(tuple(begins)) for key in tensors):
        return tensors
    prefix = begins[0]
    return stripped({key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)})


def averaged(shadow: Any, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """score_sde's list of averages under the names of the parameters they average, in the same order."""
    names = [name for name in model if name not in ddpmpp.BUFFERS]
    if not isinstance(shadow, list) or len(shadow) != len(names) or not all(isinstance(p, Tensor) for p in shadow):
        count = len(shadow) if isinstance(shadow, list) else 0
        raise LayoutError(f"ema.shadow_params holds {count} tensors, the model {len(names)} parameters")
    for name, average in zip(names, shadow, strict=True):
        if average.shape != model[name].shape:
            raise LayoutError(f"ema.shadow_params is in another order than the model's parameters, from {name} on")
    return dict(zip(names, shadow, strict=True))

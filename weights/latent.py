"""The parts of a latent diffusion model (UNet, autoencoder, CLIP, ControlNet), from single files and folders."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import clip, controlnet, hub, unet, vae
from .catalogue import CATALOGUE
from .errors import ConfigError, LayoutError, MissingFileError, WeightsError, first
from .files import check_floating, opened, read_json
from .latent_settings import settings
from .layout import Layout, state
from .load import PREFERRED, SUFFIXES, Network, chosen
from .names import Shape, rename

# what a single file holds, by the beginnings of its keys, under the names of diffusers' folders
PREFIXES = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",  # Stable Diffusion 2
    "control_model.": "controlnet",
}
# and besides: schedules, averaged weights, and marks of how a network was trained
BESIDES = re.compile(
    r"(denoiser\.sigmas|model_ema\..*|betas|(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?alphas_cumprod(_prev)?|sqrt_recipm?1?_"
    r"alphas_cumprod|posterior_.*|lvlb_weights|logvar|global_step|scale_factor|v_pred|ztsnr|edm_(mean|std|vpred\..*))$"
)
# what a part has to be
FAMILIES = {
    "unet": "unet",
    "vae": "vae",
    "text_encoder": "clip_text",
    "text_encoder_2": "clip_text",
    "image_encoder": "clip_vision",
    "controlnet": "controlnet",
}
# the two towers of a whole CLIP: where its config.json tells of each, and how the keys of the second begin
TOWERS = {"text_encoder": "text_config", "image_encoder": "vision_config"}
VISION = ("visual.", "vision_model.", "visual_projection.")
# the first whose mark any key bears
LAYOUTS = (
    Layout("ControlNet, LDM", "controlnet", controlnet, controlnet.LDM, r"input_hint_block\."),
    Layout("ControlNet, diffusers", "controlnet", controlnet, controlnet.DIFFUSERS, r"controlnet_cond_embedding\."),
    Layout("UNet, LDM", "unet", unet, unet.LDM, r"input_blocks\.\d+\.1\.transformer_blocks\."),
    Layout("UNet, diffusers", "unet", unet, unet.DIFFUSERS, r"(down_blocks\.\d+|mid_block)\.attentions\.\d+\.transf"),
    Layout("autoencoder, LDM", "vae", vae, vae.LDM, r"decoder\.(up|mid)\."),
    Layout(
        "autoencoder, diffusers, 2022", "vae", vae, vae.DIFFUSERS_2022, r"decoder\.mid_block\.attentions\.0\.query\."
    ),
    Layout("autoencoder, diffusers", "vae", vae, vae.DIFFUSERS, r"decoder\.(up_blocks|mid_block)\."),
    Layout("CLIP for pictures, open_clip", "clip_vision", clip, clip.OPEN_CLIP, r"visual\."),
    Layout("CLIP for pictures, transformers", "clip_vision", clip, clip.TRANSFORMERS, r"vision_model\."),
    Layout("CLIP for pictures, flat", "clip_vision", clip, clip.FLAT, r"embeddings\.patch_embedding\."),
    Layout("CLIP for text, open_clip", "clip_text", clip, clip.OPEN_CLIP, r"transformer\.resblocks\."),
    Layout("CLIP for text, transformers", "clip_text", clip, clip.TRANSFORMERS, r"text_model\."),
    Layout("CLIP for text, flat", "clip_text", clip, clip.FLAT, r"embeddings\.token_embedding\."),
)


def load(
    source: str | os.PathLike[str],
    part: str | None = None,
    *,
    file: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **given: Any,
) -> Network:
    """One part of a model: of a single file, of a folder of diffusers', or a file of its own, on this disk or the Hub.

    `part` is unet, vae, text_encoder, text_encoder_2, image_encoder or controlnet; it may be left out where there is
    one alone.  `source` may be a name of the catalogue or a repository, of which `file` or, else, the part's weights in
    full precision are fetched.  `config` and `given` are as in `diaphane.weights.load`.  Raises a WeightsError of one
    line.
    """
    path = Path(source).expanduser()
    if isinstance(source, str) and not path.exists():
        path = fetched(source, part, file)
    if path.is_dir():
        inside = path / part if part and (path / part).is_dir() else path
        if part and inside == path and any(child.is_dir() for child in path.iterdir()):
            raise MissingFileError(f"there is no {part} in {path}: it has {first(folders(path), 9) or 'no folders'}")
        path = chosen(inside, file)
    if not path.is_file():
        raise MissingFileError(f"there is no {path}: give a weight file or a folder")
    return read(path, part, config=config, **given)


def fetched(name: str, part: str | None, file: str | None) -> Path:
    """The file of a catalogue entry, or a repository's.  Raises MissingFileError for what is neither, HubError."""
    if name in CATALOGUE:
        return hub.fetch_entry(CATALOGUE[name])
    if not hub.is_repo(name) or name.endswith(SUFFIXES):
        raise MissingFileError(f"there is no {name[:200]}: give a file, a folder, a repository or a catalogued name")
    inside = [f"{part}/{found}" for found in PREFERRED] if part else []
    return hub.fetch(name, [file] if file else [*inside, *PREFERRED])


def folders(path: Path) -> list[str]:
    """The names of the folders in a folder."""
    return sorted(child.name for child in path.iterdir() if child.is_dir())


def read(
    path: Path,
    part: str | None = None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    assumed: Mapping[str, Any] | None = None,
    **given: Any,
) -> Network:
    """One part of a model in one local file.  Nothing is copied, cast or searched: its tensors stay in the file.

    `assumed` holds where neither the file nor its config.json nor the caller says anything.
    """
    found = opened(path)
    try:
        held, implied = parts(state(found.content))
        implied = {**(assumed or {}), **implied}
        if part is None and len(held) > 1:
            raise LayoutError(f"it holds {', '.join(held)}: choose one with part=")
        if part is not None and "" not in held and part not in held:
            raise LayoutError(f"it holds {', '.join(held)}, not {part}")
        name = next(iter(held)) if part is None or "" in held else part
        if config is None:
            beside = path.parent / "config.json"
            whole = read_json(beside) if beside.is_file() else {}
            said = whole.get(TOWERS.get(name, ""), {}) if name else whole
        else:
            said = config if isinstance(config, Mapping) else read_json(Path(config))
        layout, plan, tensors = renamed(held[name])
        if FAMILIES.get(part or "", layout.family) != layout.family:
            raise LayoutError(f"it is {layout.name}, which is no {part}")
        check_floating(tensors)
        kwargs = settings(layout.family, plan, said, given, implied)
    except LayoutError as e:
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"{path}: {e.message}".removesuffix(": "), **lists) from e
    except WeightsError as e:
        raise type(e)(f"{path}: {e}") from e
    marks = {name: value for name, value in implied.items() if name in ("prediction", "zero_terminal_snr")}
    return Network(layout.family, kwargs, tensors, layout.name, found.paths, found.metadata | marks)


def parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a file holds, part by part ("": a file of one part, its keys as they are), and what its keys imply.

    Implied are the autoencoder's scaling, and the prediction (v) where a key says so.  Raises LayoutError for keys of
    no known part beside known ones, ConfigError for a scaling that is none.
    """
    held: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is not None:
            held.setdefault(PREFIXES[prefix], {})[key.removeprefix(prefix)] = tensor
        elif not BESIDES.match(key):
            strange.append(key)
    if not held:
        return towers(tensors), {}
    if strange:
        raise LayoutError(f"it holds {', '.join(held)}, and keys of no known part", unexpected=strange)
    held = {part: held[part] for part in dict.fromkeys(PREFIXES.values()) if part in held}
    implied: dict[str, Any] = {}
    if any(key.startswith("conditioner.") for key in tensors):
        implied["scaling"] = 0.13025
    elif any(key.startswith("cond_stage_model.") for key in tensors):
        implied["scaling"] = 0.18215
    if "scale_factor" in tensors:
        implied["scaling"] = scale_of(tensors["scale_factor"])
    implied |= {"prediction": "v"} if "v_pred" in tensors else {}
    implied |= {"zero_terminal_snr": "yes"} if "ztsnr" in tensors else {}
    return held, implied


def scale_of(tensor: Tensor) -> float:
    """The scaling that a file says, to six digits.  Raises ConfigError where it is not one positive number."""
    value = float(tensor) if tensor.numel() == 1 else 0.0
    if not 0 < value < float("inf"):
        raise ConfigError("its scale_factor is not one positive number")
    return float(f"{value:.6g}")


def towers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The two towers of a whole CLIP, or else all there is as one part."""
    pictures = {key: tensor for key, tensor in tensors.items() if key.startswith(VISION)}
    text = {key: tensor for key, tensor in tensors.items() if key not in pictures and key != "logit_scale"}
    whole = pictures and any("token_embedding" in key for key in text)
    return {"text_encoder": text, "image_encoder": pictures} if whole else {"": dict(tensors)}


def detect(keys: Iterable[str]) -> Layout:
    """The layout whose mark a key bears.  Raises LayoutError if none does."""
    keys = list(keys)
    for layout in LAYOUTS:
        mark = re.compile(layout.keys, re.ASCII)
        if any(mark.match(key) for key in keys):
            return layout
    known = "a text-conditioned UNet, an autoencoder, CLIP or a ControlNet"
    raise LayoutError(f"these are not the keys of {known} ({first(keys) or 'there are none'})")


def renamed(tensors: Mapping[str, Tensor]) -> tuple[Layout, Any, dict[str, Tensor]]:
    """A part's layout, its numbers, and its tensors under our names.  Raises LayoutError that names the layout."""
    layout = detect(tensors)
    tables = layout.tables
    if tables is clip and layout.column == clip.OPEN_CLIP:
        tensors = clip.unfused(tensors)
    if tables is vae and layout.column == vae.LDM:  # the losses of its training are in some published files
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("loss.")}
    shapes: dict[str, Shape] = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        plan = tables.plan(shapes, layout.column)
        strays = tables.strays(plan, layout.column)
        return layout, plan, rename(tensors, tables.table(plan, layout.column), tables.want(plan), ignore=strays)
    except LayoutError as e:
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"in the layout {layout.name}: {e.message}".removesuffix(": "), **lists) from e

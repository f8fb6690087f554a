"""A whole latent diffusion model from a folder, a repository or a single file, and what it says of itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import hub, latent
from .catalogue import CATALOGUE
from .conventions import Conventions, of_scheduler, of_single_file
from .errors import ConfigError, LayoutError, MissingFileError, WeightsError
from .files import Opened, check_floating, opened, read_json, sharded
from .latent_settings import settings
from .layout import foreign, state
from .load import SUFFIXES, Network
from .words import ROWS, TOKENIZERS, Folder, Words, own_words, words_from, words_in

Source = str | os.PathLike[str]
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
WIDTHS = {768: "CLIP L", 1024: "CLIP H", 1280: "CLIP bigG"}


@dataclass(frozen=True)
class Pipeline:
    """Parts under the names of diffusers' folders, a tokeniser for each text encoder that has one, and conventions."""

    parts: dict[str, Network]  # unet, vae, and text_encoder, text_encoder_2 or both
    words: dict[str, Words]  # by text encoder; empty where a tower is not of CLIP's vocabulary and none came along
    says: Conventions = field(default_factory=Conventions)

    @property
    def texts(self) -> list[str]:
        """The text encoders there are, in the order in which their states are laid side by side."""
        return [name for name in PARTS[2:] if name in self.parts]


def load(
    source: Source,
    *,
    variant: str | None = None,
    file: str | None = None,
    revision: str | None = None,
    tokenizer: Source | None = None,
    replaced: Mapping[str, Source] | None = None,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    prediction: str | None = None,
) -> Pipeline:
    """A model's parts, nothing of them read, copied or cast yet: tensors stay in their files until they are used.

    `source` is a single file, a folder with model_index.json, a repository of either kind (`file` names the single
    file in it) or a name of the catalogue.  `variant` is the "fp16" of file names such as model.fp16.safetensors.
    `tokenizer` is a folder or a repository with vocab.json and merges.txt, in it or in its tokenizer/; without one, and
    for single files, which hold none, towers of 49,408 tokens get CLIP's own, which ships with the package.  `replaced`
    takes parts from elsewhere ({"vae": path}; an autoencoder whose files do not say its scaling has that of the
    model's), `given` settings that tensors cannot say ({"unet": {"head_dim": 64}}),
    and `prediction` is eps or v where no file says which.  Raises a WeightsError of one line, among others for parts
    that do not belong together.
    """
    name = os.fspath(source)
    given = given or {}
    if entry := CATALOGUE.get(name) if isinstance(source, str) else None:
        if entry.family != "model" or entry.repo is None:
            raise ConfigError(f"{name} is of the kind {entry.family}, not a whole latent model")
        file = file or (None if entry.variant else entry.file)
        name, variant, prediction = entry.repo, variant or entry.variant, prediction or entry.prediction
    if strange := [part for part in (*(replaced or {}), *given) if part not in PARTS]:
        raise ConfigError(f"a model has no part {strange[0]}: its parts are {', '.join(PARTS)}")
    path = single(name, file, revision)
    if path is not None:
        parts, says = in_single_file(path, given)
        words = {}
    else:
        folder = Folder(name, revision)
        parts, says = in_folder(folder, variant, given)
        words = {text: found for text in parts if (found := words_in(folder, TOKENIZERS.get(text, "")))}
    for part, elsewhere in (replaced or {}).items():
        scaling = {"scaling": parts[part].config["scaling"]} if part == "vae" and part in parts else {}
        parts[part] = alone(part, elsewhere, variant, given.get(part, {}), scaling)
    consistent(parts, list(replaced or {}))
    towers = {name: parts[name].config for name in PARTS[2:] if name in parts}
    quick = {name: cfg["act"] == "quick_gelu" for name, cfg in towers.items()}
    if tokenizer is not None:
        words = words_from(tokenizer, quick)
    else:
        clip = {name: quick[name] for name, cfg in towers.items() if name not in words and cfg["vocabulary"] == ROWS}
        words |= own_words(clip)
    if prediction is not None:
        says = replace(says, prediction=prediction)
    return Pipeline(parts, words, says.checked(str(path or name)))


def single(name: str, file: str | None, revision: str | None) -> Path | None:
    """The single file that a source is, or None where it is a folder or a repository of parts."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if file and not (path / file).is_file():
            raise MissingFileError(f"there is no {file} in {path}")
        return path / file if file else None
    if not hub.is_repo(name) or name.endswith(SUFFIXES):
        raise MissingFileError(f"there is no {name or 'file without a name'}: give a file, a folder or a repository")
    return hub.fetch(name, [file], revision=revision) if file else None


def in_single_file(path: Path, given: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Network], Conventions]:
    """The parts of an LDM or sgm file.  Raises LayoutError where one is missing."""
    found = opened(path)
    try:
        tensors = state(found.content)
        held, implied = latent.parts(tensors)
        text = next((part for part in PARTS[2:] if part in held), "text_encoder")
        if lost := [part for part in ("unet", "vae", text) if part not in held]:
            what = foreign(tensors)
            has = f"is {what}" if what else f"holds {', '.join(filter(None, held)) or 'no part of a model'}"
            raise LayoutError(f"it {has}: a whole model has {lost[0]} too")
        if edm := [key for key in tensors if key.startswith("edm_")]:
            raise ConfigError(f"{edm[0]} says that the UNet was trained in EDM's terms; eps and v are done here")
        parts = {part: network(found, held[part], {}, given.get(part, {}), implied) for part in PARTS if part in held}
        parts = {part: without_last_layer(net) if part == "text_encoder" else net for part, net in parts.items()}
        return parts, of_single_file(parts["unet"].config, implied, found.metadata)
    except WeightsError as e:
        raise located(e, str(path)) from e


def without_last_layer(net: Network) -> Network:
    """Stable Diffusion 2 reads open_clip's last layer but one, and diffusers' files end there.  Others as they are."""
    if net.layout != "CLIP for text, open_clip":
        return net
    last = net.config["layers"] - 1
    kept = {name: t for name, t in net.tensors.items() if not name.startswith(f"layers.{last}.")}
    return replace(net, config={**net.config, "layers": last}, tensors=kept)


def in_folder(
    folder: Folder, variant: str | None, given: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Network], Conventions]:
    """The parts that a model_index.json names.  Raises MissingFileError, LayoutError."""
    index = folder.json("model_index.json")
    if index is None:
        raise MissingFileError(f"there is no model_index.json in {folder.name}: name a single file in it with file=")
    named = {part for part, kind in index.items() if isinstance(kind, list) and any(kind)}
    if lost := [part for part in ("unet", "vae") if part not in named]:
        raise LayoutError(f"{folder.name} is a {index.get('_class_name')} and has no {lost[0]}: UNets are read here")
    parts = {}
    for part in [part for part in PARTS if part in named]:
        parts[part] = in_subfolder(folder, part, variant, given.get(part, {}))
    scheduler = folder.json("scheduler/scheduler_config.json")
    config = folder.json("unet/config.json") or {}
    try:
        says = of_scheduler(scheduler or {}, index, config)
        if scheduler is None:  # of timesteps and prediction no more is said than in a single file
            kin = of_single_file(parts["unet"].config, {}, {})
            says = replace(says, prediction=kin.prediction, offset=kin.offset)
        return parts, says
    except WeightsError as e:
        raise located(e, folder.name) from e


def in_subfolder(
    folder: Folder,
    part: str,
    variant: str | None,
    given: Mapping[str, Any],
    assumed: Mapping[str, Any] = MappingProxyType({}),
) -> Network:
    """One part of a folder, or of a folder that is the part itself (part "")."""
    at = f"{part}/" if part else ""
    middle = f".{variant}" if variant else ""
    stems = ["model", "pytorch_model"] if part.startswith("text") else ["diffusion_pytorch_model", "model"]
    stems = stems if part else ["diffusion_pytorch_model", "model"]
    indices = [f"{stem}.safetensors.index{middle}.json" for stem in stems]
    files = [f"{stem}{middle}{end}" for end in (".safetensors", ".bin") for stem in stems]
    for name in [*files[: len(stems)], *indices, *files[len(stems) :]]:
        path = folder.file(at + name)
        if path is None:
            continue
        if name in indices:
            for shard in sorted({str(v) for v in (read_json(path).get("weight_map") or {}).values()}):
                folder.file(at + shard)
        found = sharded(path) if name in indices else opened(path)
        try:
            return network(found, state(found.content), folder.json(f"{at}config.json") or {}, given, assumed)
        except WeightsError as e:
            raise located(e, str(path)) from e
    which = f"{variant} weights" if variant else "weights"
    hint = "leave variant out, or name another" if variant else 'perhaps only variant="fp16" is there'
    raise MissingFileError(f"there are no {which} of {part or 'the part'} in {folder.name}: {hint}")


def alone(
    part: str, source: Source, variant: str | None, given: Mapping[str, Any], assumed: Mapping[str, Any]
) -> Network:
    """One part from elsewhere: a file, a folder of its own or in a model, a repository, a name of the catalogue.

    `assumed` holds where nothing else says anything.
    """
    name = os.fspath(source)
    entry = CATALOGUE.get(name) if isinstance(source, str) else None
    if entry and entry.variant and entry.repo:
        name, variant = entry.repo, variant or entry.variant
    path = hub.fetch_entry(entry) if entry and not entry.variant else Path(name).expanduser()
    if path.is_file():
        return latent.read(path, part if holds_parts(path) else None, assumed=assumed, **given)
    folder = Folder(name)
    if not folder.local and not hub.is_repo(name):
        raise MissingFileError(f"there is no {name}: give a file, a folder or a repository for {part}")
    whole = folder.file(f"{part}/config.json") is not None
    return in_subfolder(folder, part if whole else "", variant, given, assumed)


def holds_parts(path: Path) -> bool:
    """Whether a file holds a model, not one part."""
    try:
        return "" not in latent.parts(state(opened(path).content))[0]
    except WeightsError:
        return False  # latent.load says better what is wrong


def network(
    found: Opened,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    implied: Mapping[str, Any],
) -> Network:
    """A part's tensors under our names, and its settings."""
    layout, plan, ours = latent.renamed(tensors)
    check_floating(ours)
    kwargs = settings(layout.family, plan, config, given, implied)
    return Network(layout.family, kwargs, ours, layout.name, found.paths, found.metadata)


def located(e: WeightsError, where: str) -> WeightsError:
    """The same error, beginning with where it was found."""
    if isinstance(e, LayoutError):
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        return LayoutError(f"{where}: {e.message}".removesuffix(": "), **lists)
    return type(e)(f"{where}: {e}")


def consistent(parts: Mapping[str, Network], replaced: Sequence[str] = ()) -> None:
    """Raises LayoutError for parts that do not belong together, naming what was found and what fits.

    What was replaced is taken to be at fault, where it may be.
    """
    for part, family in {"unet": "unet", "vae": "vae", **dict.fromkeys(PARTS[2:], "clip_text")}.items():
        if part in parts and parts[part].family != family:
            raise LayoutError(f"{part} is of the kind {parts[part].family} ({parts[part].path}); {family} fits there")
    unet, vae = parts["unet"].config, parts["vae"].config
    texts = [name for name in PARTS[2:] if name in parts]
    total = sum(parts[name].config["width"] for name in texts)
    if total != unet["context_dim"]:
        likely = sorted(texts, key=lambda name: name not in replaced)
        name = next((name for name in likely if fits(parts[name], unet["context_dim"] - total)), likely[0])
        width = parts[name].config["width"]
        need = unet["context_dim"] - (total - width)
        fit = f"{WIDTHS.get(need, 'one')} ({need}) fits" if need > 0 else "it has one too many"
        found = f"{WIDTHS.get(width, 'a tower')} ({width} wide, {parts[name].path})"
        raise LayoutError(f"{name} is {found}; the UNet reads tokens of {unet['context_dim']}: {fit}")
    pooled, last = unet["pooled_dim"], parts[texts[-1]].config["projection"]
    if pooled is not None and pooled != last:
        raise LayoutError(f"{texts[-1]} projects to {last}; the UNet takes pooled text of {pooled}")
    if unet["in_channels"] not in ((z := vae["latent_channels"]), 2 * z + 1) or unet["out_channels"] != z:
        channels = unet["in_channels"]
        raise LayoutError(f"the UNet takes {channels} channels, latents have {z}: {z} or, inpainting, {2 * z + 1} fit")


def fits(net: Network, excess: int) -> bool:
    """Whether a published tower in this one's place would make up the difference."""
    return net.config["width"] + excess in WIDTHS

"""From a file, a folder, an embedded name, a catalogue name or a repository to a network's settings and tensors."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from . import adm, hub
from .catalogue import CATALOGUE
from .errors import LayoutError, MissingFileError, WeightsError
from .files import HALVES, check_finite, check_floating, opened, read_json, sha256
from .layout import ADM_DIFFUSERS, ELSEWHERE, detect, foreign, state
from .names import rename
from .settings import settings

EMBEDDED = Path(__file__).parent / "embedded"
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".safetensors.index.json")
# what a folder or repository is searched for, best first
PREFERRED = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
)


@dataclass(frozen=True)
class Network:
    """What a public file says: a family, the keyword arguments of its configuration, and tensors under our names."""

    family: str  # ddpm | adm | ddpmpp
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    layout: str
    paths: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The weight file, or the first of several."""
        return self.paths[0]

    @cached_property
    def sha256(self) -> str:
        """Of the weight file, in hex; read when first asked for."""
        return sha256(self.paths)


def load(
    source: str | os.PathLike[str],
    *,
    file: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    **given: Any,
) -> Network:
    """A network by any of its names: embedded, in the catalogue, a local file or folder, a repository of the Hub.

    `file` chooses one file of a folder or repository.  `config` is the settings (or a json file of them) in place
    of the config.json beside the weights; {} does without.  `given` are settings of the family that the tensors
    cannot say (resolution, groups, heads, head_dim, qkv, dropout); they win over `config`.  A plain word that names
    an embedded or catalogued network is that network, not a folder of that name (write ./word for the folder).
    Raises a WeightsError of one line with the cure, also for latent models, which `pipeline.load` and `latent.load`
    read.
    """
    entry = CATALOGUE.get(source) if isinstance(source, str) and source not in embedded() else None
    if entry and entry.family not in ("ddpm", "adm", "ddpmpp"):
        what = "a latent diffusion model" if entry.family == "model" else f"of the kind {entry.family}"
        hint = ": diaphane.weights.pipeline.load and `diaphane generate` take it" if entry.family == "model" else ""
        raise LayoutError(f"{source} is {what}; pixel DDPM, ADM and DDPM++ networks are read here{hint}")
    return read(find(source, file, revision), config=config, **given)


def read(path: Path, *, config: Mapping[str, Any] | str | os.PathLike[str] | None = None, **given: Any) -> Network:
    """The network in one local weight file.  Half-precision files are searched for NaN and infinity."""
    found = opened(path)
    if config is None:
        beside = path.parent / "config.json"
        config = read_json(beside) if beside.is_file() else {}
    elif not isinstance(config, Mapping):
        config = read_json(Path(config))
    where, tensors = str(path), {}
    try:
        tensors = state(found.content)
        layout = detect({key: tuple(t.shape) for key, t in tensors.items()})
        where = f"{path}, in the layout {layout.name}"
        if layout is ADM_DIFFUSERS:
            tensors = adm.fused(tensors)
        plan = layout.tables.plan({key: tuple(t.shape) for key, t in tensors.items()}, layout.column)
        strays = layout.tables.strays(plan, layout.column)
        tensors = rename(tensors, layout.tables.table(plan, layout.column), layout.tables.want(plan), ignore=strays)
    except LayoutError as e:
        if what := foreign(tensors):
            hint = f": {ELSEWHERE[what]}" if what in ELSEWHERE else ""
            raise LayoutError(f"{path} is {what}; pixel DDPM, ADM and DDPM++ networks are read here{hint}") from e
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"{where}: {e.message}".removesuffix(": "), **lists) from e
    try:
        check_floating(tensors)
        check_finite({name: tensor for name, tensor in tensors.items() if tensor.dtype in HALVES})
        kwargs = settings(layout, plan, config, given)
    except WeightsError as e:
        raise type(e)(f"{where}: {e}") from e
    return Network(layout.family, kwargs, tensors, layout.name, found.paths, found.metadata)


def embedded() -> tuple[str, ...]:
    """The names of the networks that ship with the package."""
    return tuple(sorted(path.parent.name for path in EMBEDDED.glob("*/diffusion_pytorch_model.safetensors")))


def find(source: str | os.PathLike[str], file: str | None = None, revision: str | None = None) -> Path:
    """The local weight file that a name stands for, fetched from the Hub if it has to be."""
    name = os.fspath(source)
    if isinstance(source, str) and name in embedded():
        return chosen(EMBEDDED / name, file)
    if isinstance(source, str) and name in CATALOGUE:
        return hub.fetch_entry(CATALOGUE[name])
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return chosen(path, file)
        if name and path.is_file():
            return path
    except (OSError, RuntimeError) as e:  # no permission, too long a name, nobody's home
        raise MissingFileError(f"cannot open {name[:200]}: {getattr(e, 'strerror', None) or e}") from e
    if isinstance(source, str) and hub.is_repo(name) and not name.endswith(SUFFIXES):
        return hub.fetch(name, [file] if file else PREFERRED, revision=revision)
    near = ", ".join(get_close_matches(name, (*embedded(), *CATALOGUE), n=3)) or "`diaphane fetch` lists them"
    raise MissingFileError(
        f"there is no {name or 'file without a name'}: give a weight file, a folder, a repository such as "
        f"google/ddpm-cifar10-32, or a name of the catalogue ({near})"
    )


def in_folder(folder: Path) -> list[Path]:
    """The weight files of a folder, the preferred one alone if it is there."""
    preferred = [folder / name for name in PREFERRED if (folder / name).is_file()]
    return preferred[:1] or sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))


def chosen(folder: Path, file: str | None) -> Path:
    """The weight file of a folder (or of `unet` in it): the one asked for, the preferred one, the only one."""
    if file:
        if not (folder / file).is_file():
            raise MissingFileError(f"there is no {file} in {folder}")
        return folder / file
    files = in_folder(folder) or (in_folder(folder / "unet") if (folder / "unet").is_dir() else [])
    if not files:
        raise MissingFileError(f"there is no weight file in {folder}: its name should end in {', '.join(SUFFIXES[:5])}")
    if len(files) > 1:
        raise MissingFileError(f"{folder} holds {len(files)} weight files: choose with file={files[0].name} or another")
    return files[0]

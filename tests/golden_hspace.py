"""Every case of an h-space folder, and a failing one for whatever in it is not known."""

from collections.abc import Callable, Iterable

from . import golden_asyrp, golden_nets, golden_networks, golden_walks
from .golden_reader import Case, Folder, unclaimed, unknown

ALONE: dict[str, Callable[[Folder, str], list[Case]]] = {
    "images": golden_walks.image_cases,
    "noise": golden_walks.noise_cases,
    "schedule": golden_walks.schedule_cases,
    "slerp": golden_networks.slerp_cases,
    "formula_models": golden_networks.formula_cases,
    "asyrp_train": golden_asyrp.train_cases,
}
PER_MODEL: dict[str, Callable[[Folder, str, str], list[Case]]] = {
    "unet": golden_networks.unet_cases,
    "invert": golden_walks.invert_cases,
    "steps": golden_walks.step_cases,
    "diffstyle": golden_walks.diffstyle_cases,
    "learned_range": golden_walks.learned_range_cases,
    "asyrp_steps": golden_asyrp.step_cases,
    "asyrp_edit": golden_asyrp.edit_cases,
}
# (json stem, key) -> the file whose cases read it; {} is the name of a network, which the next key gives
READ_BY = {
    ("inject", "skips"): "unet_{}",
    ("inject", "invert"): "invert_{}",
    ("inject", "steps"): "steps_{}",
    ("asyrp", "steps"): "asyrp_steps_{}",
    ("asyrp", "edit"): "asyrp_edit_{}",
    ("inject", "formula_models"): "formula_models",
    ("inject", "slerp_same_input_is_nan"): "slerp",
    ("inject", "slerp_norm_preserved_maxrel"): "slerp",
    ("asyrp", "train"): "asyrp_train",
    ("asyrp", "train_init_block"): "asyrp_train",
    ("asyrp", "train_change_rms"): "asyrp_train",
}
ALWAYS = {("inject", "sequences")}  # needs no file
SHARED = {("inject", "skip_channel_stride"), ("inject", "fw_gamma")}  # read by whatever unet_* there is
TOLD = {("inject", "split"), ("asyrp", "split"), ("inject", "image_decode")}  # for people


def cases(folder: Folder) -> list[Case]:
    """Files, tensors and json keys, each taken by a case or by one that fails."""
    found, stems = [], []
    for path in sorted(folder.path.iterdir()):
        kind, _, model = path.stem.rpartition("_")
        if path.suffix == ".safetensors" and path.stem in ALONE:
            found += ALONE[path.stem](folder, path.stem)
        elif path.suffix == ".safetensors" and kind in PER_MODEL and model in golden_nets.names():
            found += PER_MODEL[kind](folder, path.stem, model)
        elif path.name not in ("README.md", "inject.json", "asyrp.json"):
            found.append(unknown(folder, f"file {path.name}"))
            continue
        stems += [path.stem] if path.suffix == ".safetensors" else []
    found += golden_walks.sequence_cases(folder) + golden_asyrp.select_cases(folder)
    return found + unclaimed(folder, found, stems) + list(unread(folder, found))


def unread(folder: Folder, found: list[Case]) -> Iterable[Case]:
    """A failing case for every json entry that no case reads, a skipped one where its tensors are not in the folder."""
    for stem, document in folder.documents.items():
        for key, value in document.items():
            where = (stem, key)
            if where in TOLD | SHARED:
                continue
            if where == ("asyrp", "t_select"):
                taken = {path[-1] for case in found for path in case.paths if path[:2] == where}
                yield from (unknown(folder, f"t_select table {name}") for name in value.keys() - taken - {"cases"})
            elif where == ("inject", "diffstyle"):
                for model in sorted({run["model"] for run in value}):
                    yield from absent(folder, where, model, f"diffstyle_{model}")
            elif where not in READ_BY and where not in ALWAYS:
                yield unknown(folder, f"key {key} in {stem}.json")
            elif where in READ_BY and "{}" in READ_BY[where]:
                for model in value:
                    yield from absent(folder, where, model, READ_BY[where].format(model))
            elif where in READ_BY:
                yield from absent(folder, where, "", READ_BY[where])


def absent(folder: Folder, where: tuple[str, str], model: str, stem: str) -> Iterable[Case]:
    """What to say of a json entry whose tensors would be in the file `stem`."""
    if model and model not in golden_nets.names():
        yield unknown(folder, f"network {model} in {where[0]}.json: {where[1]}")
    elif not folder.has(stem):
        why = f"{stem}.safetensors is not in this folder"
        yield Case(f"{'.'.join(where)}.{model}".rstrip("."), lambda case: None, folder, skip=why)

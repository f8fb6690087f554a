"""Reading reference data so that nothing goes unread: what no case takes, and what a case leaves, are failures."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FORWARD, STEP, RUN, HALF = 1e-4, 2e-4, 1e-3, 1e-3  # tolerances, times max(1, max |reference|)
STAT = 2e-6  # and half a unit of the sixth decimal, to which the json files round


class Entry:
    """A json object that knows which of its keys were read."""

    def __init__(self, value: dict[str, Any], where: str):
        self.value, self.where = value, where
        self.read: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __getitem__(self, key: str) -> Any:
        if key not in self.read:
            self.read[key] = wrapped(self.value[key], f"{self.where}.{key}")
        return self.read[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.value else default

    def unread(self) -> list[str]:
        """Every key, at any depth, that nobody asked for."""
        inner = [e for value in self.read.values() for e in (value if isinstance(value, list) else [value])]
        missed = [f"{self.where}.{key}" for key in self.value if key not in self.read]
        return missed + [name for e in inner if isinstance(e, Entry) for name in e.unread()]


def wrapped(value: Any, where: str) -> Any:
    """Json values as they are, objects and lists of objects as entries."""
    if isinstance(value, dict):
        return Entry(value, where)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return [Entry(v, f"{where}[{i}]") for i, v in enumerate(value)]
    return value


class Folder:
    """One method's reference data: json files and tensors by the stems of their names."""

    def __init__(self, path: Path):
        self.path, self.held = path, {}

    def has(self, stem: str) -> bool:
        return (self.path / f"{stem}.safetensors").is_file()

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """A file's tensors as stored."""
        if stem not in self.held:
            self.held[stem] = load_file(self.path / f"{stem}.safetensors")
        return self.held[stem]

    def floats(self, stem: str, name: str) -> Tensor:
        """An input: half precision is exact and becomes float32."""
        value = self.tensors(stem)[name]
        return value.float() if value.dtype == torch.float16 else value

    @cached_property
    def documents(self) -> dict[str, dict[str, Any]]:
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.path.glob("*.json"))}

    def json(self, stem: str, *keys: str) -> Any:
        """What stands under a path of keys, or None."""
        value: Any = self.documents.get(stem)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def entry(self, stem: str, *keys: str) -> Entry | None:
        value = self.json(stem, *keys)
        return Entry(value, ".".join((stem, *keys))) if isinstance(value, dict) else None


@dataclass
class Case:
    """One comparison: what it may read, and how it is made."""

    name: str
    run: Callable[["Case"], None]
    folder: Folder
    stem: str = ""  # the file its tensors are in
    claims: frozenset[str] = frozenset()  # tensors, all of which it has to read
    entry: Entry | None = None  # settings and figures, all of which it has to read
    paths: tuple[tuple[str, ...], ...] = ()  # (json stem, key, ...) of what it takes from the json files
    skip: str = ""
    read: set[str] = field(default_factory=set)

    @property
    def settings(self) -> Entry:
        assert self.entry is not None, f"{self.name} has tensors in {self.stem} and no entry in the json files"
        return self.entry

    def has(self, name: str) -> bool:
        return name in self.claims

    def input(self, name: str) -> Tensor:
        self.read.add(name)
        return self.folder.floats(self.stem, name)

    def compare(self, name: str, ours: Tensor, tolerance: float):
        """Ours against the tensor `name`, if the case has it."""
        if self.has(name):
            self.read.add(name)
            close(ours, self.folder.tensors(self.stem)[name], tolerance, f"{self.stem}: {name}")

    def check(self):
        """Run, then see that nothing was left unread."""
        self.run(self)
        left = sorted(self.claims - self.read) + (self.entry.unread() if self.entry else [])
        assert not left, f"{self.name} leaves unread: {', '.join(left)}"


def close(ours: Tensor, theirs: Tensor, tolerance: float, what: str):
    """|ours - theirs| <= tolerance max(1, max |theirs|); half-precision outputs are rounded results."""
    tolerance = max(tolerance, HALF) if theirs.dtype == torch.float16 else tolerance
    theirs = theirs.double()
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    assert ours.isfinite().all(), f"{what}: ours is not finite"
    error, bound = float((ours.double() - theirs).abs().max()), tolerance * max(1.0, float(theirs.abs().max()))
    assert error <= bound, f"{what}: off by {error:.3g}, may be {bound:.3g}"


def near(ours: float, theirs: float, tolerance: float, what: str):
    """The same for one number."""
    error, bound = abs(ours - theirs), tolerance * max(1.0, abs(theirs)) + STAT
    assert error <= bound, f"{what}: {ours:.6g}, not {theirs:.6g} (may be off by {bound:.3g})"


def stat(ours: Tensor, triple: list[float], tolerance: float, what: str):
    """[mean, standard deviation, max |.|] of a whole tensor; the mean is as exact as the spread is wide."""
    mean, spread, largest = triple
    near(float(ours.mean()), mean, tolerance * max(1.0, spread), f"{what}: mean")
    near(float(ours.std()), spread, tolerance, f"{what}: standard deviation")
    near(float(ours.abs().max()), largest, tolerance, f"{what}: max")


def unknown(folder: Folder, what: str) -> Case:
    """A case that fails: something in the folder that no case here takes."""

    def run(case: Case):
        raise AssertionError(f"{folder.path.name}: unknown {what}")

    return Case(f"unknown {what}", run, folder)


def unclaimed(folder: Folder, cases: Iterable[Case], stems: Iterable[str]) -> list[Case]:
    """One failing case for every tensor that no case claims."""
    claimed = {(case.stem, name) for case in cases for name in case.claims}
    return [
        unknown(folder, f"tensor {name} in {stem}.safetensors")
        for stem in stems
        for name in sorted(folder.tensors(stem))
        if (stem, name) not in claimed
    ]

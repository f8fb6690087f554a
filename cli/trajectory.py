"""Where a picture's inversion passed, as a file: latents at every timestep, noise maps, null texts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..methods.text_to_image import Walk
from ..samplers.ddim import Step, Steps, ddim
from ..samplers.noise import replayed
from ..samplers.null_text import Halfway, with_nulls
from ..samplers.parameterisation import Denoise, Prediction
from ..samplers.schedule import Schedule
from .errors import CommandError

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
METHODS = ("ddim", "edit-friendly", "null-text")


class Trajectory(NamedTuple):
    """n steps of B pictures, from noise to the picture."""

    method: str
    path: list[float]  # n + 1 timesteps, falling; -1 is the clean picture
    xs: Tensor  # (n + 1, B, C, H, W) at each of them, in float32 at least
    zs: Tensor | None = None  # (n, B, C, H, W) the noise of each step: edit-friendly
    nulls: Tensor | None = None  # (n, B, M, D) the negative text's states at each step: null-text
    eta: float = 0.0

    def only(self, i: int) -> "Trajectory":
        """That of picture i."""
        rows = {name: getattr(self, name) for name in ("xs", "zs", "nulls")}
        return self._replace(**{name: None if t is None else t[:, i : i + 1] for name, t in rows.items()})

    def back(
        self, denoise: Denoise, schedule: Schedule, *, skip: int = 0, halfway: Halfway | None = None,
        kind: Prediction = "eps",
    ) -> Iterator[Step]:  # fmt: skip
        """The walk down from the `skip`-th latents: `halfway` for null texts (`methods.null_text`), else `denoise`."""
        x, path = self.xs[skip], self.path[skip:]
        if self.nulls is not None and halfway is not None:
            return with_nulls(halfway, x, schedule, path, list(self.nulls[skip:]), kind=kind)
        walk, path, x = self.resumed(skip, x.shape[0], x)
        return walk(denoise, x, schedule, path)

    def resumed(self, skip: int, n: int, like: Tensor) -> tuple[Walk, list[float], Tensor]:
        """The walk down from the `skip`-th latents for n pictures, its timesteps, and where it begins, as `like`."""
        noises = None if self.zs is None else self.zs[skip:].expand(-1, n, -1, -1, -1)

        def walk(denoise: Denoise, x: Tensor, schedule: Schedule, path: Sequence[float]) -> Steps:
            return ddim(denoise, x, schedule, path, eta=self.eta, noise=None if noises is None else replayed(noises))

        return walk, self.path[skip:], self.xs[skip].expand(n, -1, -1, -1).to(like)


def packed(found: Trajectory, about: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file: x_T, trajectory, timesteps, and noise or null_text; `about` in its header."""
    tensors = {"x_T": found.xs[0], "trajectory": found.xs, "noise": found.zs, "null_text": found.nulls,
               "timesteps": torch.tensor(found.path, dtype=torch.float64)}  # fmt: skip
    held = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items() if t is not None}
    return save(held, {"diaphane": json.dumps({"method": found.method, "eta": found.eta, **about})})


def unpacked(data: bytes, name: str) -> tuple[Trajectory, dict[str, Any]]:
    """What `packed` made, and what the header says.  Raises CommandError for any other file, naming what it lacks."""
    try:
        tensors = load(data)
        about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["diaphane"])
        xs, path = tensors["trajectory"], tensors["timesteps"].double().flatten().tolist()
        method, eta = about["method"], float(about["eta"])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as e:
        raise CommandError(f"{name} is no trajectory: diaphane invert --model FOLDER writes one ({e})") from e
    found = Trajectory(method, path, xs, tensors.get("noise"), tensors.get("null_text"), eta)
    n, falls = len(path) - 1, all(s < t for t, s in pairwise(path))
    kinds = {t.dtype for t in (xs, found.zs, found.nulls) if t is not None} <= FLOATS
    whole = kinds and xs.ndim == 5 and len(xs) == n + 1 and n >= 1 and falls and method in METHODS
    fits = (found.zs is None or found.zs.shape == xs[1:].shape) and (found.zs is not None) == (0 < eta <= 1)
    if not whole or not fits or (found.nulls is not None and found.nulls.shape[:2] != xs[1:].shape[:2]):
        raise CommandError(f"{name} is not whole: its tensors do not belong to one walk")
    if not all(bool(t.isfinite().all()) for t in (xs, found.zs, found.nulls) if t is not None):
        raise CommandError(f"{name} holds numbers that are not finite")
    return found, about

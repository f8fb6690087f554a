"""What further pictures need of the anchors of a ConsiStory set, kept in memory or in a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.sources import Source, Sources
from .consistory import Others
from .scene import SceneError

STAGES = (1, 2)


@dataclass
class Kept:
    """Of each call: the subject's keys and values at every site, and the injected outputs; the feature and its masks.

    Both stages are the same until injection begins, and then the calls are stored once.  Outputs are kept at the
    subject's pixels alone: no others are ever read.
    """

    images: int  # how many anchors
    size: tuple[int, int]  # of the latents
    path: tuple[float, ...]
    said: dict[str, str] = field(default_factory=dict)  # what else has to be the same, for people and checks
    branch: int = 0  # the call at which the second stage leaves the first
    pools: dict[tuple[int, int], dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by stage and call
    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by call: (K, C)
    feature: Tensor | None = None  # (A, C, H, W), smoothed
    masks: Tensor | None = None  # bool (A, N) at the level of the injection

    def pool(self, stage: int, call: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of a call by site; nothing for the first one, which has no masks yet."""
        return self.pools.get((1 if call < self.branch else stage, call), {})

    def row(self) -> Tensor:
        """Where a pixel (image * N + pixel) is among the kept outputs.  -> int64 (A * N,)."""
        assert self.masks is not None
        return (self.masks.flatten().long().cumsum(0) - 1).clamp(min=0)

    def fits(self, path: Sequence[float], size: tuple[int, int], said: Mapping[str, str]) -> None:
        """Raises SceneError for a walk that is not the anchors'."""
        if tuple(path) != self.path:
            raise SceneError(
                f"the anchors were drawn in {len(self.path) - 1} steps from {self.path[0]:g}, these pictures in "
                f"{len(path) - 1} from {path[0]:g}: take the same steps and sampler"
            )
        if size != self.size:
            raise SceneError(f"the anchors' latents are {self.size}, these pictures' {size}: take the same size")
        for name, value in self.said.items():
            if said.get(name, value) != value:
                raise SceneError(f"the anchors were drawn with {name} {value}, these pictures with {said[name]}")

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name and a header, for a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for (stage, call), pools in self.pools.items():
            for site, (k, v) in pools.items():
                tensors[f"stage{stage}.{call}.{site}.k"] = k.cpu().contiguous()
                tensors[f"stage{stage}.{call}.{site}.v"] = v.cpu().contiguous()
        for call, rows in self.outputs.items():
            for site, x in rows.items():
                tensors[f"outputs.{call}.{site}"] = x.cpu().contiguous()
        if self.feature is not None and self.masks is not None:
            tensors["feature"], tensors["masks"] = self.feature.cpu().contiguous(), self.masks.cpu().contiguous()
        header = {"format": "diaphane anchors 1", "images": self.images, "size": list(self.size), "path": self.path,
                  "said": self.said, "branch": self.branch}  # fmt: skip
        return tensors, {"anchors": json.dumps(header)}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> "Kept":
        """What `packed` gave.  Raises SceneError for anything else."""
        try:
            told = json.loads(header["anchors"])
            assert told["format"] == "diaphane anchors 1"
            kept = cls(told["images"], tuple(told["size"]), tuple(told["path"]), dict(told["said"]), told["branch"])
            for name, tensor in tensors.items():
                kind, *rest = name.split(".")
                if kind == "outputs":
                    kept.outputs.setdefault(int(rest[0]), {})[".".join(rest[1:])] = tensor
                elif kind.startswith("stage") and rest[-1] == "k":
                    site = ".".join(rest[1:-1])
                    pair = (tensor, tensors[f"{name[:-1]}v"])
                    kept.pools.setdefault((int(kind.removeprefix("stage")), int(rest[0])), {})[site] = pair
            kept.feature, kept.masks = tensors.get("feature"), tensors.get("masks")
        except (KeyError, IndexError, ValueError, TypeError, AssertionError) as e:
            raise SceneError("this is no file of ConsiStory's anchors") from e
        return kept

    @property
    def bytes(self) -> int:
        """How much is kept."""
        return sum(t.numel() * t.element_size() for t in self.packed()[0].values())


def cached(kept: int, images: int, halves: int, device: torch.device) -> Others:
    """Others of a cache: every row sees all `kept` tokens of its half, and none of its own batch."""
    rows = [[Source(half, 0, kept)] for half in range(halves) for _ in range(images)]
    return Others(Sources.of(rows, device))

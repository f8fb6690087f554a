"""Size, mean and deviation of h and of every skip at every call of a network, heard where the decoder joins them."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ops import Ops, Site


class Row(NamedTuple):
    """What one tensor was at one call, one number a picture."""

    norm: Tensor  # (B,) L2 norm of the whole map, over the square root of its size
    mean: Tensor
    std: Tensor


@dataclass
class Statistics:
    """Rows by name, "h" or "skip 0" (the finest) ..., one for each call.  Of a guided batch they are the text's half.

    It goes anywhere among the verbs that `join` has no other method of, and sees what that verb is given.
    """

    n: int  # pictures
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def watching(self, ops: Ops) -> Ops:
        """The same verbs, listened to; nothing waits for the device."""

        def join(site: Site, h: Tensor, skip: Tensor) -> Tensor:
            stage = int(site.stage.removeprefix("dec."))
            if stage == 0:
                self.rows.setdefault("h", []).append(row(h[-self.n :]))
            self.rows.setdefault(f"dec.{stage}", []).append(row(skip[-self.n :]))
            return ops.join(site, h, skip)

        return replace(ops, join=join)

    def table(self) -> dict[str, Tensor]:
        """Name -> (calls, B, 3), norm, mean and std; the skips are numbered as `encode` emits them, from the finest."""
        last = len(self.rows) - 2
        names = {f"dec.{i}": f"skip {last - i}" for i in range(last + 1)}
        found = {names.get(k, k): torch.stack([torch.stack(r, dim=-1) for r in v]).cpu() for k, v in self.rows.items()}
        return {name: found[name] for name in ("h", *(f"skip {i}" for i in range(last + 1)))}


def row(x: Tensor) -> Row:
    """Of x (B, C, H, W), in float32 or better."""
    y = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(1)
    return Row(y.square().mean(1).sqrt(), y.mean(1), y.std(1))

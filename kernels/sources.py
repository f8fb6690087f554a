"""Which keys, besides its own, each image sees: ranges of rows of a pool, each with a scale and a shift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SourcesError(ValueError):
    """Sources that cannot be: a range, a scale, or an image that is not there."""


class Source(NamedTuple):
    """Rows `start` to `stop` of image `image` of the pool; logits become scale * logit + shift, shift in nats."""

    image: int
    start: int
    stop: int
    scale: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Sources:
    """The sources of B images as three small tensors, which kernels read without asking the host."""

    offsets: Tensor  # int32 (B + 1,): image i owns segments offsets[i] to offsets[i + 1]
    segments: Tensor  # int32 (S, 4): image of the queries, image of the pool, start, stop
    gains: Tensor  # (S, 2): scale, shift; float64 on a CPU, as they were given, and float32 elsewhere
    images: int  # of queries
    pool_images: int  # the least the pool must hold
    pool_rows: int

    @classmethod
    def of(cls, seen: Sequence[Sequence[Source]], device: torch.device | str = "cpu") -> "Sources":
        """seen[i]: what image i sees besides its own keys.  Empty ranges are dropped; overlaps count twice.

        SourcesError: a range that runs backwards or begins before 0, a scale that is negative or not finite, a shift
        that is not finite.
        """
        offsets, segments, gains = [0], [], []
        for i, sources in enumerate(seen):
            for source in sources:
                _check(i, source)
                if source.stop > source.start:
                    segments.append([i, source.image, source.start, source.stop])
                    gains.append([source.scale, source.shift])
            offsets.append(len(segments))
        return cls(
            torch.tensor(offsets, dtype=torch.int32).to(device),
            torch.tensor(segments, dtype=torch.int32).reshape(-1, 4).to(device),
            torch.tensor(gains, dtype=_kind(device)).reshape(-1, 2).to(device),
            len(seen),
            max((s[1] + 1 for s in segments), default=0),
            max((s[3] for s in segments), default=0),
        )

    @classmethod
    def none(cls, images: int, device: torch.device | str = "cpu") -> "Sources":
        """Nothing but the own keys; made on the device, which nobody waits for."""
        offsets = torch.zeros(images + 1, dtype=torch.int32, device=device)
        return cls(
            offsets, offsets.new_zeros((0, 4)), torch.zeros((0, 2), dtype=_kind(device), device=device), images, 0, 0
        )

    def listed(self) -> list[list[Source]]:
        """What `of` was given, without the empty ranges.  It waits for the device."""
        gains = self.gains.tolist()
        rows = [Source(p, a, z, *g) for (_, p, a, z), g in zip(self.segments.tolist(), gains, strict=True)]
        edges = self.offsets.tolist()
        return [[row for row in rows[a:z] if row.stop > row.start] for a, z in pairwise(edges)]


class Seen(NamedTuple):
    """What an attention sees besides the own keys: the arguments of `source_attention` of the same names."""

    sources: Sources | None = None
    pool: tuple[Tensor, Tensor] | None = None  # 2 x (P, H, T, D); by default the keys and values of the call
    ref: Tensor | None = None  # (B,) integers: q and the own keys take the token statistics of image ref[i]


def also(seen: Seen | None, more: Seen, k: Tensor, v: Tensor) -> Seen:
    """What one method has described and what the next adds, in one description; k, v (B, H, M, D) are the call's own.

    SourcesError: both align queries and keys, and towards different images.
    """
    if seen is None:
        return more
    ref = more.ref if seen.ref is None else seen.ref
    if ref is not None and more.ref is not None and ref is not more.ref and not torch.equal(ref, more.ref):
        raise SourcesError("two methods align queries and keys towards different images: give both the same references")
    if seen.sources is None or more.sources is None:
        return Seen(more.sources, more.pool, ref) if seen.sources is None else Seen(seen.sources, seen.pool, ref)
    if seen.pool is None and more.pool is None:
        return Seen(_union(seen.sources, more.sources, 0), None, ref)
    pools = [(k, v) if each.pool is None else each.pool for each in (seen, more)]
    rows = max(pk.shape[2] for pk, _ in pools)
    keys, values = (torch.cat([F.pad(pool[i], (0, 0, 0, rows - pool[i].shape[2])) for pool in pools]) for i in range(2))
    return Seen(_union(seen.sources, more.sources, len(pools[0][0])), (keys, values), ref)


def _union(a: Sources, b: Sources, images: int) -> Sources:
    """The sources of both, image by image; those of `b` are `images` further on in the pool."""
    if a.images != b.images:
        raise SourcesError(f"sources of {a.images} and of {b.images} images cannot be of one attention")
    segments = torch.cat([a.segments, b.segments + b.segments.new_tensor([0, images, 0, 0])])
    order = segments[:, 0].argsort(stable=True)
    return Sources(
        a.offsets + b.offsets,
        segments[order],
        torch.cat([a.gains, b.gains])[order],
        a.images,
        max(a.pool_images, b.pool_images + images),
        max(a.pool_rows, b.pool_rows),
    )


def _kind(device: torch.device | str) -> torch.dtype:
    """The type of scales and shifts on a device."""
    return torch.float64 if torch.device(device).type == "cpu" else torch.float32


def _check(image: int, source: Source) -> None:
    if source.image < 0 or source.start < 0 or source.stop < source.start:
        raise SourcesError(f"image {image}: a source is rows start <= stop of an image >= 0; got {source}")
    if not (math.isfinite(source.scale) and source.scale >= 0 and math.isfinite(source.shift)):
        raise SourcesError(f"image {image}: a source has a finite scale >= 0 and a finite shift; got {source}")


def shared(
    ref: Sequence[int], tokens: int, scale: float = 1.0, shift: float = 0.0, device: torch.device | str = "cpu"
) -> Sources:
    """Image i sees image ref[i] of the batch (StyleAligned, Hertz et al. 2024, eq. 4); a reference sees itself alone.

    `scale` multiplies the reference's logits and `shift` is added to them (their section 5.3 and code).  A reference
    that attends to itself twice is a reference that attends to itself, whatever the shift, so it gets no source.
    """
    _in_batch(ref, len(ref))
    return Sources.of(
        [[] if r == i else [Source(r, 0, tokens, scale, shift)] for i, r in enumerate(ref)], device=device
    )


def everyone(groups: Sequence[Sequence[int]], tokens: int, device: torch.device | str = "cpu") -> Sources:
    """Every image sees all the images of its group; `groups` part the batch."""
    order = sorted(i for group in groups for i in group)
    if order != list(range(len(order))):
        raise SourcesError(f"groups hold every image of the batch once; got {[list(g) for g in groups]}")
    seen: dict[int, list[Source]] = {}
    for group in groups:
        for i in group:
            seen[i] = [Source(j, 0, tokens) for j in group if j != i]
    return Sources.of([seen[i] for i in order], device=device)


def compacted(
    counts: Sequence[int] | Tensor,
    sees: Sequence[Sequence[bool]],
    halves: int = 1,
    device: torch.device | str = "cpu",
    apart: bool = False,
    rows: int = 0,
) -> Sources:
    """Image i sees the kept tokens of every image j with sees[i][j] (ConsiStory, Tewel et al. 2024, section 3.1).

    The pool is (halves, H, sum(counts), D): the kept tokens of image 0, then of image 1, ... for each half of the batch
    (guidance makes two).  `sees` has a row per image of a half, and a column per image of the pool: an image is never
    its own source, unless the images of the pool are `apart`, and none of the batch.

    Counts that are a tensor of integers (B,) stay on its device and nobody waits for them: the tables are made there,
    of a size that `sees` alone decides, for a pool of at least `rows` rows.
    """
    images = len(counts)
    runs: list[list[list[int]]] = []  # of each image, which images of the pool follow each other: first, and past last
    for i, row in enumerate(sees):
        if len(row) != images:
            raise SourcesError(f"sees[{i}] has one entry per image of the pool, {images}; got {len(row)}")
        runs.append([])
        for j in (j for j, seen in enumerate(row) if seen and (apart or j != i)):
            if runs[-1] and runs[-1][-1][1] == j:
                runs[-1][-1][1] = j + 1
            else:
                runs[-1].append([j, j + 1])
    if isinstance(counts, Tensor):
        return _tables(counts, runs, halves, rows)
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + count)
    seen = [[Source(half, edges[a], edges[z]) for a, z in row] for half in range(halves) for row in runs]
    return Sources.of(seen, device=device)


def _tables(counts: Tensor, runs: list[list[list[int]]], halves: int, rows: int) -> Sources:
    """Runs of images as ranges of rows, computed where the counts are; some may be empty."""
    if counts.ndim != 1 or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        raise SourcesError(f"counts are integers (B,); got {counts.dtype} {tuple(counts.shape)}")
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    listed = [(half * len(runs) + i, half, *run) for half in range(halves) for i, row in enumerate(runs) for run in row]
    lengths = [0, *(len(row) for row in runs * halves)]
    # one copy, which nobody waits for
    known = torch.tensor([*lengths, *(x for row in listed for x in row)], dtype=torch.int32)
    known = known.to(counts.device, non_blocking=True)
    images, half, first, past = known[len(lengths) :].view(-1, 4).unbind(1)
    return Sources(
        known[: len(lengths)].cumsum(0).int(),
        torch.stack([images, half, edges[first.long()], edges[past.long()]], 1),
        torch.eye(2, dtype=_kind(counts.device), device=counts.device)[:1].repeat(
            len(listed), 1
        ),  # a scale of 1, a shift of 0
        len(runs) * halves,
        halves if listed else 0,
        rows if listed else 0,
    )


def _in_batch(ref: Sequence[int], images: int) -> None:
    for i, r in enumerate(ref):
        if not 0 <= r < images:
            raise SourcesError(f"ref[{i}] is an image of the batch, 0 to {images - 1}; got {r}")
        if ref[r] != r:
            raise SourcesError(f"ref[{i}] is {r}, which is its own reference; got ref[{r}] = {ref[r]}")

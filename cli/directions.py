"""Directions of h-space for `diaphane asyrp`: read from files, or found in pictures, samples and the decoder."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..methods.asyrp import DeltaF, Edit
from ..methods.delta import delta_block
from ..methods.directions import jacobian, mean_difference, pca
from ..methods.taps import closest, invert, tapped
from ..methods.taps import rows as over
from ..model.blocks import Cond
from ..samplers.noise import seeded
from ..samplers.parameterisation import times
from ..samplers.path import papers
from ..weights import asyrp as published
from ..weights.errors import WeightsError
from .errors import CommandError, line
from .session import Session

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FIRST_SAMPLE = 10_000  # seeds of the samples of --pca begin this far above --seed


class Direction(NamedTuple):
    """Δh at any timestep: values by timestep (1 or N, C, H, W), or a learned f."""

    name: str
    values: dict[int, Tensor] | None = None
    f: DeltaF | None = None

    def __call__(self, h: Tensor, t: int, c: Cond, rows: list[int]) -> Tensor:
        """Δh of the pictures `rows`.  Raises CommandError if it does not fit h (B, C, H, W)."""
        if self.values is None:
            assert self.f is not None
            return fitting(self.f(h, c.emb), h, self.name)
        value, n = closest(t, self.values), len(rows)
        if 1 < len(value) <= max(rows):
            raise CommandError(f"{self.name} is for {len(value)} pictures; there are more")
        delta = fitting(value if len(value) == 1 else value[rows], h[:n], self.name).to(h)
        return over(delta, len(h))  # both halves under guidance


def fitting(delta: Tensor, h: Tensor, name: str) -> Tensor:
    """A Δh that can be added to h."""
    if delta.shape[1:] != h.shape[1:] or len(delta) not in (1, len(h)):
        raise CommandError(f"{name} is for h of {tuple(delta.shape[1:])}, this network's is {tuple(h.shape[1:])}")
    return delta


def edit(directions: Sequence[Direction], weights: Sequence[Tensor], rows: list[int]) -> Edit:
    """h -> h + sum of weight_i (B, 1, 1, 1) Δh_i; every direction sees the unedited h (Kwon et al. 2023, eq. 8)."""

    def edited(h: Tensor, t: int, c: Cond) -> Tensor:
        out = h
        for direction, weight in zip(directions, weights, strict=True):
            out = out + over(weight.to(h), len(h)) * direction(h, t, c, rows)
        return out

    return edited


def files(folder: str) -> list[str]:
    """The pictures in a folder, by name."""
    if not Path(folder).is_dir():
        raise CommandError(f"{folder} is not a folder of pictures")
    found = sorted(str(path) for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise CommandError(f"{folder} holds no {', '.join(PICTURES)} pictures")
    return found


def from_file(path: str, session: Session) -> list[Direction]:
    """Directions saved by --save-direction, or published (or own) f of Asyrp."""
    data, name = session.read(path), Path(path).name
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        tensors = {}
    keys = [key.split(".") for key in tensors]
    if keys and all(len(key) == 3 and key[0] == "direction" and key[1].isdigit() and key[2].isdigit() for key in keys):
        by_index: dict[int, dict[int, Tensor]] = {}
        for (_, i, t), tensor in zip(keys, tensors.values(), strict=True):
            if tensor.ndim != 4 or not bool(torch.isfinite(tensor).all()):
                raise CommandError(f"{name} is damaged: direction {i} at t = {t} is no finite (N, C, H, W)")
            by_index.setdefault(int(i), {})[int(t)] = tensor.to(session.net.device)
        return [Direction(f"{name} {i}" if len(by_index) > 1 else name, by_index[i]) for i in sorted(by_index)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "delta"
        copy.write_bytes(data)
        try:
            family, blocks = published.load_delta_blocks(copy)
        except WeightsError as e:
            raise CommandError(str(e).replace(str(copy), path)) from e
    if family != session.net.weights["family"]:
        raise CommandError(f"{name} was trained beside another family ({family}) than {session.net.weights['family']}")
    dtype, found = getattr(torch, session.args.dtype), []
    for i, tensors in enumerate(blocks):
        try:
            f = delta_block({key: tensor.clone().to(session.net.device, dtype) for key, tensor in tensors.items()})
        except (RuntimeError, ValueError, KeyError) as e:
            raise CommandError(f"{name} holds no f of Asyrp: {line(e)[:120]}") from e
        found.append(Direction(f"{name} {i}" if len(blocks) > 1 else name, f=checked(f, name)))
    return found


def checked(f: torch.nn.Module, name: str) -> DeltaF:
    """f, refusing h and embeddings that it is not for."""
    wanted = tuple(f.get_parameter("emb.weight").shape)
    f.eval().requires_grad_(False)

    def delta(h: Tensor, emb: Tensor) -> Tensor:
        if (h.shape[1], emb.shape[1]) != wanted:
            had = f"{h.shape[1]} and {emb.shape[1]}"
            raise CommandError(
                f"{name} is for {wanted[0]} channels of h and {wanted[1]} of time; the network has {had}"
            )
        return f(h, emb)

    return delta


def of_sets(sources: Sequence[str], targets: Sequence[str], args: argparse.Namespace, session: Session) -> Direction:
    """Mean h of the second set's inversions minus mean h of the first's, by timestep."""
    net, means = session.net, []
    for what, paths in (("set A", sources), ("set B", targets)):
        pictures, sums = net.encode(session.pictures(paths, resize=not args.no_resize)), dict[int, Tensor]()
        for batch in session.batches(len(pictures)):
            held = invert(net.unet, pictures[batch.start : batch.stop], net.schedule, papers(args.steps),
                          embed=net.embed, watch=watching(session, args.steps - 1, f"invert {what}")).h  # fmt: skip
            n = len(batch)  # under guidance, the text's half
            sums = {t: sums.get(t, 0) + h[-n:].sum(0, keepdim=True) for t, h in held.items()}
        means.append({t: total / len(pictures) for t, total in sums.items()})
    return Direction("set A to set B", mean_difference(means[0], means[1]))


def of_samples(k: int, args: argparse.Namespace, session: Session) -> list[Direction]:
    """The k principal components of h along the walks of --pca-samples samples, each one standard deviation long.

    A sample is the vector of its h at all timesteps t >= t_edit, so a component is one direction for the whole walk.
    """
    net, down, walks = session.net, papers(args.steps), []
    kept = [t for t in down if t >= args.t_edit]
    if not kept:
        raise CommandError(f"no timestep of {args.steps} steps lies at or above --t-edit {args.t_edit}")
    for batch in session.batches(args.pca_samples):
        noise = seeded([args.seed + FIRST_SAMPLE + i for i in batch])
        x = noise(torch.empty(len(batch), *net.shape, device=net.device, dtype=net.dtype))
        taps = tapped(net.unet, x, net.schedule, down[: len(kept) + 1], embed=net.embed)
        walked = session.progress(taps, len(kept), "samples for PCA")
        walks.append(torch.stack([tap.h[-len(batch) :] for tap in walked], dim=1))
    found = pca(torch.cat(walks).float(), k)
    lengths = found.variances.sqrt()
    return [
        Direction(f"component {i + 1}", {t: length * row[j][None] for j, t in enumerate(kept)})
        for i, (row, length) in enumerate(zip(found.directions, lengths, strict=True))
    ]


def of_decoder(k: int, x_T: Tensor, args: argparse.Namespace, session: Session) -> list[Direction]:
    """The k directions of h that change eps most at --t-jacobian, for each picture, as long as its h there."""
    net, down = session.net, papers(args.steps)
    stop = min((t for t in down if t >= 0), key=lambda t: abs(t - args.t_jacobian))
    parts = []
    for batch in session.batches(len(x_T)):
        x = x_T[batch.start : batch.stop]
        taps = tapped(net.unet, x, net.schedule, down[: down.index(stop) + 1], embed=net.embed)
        for tap in session.progress(taps, down.index(stop), "to the Jacobian's timestep"):
            x = tap.step.x
        unet, embed = net.unguided
        c = embed(times(stop, x))
        deep, skips = unet.encode(x, c)
        h = unet.middle(deep, c)
        found = jacobian(unet, h, skips, c, k=k, iterations=args.iterations, seed=args.seed)
        parts.append(found.directions * torch.linalg.vector_norm(h, dim=(1, 2, 3), keepdim=True))
    return [Direction(f"singular vector {i + 1}", {stop: row}) for i, row in enumerate(torch.cat(parts, dim=1))]


def watching(session: Session, total: int, what: str) -> Callable:
    """A progress bar for `invert`."""
    return lambda taps: session.progress(taps, total, what)


def saved(directions: Sequence[Direction], about: Mapping[str, str]) -> bytes:
    """Directions as safetensors: `direction.I.T` (1 or N, C, H, W) of direction I at timestep T."""
    fixed = [direction for direction in directions if direction.values is not None]
    if not fixed:
        raise CommandError("--save-direction is for directions that were found, not for a learned f")
    tensors = {
        f"direction.{i}.{t}": value.detach().cpu().contiguous()
        for i, direction in enumerate(fixed)
        for t, value in (direction.values or {}).items()
    }
    return save(tensors, dict(about))

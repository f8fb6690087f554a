"""What `diaphane inspect` says of latent models, of their parts, and of LoRA."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.latent import build
from ..weights import ip_adapter, latent, pipeline
from ..weights import lora as weights_lora
from ..weights.errors import WeightsError
from ..weights.files import opened
from ..weights.layout import state
from ..weights.load import Network, find
from .errors import CommandError

Rows = Iterator[tuple[str, object]]


def kind_of(args: argparse.Namespace) -> str:
    """What a source is: a latent "model", "parts" of one, an "adapter", a "lora", or "" for anything else.

    Raises MissingFileError, HubError.
    """
    path = Path(args.source).expanduser()
    if (path / "model_index.json").is_file() and not args.file:
        return "model"
    looks: dict[str, Callable[[Path], object]] = {
        "model": whole,
        "parts": parts,
        "lora": lambda path: weights_lora.grouped(held(path)),
        "adapter": ip_adapter.load,
    }
    path = find(args.source, args.file)
    for kind, look in looks.items():
        try:
            if look(path):
                return kind
        except WeightsError:
            continue
    return ""


def held(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which stay in it."""
    return state(opened(path).content)


def whole(path: Path) -> bool:
    """Whether there is a UNet with its autoencoder."""
    return {"unet", "vae"} <= set(latent.parts(held(path))[0])


def parts(path: Path) -> list[str | None]:
    """The parts that there are; None for a file of one.  Raises LayoutError for other keys."""
    found = latent.parts(held(path))[0]
    for tensors in found.values():
        latent.detect(tensors)
    return [name or None for name in found]


def rows(args: argparse.Namespace, kind: str) -> Rows:
    """What to say, line by line.  Raises CommandError for options of pixel networks, and a WeightsError."""
    if args.resolution or args.config:
        raise CommandError("--resolution and --config are for pixel networks")
    if args.base is not None and kind != "lora":
        raise CommandError(f"--base is the model that a LoRA is for; {args.source} is none")
    path = find(args.source, args.file) if kind != "model" or Path(args.source).is_file() else Path(args.source)
    if kind == "lora":
        yield from lora(path, args)
        return
    if kind in ("parts", "adapter"):
        names = parts(path) if kind == "parts" else [None]
        for name in names:
            found = latent.load(path, name) if kind == "parts" else ip_adapter.load(path)
            yield from [("part", name)] if name else []
            yield from [("file", path), ("sha256", found.sha256), *of_part(found, args.keys)]
        return
    found = pipeline.load(args.source, file=args.file)
    yield "model", path
    for name, part in found.parts.items():
        yield name, ""
        yield from (("  " + key, value) for key, value in of_part(part, args.keys))
    yield from shapes(found)
    for text in found.texts:
        words = found.words.get(text)
        own = "CLIP's, which ships with the package"
        said = "none: give --tokenizer" if words is None else f"{words.vocabulary or own}, filled up with {words.pad}"
        yield f"tokeniser of {text}", said
    for name, value in vars(found.says).items():
        yield name, value


def of_part(net: Network, keys: bool) -> Rows:
    """Layout, family, parameters and settings of one part."""
    yield "layout", net.layout
    yield "family", net.family
    yield "parameters", counted(net.tensors)
    yield from net.config.items()
    yield from ((name, tuple(tensor.shape)) for name, tensor in net.tensors.items() if keys)


def counted(tensors: Mapping[str, Tensor]) -> str:
    """How many parameters, in how many tensors, of which types."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{count:,} in {len(tensors)} tensors, {', '.join(kinds)}"


def shapes(whole: pipeline.Pipeline) -> Rows:
    """h and the skips at the model's own size, found without computing anything."""
    part, vae = whole.parts["unet"], whole.parts["vae"].config
    cfg: dict[str, Any] = part.config
    side = whole.says.side // 2 ** (len(vae["channels"]) - 1)
    with torch.device("meta"):
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in part.tensors.items()}
        unet = build(part.family, cfg, meta, dtype=torch.float32)
        pooled = (torch.empty(1, cfg["pooled_dim"]), torch.empty(1, cfg["ids"])) if cfg["pooled_dim"] else ()
        c = unet.embed(torch.empty(1), torch.empty(1, 77, cfg["context_dim"]), *pooled)
        deep, skips = unet.encode(torch.empty(1, cfg["in_channels"], side, side), c)
        h = unet.middle(deep, c)
    yield "h", f"{' x '.join(map(str, h.shape[1:]))} at {whole.says.side} pixels"
    yield "skips", ", ".join(f"{s.shape[1]}x{s.shape[2]}" for s in skips)


def lora(path: Path, args: argparse.Namespace) -> Rows:
    """How many modules of which rank, the model by its text tokens; with --base what each of them changes."""
    groups, strange = weights_lora.grouped(tensors := held(path))
    ranks = Counter(len(sides["down"]) for sides in groups.values() if "down" in sides)
    yield "file", path
    yield "family", "lora"
    yield "modules", f"{len(groups)}, {counted(tensors)}"
    yield "rank", ", ".join(f"{rank} in {count}" for rank, count in sorted(ranks.items()))
    widths = {sides["down"].shape[1] for key, sides in groups.items()
              if "down" in sides and weights_lora.READS.search(key)}  # fmt: skip
    yield from (("text tokens", f"{n}: {weights_lora.KINDS.get(n, 'of no known model')}") for n in sorted(widths))
    if strange:
        yield "no LoRA", ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
    if args.base is None:
        return
    found = weights_lora.load(path, pipeline.load(args.base).parts)
    for part, factors in found.factors.items():
        yield part, f"{len(factors)} weights"
    if args.keys:
        for key, part, name, rank, alpha in found.rows():
            yield f"{part}.{name}", f"{key}, rank {rank}, alpha {alpha:g}"

"""From the options of text to image to a model that runs: its parts, where they are, and who they are."""

import argparse
import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import text_to_image as t2i
from ..methods.lora import with_lora
from ..model import latent as model_latent
from ..model.components import Components, components, placed
from ..model.controlnet import ControlNet
from ..model.tiling import tiles
from ..samplers import schedule as schedules
from ..samplers.schedule import Schedule, rescale_zero_terminal_snr
from ..weights import lora as weights_lora
from ..weights import pipeline
from ..weights.conventions import Conventions
from ..weights.files import sha256
from .errors import CommandError
from .network import device_of
from .options import whole

OVERLAP = 0.25  # of a tile's side


@dataclass(frozen=True)
class Loaded:
    """A latent diffusion model, and what the records of pictures say of it."""

    parts: Components
    control: ControlNet | None
    says: Conventions
    schedule: Schedule
    weights: dict[str, Any]
    device: torch.device
    low: bool  # parts stay on the CPU between uses
    loras: tuple[str, ...]  # a line about each
    tile: int | None  # the autoencoder works in squares of so many pixels

    def on(self, *networks: nn.Module | None) -> AbstractContextManager[None]:
        """The networks on the device meanwhile."""
        return placed(self.device, *(net for net in networks if net is not None)) if self.low else nullcontext()

    def pictures(self, x: Tensor) -> Tensor:
        """Latents -> pictures (B, 3, H, W) in [-1, 1], float32."""
        with self.on(self.parts.vae):
            return t2i.pictures(self.parts.vae, x, tile=None if self.tile is None else self.tile // self.parts.factor)

    def encoded(self, pictures: Tensor) -> Tensor:
        """Pictures -> latents, float32 at least, on the device."""
        vae = self.parts.vae
        with self.on(vae):
            x = pictures.to(next(vae.parameters()))
            if self.tile is None:
                found = vae.latents(x)
            else:
                found = tiles(vae.latents, x, self.tile, self.tile // self.parts.factor, OVERLAP)
        return found.to(self.device, torch.promote_types(found.dtype, torch.float32))


def options(p: argparse.ArgumentParser) -> None:
    """The options that say which model."""
    net = p.add_argument_group("model")
    net.add_argument("--model", required=True, help="a single file (.safetensors), a folder of diffusers', a "
                     "repository on the Hub, or a name that `diaphane fetch` lists")  # fmt: skip
    net.add_argument("--file", help="the single file in a folder or repository")
    parts(net)
    net.add_argument("--control-model", help="a ControlNet's file or folder, for --control")


def parts(p: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The options that say which parts a model has, for commands that take models of other kinds too."""
    p.add_argument("--variant", help='which weights of a folder or repository: "fp16" for model.fp16.safetensors')
    p.add_argument("--tokenizer", help="a folder or repository with vocab.json and merges.txt, or tokenizer.json "
                   "(default: the model's own; for single files CLIP's, which ships with the package)")  # fmt: skip
    p.add_argument("--literal", action="store_true", help='a "!" in a text is text for SDXL\'s second tower too, not '
                   "padding as transformers has it")  # fmt: skip
    p.add_argument("--vae", help="an autoencoder in place of the model's: a file, folder or repository")
    p.add_argument("--lora", nargs="+", metavar="NAME[:WEIGHT]", help="LoRA files, folders or repositories, and how "
                   "much of each (default: 1)")  # fmt: skip
    p.add_argument("--prediction", choices=("eps", "v"), help="what the UNet predicts, where no file says it")
    tiling(p)


def tiling(p: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """The option of pictures that are too large for the autoencoder."""
    p.add_argument("--tile", type=tile, metavar="N", help="the autoencoder works in overlapping squares of N pixels, a "
                   "multiple of 32: less memory, nearly the same picture (default: whole)")  # fmt: skip


def tile(text: str) -> int:
    """A side of tiles: their overlap, a quarter, is whole in latents."""
    side = whole(32, 8192)(text)
    if side % 32:
        raise argparse.ArgumentTypeError(f"{side} is no multiple of 32")
    return side


def reads_text(args: argparse.Namespace) -> bool:
    """Whether --model is a folder or a single file of a model with text encoders, as far as can be seen here."""
    path = Path(args.model).expanduser()
    file, index = path / args.file if args.file else path, path / "model_index.json"
    try:
        if file.is_file():
            return pipeline.holds_parts(file)
        return index.is_file() and any(part.startswith("text_encoder") for part in json.loads(index.read_bytes()))
    except (OSError, ValueError, AttributeError):
        return False  # whoever reads it for good says what is wrong


def weighted(text: str) -> tuple[str, float]:
    """NAME:WEIGHT -> both; a name without a weight has 1."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not colon or not name:
        return text, 1.0
    if not -100 <= weight <= 100:
        raise CommandError(f"--lora {text}: the weight is a number in -100 ... 100")
    return name, weight


def found(args: argparse.Namespace) -> pipeline.Pipeline:
    """The model's files, opened and not read."""
    replaced = {"vae": args.vae} if args.vae else {}
    return pipeline.load(args.model, file=args.file, variant=args.variant, tokenizer=args.tokenizer,
                         replaced=replaced, prediction=args.prediction)  # fmt: skip


def loaded(args: argparse.Namespace) -> Loaded:
    """The model that the options name, in evaluation mode and without gradients."""
    files = found(args)
    device = device_of(args.device)
    name = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, name)
    if args.threads:
        torch.set_num_threads(args.threads)
    if lost := [name for name in files.texts if name not in files.words]:
        rows = files.parts[lost[0]].config["vocabulary"]
        raise CommandError(f"{args.model} came without a vocabulary for {lost[0]}, which has {rows} tokens, not the "
                           "49408 of CLIP: give --tokenizer, a folder with vocab.json and merges.txt")  # fmt: skip
    at = torch.device("cpu") if args.low_vram else device
    parts = components(files.parts, files.words, dtype=dtype, device=at, cut_pad=not args.literal)
    paths, lines = {part: net.paths for part, net in files.parts.items()}, []
    for text, words in files.words.items():
        paths[f"tokeniser of {text}"] = tuple(path for path in (words.vocabulary, words.merges) if path)
    for text in args.lora or ():
        source, weight = weighted(text)
        lora = weights_lora.load(source, files.parts)
        parts = with_lora(parts, lora.factors, weight)
        paths[f"lora {text}"] = lora.paths
        counts = ", ".join(f"{len(rows)} of {part}" for part, rows in lora.factors.items())
        lines.append(f"{source} at {weight:g}: {counts}")
    control = None
    if args.control_model:
        net = weights_control(args.control_model)
        if net.config["context_dim"] != files.parts["unet"].config["context_dim"]:
            reads = files.parts["unet"].config["context_dim"]
            width = net.config["context_dim"]
            raise CommandError(f"{args.control_model} reads text tokens of {width}, the model's are {reads}: "
                               "it is for another model")  # fmt: skip
        control = model_latent.build(net.family, net.config, net.tensors, dtype=dtype, device=at)
        paths["controlnet"] = net.paths
    return Loaded(parts, control, files.says, schedule_of(files.says), record(args.model, paths, name), device,
                  args.low_vram, tuple(lines), args.tile)  # fmt: skip


def weights_control(source: str) -> Any:
    """A ControlNet's settings and tensors.  Raises CommandError for another network."""
    from ..weights import latent

    whole = Path(source).is_file() and pipeline.holds_parts(Path(source))  # the first ones came inside their model
    net = latent.load(source, "controlnet" if whole else None)
    if net.family != "controlnet":
        raise CommandError(f"{source} is of the kind {net.family}, not a ControlNet")
    return net


def schedule_of(says: Conventions, floor: float = 2.0**-24) -> Schedule:
    """The noise schedule of a model's training; `floor` is the last alpha where that is 0."""
    made = schedules.cosine(says.steps) if says.betas == "cosine" else getattr(schedules, says.betas)(
        says.steps, says.beta_0, says.beta_1
    )  # fmt: skip
    return rescale_zero_terminal_snr(made, floor) if says.zero_terminal_snr else made


def record(model: str, paths: dict[str, tuple[Path, ...]], dtype: str) -> dict[str, Any]:
    """The sha256 of every part's files, and one of all of them."""

    @cache
    def digest(files: tuple[Path, ...]) -> str:
        return sha256(files)

    digests = {part: digest(tuple(files)) for part, files in paths.items()}
    one = set(digests.values())
    everything = one.pop() if len(one) == 1 else hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    names = ", ".join(dict.fromkeys(files[0].name for files in paths.values()))
    return {"model": model, "file": names, "parts": digests, "sha256": everything, "dtype": dtype}

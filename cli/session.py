"""One run of a command: its options, what it read, its network, and the records that its pictures carry."""

import argparse
import base64
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import images, network, options
from .errors import CommandError, line, reason
from .output import Folder

EMBED_EACH, EMBED_ALL = 64 * 1024, 512 * 1024  # bytes of inputs that a picture's record may hold
MAX_INPUT = 1 << 28
T = TypeVar("T")


class Made(NamedTuple):
    """A file that a command makes: a picture and its record, or plain bytes."""

    name: str
    picture: Image.Image | None = None
    record: Mapping[str, Any] | None = None
    data: bytes = b""


@dataclass
class Session:
    """The state of one run."""

    command: str
    args: argparse.Namespace
    given: Mapping[str, bytes] = field(default_factory=dict)  # inputs that are in hand already, by path
    wanted: str | None = None  # the one picture that is asked for; None: all
    inputs: dict[str, bytes] = field(default_factory=dict)  # everything read so far, by path
    load: Callable[[argparse.Namespace], Any] = network.loaded

    @cached_property
    def net(self) -> network.Loaded:
        """The network of the options, loaded when first asked for."""
        return self.load(self.args)

    def beside(self, command: str, args: argparse.Namespace) -> "Session":
        """A run of another command on the same network."""
        session = Session(command, args, self.given)
        session.__dict__["net"] = self.net
        return session

    def read(self, path: str) -> bytes:
        """A file's bytes, noted for the record.  Raises CommandError."""
        if path not in self.inputs:
            self.inputs[path] = self.given[path] if path in self.given else content(path)
        return self.inputs[path]

    def pictures(self, paths: Sequence[str], *, resize: bool = True) -> Tensor:
        """Picture files -> (B, C, side, side) in [-1, 1], on the network's device."""
        net = self.net
        rows = [images.fitted(images.decoded(self.read(p), p), net.side, p, resize) for p in paths]
        return torch.stack([images.to_tensor(row, net.channels) for row in rows]).to(net.device, net.dtype)

    def masks(self, paths: Sequence[str], *, resize: bool = True) -> list[Tensor]:
        """Mask files -> one (1, 1, side, side) in [0, 1] each."""
        net = self.net
        rows = [images.fitted(images.decoded(self.read(p), p), net.side, p, resize) for p in paths]
        return [images.to_mask(row)[None].to(net.device, net.dtype) for row in rows]

    def batches(self, n: int) -> Iterator[range]:
        """0 ... n-1 in pieces of --batch."""
        for start in range(0, n, self.args.batch):
            yield range(start, min(n, start + self.args.batch))

    def wants(self, *names: str) -> bool:
        """Whether one of these pictures is asked for."""
        return self.wanted is None or self.wanted in names

    def made(self, name: str, picture: Tensor | Image.Image, **about: Any) -> Made:
        """A picture with its record."""
        if isinstance(picture, Tensor):
            picture = images.to_picture(picture)
        return Made(name, picture, self.record(name, about))

    def record(self, name: str, about: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that a picture needs to be made again."""
        return {
            "command": self.command,
            "picture": name,
            **about,
            "settings": options.settings(self.args),
            "weights": self.net.weights,
            "device": str(self.net.device),
            "dtype": self.args.dtype,
            "threads": torch.get_num_threads(),
            "versions": {
                "diaphane": version("diaphane"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "inputs": recorded(self.inputs),
        }

    def progress(self, steps: Iterable[T], total: int, what: str) -> Iterator[T]:
        """The same walk, with a bar on a terminal.  Raises CommandError where its first step is not finite."""
        bar = tqdm(steps, total=total, desc=what, leave=False, disable=True if self.args.quiet else None)
        for i, step in enumerate(bar):
            x = getattr(step, "x", None)
            if i == 0 and isinstance(x, Tensor) and not bool(torch.isfinite(x).all()):
                raise CommandError("the network's first step is not finite: its weights are damaged, a setting is too "
                                   "extreme, or --dtype is too narrow for it")  # fmt: skip
            yield step

    def say(self, text: str) -> None:
        """A line of results, on standard output."""
        print(line(text))


def content(path: str) -> bytes:
    """A file's bytes.  Raises CommandError for what is no file, cannot be read, or is larger than 256 MiB."""
    try:
        if Path(path).is_dir():
            raise CommandError(f"{path} is a folder: name a file")
        if Path(path).exists() and not Path(path).is_file():
            raise CommandError(f"{path} is not a regular file")
        if Path(path).stat().st_size > MAX_INPUT:
            raise CommandError(f"{path} is larger than {MAX_INPUT >> 20} MiB")
        return Path(path).read_bytes()
    except OSError as e:
        raise CommandError(f"cannot read {path}: {reason(e)}") from e


def recorded(inputs: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Inputs by path: their sha256, and small ones whole, in base64."""
    rows, room = {}, EMBED_ALL
    for path, data in inputs.items():
        rows[path] = {"sha256": hashlib.sha256(data).hexdigest()}
        if len(data) <= min(EMBED_EACH, room):
            rows[path]["base64"] = base64.b64encode(data).decode("ascii")
            room -= len(data)
    return rows


def produce(
    command: str,
    parser: options.Parser,
    make: Callable[[argparse.Namespace, Session], Iterator[Made]],
    argv: Sequence[str],
    load: Callable[[argparse.Namespace], Any] = network.loaded,
) -> int:
    """Run a command that makes files: read the options, make, and write each file as soon as it is finished."""
    args = parser.parse_args(argv)
    session = Session(command, args, load=load)
    folder = Folder(args.out, overwrite=args.overwrite or getattr(args, "resume", False))
    with torch.no_grad(), folder:
        for made in make(args, session):
            folder.write(made.name, made.data if made.picture is None else encoded(made.picture, made.record))
    if not args.quiet and folder.written:
        print(line(f"wrote {len(folder.written)} file{'s' * (len(folder.written) > 1)} to {folder.path}"))
        sheet = folder.path / "sheet.png"
        if len(folder.written) > 1 and sheet in folder.written:
            print(line(f"see {sheet}"))
    sys.stdout.flush()
    return 0


def encoded(picture: Image.Image, record: Mapping[str, Any] | None) -> bytes:
    """A picture as the bytes of a PNG, with its record in an iTXt chunk called diaphane.

    Text under `parameters` in the record is in a chunk of that name too, where other programs look for settings.
    """
    import io

    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("diaphane", json.dumps(record))
    if record and record.get("parameters"):
        chunks.add_text("parameters", record["parameters"])
    data = io.BytesIO()
    picture.save(data, "PNG", pnginfo=chunks)
    return data.getvalue()

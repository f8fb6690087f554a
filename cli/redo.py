"""`diaphane redo`: a picture made again from its own record, and compared pixel by pixel."""

import argparse
import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import images, network, options
from .errors import CommandError, Differs, line
from .output import replace
from .session import Made, Session, content, encoded

MAKERS = (
    "generate",
    "instant-style",
    "probe",
    "style-align",
    "consistory",
    "panorama",
    "look",
    "sample",
    "invert",
    "diffstyle",
    "asyrp",
    "correlation",
    "demo",
)


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser(
        "redo",
        description="Make a picture again from the record that it carries (command, settings, seeds, sha256 of\n"
        "the weights and of every input), and compare: on the same machine, with the same versions, it is the same\n"
        "bit for bit.\n"
        "Small inputs are in the record; large ones have to be where they were.",
        epilog="example:\n  diaphane redo out/diffstyle/c01-s01.png\n  diaphane redo picture.png --show",
    )
    p.add_argument("picture", metavar="PNG", help="a picture that diaphane made")
    p.add_argument("--out", help="the new picture's file (default: NAME.redo.png beside the old one)")
    p.add_argument("--model", help="weights in another place; their sha256 has to be the same")
    p.add_argument("--show", action="store_true", help="print the record and stop")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it is there")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def record_of(data: bytes, name: str) -> dict[str, Any]:
    """The record that a PNG carries.  Raises CommandError."""
    images.decoded(data, name)
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as picture:
            picture.load()
            record = json.loads(picture.info.get("diaphane", ""))
    except (ValueError, TypeError, RecursionError):
        raise CommandError(
            f"{name} carries no record of diaphane: it was made, or saved again, by another program"
        ) from None
    kinds = {"command": str, "picture": str, "settings": dict, "weights": dict, "inputs": dict, "device": str,
             "threads": int, "versions": dict}  # fmt: skip
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise CommandError(f"the record of {name} is not whole")
    if record["command"] not in MAKERS:
        raise CommandError(f"the record of {name} is of no known command")
    return record


def inputs_of(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Every input by path: from the record, or from where it was, with the sha256 it had.  Raises CommandError."""
    found = {}
    for path, row in record["inputs"].items():
        if not isinstance(row, dict) or not isinstance(row.get("sha256"), str):
            raise CommandError("the record of inputs is not whole")
        try:
            data = base64.b64decode(row["base64"], validate=True) if "base64" in row else content(path)
        except (binascii.Error, TypeError, ValueError) as e:
            raise CommandError(f"the input {path} is needed: {e}") from e
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise CommandError(f"the input {path} has changed: its sha256 was {row['sha256'][:12]}...")
        found[path] = data
    return found


def again(record: Mapping[str, Any], *, model: str | None = None, quiet: bool = False) -> Made:
    """The picture of a record, made again.  Raises CommandError if weights or inputs are not what they were."""
    command = import_module(f".{record['command'].replace('-', '_')}", __package__)
    settings = {**record["settings"], "device": record["device"], "threads": record["threads"]}
    if model:
        settings["model"] = model
    p = command.parser()
    args: argparse.Namespace = p.parse_args(options.words(p, settings))
    args.quiet = quiet
    load = getattr(command, "LOAD", network.loaded)
    session = Session(record["command"], args, inputs_of(record), wanted=record["picture"], load=load)
    if session.net.weights["sha256"] != record["weights"].get("sha256"):
        was = str(record["weights"].get("sha256"))[:12]
        raise CommandError(f"the weights of {args.model} are others than the picture's (sha256 {was}...): give --model")
    with torch.no_grad():
        for made in command.make(args, session):
            if made.record and all(made.record[key] == record[key] for key in ("command", "picture")):
                return made
    raise CommandError(f"diaphane {record['command']} makes no {record['picture']}")


def target(args: argparse.Namespace) -> Path:
    """Where the new picture goes."""
    old = Path(args.picture)
    if args.out is None:
        names = (old.with_name(f"{old.stem}.redo{'' if i == 1 else f'-{i}'}.png") for i in count(1))
        return next(path for path in names if args.overwrite or not path.exists())
    path = Path(args.out)
    if path.is_dir():
        raise CommandError(f"--out {path} is a folder: name a file")
    if path.exists() and not args.overwrite:
        raise CommandError(f"{path} exists: name another file, or say --overwrite")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--out {path}: there is no folder {path.absolute().parent}")
    return path


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    data = content(args.picture)
    record, path = record_of(data, args.picture), target(args)
    if args.show:
        inputs = {
            name: row["sha256"] for name, row in record["inputs"].items() if isinstance(row, dict) and "sha256" in row
        }
        print(json.dumps({**record, "inputs": inputs}, indent=2))
        return 0
    made = again(record, model=args.model, quiet=args.quiet)
    assert made.picture is not None
    replace(path, encoded(made.picture, made.record))
    old, new = np.asarray(images.decoded(data, args.picture)), np.asarray(made.picture)
    print(line(f"wrote {path}"))
    if old.shape == new.shape and bool((old == new).all()):
        print("the same, bit for bit")
        return 0
    now = (made.record or {})["versions"]
    versions = [
        f"{what} {was} then, {now.get(what)} now" for what, was in record["versions"].items() if now.get(what) != was
    ]
    most = int(np.abs(old.astype(int) - new.astype(int)).max()) if old.shape == new.shape else 255
    raise Differs(
        f"{path} differs from {args.picture}, by up to {most} of 255 ({'; '.join(versions) or 'same versions'})"
    )

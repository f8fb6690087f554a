"""Opening weight files memory-mapped and without running what is in them, and writing them whole or not at all."""

import errno
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CorruptFileError, DiskFullError, DtypeError, MissingFileError, NonFiniteError, UnsafePickleError

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Opened:
    """What a file holds: named tensors mapped from it (safetensors), or whatever was pickled (torch)."""

    content: Any
    paths: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)


def opened(path: Path) -> Opened:
    """A weight file by its content, whatever its name: safetensors, a safetensors index, or a torch pickle.

    Tensors of safetensors and of torch's zip format stay in the file until they are read; no byte is copied or cast.
    Raises MissingFileError, CorruptFileError, UnsafePickleError.
    """
    try:
        with open(path, "rb") as f:
            head, size = f.read(512), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise MissingFileError(f"cannot open {path}: {e.strerror or e}") from e
    if not head:
        raise CorruptFileError(f"{path} is empty: fetch it again")
    if path.name.endswith(".index.json"):
        return sharded(path)
    torch_file = head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"
    # safetensors begin with the length of a json header, whose first byte may be a pickle's
    if head[8:9] == b"{" and (not torch_file or int.from_bytes(head[:8], "little") <= size - 8):
        return safetensors(path, size)
    if torch_file:
        return Opened(unpickled(path), (path,))
    for start, what in {b"version https://git-lfs": "a Git LFS pointer: run git lfs pull", b"<": "a web page"}.items():
        if head.lstrip()[: len(start)] == start:
            raise CorruptFileError(f"{path} is {what}, not weights")
    raise CorruptFileError(
        f"{path} is neither safetensors nor a torch file; it begins with {head[:8]!r}: fetch it again"
    )


def safetensors(path: Path, size: int) -> Opened:
    """A safetensors file, mapped."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (a handle, not a dict)
            return Opened(tensors, (path,), dict(f.metadata() or {}))
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as e:
        why = f"truncated or damaged ({size} bytes; {e})"
        raise CorruptFileError(f"{path} is not a whole safetensors file: {why}: fetch it again") from e


def sharded(path: Path) -> Opened:
    """The files that a `*.safetensors.index.json` names, as one."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CorruptFileError(f"{path} has no weight_map of keys and file names")
    names, tensors, metadata = sorted(set(index.values())), {}, {}
    for name in names:
        if Path(name).name != name:
            raise CorruptFileError(f"{path} names {name}, which is not a file beside it")
        shard = opened(path.parent / name)
        tensors |= {key: tensor for key, tensor in shard.content.items() if index.get(key) == name}
        metadata |= shard.metadata
    if lost := [key for key in index if key not in tensors]:
        raise CorruptFileError(f"{path} names {len(lost)} tensors that its files lack, {lost[0]} first: fetch it again")
    return Opened(tensors, tuple(path.parent / name for name in names), metadata)


def unpickled(path: Path) -> Any:
    """What a torch file holds: tensors, numbers, strings, plain containers; code in it is refused, not run."""
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles; what matters of them is raised
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        if code := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise UnsafePickleError(
                f"{path} holds code ({code[1]}), which is not run: save its tensors as safetensors where you trust it"
            ) from e
        raise CorruptFileError(f"{path} is a damaged torch file, or a pickle of other things: fetch it again") from e
    except Exception as e:  # what a damaged pickle raises is anything
        raise CorruptFileError(f"{path} is a damaged torch file ({type(e).__name__}): fetch it again") from e


def read_json(path: Path) -> dict[str, Any]:
    """A json file that holds an object.  Raises MissingFileError, CorruptFileError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise MissingFileError(f"cannot open {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CorruptFileError(f"{path} is not json: {e}") from e
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} holds no settings by name")
    return content


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Tensors as safetensors; the file appears whole or not at all.  Raises DiskFullError, MissingFileError."""
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        part.touch()
        mode = part.stat().st_mode  # as the umask gives it; safetensors would leave 0600
        save_file(whole, part, dict(metadata or {}))
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
            raise DiskFullError(f"no room for {path}: free {sum(t.nbytes for t in tensors.values())} bytes") from e
        raise MissingFileError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return path


def sha256(paths: Path | Iterable[Path]) -> str:
    """The sha256 of a file in hex; of several files, that of their digests one after the other."""
    if isinstance(paths, Path):
        with open(paths, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    digests = [sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def check_floating(tensors: Mapping[str, Tensor]) -> None:
    """Raises DtypeError for a tensor that is not of a floating type."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: weights are floating-point numbers"
            )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteError for a tensor with NaN or infinity in it, which half precision makes of large numbers."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{bad} of {tensor.numel()} values of {name} are not finite: use the float32 file")

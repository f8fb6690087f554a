"""Where files go: never over what is there, and whole or not at all."""

import os
from itertools import count
from pathlib import Path
from types import TracebackType

from .errors import CommandError, reason


class Folder:
    """A folder for the files of one run; if it is not empty, the first free one of NAME-2, NAME-3 ...

    It appears with its first file.  Raises CommandError where nothing could be written, before anything is computed.
    """

    def __init__(self, path: str, *, overwrite: bool = False):
        self.path, self.overwrite, self.written = Path(path), overwrite, list[Path]()
        self.made = False
        if not path.strip() or "\0" in path:
            raise CommandError("--out is empty: name a folder")
        try:
            first = self.path.absolute()
            while not first.exists() and first != first.parent:
                first = first.parent
        except (OSError, ValueError) as e:
            raise CommandError(f"--out {path} is no folder's name: {e}") from e
        if not first.is_dir():
            raise CommandError(f"--out {path}: {first} is a file, not a folder")
        if not os.access(first, os.W_OK | os.X_OK):
            raise CommandError(f"--out {path}: {first} is not writable")
        if len(os.fsencode(self.path.name)) > 240:
            raise CommandError(f"--out {path[:40]}... is too long a name")

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.made and not self.written:
            self.path.rmdir()

    def write(self, name: str, data: bytes) -> Path:
        """One file, in a folder of its own if `name` has one.  Raises CommandError if there is no room."""
        if not self.written:
            self._open()
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CommandError(f"cannot write {path}: {reason(e)}") from e
        replace(path, data)
        self.written.append(path)
        return path

    def _open(self) -> None:
        name = self.path.name
        for i in count(2):
            try:
                self.path.mkdir(parents=True)
                self.made = True
                return
            except FileExistsError:
                if self.path.is_dir() and (self.overwrite or not any(self.path.iterdir())):
                    return
            except OSError as e:
                raise CommandError(f"cannot make the folder {self.path}: {reason(e)}") from e
            self.path = self.path.with_name(f"{name}-{i}")


def replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.  Raises CommandError."""
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as e:
        raise CommandError(f"cannot write {path}: {reason(e)}") from e
    finally:
        part.unlink(missing_ok=True)

"""Folders and repositories by the file, and the tokenisers in them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import hub
from .errors import MissingFileError
from .files import read_json

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
END = "<|endoftext|>"
MERGES = Path(__file__).parent / "embedded" / "clip" / "merges.txt"  # of CLIP, published by OpenAI
ROWS = 49_408  # of a text tower that was trained on them


@dataclass(frozen=True)
class Folder:
    """A folder on this disk, or a repository of which only the files asked for are fetched."""

    name: str
    revision: str | None = None

    @property
    def local(self) -> bool:
        """Whether it is on this disk."""
        return Path(self.name).expanduser().is_dir()

    def file(self, name: str) -> Path | None:
        """A file in it, or None where there is no such file."""
        if not self.local:
            return hub.download(self.name, name, self.revision)
        path = Path(self.name).expanduser() / name
        return path if path.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """Settings in it, or None where there is no such file."""
        path = self.file(name)
        return None if path is None else read_json(path)


class Words(NamedTuple):
    """The files of a tokeniser, or twice one of both, and the token that fills up.

    Without a vocabulary it is what the merges give.
    """

    vocabulary: Path | None
    merges: Path
    pad: str


def words_in(folder: Folder, at: str, pad: str | None = None) -> Words | None:
    """The tokeniser in a folder of a folder ("": in itself), or None where there is none."""
    inside = f"{at}/" if at else ""
    vocabulary, merges = folder.file(f"{inside}vocab.json"), folder.file(f"{inside}merges.txt")
    if vocabulary is None or merges is None:
        vocabulary = merges = folder.file(f"{inside}tokenizer.json")  # both in one, as transformers writes since 5.0
    if vocabulary is None or merges is None:
        return None
    for name in ("tokenizer_config.json", "special_tokens_map.json") if pad is None else ():
        found = (folder.json(inside + name) or {}).get("pad_token")
        found = found.get("content") if isinstance(found, Mapping) else found
        if isinstance(found, str):
            return Words(vocabulary, merges, found)
    return Words(vocabulary, merges, pad or END)


def own_words(quick: Mapping[str, bool]) -> dict[str, Words]:
    """CLIP's tokeniser, which ships with the package, for each text encoder, filled up as `words_from` says."""
    return {text: Words(None, MERGES, END if old else "!") for text, old in quick.items()}


def words_from(source: str | os.PathLike[str], quick: Mapping[str, bool]) -> dict[str, Words]:
    """A tokeniser for each text encoder, filled up as in training: L, which has quick_gelu, with the end; others "!".

    Raises MissingFileError.
    """
    name = os.fspath(source)
    folder = Folder(name)
    if not folder.local and not hub.is_repo(name):
        raise MissingFileError(f"there is no folder {name} of a tokeniser: it should have vocab.json and merges.txt")
    out = {}
    for text, old in quick.items():
        pad = END if old else "!"
        found = words_in(folder, TOKENIZERS[text]) or words_in(folder, "tokenizer", pad) or words_in(folder, "", pad)
        if found is None:
            raise MissingFileError(f"there are no vocab.json and merges.txt in {name}, nor in its tokenizer/")
        out[text] = found
    return out

"""CLIP's tokeniser: text to byte-pair ids from a vocabulary and its merges, padded as its encoder wants it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text -> start, at most `length` - 2 tokens, end, padding.

    `pad` is the token that fills up: the end (Stable Diffusion 1, the first encoder of SDXL) or "!" (the second, and
    Stable Diffusion 2).  With `cut_pad` a pad token inside a text is taken out as such before anything else, so that
    every literal "!" is the pad id, which is what transformers does; without, "!" is text like any other, which is
    what the encoders were trained on (open_clip).  Without a file of a vocabulary it is the one that the merges give.
    """

    def __init__(
        self,
        vocabulary: str | os.PathLike[str] | None,
        merges: str | os.PathLike[str],
        *,
        pad: str = END,
        cut_pad: bool = True,
        length: int = 77,
    ):
        from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        pairs = read_merges(Path(merges))
        words = vocabulary_of(pairs) if vocabulary is None else read_vocabulary(Path(vocabulary))
        for token in (START, END, pad):
            if token not in words:
                raise ValueError(f"{vocabulary or merges} has no {token}: it is no vocabulary of CLIP's")
        try:
            model = BPE(words, pairs, end_of_word_suffix="</w>", unk_token=END)
        except Exception as e:  # the backend raises nothing narrower
            raise ValueError(f"{merges} does not fit {vocabulary or 'itself'}: {e}") from e
        backend = Backend(model)
        backend.normalizer = normalizers.Sequence(  # type: ignore[assignment]
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        raw = {pad} if cut_pad else set()  # found before the text is normalised, the others after
        special = [AddedToken(token, special=True, normalized=token not in raw) for token in sorted({START, END} | raw)]
        backend.add_special_tokens(special)
        self.backend, self.length, self.size = backend, length, max(words.values()) + 1
        self.start, self.end, self.pad = (words[token] for token in (START, END, pad))

    def ids(self, text: str) -> list[int]:
        """A text's ids between start and end, as many as there are.  Raises ValueError for what is no text."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt is text, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"the prompt has half a character (a lone surrogate) at {e.start}") from e
        return [self.start, *self.backend.encode(text, add_special_tokens=False).ids, self.end]

    def pieces(self, text: str) -> list[str]:
        """The tokens that `ids` numbers; the last of a word ends in </w>."""
        return [self.backend.id_to_token(i) or "" for i in self.ids(text)]

    def text(self, pieces: Sequence[str]) -> str:
        """What pieces spell, lower case and with a blank between words; half a character becomes the mark for one."""
        known = {letter: bytes([byte]) for byte, letter in letters().items()}
        joined = "".join(pieces).replace("</w>", " ")
        return b"".join(known.get(letter, letter.encode()) for letter in joined).decode("utf-8", "replace").strip()

    def __call__(self, texts: Sequence[str] | str) -> Tensor:
        """Texts -> ids (B, 77), cut to that length with the end last, or padded."""
        rows = [self.ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        rows = [row if len(row) <= self.length else [*row[: self.length - 1], self.end] for row in rows]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows]).view(-1, self.length)


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The tokens that merges give, numbered as CLIP's are (Radford et al. 2021).

    First the 256 bytes, those that are printed as themselves before those that stand for spaces and controls; the same
    256 at the end of a word; what each pair makes, in order; the start and the end of a text.  So 48,894 merges give
    the 49,408 tokens of CLIP.
    """
    single = letters().values()
    tokens = [*single, *(f"{letter}</w>" for letter in single), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def letters() -> dict[int, str]:
    """The letter of each byte in the vocabulary's order: itself where it is printed, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_vocabulary(path: Path) -> dict[str, int]:
    """Tokens and their ids, of a file of these or of a whole tokeniser.  Raises ValueError where it is no such json."""
    words: Any = parsed(path)
    if isinstance(words, dict) and isinstance(whole := words.get("model"), dict):
        added = [row for row in words.get("added_tokens") or () if isinstance(row, dict)]
        vocabulary = whole.get("vocab")
        held = vocabulary if isinstance(vocabulary, dict) else {}
        words = held | {row.get("content"): row.get("id") for row in added}
    if not isinstance(words, dict) or not all(type(i) is int and i >= 0 for i in words.values()):
        raise ValueError(f"{path} is no vocabulary: it should map tokens to ids")
    return words


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs in order of their merging, of lines under a version or not, or of a whole tokeniser.

    Raises ValueError for what is no pair.
    """
    if path.suffix == ".json":
        whole = parsed(path)
        model = whole.get("model") if isinstance(whole, dict) else None
        rows = model.get("merges") if isinstance(model, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} has no merges: it is no tokeniser of byte pairs")
        numbered = list(enumerate((row.split(" ") if isinstance(row, str) else row for row in rows), 1))
    else:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        found = [(i, line) for i, line in lines if line and not (i == 1 and line.startswith("#version"))]
        numbered = [(i, line.rstrip("\r").split(" ")) for i, line in found]
    for number, pair in numbered:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            said = " ".join(map(str, pair)) if isinstance(pair, list) else str(pair)
            what = "merge" if path.suffix == ".json" else "line"
            raise ValueError(f"{path}, {what} {number}: {said[:40]!r} is no pair of tokens")
    return [(first, second) for _, (first, second) in numbered]


def parsed(path: Path) -> object:
    """A json file.  Raises ValueError."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not json: {e}") from e

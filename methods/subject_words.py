"""Where a prompt says the subject: the places of its words among the tokens that CLIP reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.tokenizer import Tokenizer
from .scene import SceneError


def places_of(tokens: Tokenizer, texts: Sequence[str], words: Sequence[str]) -> Tensor:
    """The place of each subject word's first token in each text, -1 where it is not there.  -> int64 (texts, words).

    A word is found by all of its tokens, where they come first; the authors look for the first token alone, and take
    the last place.  SceneError: an empty word, a word that no text has, a text that has no word within CLIP's length.
    """
    if not words or not all(tokens.ids(word)[1:-1] for word in words):
        raise SceneError(f"the subject is one word or more of the prompts; got {list(words)}")
    rows = [[place(tokens.ids(text)[: tokens.length - 1], tokens.ids(word)[1:-1]) for word in words] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if max(row) < 0:
            said = ", ".join(repr(word) for word in words)
            raise SceneError(f"the prompt {text[:80]!r} does not name the subject {said}: write it into the prompt")
    for word, column in zip(words, zip(*rows, strict=True), strict=True):
        if max(column) < 0:
            raise SceneError(f"no prompt has the subject's word {word!r}")
    return torch.tensor(rows, dtype=torch.long)


def place(ids: Sequence[int], word: Sequence[int]) -> int:
    """Where a word begins among ids, or -1."""
    spans = range(len(ids) - len(word) + 1)
    return next((i for i in spans if list(ids[i : i + len(word)]) == list(word)), -1)

"""Text as the UNets take it: token states of one or two CLIP towers, the pooled text, size ids, and the embedding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.blocks import Cond
from ..model.components import Components
from ..model.ops import TORCH, Ops
from ..model.unet import Conditioned
from .taps import Embed, rows


class Prompt(NamedTuple):
    """What texts become: one row a picture."""

    context: Tensor  # (B, M, C) token states
    pooled: Tensor | None = None  # (B, P), where the UNet takes it

    def repeated(self, n: int) -> "Prompt":
        """Each row n times in a row: n pictures a text."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(n, dim=0)
        return Prompt(self.context.repeat_interleave(n, dim=0), pooled)

    def over(self, n: int) -> "Prompt":
        """The rows over and over, n in all: one prompt for n pictures."""
        return Prompt(rows(self.context, n), None if self.pooled is None else rows(self.pooled, n))

    def zeros(self) -> "Prompt":
        """Nothing said: zeros, as SDXL was trained to take for no text at all; not what "" is encoded to."""
        return Prompt(torch.zeros_like(self.context), None if self.pooled is None else torch.zeros_like(self.pooled))


def encode(
    parts: Components,
    texts: Sequence[str] | str,
    second: Sequence[str] | str | None = None,
    *,
    clip_skip: int = 0,
    ops: Ops = TORCH,
) -> Prompt:
    """Texts -> token states and, for SDXL, pooled text; one row a text, cut at 77 tokens.

    SDXL reads the last layer but one of each tower side by side, under no norm, and the pooled text of the last tower
    (Podell et al. 2023, section 2.1); Stable Diffusion 1 and 2 read the last layer under the final norm.  `second`
    are other texts for the second tower, `clip_skip` how many layers earlier to read.
    A ValueError is raised for models without a tokeniser, for what is no text, and for texts that are not as many.
    """
    if not parts.tokenizers:
        raise ValueError("the model came without a vocabulary: load it with tokenizer= a folder with vocab.json")
    said = [listed(texts)]
    said.append(said[0] if second is None else listed(second))
    if len(said[0]) != len(said[1]):
        raise ValueError(f"{len(said[0])} texts for the first tower, {len(said[1])} for the second: give as many")
    ids = [tokens(row) for tokens, row in zip(parts.tokenizers, said, strict=False)]
    return encode_ids(parts, ids, clip_skip=clip_skip, ops=ops)


def listed(texts: Sequence[str] | str) -> list[str]:
    """Texts as a list.  Raises ValueError for what is no text, and for none."""
    rows = [texts] if isinstance(texts, str) else texts
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(text, str) for text in rows):
        wrong = [row for row in rows if not isinstance(row, str)] if isinstance(rows, list | tuple) else [rows]
        kinds = {type(row).__name__ for row in wrong}
        raise ValueError(f"a prompt is a text, or a list of texts, not {' and '.join(sorted(kinds)) or 'an empty one'}")
    return list(rows)


def encode_ids(parts: Components, ids: Sequence[Tensor], *, clip_skip: int = 0, ops: Ops = TORCH) -> Prompt:
    """The same from token ids, (B, M) for each tower."""
    states, pooled = [], None
    for tower, row in zip(parts.towers, ids, strict=True):
        text = tower(row.to(tower.token.weight.device), ops)
        if parts.xl:
            states.append(text.skipped(clip_skip))
            pooled = text.pooled
        else:
            if not isinstance(clip_skip, int) or not 0 <= clip_skip < len(text.hidden) - 1:
                raise ValueError(f"clip skip is 0...{len(text.hidden) - 2} in a tower of this depth, not {clip_skip}")
            states.append(tower.norm(text.hidden[-1 - clip_skip]))
    return Prompt(torch.cat([state.to(states[0]) for state in states], dim=-1), pooled)


def beside(*prompts: Prompt) -> Prompt:
    """Rows of several prompts one after the other, as a doubled batch wants them: negative first, then positive."""
    if len({tuple(p.context.shape[1:]) for p in prompts}) > 1:
        shapes = " and ".join(str(tuple(p.context.shape)) for p in prompts)
        raise ValueError(f"prompts in one batch have as many tokens each; got {shapes}")
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    return Prompt(torch.cat([p.context for p in prompts]), torch.cat(pooled) if pooled else None)


def size_ids(
    size: tuple[int, int],
    batch: int = 1,
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    target: tuple[int, int] | None = None,
) -> Tensor:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2), in pixels, height first: (batch, 6).

    The size that a picture had, the top left corner of what was cut out of it, and the size it came to; by default as
    if nothing had been done to a picture of `size`.
    """
    return torch.tensor([(*(original or size), *crop, *(target or size))], dtype=torch.float32).repeat(batch, 1)


def score_ids(
    size: tuple[int, int],
    batch: int = 1,
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    score: float = 6.0,
) -> Tensor:
    """The refiner's: original size, crop, and how beautiful people found the picture, 0...10; (batch, 5).

    Negative prompts are usually given 2.5.
    """
    return torch.tensor([(*(original or size), *crop, score)], dtype=torch.float32).repeat(batch, 1)


def conditioning(unet: Conditioned, prompt: Prompt, ids: Tensor | None = None) -> Embed:
    """t (B,) -> what conditions every block of `unet` (or ControlNet): what samplers and h-space methods call `embed`.

    Prompt and ids have as many rows as x has pictures; networks without pooled text take no ids, and what is not
    theirs is left out here.
    """
    kind = next(unet.parameters())
    context = prompt.context.to(kind)
    if unet.vector is None:
        return lambda t: unet.embed(t, context)
    if prompt.pooled is None or ids is None:
        raise ValueError("this UNet takes pooled text and size ids: encode with its own towers, and give ids")
    pooled, sizes = prompt.pooled.to(kind), ids.to(kind.device)

    def embed(t: Tensor) -> Cond:
        return unet.embed(t, context, pooled, sizes)

    return embed

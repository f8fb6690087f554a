"""InstantStyle (Wang et al. 2024) on IP-Adapter (Ye et al. 2023): pictures as prompts, where the UNet makes style.

    adapter.fits(unet.cfg, tower)
    states = features(adapter, tower, pixels)                      # (n, E), or (n, T, C) for Plus
    states = subtracted(adapter, states, [(text, 0.5)])            # linear adapters: leave a content out
    seen = Pictures(adapter(states)[None], adapter(adapter.nothing(tower))[None])
    prompt = image_prompt(adapter, unet.cfg, seen.repeated(4), scales(unet.cfg, "style"))
    denoise = t2i.denoiser(unet, ..., ops=instant_style(TORCH, [prompt]))

At each attention to text in `scales` (Ye et al. 2023, eq. 5, with a number lambda_l of its own)

    h = softmax(q K_txt' / sqrt(d)) V_txt + lambda_l softmax(q K_img' / sqrt(d)) V_img,

K_img and V_img computed once, whatever the number of steps.  lambda_l is not 0 for the blocks of style (and layout)
alone: InstantStyle's first idea; its second is subtracting what a text says from the embedding.  The paper writes a
plain difference; its authors' code has a weight (0.5 in the example, 0.8 for Stable Diffusion 1), and so has this.
With scales 0 nothing is computed and nothing changes, bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.clip import TextTower, VisionTower
from ..model.image_prompt import IPAdapter, text_sites
from ..model.ops import TORCH, Ops, Site
from ..model.tokenizer import Tokenizer
from ..model.unet import UNetConfig
from ..samplers.parameterisation import Denoise
from .scales import Scales


class Pictures(NamedTuple):
    """What pictures become for one adapter: one row a picture that is drawn, n images in each."""

    tokens: Tensor  # (B, n, N, D)
    nothing: Tensor  # (B, n or 1, N, D): of no picture, for the rows that guidance leads away from

    def repeated(self, n: int) -> "Pictures":
        """Each row n times in a row."""
        return Pictures(*(t.repeat_interleave(n, dim=0) for t in self))


def features(adapter: IPAdapter, tower: VisionTower, pixels: Tensor, ops: Ops = TORCH) -> Tensor:
    """Normalised pictures (n, 3, 224, 224) -> what the adapter reads: (n, E) embeddings, or (n, T, C) states."""
    return adapter.read(tower(pixels.to(tower.cls), ops))


def averaged(states: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Several pictures as one: the mean of what the adapter reads, (n, ...) -> (1, ...), weighted by `weights`.

    A ValueError is raised for weights that are not as many, or whose sum is 0.
    """
    if weights is None:
        return states.mean(dim=0, keepdim=True)
    w = torch.tensor(weights, dtype=states.dtype, device=states.device)
    if len(w) != len(states) or not float(w.sum()):
        raise ValueError(f"weights are {len(states)}, one a picture, with a sum that is not 0; got {list(weights)}")
    return (states * (w / w.sum()).view(-1, *[1] * (states.ndim - 1))).sum(dim=0, keepdim=True)


def subtracted(adapter: IPAdapter, states: Tensor, contents: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Embeddings (n, E) less weight times each text embedding (1 or n, E) (Wang et al. 2024).

    Both are of one CLIP, projected and not normalised: SDXL's second text encoder belongs to bigG, ViT-H has its own.
    A ValueError is raised for adapters that read states, of which no text can be subtracted, and for another CLIP's.
    """
    if contents and adapter.cfg.kind != "linear":
        raise ValueError(f"a {adapter.cfg.kind} adapter reads states of patches, from which no text can be subtracted: "
                         "take a linear adapter")  # fmt: skip
    for text, weight in contents:
        if text.shape[-1] != states.shape[-1]:
            raise ValueError(f"the text's embedding has {text.shape[-1]} numbers, the picture's {states.shape[-1]}: "
                             "take the text tower of the image encoder's own CLIP")  # fmt: skip
        states = states - weight * text.to(states)
    return states


def content(tower: TextTower, tokens: Tokenizer, text: str, ops: Ops = TORCH) -> Tensor:
    """The embedding (1, E) of a text, for `subtracted`.  A ValueError is raised for towers that do not project."""
    if tower.projection is None:
        raise ValueError("the text tower has no projection into the space of pictures: CLIP L of Stable Diffusion 1 "
                         "and SDXL is such; take the one of the image encoder's own CLIP")  # fmt: skip
    return tower(tokens([text]).to(tower.token.weight.device), ops).pooled


class Term(NamedTuple):
    """One image term of one attention to text: K_img, V_img of no picture and of the pictures, 2B rows, and lambda."""

    k: Tensor  # (2B, M, C), or (2B, n, N, C) where every image has a mask
    v: Tensor
    scale: float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """One adapter's terms at each attention to text, for B pictures, and at which timesteps they are added."""

    batch: int
    terms: Mapping[Site, Term]
    strength: Tensor | None = None  # (B,): a number a picture that is drawn
    masks: Mapping[int, Tensor] = field(default_factory=dict)  # queries -> (1 or 2B, n, queries, 1)
    first: float | None = None  # on where last <= t <= first, as `methods.controlnet.between` gives them
    last: float | None = None

    def on(self, t: float) -> bool:
        """Whether it is on at a timestep."""
        return (self.first is None or t <= self.first) and (self.last is None or t >= self.last)

    def rows(self, value: Tensor, n: int) -> Tensor:
        """Those of 2B rows that a batch of n has: all of them, or without guidance the second half."""
        if len(value) != 2 * self.batch:
            raise ValueError(f"what is of {self.batch} pictures has {2 * self.batch} rows, of none and of them; got "
                             f"{len(value)}")  # fmt: skip
        if n == 2 * self.batch:
            return value
        if n != self.batch:
            raise ValueError(f"the image prompt is of {self.batch} pictures, {2 * self.batch} rows with guidance; "
                             f"the batch has {n}")  # fmt: skip
        return value[self.batch :]

    def of(self, ops: Ops, site: Site, q: Tensor) -> Tensor:
        """lambda softmax(q K_img' / sqrt(d)) V_img.  (R, H, N, D) -> the same."""
        term, here = self.terms[site], site._replace(kind="image")
        k, v = (self.rows(t, len(q)).to(q).unflatten(-1, (q.shape[1], -1)).transpose(-2, -3) for t in term[:2])
        if not isinstance(term.scale, tuple):
            out = term.scale * ops.attend(here, q, k, v)
        else:
            if q.shape[2] not in self.masks:
                raise ValueError(f"no mask is made for {q.shape[2]} queries at {site.stage}: the mask is for "
                                 "pictures of another size")  # fmt: skip
            mask = self.masks[q.shape[2]].to(q)
            shares = [i for i, n in enumerate(term.scale) if n]
            each = [ops.attend(here, q, k[:, i], v[:, i]) for i in shares]
            seen = mask if len(mask) == 1 else self.rows(mask, len(q))
            parts = [term.scale[i] * (y * seen[:, i, None]) for i, y in zip(shares, each, strict=True)]
            out = sum(parts[1:], parts[0])
        if self.strength is None:
            return out
        strength = self.strength.to(out)
        return torch.cat([strength] * (len(q) // self.batch)).view(-1, 1, 1, 1) * out


def image_prompt(
    adapter: IPAdapter,
    cfg: UNetConfig,
    pictures: Pictures,
    scale: Scales,
    *,
    strength: Tensor | None = None,
    masks: Tensor | None = None,
    size: tuple[int, int] | None = None,
    first: float | None = None,
    last: float | None = None,
) -> ImagePrompt:
    """What an adapter adds, with keys and values computed here, at the places of `scale` alone.

    Matrices of other places are not touched: an adapter may stay where its file maps it; tokens say type and device.
    Several images of one adapter are seen by one softmax.  With `masks` (1 or B, n, H, W) in [0, 1], at the size of
    the pictures that are drawn or in their proportions, each image has a softmax of its own and is seen where its
    mask is; `size` is then (height, width) of the latents.  `strength` (B,) is a further number a picture.
    A ValueError is raised for an adapter of another UNet, for masks that are not as many as images or have other
    proportions, and for lists of scales without masks.
    """
    adapter.fits(cfg)
    tokens, n = pictures.tokens, pictures.tokens.shape[1]
    if tokens.ndim != 4 or pictures.nothing.ndim != 4 or len(pictures.nothing) != len(tokens):
        raise ValueError(f"tokens are (B, images, N, D); got {tuple(tokens.shape)} and {tuple(pictures.nothing.shape)}")
    if strength is not None and tuple(strength.shape) != (len(tokens),):
        raise ValueError(f"strength is ({len(tokens)},), one a picture; got {tuple(strength.shape)}")
    if masks is not None and size is None:
        raise ValueError("masks need size=, height and width of the latents")
    for at, value in scale.items():
        if isinstance(value, tuple) and (masks is None or len(value) != n):
            why = f"has {n}" if masks is not None else "has no masks: give it one number"
            raise ValueError(f"{at.stage} has {len(value)} scales for images, the adapter {why}")
    both = torch.cat([pictures.nothing.expand(-1, n, -1, -1), tokens])  # (2B, n, N, D): guidance's halves
    index = {found: i for i, (found, _) in enumerate(text_sites(cfg))}
    terms: dict[Site, Term] = {}
    for at, value in scale.items():
        if not any(value if isinstance(value, tuple) else (value,)):
            continue
        k, v = (F.linear(both, part[index[at]].get_parameter("weight").to(both)) for part in (adapter.k, adapter.v))
        if masks is None:
            terms[at] = Term(k.flatten(1, 2), v.flatten(1, 2), value)
        else:
            terms[at] = Term(k, v, value if isinstance(value, tuple) else (value,) * n)
    strength = None if strength is None else strength.to(both)
    masks = None if masks is None else masks.to(both.device)
    resized = {} if masks is None or size is None else at_levels(masks, n, len(tokens), cfg, size)
    return ImagePrompt(batch=len(tokens), terms=terms, strength=strength, masks=resized, first=first, last=last)


def at_levels(masks: Tensor, n: int, batch: int, cfg: UNetConfig, size: tuple[int, int]) -> dict[int, Tensor]:
    """Masks (1 or B, n, H, W) at the size of each level, bicubic without antialias: queries -> (1 or 2B, n, N, 1)."""
    if masks.ndim != 4 or masks.shape[1] != n or len(masks) not in (1, batch):
        raise ValueError(f"masks are (1 or {batch}, {n}, H, W), one an image; got {tuple(masks.shape)}")
    if bool(((masks < 0) | (masks > 1)).any()):
        raise ValueError("masks lie in [0, 1]: 1 where an image is seen")
    (h, w), (high, wide) = size, masks.shape[2:]
    if high * w != wide * h:
        raise ValueError(f"masks of {wide} x {high} are of other proportions than latents of {w} x {h}")
    out = {}
    for level in range(len(cfg.channels)):
        here = (math.ceil(h / 2**level), math.ceil(w / 2**level))
        small = F.interpolate(masks.float(), size=here, mode="bicubic", align_corners=False)
        small = small.flatten(2).unsqueeze(-1)
        out[here[0] * here[1]] = small if len(small) == 1 else torch.cat([small, small])
    return out


def instant_style(ops: Ops, prompts: Sequence[ImagePrompt]) -> Ops:
    """`ops` with what image prompts add to each attention to text: separate terms, one after the other.

    A batch has B rows, or 2B under guidance (`samplers.guidance`); the text's attention is left to `ops`, with every
    argument, and the images' is the same verb at sites of the kind "image".  Without terms it is `ops` itself.
    """
    prompts = [prompt for prompt in prompts if prompt.terms]
    if not prompts:
        return ops

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, bias=None, seen=None) -> Tensor:
        out = ops.attend(site, q, k, v, bias, seen)
        for prompt in prompts:
            if site in prompt.terms:
                out = out + prompt.of(ops, site, q)
        return out

    return replace(ops, attend=attend)


def ranged(make: Callable[[Ops], Denoise], ops: Ops, prompts: Sequence[ImagePrompt]) -> Denoise:
    """A denoiser with each image prompt at its own timesteps; `make` makes one that speaks given verbs.

    Where none is on it is `make(ops)`.  t is one timestep for the whole batch.
    """
    if all(prompt.first is None and prompt.last is None for prompt in prompts):
        return make(instant_style(ops, prompts))
    made: dict[tuple[bool, ...], Denoise] = {}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        now = float(t.flatten()[0])
        on = tuple(prompt.on(now) for prompt in prompts)
        if on not in made:
            made[on] = make(instant_style(ops, [p for p, there in zip(prompts, on, strict=True) if there]))
        return made[on](x, t)

    return denoise

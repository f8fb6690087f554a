"""What parts of a call cost, as shares of one pass of the network: multiplications, counted from its weights."""

from typing import Any

from torch import nn

from ..model.unet import Attention, UNet
from .cast import Tally
from .consistory import Places, places


def shares(unet: UNet, latents: tuple[int, int], tokens: int = 77) -> Tally:
    """The parts that ConsiStory runs, as shares of a pass at latents (height, width) under a text of `tokens`.

    Matrix products, convolutions and attention; what is seen of other pictures besides is not counted.
    """
    where = places(unet.cfg)
    encoder = sum(stage(unet, where, f"enc.{i}", latents, tokens) for i in range(len(unet.enc)))
    encoder += stage(unet, where, "mid", latents, tokens)
    decoder = [stage(unet, where, f"dec.{i}", latents, tokens) for i in range(len(unet.dec))]
    whole = encoder + sum(decoder) + weights(unet.conv_out, latents[0] * latents[1], tokens)
    ends = {}
    for site in (where.last, where.last_map):
        at = int(site.stage.partition(".")[2])
        modules: list[Any] = list(unet.dec[at])  # pyright: ignore[reportArgumentType]
        last, n = modules[1].blocks[-1], pixels(latents, where.level[site.stage])
        left = [last.ff_in, last.ff_out, modules[1].proj_out]
        left += [last.cross_attn.out] if site.kind == "cross" else [last.cross_attn, last.self_attn.out]
        rest = sum(weights(m, n, tokens) for m in left)
        rest += sum(weights(m, finer(latents, where, at), tokens) for m in modules[2:])
        rest += 2 * n * n * last.self_attn.q.out_features if site.kind == "self" else 0
        ends[site] = sum(decoder[: at + 1]) - rest
    feature = sum(decoder[: int(where.feature.partition(".")[2])])
    return Tally(
        encoder / whole, 1 - encoder / whole, ends[where.last] / whole, ends[where.last_map] / whole, feature / whole
    )


def stage(unet: UNet, where: Places, name: str, latents: tuple[int, int], tokens: int) -> int:
    """Multiplications of a stage; what doubles or halves does so at the size that comes out."""
    kind, _, number = name.partition(".")
    modules = list(unet.mid if kind == "mid" else getattr(unet, kind)[int(number)])
    n = pixels(latents, where.level[name])
    total = 0
    for module in modules:
        other = type(module).__name__ in ("Up", "Down")
        at = n if not other else finer(latents, where, int(number)) if kind == "dec" else pixels(
            latents, where.level[name] + 1
        )  # fmt: skip
        total += weights(module, at, tokens)
    return total


def finer(latents: tuple[int, int], where: Places, number: int) -> int:
    """Pixels at the level above that of a decoder's stage."""
    return pixels(latents, max(where.level[f"dec.{number}"] - 1, 0))


def pixels(latents: tuple[int, int], level: int) -> int:
    """How many there are at a level."""
    height, width = (-(-side // 2**level) for side in latents)
    return height * width


def weights(module: nn.Module, n: int, tokens: int) -> int:
    """Multiplications of a module over n pixels and a text."""
    total = 0
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            text = name.endswith(("cross_attn.k", "cross_attn.v"))
            total += part.weight.numel() * (tokens if text else 1 if name.endswith("emb") else n)
        elif isinstance(part, Attention):
            total += 2 * n * (n if part.site.kind == "self" else tokens) * part.q.out_features
    return total

"""The option of FreeU, and the verbs that it comes to."""

import argparse
import math

from ..methods.freeu import PRESETS, FreeU, freeu
from ..model.ops import TORCH, Ops
from . import latents

KNOWN = (*PRESETS, "none")


def option(p: "argparse.ArgumentParser | argparse._ArgumentGroup", default: str) -> None:
    """How much of h and of the skips' low frequencies."""
    known = ", ".join(KNOWN)
    p.add_argument("--freeu", type=said, default=default, metavar="F", help="more of h, less of skips' low frequencies "
                   f"(Si et al. 2024): {known}, or b1,b2,s1,s2 (default: {default})")  # fmt: skip


def said(text: str) -> str:
    """FreeU's factors, as they are said."""
    factors(text)
    return text


def factors(text: str) -> FreeU | None:
    """A preset's factors, or four numbers; none for `none`."""
    if text in KNOWN:
        return PRESETS.get(text)
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4 or not all(math.isfinite(f) and -100 <= f <= 100 for f in numbers):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of {', '.join(KNOWN)}, and no b1,b2,s1,s2 in -100 "
                                         "... 100")  # fmt: skip
    return FreeU(*numbers)


def freed(args: argparse.Namespace, net: latents.Loaded, ops: Ops = TORCH) -> Ops:
    """The verbs with FreeU, where the options ask for it."""
    found = factors(args.freeu)
    return ops if found is None else freeu(ops, net.parts.unet.cfg, found)

"""`diaphane instant-style`: text drawn in the style of pictures, by InstantStyle on IP-Adapter."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from . import generate, image_options, image_prompts, options
from .draw import check
from .session import Made, Session, produce

LOAD = image_prompts.loaded
ABOUT = """\
Draw a text in the style of pictures (InstantStyle, Wang et al. 2024), with an IP-Adapter (Ye et al. 2023).

CLIP sees each picture; the adapter makes tokens of what it says, and at each attention to text
h = Attn(q, K_text, V_text) + lambda Attn(q, K_picture, V_picture).  InstantStyle: lambda is not 0 only where the UNet
makes style (one of eleven blocks of SDXL), or style and layout; and what a text says of the picture's content is
subtracted from its embedding.  Everything of `diaphane generate` goes with it: --control, --init, --mask, --lora.
"""
EXAMPLES = """\
examples:
  diaphane instant-style "a cat" --model FOLDER --adapter ip-adapter_sdxl --style-image painting.png
  diaphane instant-style "a cat" --model FOLDER --adapter ip-adapter_sdxl --style-image a.png --subtract "a tower:0.5"
  diaphane instant-style "a cat" --model FOLDER --adapter ip-adapter_sdxl --style-image a.png --n 3 --amounts 0 0.5 1
  diaphane instant-style "a cat" --model FOLDER --adapter ip-adapter_sdxl --style-image a.png --sites dec.1=1 enc.8=0.5
"""


def parser() -> options.Parser:
    """The command's options."""
    p = generate.arguments(options.Parser("instant-style", description=ABOUT, epilog=EXAMPLES), "instant-style")
    image_options.options(p)
    p.add_argument("--amounts", nargs="+", type=options.real(-100, 100), metavar="A", help="a further number for each "
                   "picture that is drawn, one after the other and over again (default: 1)")  # fmt: skip
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The pictures, then a sheet of all of them."""
    image_options.check(args)
    generate.prompts(args, session)
    net: Any = session.net
    check(args, net)
    size = generate.sizes(args, net)
    seen = image_prompts.shown(args, session, net, size)
    yield from generate.make(args, session, image_prompts.around(net, seen, size, args.amounts))


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("instant-style", parser(), make, argv, load=LOAD)

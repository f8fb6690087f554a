"""`diaphane correlation`: how |h| and the skip beside it go together."""

import argparse
import csv
import io
from collections.abc import Iterator, Sequence

import torch

from ..methods.blend import BLENDS
from ..methods.correlation import Correlations, correlations
from ..methods.taps import Tap, tapped
from ..samplers.noise import seeded
from ..samplers.path import papers, upward
from . import options, text_network
from .errors import CommandError
from .plot import plot
from .session import Made, Session, produce

ABOUT = """\
Correlate the norms of h and of its skip (DiffStyle, Jeong et al. 2024, figure 4b).

At each timestep, over a set of pictures, Pearson's r between |h| and |g|, where g is the skip that the
decoder joins to h first:
    r_homo     h and g of the same picture
    r_hetero   h of one picture, g of another
    r_alt      h mixed with another picture's h by slerp, lerp, addition or replacement, and g
The paper's argument for slerp: the decoder knows r_homo, and slerp at equal norm keeps it exactly.
Writes correlation.csv and correlation.png.
"""
LOAD = text_network.loaded
EXAMPLES = """\
example:
  diaphane correlation --n 32
  diaphane correlation --image a.png b.png c.png --gamma 0.6
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("correlation", ABOUT, EXAMPLES)
    p.add_argument("--image", nargs="+", metavar="IMG", help="at least 3 pictures, inverted (default: --n samples)")
    p.add_argument("--n", type=options.whole(3, 10_000), default=32, help="how many samples (default: 32)")
    p.add_argument("--gamma", type=options.real(0, 2), default=0.3, help="how much is mixed for r_alt (default: 0.3)")
    options.steps(p, what="DDIM steps", low=2)
    options.pictures(p)
    text_network.options(p)
    return p


def together(walks: Sequence[Iterator[Tap]]) -> Iterator[Tap]:
    """Batches walked in step, as one tap each of all pictures; h and the last skip only, under guidance the text's."""
    for taps in zip(*walks, strict=True):
        h, g = (
            torch.cat([v[-len(tap.step.x) :] for tap, v in zip(taps, kept, strict=True)])
            for kept in ([tap.h for tap in taps], [tap.skips[-1] for tap in taps])
        )
        if not bool(torch.isfinite(h).all() and torch.isfinite(g).all()):
            raise CommandError("h is not finite: the weights are damaged, or --dtype is too narrow for them")
        yield Tap(taps[0].step, h, [g])


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The table, then the plot."""
    net, path = session.net, papers(args.steps)
    if args.image:
        x, path = net.encode(session.pictures(args.image, resize=not args.no_resize)), upward(path)
    else:
        x = seeded([args.seed + i for i in range(args.n)])(
            torch.empty(args.n, *net.shape, device=net.device, dtype=net.dtype)
        )
    if len(x) < 3:
        raise CommandError(f"a correlation needs at least 3 pictures; got {len(x)}")
    walks = [
        tapped(net.unet, x[b.start : b.stop], net.schedule, path, embed=net.embed) for b in session.batches(len(x))
    ]
    taps = session.progress(together(walks), len(path) - 1, f"{len(x)} pictures")
    rows = sorted(correlations(taps, gamma=args.gamma), key=lambda row: row.t)
    if session.wanted is None:
        yield Made("correlation.csv", data=table(rows).encode())
    lines = {"r_homo": [row.homo for row in rows], "r_hetero": [row.hetero for row in rows]}
    lines |= {f"r_alt, {name}": [row.alt[name] for row in rows] for name in BLENDS}
    title = f"|h| and |g| of {len(x)} {'pictures, inverted' if args.image else 'samples'}; gamma {args.gamma:g}"
    yield session.made(
        "correlation.png", plot([row.t for row in rows], lines, title=title, across="t", along="Pearson's r")
    )


def table(rows: Sequence[Correlations]) -> str:
    """The correlations as csv, one row per timestep."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["t", "homo", "hetero", *(f"alt_{name}" for name in BLENDS)])
    for row in rows:
        writer.writerow([row.t, *(f"{r:.6f}" for r in (row.homo, row.hetero, *(row.alt[name] for name in BLENDS)))])
    return text.getvalue()


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("correlation", parser(), make, argv, load=LOAD)

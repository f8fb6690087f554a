"""`diaphane sample`: pictures from noise."""

import argparse
from collections.abc import Iterator, Sequence

import torch

from ..samplers import ddpm as ancestral
from ..samplers import path
from ..samplers.ddim import ddim
from ..samplers.inversion import last
from ..samplers.noise import seeded
from ..samplers.parameterisation import clipped
from . import options
from .images import to_picture
from .session import Made, Session, produce
from .sheet import grid

SPACINGS = {"papers": path.papers, "leading": path.leading, "trailing": path.trailing, "linspace": path.linspace}
ABOUT = """\
Draw pictures from noise.

DDIM (Song et al. 2021, eq. 12) walks from x_T down a path of timesteps.  At each, the network predicts
the noise eps, which gives a clean picture P = (x - sqrt(1 - alpha) eps) / sqrt(alpha); the next x is that
picture with the same noise added back, less of it.  --eta 1 adds fresh noise at each step.  DDPM (Ho et
al. 2020) is the ancestral sampler; networks that have learned their variances use them.
"""
EXAMPLES = """\
example:
  diaphane sample --n 16 --steps 50
  diaphane sample --n 4 --sampler ddpm --steps 250 --clip
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("sample", ABOUT, EXAMPLES)
    p.add_argument("--n", type=options.whole(1, 100_000), default=16, help="how many pictures (default: 16)")
    options.steps(p, what="steps")
    p.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="(default: ddim)")
    p.add_argument("--eta", type=options.real(0, 1), default=0.0, help="DDIM's fresh noise, 0 ... 1 (default: 0)")
    p.add_argument("--spacing", choices=tuple(SPACINGS), default="papers",
                   help="which timesteps: the h-space papers' own (0 and 999 among them), or as elsewhere")  # fmt: skip
    p.add_argument("--variance", choices=("small", "large", "learned"),
                   help="DDPM's (default: learned where the network has it, else small)")  # fmt: skip
    p.add_argument("--clip", action="store_true", help="keep the predicted clean picture in [-1, 1] at every step")
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The pictures, then a sheet of all of them."""
    net, down = session.net, SPACINGS[args.spacing](args.steps)
    names, drawn = [f"{i + 1:04d}.png" for i in range(args.n)], []
    for rows in session.batches(args.n):
        if not session.wants("sheet.png", *(names[i] for i in rows)):
            continue
        noise = seeded([args.seed + i for i in rows])
        x = noise(torch.empty(len(rows), net.channels, net.side, net.side, device=net.device, dtype=net.dtype))
        if args.sampler == "ddim":
            denoise = clipped(net.denoise(), net.schedule) if args.clip else net.denoise()
            walk = ddim(denoise, x, net.schedule, down, eta=args.eta, noise=noise)
        else:
            variance = args.variance or ("learned" if net.learned_sigma else "small")
            denoise, clip = net.denoise(variance=variance == "learned"), 1.0 if args.clip else None
            walk = ancestral.ddpm(denoise, x, net.schedule, down, noise=noise, variance=variance, clip=clip)
        x = last(session.progress(walk, len(down) - 1, f"pictures {rows[0] + 1} ... {rows[-1] + 1} of {args.n}")).x
        for i, row in zip(rows, x, strict=True):
            drawn.append(to_picture(row))
            yield session.made(names[i], drawn[-1], seed=args.seed + i)
    if args.n > 1 and session.wants("sheet.png"):
        yield session.made(
            "sheet.png", grid(drawn[:256], title=f"{args.n} pictures, {args.steps} {args.sampler} steps")
        )


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("sample", parser(), make, argv)

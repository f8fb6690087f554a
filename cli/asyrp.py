"""`diaphane asyrp`: edits along directions of h-space."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..methods.asyrp import asyrp, coefficients
from ..methods.taps import invert
from ..samplers.inversion import last
from ..samplers.noise import seeded
from ..samplers.path import papers
from . import options, text_network
from .directions import Direction, edit, files, from_file, of_decoder, of_samples, of_sets, saved, watching
from .errors import CommandError
from .images import to_picture
from .output import replace
from .session import Made, Session, produce
from .sheet import sheet, stacked

ABOUT = """\
Edit pictures along directions of h-space (Asyrp, Kwon et al. 2023).

The asymmetric reverse process changes h in one half of each DDIM step only (eq. 6):
    x_s = sqrt(alpha_s) · P(eps(x_t | h + Δh))  +  D(eps(x_t | h))
P is the predicted clean picture, D the direction back to x_s; Δh is added where t >= t_edit.  Changing
both halves would cancel.  A direction Δh comes from
  --delta FILE       a learned f(h, t) in the published format, or what --save-direction wrote
  --from-sets A B    two folders of pictures: mean h of B minus mean h of A
  --pca K            principal components of h over samples, each one standard deviation long
  --jacobian K       what of h changes eps most, for each picture: singular vectors of d eps / d h,
                     as long as h (Haas et al. 2024)
Every direction gets a strip: the pictures down the side, the multiples of --strip along the top.  With
--scale W1 W2 ... (one for each direction, in the order above) the directions are added up into one edit.
"""
LOAD = text_network.loaded
EXAMPLES = """\
example:
  diaphane asyrp --pca 3
  diaphane asyrp --image face.png --model celeba_hq.ckpt --delta smiling.pth
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("asyrp", ABOUT, EXAMPLES)
    p.add_argument("--image", nargs="+", metavar="IMG", help="pictures to edit (default: --n drawn from noise)")
    p.add_argument("--n", type=options.whole(1, 1000), default=4, help="how many to draw (default: 4)")
    p.add_argument("--delta", nargs="+", metavar="FILE", help="directions in files")
    p.add_argument("--from-sets", nargs=2, metavar=("A", "B"), help="folders of pictures")
    p.add_argument("--set-a", nargs="+", metavar="IMG", help="the same, picture by picture")
    p.add_argument("--set-b", nargs="+", metavar="IMG")
    p.add_argument("--pca", type=options.whole(1, 64), metavar="K", help="how many components")
    p.add_argument(
        "--pca-samples", type=options.whole(2, 100_000), default=64, help="of how many samples (default: 64)"
    )
    p.add_argument("--jacobian", type=options.whole(1, 64), metavar="K", help="how many singular vectors")
    options.timestep(p, "--t-jacobian", 600, "at which timestep")
    p.add_argument(
        "--iterations", type=options.whole(1, 1000), default=10, help="of its subspace iteration (default: 10)"
    )
    p.add_argument("--strip", nargs="+", type=options.real(), default=[-1.0, -0.5, 0.0, 0.5, 1.0], metavar="S",
                   help="multiples of the edit (default: -1 -0.5 0 0.5 1)")  # fmt: skip
    p.add_argument(
        "--scale", nargs="+", type=options.real(), metavar="W", help="add the directions up, so much of each"
    )
    p.add_argument("--n-train", type=options.whole(1, 1000), default=40,
                   help="steps a learned f was trained with; scales Δh by n_train / steps (default: 40)")  # fmt: skip
    options.steps(p, what="steps of inversion and generation", low=2)
    options.timestep(p, "--t-edit", 400, "h is edited down to this timestep")
    options.timestep(p, "--t-boost", 0, "fresh noise below this timestep (quality boosting)")
    p.add_argument("--save-direction", metavar="FILE", help="also write the directions, as safetensors, for --delta")
    options.pictures(p)
    text_network.options(p)
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """For each direction a picture per multiple and source, then a strip; then a sheet of all strips."""
    sets = named_sets(args)
    if args.save_direction and Path(args.save_direction).exists() and not args.overwrite:
        raise CommandError(f"{args.save_direction} exists: name another file, or say --overwrite")
    learned = [direction for path in args.delta or [] for direction in from_file(path, session)]
    x_T, n = start(args, session)
    found = [*learned]
    if sets:
        found.append(of_sets(*sets, args, session))
    if args.pca:
        found += of_samples(args.pca, args, session)
    if args.jacobian:
        found += of_decoder(args.jacobian, x_T, args, session)
    if not found:
        raise CommandError("there is no direction: give --delta, --from-sets, --pca or --jacobian")
    if args.save_direction and session.wanted is None:
        about = {"settings": options.settings(args), "weights": session.net.weights, "names": [d.name for d in found]}
        replace(Path(args.save_direction), saved(found, {"diaphane": json.dumps(about)}))
        session.say(f"wrote {args.save_direction}")
    edits, titles = combined(found, args)
    strips = []
    jobs = [(i, k) for i in range(n) for k in range(len(args.strip))]
    for d, (chosen, weights) in enumerate(edits):
        names = [f"d{d + 1:02d}-p{i + 1:02d}-{k + 1:02d}.png" for i, k in jobs]
        rows: list[list[Image.Image]] = [[] for _ in range(n)]
        for batch in session.batches(len(jobs)):
            if not session.wants("sheet.png", f"strip-{d + 1:02d}.png", *(names[j] for j in batch)):
                continue
            drawn = edited(x_T, [jobs[j] for j in batch], chosen, weights, args, session)
            for j, row in zip(batch, drawn, strict=True):
                i = jobs[j][0]
                rows[i].append(to_picture(row))
                yield session.made(names[j], rows[i][-1], seed=args.seed + i)
        if session.wants("sheet.png", f"strip-{d + 1:02d}.png"):
            note = f"h is edited at t >= {args.t_edit}, {args.steps} steps"
            columns = [f"{multiple:g}" for multiple in args.strip]
            strips.append(sheet(rows, title=f"Asyrp: {titles[d]}", note=note, columns=columns))
            if len(edits) > 1:
                yield session.made(f"strip-{d + 1:02d}.png", strips[-1])
    if session.wants("sheet.png"):
        yield session.made("sheet.png", stacked(strips))


def named_sets(args: argparse.Namespace) -> tuple[list[str], list[str]] | None:
    """The two sets of pictures, file by file; folders are written out into --set-a and --set-b."""
    if args.from_sets:
        if args.set_a or args.set_b:
            raise CommandError("give --from-sets, or --set-a and --set-b, not both")
        (args.set_a, args.set_b), args.from_sets = [files(folder) for folder in args.from_sets], None
    if bool(args.set_a) != bool(args.set_b):
        raise CommandError("--set-a and --set-b go together")
    return (args.set_a, args.set_b) if args.set_a else None


def start(args: argparse.Namespace, session: Session) -> tuple[Tensor, int]:
    """Where the walks begin: x_T of the pictures' inversions, or noise."""
    net, parts = session.net, []
    if not args.image:
        shape = (args.n, *net.shape)
        noise = seeded([args.seed + i for i in range(args.n)])
        return noise(torch.empty(shape, device=net.device, dtype=net.dtype)), args.n
    pictures = net.encode(session.pictures(args.image, resize=not args.no_resize))
    for batch in session.batches(len(pictures)):
        parts.append(invert(net.unet, pictures[batch.start : batch.stop], net.schedule, papers(args.steps),
                            embed=net.embed, watch=watching(session, args.steps - 1, "invert")).x_T)  # fmt: skip
    return torch.cat(parts), len(pictures)


def combined(
    found: list[Direction], args: argparse.Namespace
) -> tuple[list[tuple[list[Direction], list[float]]], list[str]]:
    """The edits (directions and their weights), and what to call each."""
    train = [args.n_train / args.steps if direction.f is not None else 1.0 for direction in found]
    if args.scale is None:
        return [([d], [share]) for d, share in zip(found, train, strict=True)], [d.name for d in found]
    if len(args.scale) != len(found):
        raise CommandError(f"--scale takes one number for each of {len(found)} directions; got {len(args.scale)}")
    weights = coefficients(args.scale, n_train=1, n_test=1)
    title = " + ".join(f"{w:g} x {d.name}" for w, d in zip(args.scale, found, strict=True))
    return [(found, [w * share for w, share in zip(weights, train, strict=True)])], [title]


def edited(
    x_T: Tensor,
    jobs: Sequence[tuple[int, int]],
    chosen: list[Direction],
    weights: list[float],
    args: argparse.Namespace,
    session: Session,
) -> Tensor:
    """One batch of jobs (picture, multiple of the strip).  -> (B, C, H, W)."""
    net, rows = session.net, [i for i, _ in jobs]
    multiples = torch.tensor([args.strip[k] for _, k in jobs], device=net.device).view(-1, 1, 1, 1)
    noise = seeded([args.seed + i for i in rows])
    if not args.image:
        noise(x_T[rows])  # the first draw was x_T
    walk = asyrp(
        net.unet,
        x_T[rows],
        net.schedule,
        papers(args.steps),
        edit(chosen, [multiples * weight for weight in weights], rows),
        t_edit=args.t_edit,
        t_boost=args.t_boost,
        noise=noise,
        embed=net.embed,
    )
    return net.decode(last(session.progress(walk, args.steps, f"edit with {chosen[0].name}")).x)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("asyrp", parser(), make, argv, load=LOAD)

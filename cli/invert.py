"""`diaphane invert`: the noise that a picture comes from, and how well the picture comes back from it."""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from safetensors.torch import save

from ..samplers.ddim import ddim
from ..samplers.inversion import last, psnr, round_trips
from ..samplers.path import papers, upward
from . import invert_latents, latents, network, options
from .images import to_picture
from .session import Made, Session, produce
from .sheet import sheet

TRIPS = (10, 20, 50, 100, 200, 500, 1000)
ABOUT = """\
Find the noise x_T that a picture comes from, and come back.

DDIM without fresh noise is a differential equation, so it can be walked upward too (Song et al. 2021,
section 4.3): x at the next higher timestep is the predicted clean picture with the predicted noise, more
of it.  More steps come back better; the peak signal-to-noise ratio (PSNR, in dB) says how well.
Writes x_T as safetensors (key x_T, (1, C, H, W)), the picture that comes back, and a sheet.

With a latent model (a folder, a single file, or any with --prompt) the walk is that of its latents, under a text
and under guidance, and --to goes back under another text.  Three ways to invert:
  ddim           as above; --fixed-point K makes each step up the inverse of the step down (Pan et al. 2023)
  edit-friendly  noise maps with which DDPM gives the picture back (Huberman-Spiegelglas et al. 2024)
  null-text      a negative text for every step, with which guidance comes back (Mokady et al. 2023; here the
                 decoder alone reads it)
It writes the latents at every timestep, with the noise maps or null texts, as NAME-trajectory.safetensors.
"""
EXAMPLES = """\
examples:
  diaphane invert photo.png --steps 100
  diaphane invert a.png b.png --round-trips
  diaphane invert cat.png --model FOLDER --prompt "a cat" --method edit-friendly --to "a dog" --steps 100
"""


def loaded(args: argparse.Namespace) -> network.Loaded | latents.Loaded:
    """The network that the options name, of either kind."""
    return invert_latents.loaded(args) if invert_latents.wanted(args) else network.loaded(args)


LOAD = loaded


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("invert", ABOUT, EXAMPLES)
    p.add_argument("picture", nargs="+", help="PNG, JPEG or WebP")
    options.steps(p, what="DDIM steps each way", low=2)
    p.add_argument("--round-trips", action="store_true", help=f"also the PSNR at {', '.join(map(str, TRIPS))} steps")
    options.pictures(p)
    invert_latents.options(p)
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """x_T and the reconstruction of each picture, a sheet, and the table of round trips."""
    text = isinstance(session.net, latents.Loaded)
    yield from (invert_latents.make if text else pixels)(args, session)
    if args.round_trips and session.wanted is None:
        yield trips(args, session, partial(invert_latents.trip if text else trip, args, session))


def pixels(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """x_T and the reconstruction of each picture by a pixel network, and a sheet."""
    net, down = session.net, papers(args.steps)
    originals = session.pictures(args.picture, resize=not args.no_resize)
    rows, labels = [], []
    for batch in session.batches(len(originals)):
        names = [f"{i + 1:04d}.png" for i in batch]
        if not session.wants("sheet.png", *names):
            continue
        x0 = originals[batch.start : batch.stop]
        up = session.progress(ddim(net.denoise(), x0, net.schedule, upward(down)), args.steps - 1, "invert")
        x_T = last(up).x
        back = last(session.progress(ddim(net.denoise(), x_T, net.schedule, down), args.steps, "come back")).x
        for i, name, quality in zip(batch, names, psnr(x0, back).tolist(), strict=True):
            j = i - batch.start
            noise = {"x_T": x_T[j : j + 1].cpu().contiguous()}
            about = {"picture": args.picture[i], "steps": args.steps, "weights": net.weights, "schedule": args.schedule}
            yield Made(name.replace(".png", "-x_T.safetensors"), data=save(noise, {"diaphane": json.dumps(about)}))
            rows.append([to_picture(row) for row in (x0[j], (x_T[j] / 3), back[j])])
            labels.append(f"{quality:.1f} dB")
            yield session.made(name, rows[-1][2], psnr=quality)
            if session.wanted is None:
                session.say(f"{args.picture[i]}: {quality:.2f} dB after {args.steps} steps up and down")
    if session.wants("sheet.png"):
        columns = ("picture", "its noise x_T", "back")
        yield session.made("sheet.png", sheet(rows, columns=columns, labels=labels, title=f"{args.steps} DDIM steps"))


def trip(args: argparse.Namespace, session: Session, batch: range, n: int) -> list[float]:
    """PSNR of each picture of a batch after n steps up and down."""
    net, paths = session.net, args.picture[batch.start : batch.stop]
    walk = round_trips(net.denoise(), session.pictures(paths, resize=not args.no_resize), net.schedule, [n])
    return next(session.progress(walk, 1, f"{n} steps")).psnr.tolist()


def trips(args: argparse.Namespace, session: Session, measured: Callable[[range, int], list[float]]) -> Made:
    """The table of PSNR by steps: printed, and as a csv file with one row per number of steps and picture."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["steps", "picture", "psnr_dB"])
    session.say("steps  mean PSNR in dB")
    for steps in TRIPS:
        qualities = [q for batch in session.batches(len(args.picture)) for q in measured(batch, steps)]
        table.writerows([steps, path, f"{q:.4f}"] for path, q in zip(args.picture, qualities, strict=True))
        session.say(f"{steps:5d}  {sum(qualities) / len(qualities):.2f}")
    return Made("round-trips.csv", data=text.getvalue().encode())


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("invert", parser(), make, argv, load=LOAD)

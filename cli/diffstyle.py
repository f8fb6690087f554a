"""`diaphane diffstyle`: one picture's content in another's style, through h-space."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from ..methods.blend import BLENDS
from ..methods.diffstyle import Content, diffstyle
from ..methods.taps import Inverted, invert
from ..samplers.inversion import last
from ..samplers.noise import seeded
from ..samplers.path import papers
from . import options, text_network
from .errors import CommandError
from .images import to_picture
from .session import Made, Session, produce
from .sheet import sheet

ABOUT = """\
Give a style picture the content of another (DiffStyle / InjectFusion, Jeong et al. 2024).

Both pictures are inverted.  The style's x_T is sampled again, and at every timestep t >= t_edit the
bottleneck h of the network is turned towards the content's, on a sphere, at equal norm (eq. 4):
    h' = sin((1 - gamma) a) / sin a · h  +  sin(gamma a) / sin a · h_content |h| / |h_content|
where a is the angle between the two.  The prediction with h' replaces the predicted clean picture only;
--omega moves x itself instead, so that the plain prediction becomes the edited one (style calibration,
section 3.3; 0 is without).  --t-boost adds fresh noise at low timesteps.  --gamma 0 is the style picture,
come back.

Every content goes into every style.  With as many --mask as --content, all contents go together into
each style, each where its mask is white (local mixing); one --mask holds for every content.
"""
LOAD = text_network.loaded
EXAMPLES = """\
example:
  diaphane diffstyle --content cat.png --style dog.png --gamma 0.6
  diaphane diffstyle --content a.png b.png --mask left.png right.png --style s.png
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.parser("diffstyle", ABOUT, EXAMPLES)
    p.add_argument("--content", nargs="+", required=True, metavar="IMG", help="whose content: PNG, JPEG or WebP")
    p.add_argument("--style", nargs="+", required=True, metavar="IMG", help="whose style")
    p.add_argument("--mask", nargs="+", metavar="IMG", help="where the content goes: white is there, black is not")
    p.add_argument(
        "--gamma",
        type=options.real(0, 2),
        default=0.3,
        help="how much content, 0 ... 1; at most 2 (default: 0.3)",
    )
    p.add_argument("--omega", type=options.real(0, 2), default=0.3, help="style calibration (default: 0.3)")
    p.add_argument("--blend", choices=tuple(BLENDS), default="slerp", help="how h are mixed (default: slerp)")
    options.timestep(p, "--t-edit", 400, "h is mixed down to this timestep")
    options.timestep(p, "--t-boost", 200, "fresh noise from this timestep down, 0 for almost none")
    options.steps(p, "--n-inv", what="steps of the inversion", low=2)
    options.steps(p, "--n-gen", what="steps of the generation")
    options.pictures(p)
    text_network.options(p)
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """One picture per pair (or per style, in local mixing), then a sheet of all of them."""
    masks = session.masks(args.mask or [], resize=not args.no_resize)
    if len(masks) not in (0, 1, len(args.content)):
        raise CommandError(f"give no --mask, one, or one for each of {len(args.content)} contents; got {len(masks)}")
    contents = session.pictures(args.content, resize=not args.no_resize)
    styles = session.pictures(args.style, resize=not args.no_resize)
    together = len(masks) > 1
    groups = [list(range(len(contents)))] if together else [[i] for i in range(len(contents))]
    jobs = [(group, style) for group in groups for style in range(len(styles))]
    names = [f"{'mixed' if together else f'c{group[0] + 1:02d}'}-s{style + 1:02d}.png" for group, style in jobs]
    sources, targets = inverted(contents, args, session, "contents"), inverted(styles, args, session, "styles")
    drawn: list[Image.Image] = []
    for batch in session.batches(len(jobs)):
        if session.wants("sheet.png", *(names[i] for i in batch)):
            walked = walk([jobs[i] for i in batch], batch.start, sources, targets, masks, args, session)
            for i, row in zip(batch, walked, strict=True):
                drawn.append(to_picture(row))
                yield session.made(names[i], drawn[-1], seed=args.seed + i)
    if session.wants("sheet.png"):
        yield session.made("sheet.png", overview(drawn, contents, styles, args, together))


def inverted(pictures: Tensor, args: argparse.Namespace, session: Session, what: str) -> Inverted:
    """x_T and h on the way for all pictures, --batch at a time."""
    net, path, parts = session.net, papers(args.n_inv), []
    for batch in session.batches(len(pictures)):
        x0 = net.encode(pictures[batch.start : batch.stop])
        parts.append(invert(net.unet, x0, net.schedule, path, embed=net.embed,
                            watch=lambda taps: session.progress(taps, args.n_inv - 1, f"invert {what}")))  # fmt: skip
    return Inverted(torch.cat([p.x_T for p in parts]), {t: torch.cat([p.h[t] for p in parts]) for t in parts[0].h})


def walk(
    jobs: Sequence[tuple[list[int], int]],
    first: int,
    sources: Inverted,
    targets: Inverted,
    masks: list[Tensor],
    args: argparse.Namespace,
    session: Session,
) -> Tensor:
    """One batch of jobs (contents, style) -> (B, C, H, W)."""
    net = session.net
    injected = [
        Content(
            {t: h[[group[k] for group, _ in jobs]] for t, h in sources.h.items()},
            args.gamma,
            masks[k if len(masks) > 1 else 0] if masks else None,
        )
        for k in range(len(jobs[0][0]))
    ]
    steps = diffstyle(
        net.unet,
        targets.x_T[[style for _, style in jobs]],
        injected,
        net.schedule,
        papers(args.n_gen),
        blend=BLENDS[args.blend],
        omega=args.omega,
        t_edit=args.t_edit,
        t_boost=args.t_boost,
        noise=seeded([args.seed + first + i for i in range(len(jobs))]),
        embed=net.embed,
    )
    return net.decode(last(session.progress(steps, args.n_gen, f"inject {len(jobs)} pairs")).x)


def overview(
    drawn: list[Image.Image], contents: Tensor, styles: Tensor, args: argparse.Namespace, together: bool
) -> Image.Image:
    """Contents down the side, styles along the top, what came of them between."""
    thumbs, tops = [to_picture(row) for row in contents], [to_picture(row) for row in styles]
    title = f"DiffStyle: {args.blend}, gamma {args.gamma:g}, omega {args.omega:g}"
    note = (
        f"h mixed at t >= {args.t_edit}, fresh noise at t <= {args.t_boost}; {args.n_inv} steps up, {args.n_gen} down"
    )
    if together:
        rows: list[list[Image.Image | None]] = [[*thumbs, top, row] for top, row in zip(tops, drawn, strict=True)]
        columns = [*(f"content {i + 1}" for i in range(len(thumbs))), "style", "mixed"]
        return sheet(rows, title=title, note=note, columns=columns)
    rows = [[None, *tops]]
    for i, thumb in enumerate(thumbs):
        rows.append([thumb, *drawn[i * len(tops) : (i + 1) * len(tops)]])
    return sheet(rows, title=title, note=f"{note}\nleft: contents; top: styles")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("diffstyle", parser(), make, argv, load=LOAD)

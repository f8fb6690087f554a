"""`diaphane consistory`: one subject in several pictures, by ConsiStory."""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ..methods.cost import shares
from . import generate, image_options, latents, options, subject_sheet, subjects
from .images import to_picture
from .session import Made, Session, produce

LOAD = subjects.loaded
ABOUT = """\
Draw one subject in several pictures, without training (ConsiStory, Tewel et al. 2024).

The pictures are drawn together.  Attention to the subject's words shows where it is; in the decoder every picture sees
there the keys and values of the first ones, the anchors, besides its own: softmax(Q [K_own, K_anchors] / sqrt d) V.
Early queries are mixed with those of a plain pass, which keeps layouts diverse; and features are carried along matches
from picture to picture.  The subject's words have to be in every prompt.  Any number of further pictures follows two
anchors, --batch at a time, now or later (--cache-out, --cache-in).  --real takes pictures of a real subject instead.
"""
EXAMPLES = """\
examples:
  diaphane consistory "a cute dog in the snow" "a cute dog on a skateboard" "a cute dog asleep" --subject dog \\
      --style "A watercolor of" --model stabilityai/stable-diffusion-xl-base-1.0 --variant fp16
  diaphane consistory "a girl with a hat, reading" "a girl with a hat at sea" --subject girl hat --model FOLDER \\
      --cache-out girl.safetensors
  diaphane consistory "a girl with a hat in a train" --subject girl hat --model FOLDER --cache-in girl.safetensors
  diaphane consistory "a dog on the moon" --subject dog --model FOLDER --real me1.jpg me2.jpg --real-prompt "a dog"
"""
WITHOUT = ("attention", "blending", "injection")


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser("consistory", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("prompt", nargs="*", help="what to draw; the first ones are the anchors")
    p.add_argument("--prompts", metavar="FILE", help="one prompt a line, in place of prompts; empty lines are left out")
    p.add_argument("--subject", nargs="+", required=True, metavar="WORD", help="the words that say the subject")
    p.add_argument("--style", help='told before every prompt: "STYLE PROMPT"')
    p.add_argument("--n", type=options.whole(1, 100_000), default=1, help="pictures of each prompt (default: 1)")
    group = p.add_argument_group("subject")
    group.add_argument("--anchors", type=options.whole(1, 64), default=2, help="how many of the first pictures all "
                       "look at (default: 2)")  # fmt: skip
    group.add_argument("--dropout", type=options.real(0, 1), default=0.5, help="share of the subject that others do "
                       "not see: more gives more diverse poses (default: 0.5; with ControlNet 0.7)")  # fmt: skip
    group.add_argument("--window", type=options.whole(0, 1000), default=20, help="masks are of so many steps, 0 of "
                       "all as in the paper (default: 20)")  # fmt: skip
    group.add_argument("--alpha", type=options.real(0, 1), default=0.8, help="of carried features (default: 0.8)")
    group.add_argument("--without", nargs="+", choices=WITHOUT, help="leave a part of the method out")
    group.add_argument("--simultaneous", action="store_true", help="carry features into all pictures at once, as in "
                       "the paper, not in order, as in the authors' code")  # fmt: skip
    group.add_argument("--by-steps", action="store_true", help="windows in steps, n / 10 and n / 3, as in the code, "
                       "and not in timesteps")  # fmt: skip
    group.add_argument("--early-stop", action="store_true", help="end the first walk at the matches, as in the paper: "
                       "an eighth less to compute, other pictures")  # fmt: skip
    group.add_argument("--cache-out", metavar="FILE", help="keep the anchors for further pictures")
    group.add_argument("--cache-in", metavar="FILE", help="all prompts are further pictures to anchors that were kept")
    group.add_argument("--real", nargs="+", metavar="PICTURE", help="real pictures of the subject as the anchors")
    group.add_argument("--real-prompt", metavar="TEXT", help="what they show (default: the style and the subject)")
    group.add_argument("--real-guidance", type=options.real(0, 100), default=2.0, help="while they are inverted "
                       "(default: 2)")  # fmt: skip
    image_options.options(p, image_options.ADAPTER)
    generate.sampling(p, steps=50, sampler="ddim", freeu="consistory")
    p.add_argument("--control", metavar="PICTURE", help="the hint of --control-model: edges, depth ... as it is")
    p.add_argument("--control-scale", type=options.real(0, 10), default=1.0, help="(default: 1)")
    latents.options(p)
    generate.running(p, "consistory", batch=4)
    p.set_defaults(steps=None, eta=None)  # 50 and 0; with --real 100 and 1
    return p


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The pictures, then a sheet with their masks, how these came about, and matches."""
    net: Any = session.net
    plan = subjects.planned(args, session, net)
    for line in net.loras if session.wanted is None else ():
        session.say(line)
    told = argparse.Namespace(**vars(args) | {"init": None})
    drawn: list[Image.Image] = []
    found: list[subject_sheet.Drawn] = []
    began, kept = time.perf_counter(), plan.kept
    for rows in plan.batches(args.batch):
        first = kept is None and rows[0] == 0
        more = len(plan.texts) > len(rows) or bool(args.cache_out)
        if not (session.wants("sheet.png", *(plan.names[i] for i in rows)) or (first and more)):
            continue
        done = {i: finished(args, net, plan, i, args.resume) for i in rows}
        if all(done.values()) and not (first and more):
            drawn += [one for one in done.values() if one]
            continue
        made = subjects.drawn(args, session, net, plan, list(rows), kept, keep=first and more)
        kept = made.kept or kept
        if first and args.cache_out and made.kept and session.wanted is None:
            session.say(f"{args.cache_out}: {subjects.saved(made.kept, args.cache_out) / 1e9:.3g} GB")
        for i, picture in zip(rows, made.pictures, strict=True):
            drawn.append(done[i] or to_picture(picture))
            if done[i] is None:
                seed = plan.seeds[i]
                words = generate.parameters(told, net, plan.texts[i], seed, plan.size)
                yield session.made(plan.names[i], drawn[-1], seed=seed, prompt=plan.texts[i], parameters=words)
        found.append(made.light())
    if found and session.wanted is None:
        spent = time.perf_counter() - began
        part = shares(net.parts.unet, subjects.latent_size(net, plan.size))
        steps = None if args.real or args.sampler == "heun" else args.steps  # which asks twice a step
        session.say(subject_sheet.report(found, part, steps, spent, net.device))
    if session.wants("sheet.png"):
        yield session.made("sheet.png", subject_sheet.sheet_of(args, drawn, found))


def finished(
    args: argparse.Namespace, net: latents.Loaded, plan: subjects.Plan, i: int, resume: bool
) -> Image.Image | None:
    """The picture that an earlier run made, where it is to go on."""
    return generate.finished(args, net, (plan.names[i], plan.texts[i]), plan.seeds[i]) if resume else None


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("consistory", parser(), make, argv, load=LOAD)

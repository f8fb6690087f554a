"""`diaphane generate`: pictures from text, from a picture and text, and into a part of a picture."""

import argparse
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from ..methods import text_to_image as t2i
from . import freed, images, latents, options
from .draw import Around, alone, check, cut_off, draw, karras, prepared, strength
from .errors import CommandError
from .images import to_picture
from .redo import record_of
from .session import Made, Session, content, produce
from .sheet import grid
from .trajectory import unpacked

SAMPLERS = {"euler": "Euler", "euler-a": "Euler a", "heun": "Heun", "dpmpp": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}
STEPS, SAMPLER = 30, "euler"  # by default
LOAD = latents.loaded
ABOUT = """\
Draw pictures from text with Stable Diffusion XL, 1 or 2.

The text becomes token states of CLIP's towers, which the UNet reads; the walk begins in noise and at each
timestep is guided away from the negative text: eps = eps_negative + guidance (eps_text - eps_negative)
(Ho & Salimans 2022).  --init begins in a noised picture instead, --mask repaints only where it is white.
Timesteps and schedule are the model's own.  Every picture carries its settings, for `diaphane redo` and, in the
words of other programs, as `parameters`.
"""
EXAMPLES = """\
examples:
  diaphane generate "a lighthouse at dusk, oil painting" --model stabilityai/stable-diffusion-xl-base-1.0 --variant fp16
  diaphane generate "a lighthouse" --model sd_xl_base_1.0.safetensors --n 4
  diaphane generate "in winter" --model FOLDER --init photo.png --strength 0.6 --lora style.safetensors:0.8
  diaphane generate --prompts lines.txt --model FOLDER --out out/series --resume
"""


def parser() -> options.Parser:
    """The command's options."""
    return arguments(options.Parser("generate", description=ABOUT, epilog=EXAMPLES), "generate")


def arguments(p: options.Parser, command: str) -> options.Parser:
    """The options of every command that draws from text."""
    p.add_argument("prompt", nargs="?", help="what to draw")
    p.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, in place of the prompt; empty lines are left out"
    )
    p.add_argument("--n", type=options.whole(1, 100_000), default=1, help="pictures of each prompt (default: 1)")
    sampling(p)
    p.add_argument("--init", metavar="PICTURE", help="begin in this picture; it is cropped and resized to the size")
    p.add_argument("--strength", type=options.real(0, 1), help="how much of the walk runs from --init (default: 0.75; "
                   "with a mask 1)")  # fmt: skip
    p.add_argument("--mask", metavar="PICTURE", help="repaint --init where this is white, keep it where it is black")
    p.add_argument("--from", dest="trajectory", metavar="FILE", help="begin where `diaphane invert` came to, a file of "
                   "DDIM or edit-friendly inversion: its timesteps, its noise, its size")  # fmt: skip
    p.add_argument("--skip", type=options.whole(0, 999), help="steps of --from that are left out (default: 0)")
    p.add_argument("--control", metavar="PICTURE", help="the hint of --control-model: edges, depth ... as it is")
    p.add_argument("--control-scale", type=options.real(0, 10), default=1.0, help="(default: 1)")
    latents.options(p)
    running(p, command)
    return p


def sampling(
    p: options.Parser,
    *,
    steps: int = STEPS,
    sampler: str = SAMPLER,
    guidance: float | None = 5.0,
    freeu: str = "none",
) -> None:
    """The options of a walk; without a `guidance` its default is the command's to find."""
    p.add_argument("--negative", help="what to keep away from (default: nothing, as the model was trained to take it)")
    p.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels, or one number (default: the model's own)")
    p.add_argument("--steps", type=options.whole(1, 1000), default=steps, help=f"(default: {steps})")
    p.add_argument("--sampler", choices=tuple(SAMPLERS), default=sampler, help=f"(default: {sampler})")
    p.add_argument("--spacing", choices=("leading", "trailing", "linspace", "karras"),
                   help="which timesteps (default: as the model says)")  # fmt: skip
    said = "as the preset" if guidance is None else f"{guidance:g}"
    p.add_argument("--guidance", type=options.real(0, 100), default=guidance, help=f"1 is none (default: {said})")
    p.add_argument("--rescale", type=options.real(0, 1), default=0.0, help="guidance keeps the spread of the guided "
                   "prediction, 0 ... 1 (Lin et al. 2024; default: 0)")  # fmt: skip
    p.add_argument("--eta", type=options.real(0, 1), default=0.0, help="DDIM's fresh noise, 0 ... 1 (default: 0)")
    freed.option(p, freeu)
    p.add_argument("--clip-skip", type=options.whole(0, 30), default=0, help="read CLIP so many layers earlier")


def running(p: options.Parser, command: str, *, batch: int = 1) -> None:
    """The options of a run and of its files."""
    run = p.add_argument_group("run")
    run.add_argument("--seed", type=options.whole(0, options.MAX_SEED), default=0,
                     help="picture i of all is drawn from seed + i (default: 0)")  # fmt: skip
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    run.add_argument("--dtype", choices=("auto", *options.DTYPES), default="auto",
                     help="of the networks (default: float32 on a CPU, else float16)")  # fmt: skip
    run.add_argument("--threads", type=options.whole(1, 256), help="of the CPU (default: torch's own choice)")
    run.add_argument(
        "--batch", type=options.whole(1, 1024), default=batch, help=f"pictures at a time (default: {batch})"
    )
    run.add_argument("--low-vram", action="store_true", help="each part is on the device while it works only")
    out = p.add_argument_group("output")
    out.add_argument("--out", default=f"out/{command}", help="folder for what is made; a numbered one beside it if it "
                     f"is not empty (default: out/{command})")  # fmt: skip
    out.add_argument("--resume", action="store_true", help="go on in the folder: pictures there are not made again")
    out.add_argument("--overwrite", action="store_true", help="write into the folder even if it is not empty")
    out.add_argument("--quiet", action="store_true", help="no progress bars, no lines about files")


def size(text: str) -> str:
    """WIDTHxHEIGHT; one number is both."""
    m = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text, re.ASCII)
    if m is None or "0" in (m[1].strip("0") or "0", (m[2] or "1").strip("0") or "0"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size: say 1024 or 1216x832")
    return f"{int(m[1])}x{int(m[2] or m[1])}"


def sizes(args: argparse.Namespace, net: latents.Loaded) -> tuple[int, int]:
    """(height, width) in pixels.  Raises ValueError for sizes that are no multiples of 8."""
    width, _, height = (args.size or str(net.says.side)).partition("x")
    whole = int(height or width), int(width)
    t2i.latent_size(net.parts, whole)
    return whole


def prompts(args: argparse.Namespace, session: Session) -> list[str]:
    """The texts.  Raises CommandError where there are none, or both ways to give them."""
    if (args.prompt is None) == (args.prompts is None):
        raise CommandError("give a prompt, or --prompts FILE, and not both")
    if args.prompt is not None:
        return [args.prompt]
    try:
        lines = session.read(args.prompts).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise CommandError(f"{args.prompts} is not text in UTF-8: {e.reason} at byte {e.start}") from e
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise CommandError(f"{args.prompts} holds no prompt: write one a line")
    return texts


def parameters(args: argparse.Namespace, net: latents.Loaded, text: str, seed: int, size: tuple[int, int]) -> str:
    """The settings in the words that other programs read."""
    lines = [text, *([f"Negative prompt: {args.negative}"] if args.negative else [])]
    told = {
        "Steps": args.steps,
        "Sampler": SAMPLERS[args.sampler],
        "Schedule type": "Karras" if karras(args, net) else "Normal",
        "CFG scale": f"{args.guidance:g}",
        "Seed": seed,
        "Size": f"{size[1]}x{size[0]}",
        "Model hash": net.weights["parts"]["unet"][:10],
        "Model": Path(args.model).stem.replace(",", " "),
    }
    told |= {"Denoising strength": f"{strength(args):g}"} if args.init else {}
    told |= {"Clip skip": args.clip_skip + 1} if args.clip_skip else {}
    told |= {"CFG Rescale": f"{args.rescale:g}"} if args.rescale else {}
    told["Version"] = f"diaphane {version('diaphane')}"
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in told.items())])


def make(args: argparse.Namespace, session: Session, around: Around = alone) -> Iterator[Made]:
    """The pictures, then a sheet of all of them; `around` is what a method makes of each batch."""
    net: Any = session.net
    check(args, net)
    found = resumed(args, session, net)
    texts, whole = prompts(args, session), sizes(args, net)
    jobs = [(f"{i * args.n + j + 1:04d}.png", text) for i, text in enumerate(texts) for j in range(args.n)]
    for line in (*net.loras, *cut_off(net, [*texts, args.negative or ""])) if session.wanted is None else ():
        session.say(line)
    scene = prepared(args, session, net, whole) | found
    drawn = []
    for rows in session.batches(len(jobs)):
        if not session.wants("sheet.png", *(jobs[i][0] for i in rows)):
            continue
        kept = {i: finished(args, net, jobs[i], args.seed + i) for i in rows} if args.resume else dict.fromkeys(rows)
        if all(kept.values()):
            drawn += kept.values()
            continue
        x = draw(args, session, net, [jobs[i][1] for i in rows], rows, whole, scene, around)
        for i, row in zip(rows, x, strict=True):
            name, text = jobs[i]
            drawn.append(kept[i] or to_picture(row))
            if kept[i] is None:
                told = parameters(args, net, text, args.seed + i, whole)
                yield session.made(name, drawn[-1], seed=args.seed + i, prompt=text, parameters=told)
    if len(jobs) > 1 and session.wants("sheet.png"):
        title = f"{len(jobs)} pictures, {args.steps} steps of {SAMPLERS[args.sampler]}, guidance {args.guidance:g}"
        yield session.made("sheet.png", grid(drawn[:64], title=title))


def resumed(args: argparse.Namespace, session: Session, net: latents.Loaded) -> dict[str, Any]:
    """The walk of --from, whose timesteps and size become those of the options.  Raises CommandError."""
    if args.trajectory is None:
        if args.skip is not None:
            raise CommandError("--skip leaves steps of --from out: give --from FILE")
        return {}
    if args.init or args.mask:
        raise CommandError("--from and --init are two places to begin: give one")
    found, _ = unpacked(session.read(args.trajectory), args.trajectory)
    if found.nulls is not None:
        raise CommandError(f"{args.trajectory} holds null texts, which belong to one picture and its text: "
                           "diaphane invert --to goes on from them")  # fmt: skip
    n, (rows, channels, height, width) = len(found.path) - 1, found.xs.shape[1:]
    if rows != 1:
        raise CommandError(f"{args.trajectory} is of {rows} pictures: --from takes that of one")
    if channels != net.parts.vae.cfg.latent_channels:
        raise CommandError(f"{args.trajectory} is of latents of {channels} channels: it is of another model")
    own = f"{width * net.parts.factor}x{height * net.parts.factor}"
    if args.size not in (None, own):
        raise CommandError(f"--size {args.size}: {args.trajectory} is of {own}")
    told = {"steps": (STEPS, n), "sampler": (SAMPLER, "ddim"), "spacing": (None,)}  # as the default, or as it is
    if other := [name for name, values in told.items() if getattr(args, name) not in values]:
        raise CommandError(f"--{other[0]} {getattr(args, other[0])}: {args.trajectory} has {n} steps of DDIM, and its "
                           "own timesteps")  # fmt: skip
    if (args.skip or 0) >= n:
        raise CommandError(f"--skip {args.skip} leaves none of {n} steps of {args.trajectory}")
    args.size, args.steps, args.sampler = own, n, "ddim"
    return {"trajectory": found}


def finished(args: argparse.Namespace, net: latents.Loaded, job: tuple[str, str], seed: int) -> Image.Image | None:
    """The picture that an earlier run made of a job, or None.  Raises CommandError for one of another job."""
    path = Path(args.out) / job[0]
    if not path.is_file():
        return None
    data = content(str(path))
    record = record_of(data, str(path))
    free = {"n": None, "batch": None}
    told = (job[1], seed, net.weights["sha256"], options.settings(args) | free)
    if (record.get("prompt"), record.get("seed"), record["weights"].get("sha256"), record["settings"] | free) != told:
        raise CommandError(f"{path} was made with other settings: choose another --out, or leave out --resume")
    return images.decoded(data, str(path))


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return produce("generate", parser(), make, argv, load=LOAD)

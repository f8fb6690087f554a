"""`diaphane invert` with a latent model: pictures to trajectories, back again, and on to another text."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods import text_to_image as t2i
from ..methods.null_text import decoder_null
from ..methods.prompt import Prompt, conditioning, score_ids, size_ids
from ..samplers.ddim import ddim
from ..samplers.edit_friendly import noise_maps
from ..samplers.inversion import invert, last, psnr
from ..samplers.noise import seeded
from ..samplers.null_text import Halfway, null_text
from ..samplers.parameterisation import Denoise
from . import latents
from . import options as shared
from .draw import cut_off, inpaints, picture, said, walk_of
from .errors import CommandError
from .generate import size, sizes
from .images import to_picture
from .session import Made, Session
from .sheet import sheet
from .trajectory import METHODS, Trajectory, packed

GUIDANCE = {"ddim": 1.0, "edit-friendly": 3.5, "null-text": 7.5}
SKIPPED = {"ddim": 0.0, "edit-friendly": 0.36, "null-text": 0.0}  # of the steps, with another text
OWN = ("negative", "guidance", "to", "to_guidance", "skip", "size", "variant", "tokenizer", "vae", "lora", "prediction",
       "tile")  # fmt: skip


def options(p: argparse.ArgumentParser) -> None:
    """The options of latent models, beside those of pixel networks."""
    text = p.add_argument_group("Stable Diffusion XL, 1 and 2")
    text.add_argument("--prompt", help="what the pictures show (default: nothing; needed for repositories)")
    text.add_argument("--negative", help="what guidance leads away from (default: nothing)")
    text.add_argument("--guidance", type=shared.real(0, 100),
                      help="up and down again (default, by method: 1, which is none; 3.5; 7.5)")  # fmt: skip
    text.add_argument("--method", choices=METHODS, default="ddim", help="(default: ddim)")
    text.add_argument("--fixed-point", type=shared.whole(0, 100), default=0, metavar="K",
                      help="refine every step of DDIM inversion so often (default: 0)")  # fmt: skip
    text.add_argument("--eta", type=shared.real(0.001, 1), default=1.0, help="of edit-friendly noise (default: 1)")
    text.add_argument("--iterations", type=shared.whole(1, 1000), default=10,
                      help="of a null text, at most, each step (default: 10)")  # fmt: skip
    text.add_argument("--to", metavar="PROMPT", help="also draw the way back under this prompt: the picture, edited")
    text.add_argument("--to-guidance", type=shared.real(0, 100), help="of that way (default: 7.5)")
    text.add_argument("--skip", type=shared.whole(0, 999),
                      help="steps that it leaves out (default: 0; 36 of 100 for edit-friendly)")  # fmt: skip
    text.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels, or one number (default: the model's own)")
    text.add_argument("--spacing", choices=("leading", "trailing", "linspace", "karras"),
                      help="which timesteps (default: as the model says)")  # fmt: skip
    latents.parts(text)
    text.add_argument("--low-vram", action="store_true", help="each part is on the device while it works only")


def wanted(args: argparse.Namespace) -> bool:
    """Whether the options mean a latent model.  Raises CommandError for options of the other kind."""
    if args.prompt is None and not latents.reads_text(args):
        given = [name for name in OWN if getattr(args, name) is not None]
        given += [name for name in ("low_vram", "literal", "fixed_point") if getattr(args, name)]
        given += ["method"] * (args.method != "ddim")
        if given:
            option = given[0].replace("_", "-")
            raise CommandError(f"--{option} is for models that read text: give --prompt, which may be empty")
        return False
    for name in ("label", "config", "resolution"):
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} is for pixel networks; {args.model} reads text")
    if args.schedule != "linear" or args.no_resize:
        raise CommandError(f"--schedule and --no-resize are for pixel networks; {args.model} reads text")
    return True


def loaded(args: argparse.Namespace) -> latents.Loaded:
    """The model that the options name."""
    return latents.loaded(argparse.Namespace(**vars(args) | {"control_model": None}))


def check(args: argparse.Namespace, net: latents.Loaded) -> None:
    """Raises CommandError for options that do not go together."""
    if inpaints(net):
        raise CommandError(f"{args.model} is for inpainting: pictures are inverted with a model of text to image")
    if args.method == "null-text" and args.dtype not in ("float32", "float64"):
        raise CommandError(f"--method null-text takes gradients: give --dtype float32, not {args.dtype}")
    if args.method == "edit-friendly" and args.fixed_point:
        raise CommandError("--fixed-point refines DDIM inversion; edit-friendly noise maps are exact")
    if args.to is None and not (args.skip is None and args.to_guidance is None):
        raise CommandError("--skip and --to-guidance are of the way back under another prompt: give --to PROMPT")
    if args.skip is not None and args.skip >= args.steps:
        raise CommandError(f"--skip {args.skip} leaves none of {args.steps} steps")


class Scene(NamedTuple):
    """A model under one text, for B pictures of a size."""

    denoise: Denoise
    halfway: Halfway


def scene(net: latents.Loaded, positive: Prompt, negative: Prompt, whole: tuple[int, int], guidance: float) -> Scene:
    """What samplers take; `negative` with as many rows as `positive`."""
    unet, n, xl = net.parts.unet, len(positive.context), net.parts.xl
    ids = score_ids if net.says.aesthetic else size_ids
    sizes = ids(whole, n) if xl else None
    other = score_ids(whole, n, score=2.5) if xl and net.says.aesthetic else sizes
    denoise = t2i.denoiser(unet, positive, negative, schedule=net.schedule, ids=sizes, negative_ids=other,
                           prediction=kind_of(net), guidance=guidance)  # fmt: skip
    cond, uncond = conditioning(unet, positive, sizes), conditioning(unet, negative, other)
    return Scene(denoise, decoder_null(unet, cond, uncond, guidance))


def kind_of(net: latents.Loaded) -> Any:
    """What the UNet predicts."""
    return net.says.prediction or "eps"


def make(args: argparse.Namespace, session: Session) -> Iterator[Made]:
    """The trajectory and the reconstruction of each picture, with --to the edited one, and a sheet."""
    net: Any = session.net
    check(args, net)
    whole = sizes(args, net)
    path = path_of(args, net, args.steps)
    skip = args.skip if args.skip is not None else round(SKIPPED[args.method] * args.steps)
    rows, labels = [], []
    prompts = [args.prompt or "", args.to or "", args.negative or ""]
    for line in (*net.loras, *cut_off(net, prompts)) if session.wanted is None else ():
        session.say(line)
    for batch in session.batches(len(args.picture)):
        names = [f"{i + 1:04d}.png" for i in batch]
        edits = [f"{i + 1:04d}-edited.png" for i in batch] if args.to is not None else []
        if not session.wants("sheet.png", *names, *edits):
            continue
        originals = read(args, session, batch, whole)
        x0, plain = encoded(net, originals, args.dtype)
        found, back = there_and_back(args, session, net, x0, path, whole, [args.seed + i for i in batch])
        edited = None
        if edits and session.wants("sheet.png", *edits):
            edited = decoded(net, again(args, session, net, found, whole, skip))
        returned = decoded(net, back)
        qualities = zip(in_latents(x0, back), *(psnr(originals, x).tolist() for x in (returned, plain)), strict=True)
        for j, (i, three) in enumerate(zip(batch, qualities, strict=True)):
            quality = dict(zip(("latents", "picture", "autoencoder"), three, strict=True))
            about = {"picture": args.picture[i], "prompt": args.prompt or "", "guidance": guidance(args),
                     "size": f"{whole[1]}x{whole[0]}", "psnr": quality, "weights": net.weights}  # fmt: skip
            if session.wanted is None:
                yield Made(names[j].replace(".png", "-trajectory.safetensors"), data=packed(found.only(j), about))
                session.say("{}: {:.2f} dB in latents, {:.2f} dB in pixels ({:.2f} dB through the autoencoder alone)"
                            .format(args.picture[i], *three))  # fmt: skip
            rows.append([to_picture(t) for t in (originals[j], plain[j], returned[j])])
            yield session.made(names[j], rows[-1][2], seed=args.seed + i, psnr=quality)
            if edited is not None:
                rows[-1].append(to_picture(edited[j]))
                yield session.made(edits[j], rows[-1][3], seed=args.seed + i, prompt=args.to)
            labels.append(f"{quality['latents']:.1f} dB")
    if session.wants("sheet.png"):
        columns = ("picture", "autoencoder", "back", *(["edited"] if args.to is not None else []))
        title = f"{args.method}, {args.steps} steps, guidance {guidance(args):g}"
        yield session.made("sheet.png", sheet(rows, columns=columns, labels=labels, title=title))


def trip(args: argparse.Namespace, session: Session, batch: range, n: int) -> list[float]:
    """PSNR in latents of each picture of a batch after n steps of DDIM up and down."""
    net: Any = session.net
    whole = sizes(args, net)
    x0, _ = encoded(net, read(args, session, batch, whole), args.dtype)
    positive, negative = texts(net, args.prompt or "", args.negative, len(x0))
    with net.on(net.parts.unet):
        denoise, path = scene(net, positive, negative, whole, guidance(args)).denoise, path_of(args, net, n)
        up = invert(denoise, x0, net.schedule, path[::-1], iterations=args.fixed_point)
        x_T = last(session.progress(up, n, f"{n} steps up")).x
        return in_latents(x0, last(session.progress(ddim(denoise, x_T, net.schedule, path), n, "down")).x)


def path_of(args: argparse.Namespace, net: latents.Loaded, n: int) -> list[float]:
    """n timesteps, the last one -1."""
    return walk_of(argparse.Namespace(steps=n, spacing=args.spacing, sampler="ddim", eta=0.0), net, seeded([]))[1]


def read(args: argparse.Namespace, session: Session, batch: range, whole: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, H, W) of a size in [-1, 1], on the CPU."""
    return torch.cat([picture(session, args.picture[i], whole) for i in batch])


def in_latents(x0: Tensor, back: Tensor) -> list[float]:
    """PSNR in dB of each picture's latents (B, 4, H, W), its peak the range of the latents themselves."""
    pairs = zip(x0.split(1), back.split(1), strict=True)
    return [float(psnr(x, y, peak=float(x.max() - x.min()))) for x, y in pairs]


def guidance(args: argparse.Namespace) -> float:
    """That of the inversion."""
    return args.guidance if args.guidance is not None else GUIDANCE[args.method]


def encoded(net: latents.Loaded, pictures: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Latents (B, 4, H / 8, W / 8) in float32 at least, and what the autoencoder alone makes of the pictures."""
    x0 = torch.cat([net.encoded(one) for one in pictures.split(1)])
    x0 = x0.to(torch.float64 if dtype == "float64" else torch.float32)
    return x0, decoded(net, x0)


def decoded(net: latents.Loaded, x: Tensor) -> Tensor:
    """Latents -> pictures, on the CPU."""
    return net.pictures(x).cpu()


def texts(net: latents.Loaded, prompt: str, negative: str | None, n: int) -> tuple[Prompt, Prompt]:
    """Both prompts, n rows each."""
    return said(argparse.Namespace(negative=negative, clip_skip=0), net, [prompt] * n)


def there_and_back(
    args: argparse.Namespace,
    session: Session,
    net: latents.Loaded,
    x0: Tensor,
    path: list[float],
    whole: tuple[int, int],
    seeds: list[int],
) -> tuple[Trajectory, Tensor]:
    """The inversion of a batch, and the latents that come back from its far end."""
    positive, negative = texts(net, args.prompt or "", args.negative, len(x0))
    scale, n = guidance(args), len(path) - 1
    with net.on(net.parts.unet):
        under = scene(net, positive, negative, whole, scale)
        if args.method == "edit-friendly":
            maps = noise_maps(counted(session, under.denoise, n), x0, net.schedule, path, noise=seeded(seeds),
                              eta=args.eta)  # fmt: skip
            found = Trajectory(args.method, path, maps.xs, maps.zs, eta=args.eta)
        else:
            up = scene(net, positive, negative, whole, 1.0) if args.method == "null-text" else under
            walk = invert(up.denoise, x0, net.schedule, path[::-1], iterations=args.fixed_point)
            xs = [x0, *(step.x for step in session.progress(walk, n, "invert"))]
            found = Trajectory(args.method, path, torch.stack(xs[::-1]))
        if args.method == "null-text":
            walk = null_text(under.halfway, list(found.xs), net.schedule, path, negative.context.to(x0),
                             kind=kind_of(net), iterations=args.iterations)  # fmt: skip
            done = list(session.progress(walk, n, "null texts"))
            return found._replace(nulls=torch.stack([step.null for step in done])), done[-1].x
        walk = found.back(under.denoise, net.schedule)
        return found, last(session.progress(walk, n, "come back")).x


def counted(session: Session, denoise: Denoise, n: int) -> Denoise:
    """The same, with a bar that moves at each call."""
    bar = session.progress(iter(partial(int), 1), n, "invert")

    def eps(x: Tensor, t: Tensor) -> Tensor:
        next(bar)
        return denoise(x, t)

    return eps


def again(
    args: argparse.Namespace,
    session: Session,
    net: latents.Loaded,
    found: Trajectory,
    whole: tuple[int, int],
    skip: int,
) -> Tensor:
    """The latents at the end of the way back under --to."""
    positive, negative = texts(net, args.to, args.negative, found.xs.shape[1])
    scale = 7.5 if args.to_guidance is None else args.to_guidance
    with net.on(net.parts.unet):
        under = scene(net, positive, negative, whole, scale)
        walk = found.back(under.denoise, net.schedule, skip=skip, halfway=under.halfway, kind=kind_of(net))
        return last(session.progress(walk, args.steps - skip, "edit")).x

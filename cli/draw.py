"""A batch of pictures of a latent diffusion model: from the options to the walk, and from latents to pixels."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..methods import text_to_image as t2i
from ..methods.controlnet import Control
from ..methods.prompt import Prompt, encode, score_ids, size_ids
from ..model.ops import TORCH, Ops
from ..samplers import path as paths
from ..samplers.ddim import ddim
from ..samplers.ddpm import ddpm
from ..samplers.dpmpp import dpmpp
from ..samplers.euler import euler, euler_ancestral
from ..samplers.heun import heun
from ..samplers.inversion import last
from ..samplers.noise import Noise, seeded
from ..samplers.parameterisation import Denoise, noised
from ..samplers.schedule import Schedule
from . import images, latents
from .errors import CommandError
from .freed import freed
from .session import Session

EXACT = 2.0**-50  # the last alpha in the place of 0, in float64
# what a method makes of a batch: of a denoiser that speaks given verbs, the timesteps that run, and which pictures
Around = Callable[[Callable[[Ops], Denoise], list[float], range], Denoise]


def alone(speaking: Callable[[Ops], Denoise], path: list[float], rows: range) -> Denoise:
    """No method: the denoiser with torch's verbs."""
    return speaking(TORCH)


def inpaints(net: latents.Loaded) -> bool:
    """Whether the UNet is one for inpainting."""
    return net.parts.unet.in_channels != net.parts.vae.cfg.latent_channels


def check(args: argparse.Namespace, net: latents.Loaded) -> None:
    """Raises CommandError for options that do not go together."""
    if args.eta and args.sampler != "ddim":
        raise CommandError("--eta is DDIM's fresh noise: give --sampler ddim")
    if args.mask and not args.init:
        raise CommandError("--mask says which part of --init to repaint: give --init")
    if args.strength is not None and not args.init:
        raise CommandError("--strength is how much --init may change: give --init")
    if inpaints(net) and not args.mask:
        raise CommandError("the model is one for inpainting: give --init and --mask")
    if bool(args.control) != bool(net.control):
        raise CommandError("--control is the hint of --control-model: give both")
    if args.control_scale != 1 and not args.control:
        raise CommandError("--control-scale is how much of --control: give --control and --control-model")


def strength(args: argparse.Namespace) -> float:
    """The share of the walk that runs."""
    return args.strength if args.strength is not None else 1.0 if args.mask else 0.75


def picture(session: Session, name: str, size: tuple[int, int]) -> Tensor:
    """A picture file cropped about its centre to the proportions of `size`.  -> (1, 3, H, W) in [-1, 1]."""
    return images.to_tensor(images.filled(images.decoded(session.read(name), name), size), 3)[None]


def walk_of(args: argparse.Namespace, net: latents.Loaded, noise: Noise) -> tuple[t2i.Walk, list[float]]:
    """The sampler, and the timesteps from noise to a clean picture."""
    walks: dict[str, t2i.Walk] = {
        "euler": euler,
        "euler-a": partial(euler_ancestral, noise=noise),
        "heun": heun,
        "dpmpp": dpmpp,
        "ddim": partial(ddim, eta=args.eta, noise=noise),
        "ddpm": partial(ddpm, noise=noise),
    }
    return walks[args.sampler], path_of(args, net)


def karras(args: argparse.Namespace, net: latents.Loaded) -> bool:
    """Whether sigmas are spaced as in Karras et al. 2022: by option, or as the model says for samplers in sigma."""
    says = args.spacing is None and net.says.karras and args.sampler in ("euler", "heun", "dpmpp")
    return args.spacing == "karras" or says


def path_of(args: argparse.Namespace, net: latents.Loaded) -> list[float]:
    """The timesteps from noise to a clean picture."""
    says, n, total = net.says, args.steps, net.says.steps
    if args.spacing == "karras" or (karras(args, net) and args.sampler == "dpmpp"):
        return paths.karras(net.schedule, n)
    spacing = args.spacing or says.spacing
    cut = args.sampler == "dpmpp" and spacing in ("leading", "linspace") and n < total // 2
    even = paths.fractions if args.sampler in ("euler", "euler-a", "heun") else paths.linspace
    makers: dict[str, Callable[[int], Sequence[float]]] = {
        "leading": lambda n: paths.leading(n, total, offset=min(says.offset, total // n - 1)),
        "trailing": lambda n: paths.trailing(n, total),
        "linspace": lambda n: even(n, total),
    }
    path = paths.without_lowest(makers[spacing](n + 1)) if cut else makers[spacing](n)
    if karras(args, net) and n > 1:
        return paths.karras(net.schedule, n, first=path[0], last=path[-2])
    return list(path)


def trained(args: argparse.Namespace, net: latents.Loaded) -> Schedule:
    """The model's schedule; where it ends in noise alone, DDIM's and DDPM's walks in float64 come nearer to that."""
    if net.says.zero_terminal_snr and args.sampler in ("ddim", "ddpm") and net.device.type != "mps":
        return latents.schedule_of(net.says, EXACT)
    return net.schedule


def carried(x: Tensor, net: latents.Loaded, schedule: Schedule) -> Tensor:
    """x in the type of a walk by `trained`'s schedule: float64 where that is not the model's own."""
    return x if schedule is net.schedule else x.double()


def prepared(
    args: argparse.Namespace, session: Session, net: latents.Loaded, size: tuple[int, int]
) -> dict[str, Tensor]:
    """What pictures among the options become: latents of --init, mask, canvas, hint."""
    scene: dict[str, Tensor] = {}
    if args.control:
        scene["hint"] = (picture(session, args.control, size) + 1) / 2
    if not args.init:
        return scene
    init = picture(session, args.init, size)
    scene["x0"] = net.encoded(init).float()
    if args.mask:
        mask = images.filled(images.decoded(session.read(args.mask), args.mask), size)
        scene["mask"] = (images.to_mask(mask)[None] >= 0.5).float()
        masked = net.encoded(t2i.covered(init, scene["mask"])).float()
        scene["canvas"] = t2i.canvas(scene["mask"].to(masked), masked)
    return {name: value.to(net.device) for name, value in scene.items()}


def draw(
    args: argparse.Namespace,
    session: Session,
    net: latents.Loaded,
    texts: Sequence[str],
    rows: range,
    size: tuple[int, int],
    scene: dict[str, Any],
    around: Around = alone,
) -> Tensor:
    """One batch of pictures, (B, 3, H, W) in [-1, 1]."""
    return net.pictures(walked(args, session, net, texts, rows, size, scene, around))


def walked(
    args: argparse.Namespace,
    session: Session,
    net: latents.Loaded,
    texts: Sequence[str],
    rows: range,
    size: tuple[int, int],
    scene: dict[str, Any],
    around: Around = alone,
) -> Tensor:
    """The latents (B, 4, H / 8, W / 8) of one batch of pictures."""
    parts, n = net.parts, len(texts)
    positive, negative = said(args, net, texts)
    noise = seeded([args.seed + i for i in rows])
    walk, path = walk_of(args, net, noise)
    schedule = trained(args, net)
    controls = [] if net.control is None else [Control(net=net.control, hint=scene["hint"], scale=args.control_scale)]
    with net.on(parts.unet, net.control):
        x = t2i.pure_noise(parts, noise, size, n)
        z = x
        if args.init:
            path = t2i.tail(path, strength(args))
            if not (args.mask and strength(args) == 1):
                x = noised(scene["x0"].expand_as(z), z, schedule(path[0]))
        if "trajectory" in scene:
            walk, path, x = scene["trajectory"].resumed(args.skip or 0, n, x)
        x = carried(x, net, schedule)
        ids = score_ids if net.says.aesthetic else size_ids
        sizes = ids(size, n) if parts.xl else None
        other = score_ids(size, n, score=2.5) if parts.xl and net.says.aesthetic else None

        def speaking(ops: Ops) -> Denoise:
            return t2i.denoiser(
                parts.unet, positive, negative, schedule=schedule, ids=sizes, negative_ids=other,
                prediction=net.says.prediction or "eps",  # type: ignore[arg-type]
                guidance=args.guidance, rescale=args.rescale, controls=controls, ops=freed(args, net, ops),
                canvas=scene["canvas"] if inpaints(net) else None, whole_times=args.sampler == "dpmpp",
            )  # fmt: skip

        denoise = around(speaking, path, rows)
        if args.mask and not inpaints(net):
            steps = t2i.repainted(walk, denoise, x, schedule, path, scene["x0"].expand_as(z), z, scene["mask"])
        else:
            steps = walk(denoise, x, schedule, path)
        return last(session.progress(steps, len(path) - 1, f"picture {rows[0] + 1} ... {rows[-1] + 1}")).x.to(z)


def cut_off(net: latents.Loaded, texts: Sequence[str]) -> list[str]:
    """A line about each text that is longer than the towers read, with the words that are lost."""
    found, tokens = [], net.parts.tokenizers[0]
    for text in dict.fromkeys(texts):
        pieces = tokens.pieces(text)[1:-1]
        if over := pieces[tokens.length - 2 :]:
            lost, many = tokens.text(over), f"{len(over)} of {len(pieces)}"
            short = lost if len(lost) <= 80 else f"{lost[:77]}..."
            found.append(f"the last {many} tokens of {text[:40]!r} are cut off: {short}")
    return found


def said(args: argparse.Namespace, net: latents.Loaded, texts: Sequence[str]) -> tuple[Prompt, Prompt]:
    """What texts and the negative text become."""
    with net.on(*net.parts.towers):
        positive = encode(net.parts, texts, clip_skip=args.clip_skip)
        if args.negative is None and net.says.zero_negative:
            return positive, positive.zeros()
        return positive, encode(net.parts, [args.negative or ""] * len(texts))

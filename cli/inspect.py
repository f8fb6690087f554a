"""`diaphane inspect`: what a weight file holds."""

from collections.abc import Sequence

from ..model import load as model_load
from ..weights import load as weights_load
from ..weights.errors import LayoutError
from . import inspect_latents
from .errors import CommandError, line
from .options import Parser, whole

SHOWN = 20


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        "inspect",
        description="Say what a weight file holds: its layout (told from keys and shapes), the family and settings of\n"
        "the network in it, how many parameters, the shapes of h and of the skips, and the keys that do not fit.\n"
        "No byte of the weights is copied.\n"
        "Of Stable Diffusion (XL, 1, 2), a folder or a single file, it says so of every part, and what the model says\n"
        "of its training; of a LoRA its ranks and, with --base MODEL, which weights it changes.",
        epilog="examples:\n  diaphane inspect shapes\n  diaphane inspect celeba_hq.ckpt\n"
        "  diaphane inspect sd_xl_base_1.0.safetensors\n"
        "  diaphane inspect style.safetensors --base sd_xl_base_1.0.safetensors --keys",
    )
    p.add_argument(
        "source", metavar="FILE", help="a weight file or folder, an embedded or catalogued name, a repository"
    )
    p.add_argument("--file", help="which file of a folder or repository")
    p.add_argument("--config", help="a json file of the network's settings, in place of the one beside the weights")
    p.add_argument("--resolution", type=whole(1, 4096), help="side of the pictures, where weights cannot say")
    p.add_argument("--base", metavar="MODEL", help="match a LoRA with this model's weights")
    p.add_argument("--keys", action="store_true", help="also every tensor, under our names")
    return p


def run(argv: Sequence[str]) -> int:
    """Run the command; keys that do not fit are listed on standard output before the error's line."""
    args = parser().parse_args(argv)
    given = {"resolution": args.resolution} if args.resolution else {}
    try:
        if kind := inspect_latents.kind_of(args):
            for name, value in inspect_latents.rows(args, kind):
                print(line(f"{name:18}{' ' * (len(name) > 17)}{value}").rstrip())
            print("every key fits")
            return 0
        if args.base is not None:
            raise CommandError(f"--base is the model that a LoRA is for; {args.source} is none")
        network = weights_load.load(args.source, file=args.file, config=args.config, **given)
    except LayoutError as e:
        for what in ("missing", "unexpected", "misshapen", "doubled"):
            keys = getattr(e, what)
            for key in keys[:SHOWN]:
                print(f"{what:10}  {line(key)}")
            if len(keys) > SHOWN:
                print(f"{what:10}  ... {len(keys) - SHOWN} more")
        raise
    tensors = network.tensors
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    print(line(f"file        {network.path}"))
    print(f"sha256      {network.sha256}")
    print(f"layout      {network.layout}")
    print(f"family      {network.family}")
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"parameters  {count:,} in {len(tensors)} tensors, {', '.join(kinds)}")
    for name, value in network.config.items():
        print(f"  {name:14}{value}")
    for name, shape in shapes(network).items():
        print(f"{name:12}{shape}")
    if args.keys:
        for name, tensor in tensors.items():
            print(f"  {name:24}{tuple(tensor.shape)}")
    print("every key fits")
    return 0


def shapes(network: weights_load.Network) -> dict[str, str]:
    """h and the skips (channels x side), found without computing anything."""
    import torch

    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in network.tensors.items()}
    unet = model_load.build(network.family, network.config, meta, dtype=torch.float32)
    side, channels = network.config["resolution"], network.config["in_channels"]
    x, t = torch.empty(1, channels, side, side, device="meta"), torch.zeros(1, device="meta")
    c = unet.embed(t)
    deep, skips = unet.encode(x, c)
    h = unet.middle(deep, c)
    return {"h": " x ".join(map(str, h.shape[1:])), "skips": ", ".join(f"{s.shape[1]}x{s.shape[2]}" for s in skips)}

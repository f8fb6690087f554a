"""`diaphane fetch`: public weights, downloaded by name and checked."""

from collections.abc import Sequence

from ..weights import load as weights_load
from ..weights.catalogue import CATALOGUE
from .errors import CommandError, line
from .options import Parser


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        "fetch",
        description="Download public weights into the cache of the Hugging Face Hub and check their sha256 where\n"
        "one is known.  Without a name: the list of what there is.  A download goes on where it stopped; HF_HOME\n"
        "moves the cache, HF_TOKEN opens gated repositories, HF_HUB_OFFLINE=1 keeps to what is there.",
        epilog="example:\n  diaphane fetch\n  diaphane fetch ddpm-cifar10-32\n  diaphane fetch google/ddpm-church-256",
    )
    p.add_argument("name", nargs="?", help="a name of the list, or a repository (owner/name)")
    p.add_argument("--file", help="which file of a repository")
    p.add_argument("--revision", help="branch, tag or commit of a repository")
    return p


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.name is None:
        if args.file or args.revision:
            raise CommandError("--file and --revision go with a name")
        for name in weights_load.embedded():
            print(f"{name:32}{'embedded':12}ships with the package")
        for entry in CATALOGUE.values():
            size = f"{entry.megabytes} MB" if entry.megabytes else ""
            where = f"{entry.repo or entry.url or ''} {entry.file}"
            print(line(f"{entry.name:32}{entry.status:12}{entry.family:12}{size:9}{where}"))
        return 0
    path = weights_load.find(args.name, args.file, args.revision)
    print(line(path))
    print(f"sha256 {weights_load.sha256(path)}")
    return 0

"""`diaphane fetch`: public weights, downloaded by name and checked."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..weights import load as weights_load
from ..weights import pipeline
from ..weights.catalogue import CATALOGUE
from .errors import CommandError, line
from .options import Parser


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        "fetch",
        description="Download public weights into the cache of the Hugging Face Hub and check their sha256 where\n"
        "one is known.  Without a name: the list of what there is, with sizes, parameters and licences.  A download\n"
        "goes on where it stopped; HF_HOME moves the cache, HF_TOKEN opens gated repositories, HF_HUB_OFFLINE=1 keeps\n"
        "to what is there.",
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
            count = f"{entry.parameters / 1e6:.0f} M" if entry.parameters else ""
            where = f"{entry.repo or entry.url or ''} {entry.file}"
            licence = f"  ({entry.licence})" if entry.licence else ""
            print(line(f"{entry.name:32}{entry.status:12}{entry.family:12}{size:9}{count:8}{where}{licence}"))
        return 0
    if args.name in CATALOGUE and (args.file or args.revision):
        raise CommandError(f"{args.name} is a name of the list, which says the file: leave out --file and --revision")
    for path in fetched(args):
        print(line(path))
        print(f"sha256 {weights_load.sha256(path)}")
    return 0


def fetched(args: Namespace) -> list[Path]:
    """The files of a name: one, or those of all parts of a model that is a folder."""
    if args.name not in CATALOGUE or not CATALOGUE[args.name].variant:
        return [weights_load.find(args.name, args.file, args.revision)]
    whole = pipeline.load(args.name)
    return [path for part in whole.parts.values() for path in part.paths]

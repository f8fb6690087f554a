"""`diaphane tokens`: a prompt as the text towers get it."""

from collections.abc import Sequence

from ..model.tokenizer import Tokenizer
from ..weights import hub
from ..weights.words import TOKENIZERS, Folder, Words, own_words, words_in
from . import options
from .errors import CommandError, line

ABOUT = """\
Show how CLIP's byte-pair encoding cuts a prompt into tokens, one line a tower: pieces (the last of a word ends
in </w>), their ids, and how many of the 75 places are taken.  What comes after them is cut off; it is shown
behind a bar.  SDXL's second tokeniser takes "!" for padding, as transformers does; --literal takes it for text, as
open_clip does and as the tower was trained.  Without --tokenizer it is CLIP's own, which ships with the package.
"""
EXAMPLES = """\
examples:
  diaphane tokens "a cat!"
  diaphane tokens "an armchair in the shape of an avocado" --ids
  diaphane tokens "a cat" --tokenizer stabilityai/stable-diffusion-xl-base-1.0
"""


def parser() -> options.Parser:
    """The command's options."""
    p = options.Parser("tokens", description=ABOUT, epilog=EXAMPLES)
    p.add_argument("prompt", help="any text")
    p.add_argument("--tokenizer", help="a folder or repository with vocab.json and merges.txt, in it or in tokenizer/ "
                   "and tokenizer_2/ as models have them (default: CLIP's own)")  # fmt: skip
    p.add_argument("--ids", action="store_true", help="ids too")
    p.add_argument("--literal", action="store_true", help='"!" is text like any other')
    return p


def tokenisers(source: str | None) -> dict[str, Words]:
    """The tokenisers of a folder or repository by name; CLIP's, as SDXL has it twice, without one.

    Raises CommandError where there are none.
    """
    if source is None:
        own = own_words({"text_encoder": True, "text_encoder_2": False})
        return {TOKENIZERS[text]: words for text, words in own.items()}
    folder = Folder(source)
    if not folder.local and not hub.is_repo(source):
        raise CommandError(f"there is no folder {source}: it should have vocab.json and merges.txt")
    found = {name: words for name in TOKENIZERS.values() if (words := words_in(folder, name)) is not None}
    if not found and (words := words_in(folder, "")) is not None:
        found = {"tokenizer": words}
    if not found:
        raise CommandError(f"{source} has no vocab.json and merges.txt, nor have tokenizer/ and tokenizer_2/ in it")
    return found


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    for name, (vocabulary, merges, pad) in tokenisers(args.tokenizer).items():
        tokens = Tokenizer(vocabulary, merges, pad=pad, cut_pad=not args.literal)
        ids, pieces = tokens.ids(args.prompt)[1:-1], tokens.pieces(args.prompt)[1:-1]
        room = tokens.length - 2
        shown = [f"{piece}({i})" if args.ids else piece for piece, i in zip(pieces, ids, strict=True)]
        over = f", {len(ids) - room} of them cut off" if len(ids) > room else ""
        print(line(f"{name}: {len(ids)} of {room} tokens{over}, filled up with {pad}"))
        print(line("  " + " ".join(shown[:room]) + (" | " + " ".join(shown[room:]) if over else "")))
    return 0

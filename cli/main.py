"""The command `diaphane`: finds the subcommand, runs it, and turns what goes wrong into one line and an exit code."""

import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .errors import line, reason

COMMANDS = {
    "demo": "all of it, on the embedded model, into a folder with one picture that explains itself",
    "generate": "pictures from text, in a picture, beside a hint: Stable Diffusion XL, 1 and 2",
    "instant-style": "text in the style of pictures, at the blocks that make style (InstantStyle, IP-Adapter)",
    "probe": "what each block does with a picture, drawn and measured (InstantStyle, figure 7)",
    "style-align": "pictures of several texts in one style, the first's or a given picture's (StyleAligned)",
    "consistory": "one subject in several pictures, or a real one's pictures in others (ConsiStory)",
    "panorama": "pictures wider than the model's own, by overlapping windows, with styles across them (MultiDiffusion)",
    "tokens": "how a prompt is cut into tokens, and where it ends",
    "sample": "pictures from noise: DDIM or DDPM",
    "invert": "picture -> noise -> picture, and how well it came back",
    "diffstyle": "one picture's content in another's style, through h-space (DiffStyle, InjectFusion)",
    "asyrp": "edits along directions of h-space, learned or found (Asyrp)",
    "look": "what the network held while it drew: words, masks, layout, matches, h and the skips, on one page",
    "correlation": "how |h| and its skip go together over the timesteps (DiffStyle, figure 4b)",
    "inspect": "what a weight file holds: layout, family, settings, keys that do not fit",
    "fetch": "download public weights by name and check them",
    "bench": "the kernels against everything else that computes the same, on this machine",
    "env": "versions, devices and folders",
    "redo": "make a picture again from what it says of itself, bit for bit",
}
LONGEST = 1000  # characters of an error
WIDTH = max(map(len, COMMANDS))
HELP = f"""usage: diaphane COMMAND [options]        diaphane COMMAND --help        diaphane --version

A see-through diffusion UNet: h-space and skips as plain values.

{chr(10).join(f"  {name:{WIDTH}}  {what}" for name, what in COMMANDS.items())}

Begin with `diaphane demo`.  Every picture carries its settings; `diaphane redo PICTURE` makes it again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.  Returns the exit code: 0; 2 after one line on bad input; 130 after an interruption."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in COMMANDS else ""
    try:
        code = command(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"diaphane {name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError as e:
        return 0 if unread() else refuse(name, reason(e))
    except OSError as e:
        return refuse(name, f"{e.filename}: {reason(e)}" if e.filename else reason(e))
    except (ValueError, MemoryError) as e:
        return refuse(name, e if str(e) else "not enough memory: lower --batch")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        return refuse(name, "not enough memory: lower --batch, or choose another --device or --dtype")
    finally:
        silenced()


def command(words: list[str]) -> int:
    """Run what the words say; whatever goes wrong is the caller's to tell."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        print(f"diaphane {version('diaphane')}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        return refuse("", f"there is no command {name!r}: it is one of {', '.join(COMMANDS)}")
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its retries are not the user's errors
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(line(f"diaphane {name}: {message}"), file=sys.stderr)
        return import_module(f".{name.replace('-', '_')}", __package__).run(words[1:])


def unread() -> bool:
    """Whether whoever read the output has gone, which one empty line more shows."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def silenced() -> None:
    """No standard output where it takes no more, so that the interpreter's end does not fail on what is left in it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = None  # type: ignore[assignment]


def refuse(name: str, why: object) -> int:
    """Say in one line what is wrong."""
    text = line(f"diaphane {name}".strip() + f": {why}")
    print(text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ...", file=sys.stderr)
    return 2


def script() -> None:
    """The entry point of the installed command."""
    sys.exit(main())

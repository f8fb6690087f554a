"""What can be wrong with a command: one line, and exit code 2."""


class CommandError(ValueError):
    """Bad input to a command; its message says in one line what is wrong and what would be right."""


class Differs(CommandError):
    """A picture that was made again and is not the same."""


def line(text: object) -> str:
    """Any text as one printable line: blanks are joined, what cannot be printed is escaped."""
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def reason(error: OSError) -> str:
    """What the system says of a file, as one line."""
    return line(error.strerror or error)

"""What can be wrong with a command: one line, and exit code 2."""

import re


class CommandError(ValueError):
    """Bad input to a command; its message says in one line what is wrong and what would be right."""


class Differs(CommandError):
    """A picture that was made again and is not the same."""


def line(text: object) -> str:
    """Any text as one printable line: line breaks and tabs become a blank, what else cannot be printed is escaped."""
    joined = re.sub(r"\s*[\t\n\r\f\v\x1c-\x1e\x85\u2028\u2029]\s*", " ", str(text))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def reason(error: OSError) -> str:
    """What the system says of a file, as one line."""
    return line(error.strerror or error)

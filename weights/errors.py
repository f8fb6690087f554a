"""What can be wrong with a weight file, one exception a cause, each with a message of one line that names the cure."""

from collections.abc import Iterable


class WeightsError(ValueError):
    """The base of all errors about weights; its message is always one printable line."""

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(" ".join(line.split()))


class MissingFileError(WeightsError):
    """No such file, folder, embedded name or repository entry."""


class CorruptFileError(WeightsError):
    """A file that is truncated, damaged, or of no known format."""


class UnsafePickleError(WeightsError):
    """A pickle that asks for more than tensors and plain containers; nothing in it was run."""


class ConfigError(WeightsError):
    """Settings that contradict the tensors, cannot be told from them, or ask for what no network here does."""


class DtypeError(WeightsError):
    """A tensor that is not of a floating type."""


class NonFiniteError(WeightsError):
    """A tensor with NaN or infinity in it."""


class ChecksumError(WeightsError):
    """A file whose sha256 is not the published one."""


class HubError(WeightsError):
    """The Hub refused, or could not be reached."""


class OfflineError(HubError):
    """No network, or HF_HUB_OFFLINE, and the file is not in the cache."""


class GatedError(HubError):
    """A repository whose terms have to be accepted first, or a private one."""


class NotOnHubError(HubError):
    """A repository, revision or file that the Hub does not have."""


class DiskFullError(HubError):
    """No room for the file."""


class LayoutError(WeightsError):
    """Keys or shapes that fit no known network; `message` and the full lists are attributes."""

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[str] = (),
        doubled: Iterable[str] = (),
    ):
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.misshapen, self.doubled = tuple(misshapen), tuple(doubled)
        self.message = message
        lists = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        parts = [f"{len(found)} {what}: {first(found)}" for what, found in (*lists, ("doubled", self.doubled)) if found]
        super().__init__(": ".join(filter(None, [message, "; ".join(parts)])))


def first(names: Iterable[str], count: int = 3, width: int = 100) -> str:
    """The first few of many names, each cut to `width` characters."""
    names = list(names)
    shown = ", ".join(name if len(name) <= width else name[: width - 1] + "…" for name in names[:count])
    return shown + (f", … ({len(names) - count} more)" if len(names) > count else "")

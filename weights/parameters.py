"""Parameters of a network one by one, under our name and each layout's, with their shapes: what tables are made of."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from .names import Rule, Shape, matrix

Names = tuple[str, ...]  # of one thing: ours, then one a layout


class Parameter(NamedTuple):
    """One tensor: its names, our shape, and the view that turns a layout's tensor into ours."""

    names: Names
    shape: Shape
    view: Callable[[Tensor], Tensor] | None = None


def under(at: Names, leaf: str | Names) -> Names:
    """The names of a part of something; a single leaf is spelled alike everywhere."""
    leaves = (leaf,) * len(at) if isinstance(leaf, str) else leaf
    return tuple(".".join(filter(None, pair)) for pair in zip(at, leaves, strict=True))


def linear(at: Names, cin: int, cout: int, *, bias: bool = True) -> Iterator[Parameter]:
    """A matrix, which layouts may keep as a 1 x 1 convolution."""
    yield Parameter(under(at, "weight"), (cout, cin), matrix)
    if bias:
        yield Parameter(under(at, "bias"), (cout,))


def conv(at: Names, cin: int, cout: int, size: int = 3) -> Iterator[Parameter]:
    """A convolution."""
    yield Parameter(under(at, "weight"), (cout, cin, size, size))
    yield Parameter(under(at, "bias"), (cout,))


def norm(at: Names, channels: int) -> Iterator[Parameter]:
    """A group or layer norm."""
    yield Parameter(under(at, "weight"), (channels,))
    yield Parameter(under(at, "bias"), (channels,))


def shapes(parameters: Iterable[Parameter]) -> dict[str, Shape]:
    """Our names -> shapes."""
    return {p.names[0]: p.shape for p in parameters}


def rules(parameters: Iterable[Parameter], *columns: int) -> list[Rule]:
    """The table from a layout to our names; with several columns, of spellings that may be mixed."""
    spelled = [Rule(p.names[column], p.names[0], p.view) for p in parameters for column in columns]
    return list({rule.key: rule for rule in spelled}.values())

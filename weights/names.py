"""Renaming tensors by a table: a bijection onto our names with equal shapes, or an error that lists what is wrong."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .errors import LayoutError

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One tensor: its key in the file, our name, and the view that turns the one into the other."""

    key: str
    name: str
    view: Callable[[Tensor], Tensor] | None = None


class Row(NamedTuple):
    """One module of a network, under our name and under the name each layout gives it."""

    kind: str  # a key of the family's leaves, or "conv", "linear", "norm", "embedding": modules without leaves
    cin: int
    cout: int
    names: tuple[str, ...]  # ours, then one a layout
    skip: bool = False  # residual blocks: whether the shortcut is a convolution


# kind -> rows of (our leaf, one leaf a layout); a pair of leaves spells weight and bias out
Leaves = Mapping[str, Sequence[tuple[Any, ...]]]


def matrix(w: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix.  (C, D), (C, D, 1) or (C, D, 1, 1) -> (C, D), a view."""
    while w.ndim > 2 and w.shape[-1] == 1:
        w = w.squeeze(-1)
    return w


def transposed(w: Tensor) -> Tensor:
    """(C, D) -> (D, C), a view; anything else is left as it is, to be refused by its shape."""
    return w.mT if w.ndim == 2 else w


def parameters(row: Row, leaves: Leaves, column: int) -> Iterator[tuple[str, str, str]]:
    """(our name, the layout's key, our leaf) of every parameter of a module; `column` counts layouts from 1."""
    for spelled in leaves.get(row.kind, [("",) * len(row.names)]):
        leaf = spelled[0]
        if leaf == "skip" and not row.skip:
            continue
        ours, theirs = (ends(row.names[i], spelled[i]) for i in (0, column))
        yield ours[0], theirs[0], leaf
        if row.kind != "embedding":
            yield ours[1], theirs[1], leaf


def ends(module: str, leaf: str | tuple[str, str]) -> tuple[str, str]:
    """The names of a leaf's weight and bias."""
    if isinstance(leaf, tuple):
        return f"{module}.{leaf[0]}", f"{module}.{leaf[1]}"
    stem = f"{module}.{leaf}".strip(".")
    return f"{stem}.weight", f"{stem}.bias"


def shapes(rows: Iterable[Row], leaves: Leaves, emb: int, emb_factor: int = 1) -> dict[str, Shape]:
    """Our names -> shapes of every parameter; `emb`: width of the time embedding, `emb_factor`: 2 for scale-shift."""

    def weight(row: Row, leaf: str) -> Shape:
        cin, cout = row.cin, row.cout
        match leaf or row.kind:
            case "norm1":
                return (cin,)
            case "norm" | "norm2":
                return (cout,)
            case "emb":
                return emb_factor * cout, emb
            case "conv" | "conv1":
                return cout, cin, 3, 3
            case "conv2":
                return cout, cout, 3, 3
            case "skip":
                return cout, cin, 1, 1
            case "qkv":
                return 3 * cout, cin
            case _:  # q, k, v, out, linear, embedding
                return cout, cin

    want = {}
    for row in rows:
        for name, _, leaf in parameters(row, leaves, 0):
            shape = weight(row, leaf)
            want[name] = shape if name.endswith("weight") else shape[:1]
    return want


def rules(rows: Iterable[Row], leaves: Leaves, column: int, views: Mapping[str, Callable] | None = None) -> list[Rule]:
    """The table of one layout; `views` gives our leaves whose weights are stored in another form."""
    table = []
    for row in rows:
        for name, key, leaf in parameters(row, leaves, column):
            table.append(Rule(key, name, (views or {}).get(leaf) if name.endswith("weight") else None))
    return table


def rename(
    tensors: Mapping[str, Tensor], table: Sequence[Rule], want: Mapping[str, Shape], *, ignore: Iterable[str] = ()
) -> dict[str, Tensor]:
    """`tensors` under our names, in the order of `want`: each rule used once, every shape equal, nothing left over.

    Several rules may spell one name; then exactly one of the keys has to be there.  `ignore` lists the keys that a
    layout is known to carry besides its network.  Raises LayoutError with the lists of what is wrong.
    """
    by_key, strays = {rule.key: rule for rule in table}, set(ignore)
    landed: dict[str, str] = {}
    out: dict[str, Tensor] = {}
    unexpected, misshapen, doubled = [], [], []
    for key, tensor in tensors.items():
        rule = by_key.get(key)
        if rule is None or rule.name not in want:
            if key not in strays:
                unexpected.append(key)
            continue
        if rule.name in landed:
            doubled.append(f"{key} and {landed[rule.name]} are both {rule.name}")
            continue
        landed[rule.name] = key
        out[rule.name] = rule.view(tensor) if rule.view else tensor
        if tuple(out[rule.name].shape) != want[rule.name]:
            misshapen.append(f"{key} {shape_of(tensor.shape)} should be {shape_of(want[rule.name])}")
    spelled: dict[str, str] = {}
    for rule in table:
        spelled.setdefault(rule.name, rule.key)
    missing = [spelled.get(name, name) for name in want if name not in landed]
    if missing or unexpected or misshapen or doubled:
        raise LayoutError("", missing=missing, unexpected=unexpected, misshapen=misshapen, doubled=doubled)
    return {name: out[name] for name in want}


def shape_of(shape: Iterable[int]) -> str:
    """A shape as it is written in messages: (512, 128)."""
    return "(" + ", ".join(map(str, shape)) + ")"

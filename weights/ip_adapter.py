"""IP-Adapters in their public layout: flat in .safetensors, nested in .bin, numbered over all attentions."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import LayoutError, WeightsError
from .files import check_floating, opened
from .layout import foreign
from .load import Network, find
from .names import Shape, rename
from .parameters import Parameter, linear, norm, rules, shapes
from .plan import count, need

HEAD = 64  # channels of a resampler's head; its heads are not written in the file
PARTS = ("image_proj", "ip_adapter")
KEY = re.compile(r"ip_adapter\.(\d{1,4})\.to_([kv])_ip\.weight", re.ASCII)
OTHERS = {
    "image_proj.perceiver_resampler.": "a FaceID Plus adapter, which reads another network's embeddings of faces",
    "image_proj.norm.weight": "a FaceID adapter, which reads another network's embeddings of faces",
    "image_proj_model.": "a checkpoint of IP-Adapter's training: convert it as its authors' README says",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes alone determine."""

    kind: str  # linear | plus | full
    reads: int
    tokens: int
    context_dim: int
    width: int = 0  # plus
    layers: int = 0
    inner: int = 0
    mlp: int = 0  # plus, full
    sites: tuple[int, ...]

    def config(self) -> dict[str, Any]:
        """The settings that the shapes say; a full adapter has as many tokens as the encoder has states."""
        said: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "reads", "context_dim", "sites")}
        if self.kind == "linear":
            return said | {"tokens": self.tokens}
        if self.kind == "full":
            return said | {"mlp": self.mlp}
        said |= {name: getattr(self, name) for name in ("tokens", "width", "layers", "mlp")}
        return said | {"heads": self.inner // HEAD, "head_dim": HEAD}


def projection(plan: Plan) -> Iterator[Parameter]:
    """What makes tokens of a picture."""
    at, d = "image_proj", plan.context_dim
    if plan.kind == "linear":
        yield from linear(("proj.linear", f"{at}.proj"), plan.reads, plan.tokens * d)
        yield from norm(("proj.norm", f"{at}.norm"), d)
        return
    if plan.kind == "full":
        yield from linear(("proj.fc1", f"{at}.proj.0"), plan.reads, plan.mlp)
        yield from linear(("proj.fc2", f"{at}.proj.2"), plan.mlp, d)
        yield from norm(("proj.norm", f"{at}.proj.3"), d)
        return
    yield Parameter(("proj.queries", f"{at}.latents"), (1, plan.tokens, plan.width))
    yield from linear(("proj.proj_in", f"{at}.proj_in"), plan.reads, plan.width)
    yield from linear(("proj.proj_out", f"{at}.proj_out"), plan.width, d)
    for i in range(plan.layers):
        ours, attn, ff = f"proj.layers.{i}", f"{at}.layers.{i}.0", f"{at}.layers.{i}.1"
        for leaf, theirs in (("norm1", f"{attn}.norm1"), ("norm2", f"{attn}.norm2"), ("norm3", f"{ff}.0")):
            yield from norm((f"{ours}.{leaf}", theirs), plan.width)
        for leaf, theirs, cin, cout in (
            ("q", f"{attn}.to_q", plan.width, plan.inner),
            ("kv", f"{attn}.to_kv", plan.width, 2 * plan.inner),
            ("out", f"{attn}.to_out", plan.inner, plan.width),
            ("fc1", f"{ff}.1", plan.width, plan.mlp),
            ("fc2", f"{ff}.3", plan.mlp, plan.width),
        ):
            yield from linear((f"{ours}.{leaf}", theirs), cin, cout, bias=False)
    yield from norm(("proj.norm", f"{at}.norm_out"), d)


def parameters(plan: Plan) -> Iterator[Parameter]:
    """Every parameter; attentions to text have the odd numbers among all attentions."""
    yield from projection(plan)
    for part in ("k", "v"):
        for i, channels in enumerate(plan.sites):
            names = (f"{part}.{i}", f"ip_adapter.{2 * i + 1}.to_{part}_ip")
            yield from linear(names, plan.context_dim, channels, bias=False)


def plan(found: Mapping[str, Shape]) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError for what is not there."""
    sites = channels(found)
    if "image_proj.proj.weight" in found:
        rows, reads = need(found, "image_proj.proj.weight", 2)
        (d,) = need(found, "image_proj.norm.weight", 1)
        return Plan(kind="linear", reads=reads, tokens=max(rows // d, 1), context_dim=d, sites=sites)
    if "image_proj.proj.3.weight" in found:
        mlp, reads = need(found, "image_proj.proj.0.weight", 2)
        (d,) = need(found, "image_proj.proj.3.weight", 1)
        return Plan(kind="full", reads=reads, tokens=0, context_dim=d, mlp=mlp, sites=sites)
    for begins, what in OTHERS.items():
        if any(key.startswith(begins) for key in found):
            raise LayoutError(f"it is {what}; linear, Plus and full adapters are read here")
    if "image_proj.latents" not in found:
        what = foreign(found)
        raise LayoutError(f"it is {what}" if what else "it has no image_proj of an IP-Adapter", unexpected=list(found))
    width, reads = need(found, "image_proj.proj_in.weight", 2)
    inner = need(found, "image_proj.layers.0.0.to_q.weight", 2)[0]
    if inner % HEAD:
        raise LayoutError(f"{inner} channels of image_proj.layers.0.0.to_q do not divide into heads of {HEAD}")
    return Plan(
        kind="plus",
        reads=reads,
        tokens=need(found, "image_proj.latents", 3)[1],
        context_dim=need(found, "image_proj.proj_out.weight", 2)[0],
        width=width,
        layers=count(found, r"image_proj\.layers\.(\d{1,3})\."),
        inner=inner,
        mlp=need(found, "image_proj.layers.0.1.1.weight", 2)[0],
        sites=sites,
    )


def channels(found: Mapping[str, Shape]) -> tuple[int, ...]:
    """The channels of each attention to text.  Raises LayoutError where a number is missing in between."""
    numbers = {int(m[1]): need(found, key, 2)[0] for key in found if (m := KEY.fullmatch(key))}
    want = range(1, max(numbers, default=-1) + 1, 2)
    if lost := [f"ip_adapter.{i}.to_k_ip.weight" for i in want if i not in numbers]:
        raise LayoutError("", missing=lost)
    return tuple(numbers[i] for i in want)


def flat(content: Any) -> dict[str, Tensor]:
    """Named tensors of either layout: `image_proj.…` and `ip_adapter.…`.  Raises LayoutError for others."""
    if isinstance(content, Mapping) and any(isinstance(content.get(part), Mapping) for part in PARTS):
        if strange := [str(key) for key in content if key not in PARTS]:
            raise LayoutError("it holds more than image_proj and ip_adapter", unexpected=strange)
        content = {f"{part}.{key}": t for part in PARTS for key, t in (content.get(part) or {}).items()}
    if not isinstance(content, Mapping) or not content:
        raise LayoutError(f"there are no named tensors in it, but {type(content).__name__}")
    if strange := [str(k) for k, t in content.items() if not (isinstance(k, str) and isinstance(t, Tensor))]:
        raise LayoutError("not all of it is named tensors", unexpected=strange)
    return dict(content)


def renamed(tensors: Mapping[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """An adapter's numbers, and its tensors under our names.  Raises LayoutError."""
    found = plan({key: tuple(t.shape) for key, t in tensors.items()})
    table = list(parameters(found))
    return found, rename(tensors, rules(table, 1), shapes(table))


def load(source: str | os.PathLike[str], *, file: str | None = None, revision: str | None = None) -> Network:
    """An adapter from a file, a folder, a catalogue name ("ip-adapter_sdxl") or a repository with file=.

    Nothing is copied or cast.  Raises a WeightsError of one line.
    """
    return read(find(source, file, revision))


def read(path: Path) -> Network:
    """The adapter in one local file."""
    found = opened(path)
    try:
        numbers, tensors = renamed(flat(found.content))
        check_floating(tensors)
    except LayoutError as e:
        lists = {name: getattr(e, name) for name in ("missing", "unexpected", "misshapen", "doubled")}
        raise LayoutError(f"{path}, as an IP-Adapter: {e.message}".removesuffix(": "), **lists) from e
    except WeightsError as e:
        raise type(e)(f"{path}: {e}") from e
    return Network("ip_adapter", numbers.config(), tensors, f"IP-Adapter, {numbers.kind}", found.paths, found.metadata)

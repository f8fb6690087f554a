"""CLIP's towers in their public layouts, side by side: open_clip's (in single files), and transformers'."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .names import Rule, Shape, transposed
from .parameters import Names, Parameter, conv, linear, norm, rules, shapes, under
from .plan import count, need

OPEN_CLIP, TRANSFORMERS, FLAT = 1, 2, 3  # columns below; flat: without the name of the tower in front
PARTS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What shapes alone determine; not the heads, nor the activation."""

    width: int
    layers: int
    mlp: int
    projection: int | None
    vocabulary: int | None = None  # text
    positions: int
    patch: int | None = None  # pictures

    @property
    def vision(self) -> bool:
        """Whether it is a tower for pictures."""
        return self.patch is not None

    def config(self) -> dict[str, Any]:
        """The settings that the shapes say."""
        out: dict[str, Any] = {name: getattr(self, name) for name in ("width", "layers", "mlp", "projection")}
        if self.patch is not None:
            return out | {"patch": self.patch, "size": self.patch * round((self.positions - 1) ** 0.5)}
        return out | {"vocabulary": self.vocabulary, "positions": self.positions}


def names(plan: Plan, ours: str, open_clip: str, transformers: str) -> Names:
    """The names of a part of a tower."""
    ahead, tower = ("visual", "vision_model") if plan.vision else ("", "text_model")
    return ours, f"{ahead}.{open_clip}".strip("."), f"{tower}.{transformers}", transformers


def layer(plan: Plan, i: int) -> Iterator[Parameter]:
    """One layer."""
    at = names(plan, f"layers.{i}", f"transformer.resblocks.{i}", f"encoder.layers.{i}")
    leaf = ("self_attn", "self_attn")
    yield from norm(under(at, ("norm1", "ln_1", "layer_norm1", "layer_norm1")), plan.width)
    for part in PARTS:  # in open_clip's files after `unfused`
        yield from linear(
            under(at, (part, f"attn.{part}", *(f"{s}.{part}_proj" for s in leaf))), plan.width, plan.width
        )
    out = under(at, ("out", "attn.out_proj", *(f"{s}.out_proj" for s in leaf)))
    yield from linear(out, plan.width, plan.width)
    yield from norm(under(at, ("norm2", "ln_2", "layer_norm2", "layer_norm2")), plan.width)
    yield from linear(under(at, ("fc1", "mlp.c_fc", "mlp.fc1", "mlp.fc1")), plan.width, plan.mlp)
    yield from linear(under(at, ("fc2", "mlp.c_proj", "mlp.fc2", "mlp.fc2")), plan.mlp, plan.width)


def parameters(plan: Plan) -> Iterator[Parameter]:
    """Every parameter, in order of execution."""
    position = names(plan, "position", "positional_embedding", "embeddings.position_embedding.weight")
    if plan.patch is not None:
        patch = names(plan, "patch", "conv1", "embeddings.patch_embedding")
        yield next(conv(patch, 3, plan.width, plan.patch))  # it has no bias
        yield Parameter(names(plan, "cls", "class_embedding", "embeddings.class_embedding"), (plan.width,))
        yield Parameter(position, (plan.positions, plan.width))
        yield from norm(names(plan, "norm_in", "ln_pre", "pre_layrnorm"), plan.width)
    else:
        token = names(plan, "token", "token_embedding", "embeddings.token_embedding")
        yield from linear(token, plan.width, plan.vocabulary or 0, bias=False)
        yield Parameter(position, (plan.positions, plan.width))
    for i in range(plan.layers):
        yield from layer(plan, i)
    last = ("ln_post", "post_layernorm") if plan.vision else ("ln_final", "final_layer_norm")
    yield from norm(names(plan, "norm", *last), plan.width)
    if plan.projection:
        theirs = ("visual.proj", "visual_projection") if plan.vision else ("text_projection", "text_projection")
        both = (f"{theirs[1]}.weight",) * 2
        yield Parameter(("projection.weight", theirs[0], *both), (plan.projection, plan.width))


def plan(found: Mapping[str, Shape], column: int) -> Plan:
    """The numbers of a file from its keys and shapes.  Raises LayoutError where a key that tells one is missing."""
    vision = any(key.startswith(("visual.", "vision_model.")) or "patch_embedding" in key for key in found)
    if column == OPEN_CLIP:
        at, layers = ("visual." if vision else ""), r"transformer\.resblocks"
        position, patch, token = "positional_embedding", "conv1", "token_embedding"
        fc, last = "transformer.resblocks.0.mlp.c_fc", "visual.proj" if vision else "text_projection"
    else:
        at = {TRANSFORMERS: "vision_model." if vision else "text_model."}.get(column, "")
        layers, fc, last = r"encoder\.layers", "encoder.layers.0.mlp.fc1", "visual_projection.weight"
        position, patch = "embeddings.position_embedding.weight", "embeddings.patch_embedding"
        token, last = "embeddings.token_embedding", last if vision else "text_projection.weight"
    mlp, width = need(found, f"{at}{fc}.weight", 2)
    projection = need(found, last, 2)[1 if column == OPEN_CLIP else 0] if last in found else None
    ahead = at.replace(".", r"\.")
    return Plan(
        width=width,
        layers=count(found, rf"{ahead}{layers}\.(\d{{1,3}})\."),
        mlp=mlp,
        projection=projection,
        vocabulary=None if vision else need(found, f"{at}{token}.weight", 2)[0],
        positions=need(found, f"{at}{position}", 2)[0],
        patch=need(found, f"{at}{patch}.weight", 4)[2] if vision else None,
    )


def unfused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's in_proj as three, each a view of a third of its rows; one that has no thirds is left as it is.

    `text_projection.weight`, a linear layer's in some merged files, becomes the matrix of the other files.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "text_projection.weight" and tensor.ndim == 2 and "text_projection" not in tensors:
            out["text_projection"] = tensor.mT
            continue
        kind = next((kind for kind in ("weight", "bias") if key.endswith(f".attn.in_proj_{kind}")), None)
        if kind is None or tensor.ndim == 0 or tensor.shape[0] % 3:
            out[key] = tensor
            continue
        stem = key.removesuffix(f"in_proj_{kind}")
        out |= {f"{stem}{part}.{kind}": third for part, third in zip(PARTS, tensor.chunk(3), strict=True)}
    return out


def want(plan: Plan) -> dict[str, Shape]:
    """Our names and shapes."""
    return shapes(parameters(plan))


def table(plan: Plan, column: int) -> list[Rule]:
    """The rules from a layout to our names; open_clip multiplies by its projection from the other side."""
    if column != OPEN_CLIP:
        return rules(parameters(plan), column, TRANSFORMERS + FLAT - column)
    found = rules(parameters(plan), column)
    return [rule._replace(view=transposed) if rule.name == "projection.weight" else rule for rule in found]


def strays(plan: Plan, column: int) -> list[str]:
    """Constants that older files carry besides the weights."""
    if column == OPEN_CLIP:
        return ["logit_scale", "attn_mask", "position_ids"]
    return ["logit_scale", *(name for name in names(plan, "", "", "embeddings.position_ids")[2:] if name)]

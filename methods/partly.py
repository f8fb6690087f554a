"""A decoder that ends early: what some of its stages make of h, and the attentions on the way."""

from torch import Tensor

from ..model.blocks import Cond, Words
from ..model.ops import Ops, Site
from ..model.unet import Transformer, UNet


def stages(unet: UNet, h: Tensor, skips: list[Tensor], c: Cond, ops: Ops, stop: int) -> Tensor:
    """What the first `stop` stages of the decoder hand on, as `decode` runs them."""
    sizes = [(skip.shape[2], skip.shape[3]) for skip in skips[:-1]]
    for i in range(stop):
        size = sizes.pop() if sizes else None
        h = unet.dec[i](ops.join(Site(f"dec.{i}", 0, "join"), h, skips[-1 - i]), c, ops, size)
    return h


def to_attention(unet: UNet, h: Tensor, skips: list[Tensor], c: Cond, ops: Ops, site: Site) -> None:
    """Run the decoder up to an attention (kind self or cross), the call of `ops.attend` there being the last.

    Raises ValueError for a site that is no attention of the decoder.
    """
    side, _, number = site.stage.partition(".")
    if side != "dec" or site.kind not in ("self", "cross") or c.text is None:
        raise ValueError(f"{site} is no attention of a decoder that reads text")
    last = int(number)
    x = ops.join(Site(site.stage, 0, "join"), stages(unet, h, skips, c, ops, last), skips[-1 - last])
    for module in unet.dec[last]:  # pyright: ignore[reportGeneralTypeIssues]
        if isinstance(module, Transformer):
            inside(module, x, c.text, ops, site)
            return
        x = module(x, c, ops)
    raise ValueError(f"{site} is no attention of this network: {site.stage} has none")


def inside(module: Transformer, x: Tensor, context: Tensor | Words, ops: Ops, site: Site) -> None:
    """The same within a transformer that takes x (B, C, H, W)."""
    y = module.proj_in(module.norm(x, ops).flatten(2).transpose(1, 2))
    for i, block in enumerate(module.blocks):
        if i < site.depth:
            y = block(y, context, ops)
            continue
        z = block.norm1(y)  # pyright: ignore[reportCallIssue]
        if site.kind == "self":
            block.self_attn(z, z, ops)  # pyright: ignore[reportCallIssue]
            return
        y = ops.add(block.self_attn.site, y, block.self_attn(z, z, ops))  # pyright: ignore
        block.cross_attn(block.norm2(y), context, ops)  # pyright: ignore
        return

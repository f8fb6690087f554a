"""One text-conditioned latent UNet: Stable Diffusion XL, its refiner and its inpainting, Stable Diffusion 1 and 2."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Cond, Norm, Stage, Stem, ThreeLists, Up, Words, sinusoid
from .ops import Ops, Site


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280)  # of each level, fine to coarse; the embedding has 4 times the first
    depth: tuple[int, ...] = (0, 2, 10)  # transformer blocks of an attention at each level; 0: no attention
    mid_depth: int = 10  # and in the bottleneck
    plain_mid: bool = False  # the bottleneck is one residual block
    hollow: tuple[int, ...] = ()  # levels of depth 0 with transformers all the same: a norm and two projections
    blocks: int = 2  # residual blocks per level (decoder: one more)
    head_dim: int | None = 64  # channels of a head; None: `heads` heads everywhere
    heads: int = 8
    context_dim: int = 2048  # width of a text token
    pooled_dim: int | None = 1280  # width of the pooled text; None: neither pooled text nor size ids
    ids: int = 6  # numbers of micro-conditioning an image
    id_dim: int = 256  # width of the sinusoid of each
    groups: int = 32

    def __post_init__(self):
        if len(self.depth) != len(self.channels):
            raise ValueError(
                f"depth has {len(self.depth)} levels, channels {len(self.channels)}: give one depth a level"
            )
        if wrong := [level for level in self.hollow if level not in range(len(self.depth)) or self.depth[level]]:
            raise ValueError(f"level {wrong[0]} is hollow where it has depth 0, not {self.depth}")

    @property
    def transformers(self) -> tuple[int | None, ...]:
        """Blocks of the transformers at each level; None where there are none."""
        return tuple(depth if depth or level in self.hollow else None for level, depth in enumerate(self.depth))


SDXL = UNetConfig()  # 2,567,463,684 parameters; ids: height, width, crop top, crop left, target height, target width
SDXL_INPAINT = replace(SDXL, in_channels=9)  # latents, mask, latents of the masked image
SDXL_REFINER = UNetConfig(  # ids: height, width, crop top, crop left, aesthetic score
    channels=(384, 768, 1536, 1536), depth=(0, 4, 4, 0), mid_depth=4, context_dim=1280, ids=5
)
SD15 = UNetConfig(  # 859,520,964 parameters; Stable Diffusion 1.1 to 1.5
    channels=(320, 640, 1280, 1280), depth=(1, 1, 1, 0), mid_depth=1, head_dim=None, context_dim=768, pooled_dim=None
)
SD15_INPAINT = replace(SD15, in_channels=9)
SD21 = replace(SD15, head_dim=64, context_dim=1024)  # 865,910,724 parameters; Stable Diffusion 2.0 and 2.1
SD21_INPAINT = replace(SD21, in_channels=9)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, conv, + shortcut."""

    def __init__(self, cin: int, cout: int, cfg: UNetConfig, stage: str, i: int = 0):
        super().__init__()
        self.norm1 = Norm(cin, Site(stage, 3 * i, "norm"), groups=cfg.groups)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(4 * cfg.channels[0], cout)
        self.norm2 = Norm(cout, Site(stage, 3 * i + 1, "norm"), groups=cfg.groups)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.site = Site(stage, i, "res")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, Cin, H, W) -> (B, Cout, H, W)
        h = self.conv1(self.norm1(x, ops)) + self.emb(F.silu(c.emb))[:, :, None, None]
        return ops.add(self.site, self.skip(x), self.conv2(self.norm2(h, ops)))


class Attention(nn.Module):
    """Attention of pixels to tokens: the pixels themselves, or text."""

    def __init__(self, dim: int, context_dim: int, heads: int, site: Site):
        super().__init__()
        self.split, self.site = (heads, dim // heads), site
        self.q = nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | Words, ops: Ops) -> Tensor:  # (B, N, C), (B, M, D) -> (B, N, C)
        silent = 0
        if isinstance(context, Tensor):
            k, v = self.read(context)
        else:
            (k, v), silent = context.read[f"{self.site.stage}.{self.site.depth}"], context.silent
        y = ops.attend(self.site, self.heads(self.q(x[silent:])), k, v).transpose(1, 2).flatten(2)
        if not silent:
            return self.out(y)
        nothing = self.out(y.new_zeros(silent, 1, y.shape[2]))  # any mean of values that are 0
        return torch.cat([nothing.expand(-1, y.shape[1], -1), self.out(y)])

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values.  (B, M, D) -> 2 x (B, heads, M, C / heads)."""
        return self.heads(self.k(context)), self.heads(self.v(context))

    def heads(self, y: Tensor) -> Tensor:  # (B, N, C) -> (B, heads, N, C / heads)
        return y.view(*y.shape[:2], *self.split).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention, attention to text, a gated feed-forward layer, each over a layer norm and added."""

    def __init__(self, dim: int, heads: int, cfg: UNetConfig, stage: str, depth: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn = Attention(dim, dim, heads, Site(stage, depth, "self"))
        self.cross_attn = Attention(dim, cfg.context_dim, heads, Site(stage, depth, "cross"))
        self.ff_in, self.ff_out, self.ff_site = (
            nn.Linear(dim, 8 * dim),
            nn.Linear(4 * dim, dim),
            Site(stage, depth, "ff"),
        )

    def forward(self, x: Tensor, context: Tensor | Words, ops: Ops) -> Tensor:  # (B, N, C), (B, M, D) -> (B, N, C)
        y = self.norm1(x)
        x = ops.add(self.self_attn.site, x, self.self_attn(y, y, ops))
        x = ops.add(self.cross_attn.site, x, self.cross_attn(self.norm2(x), context, ops))
        return ops.add(self.ff_site, x, self.ff_out(ops.geglu(self.ff_in(self.norm3(x)))))


class Transformer(nn.Module):
    """Transformer blocks over pixels between two projections; 1 x 1 convolutions of older files are such matrices."""

    def __init__(self, dim: int, depth: int, cfg: UNetConfig, stage: str):
        super().__init__()
        heads, rest = divmod(dim, cfg.head_dim) if cfg.head_dim else (cfg.heads, dim % cfg.heads)
        if rest:
            want = f"heads of {cfg.head_dim} channels" if cfg.head_dim else f"{cfg.heads} heads"
            raise ValueError(f"{dim} channels at {stage} do not divide into {want}")
        self.norm = Norm(dim, Site(stage, 2, "norm"), groups=cfg.groups, eps=1e-6, silu=False)
        self.proj_in, self.proj_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, cfg, stage, i) for i in range(depth))
        self.site = Site(stage, 0, "transformer")

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        if c.text is None:
            raise ValueError("the network takes text: c.context is None, where tokens (B, M, C) should be")
        y = self.proj_in(self.norm(x, ops).flatten(2).transpose(1, 2))
        for block in self.blocks:
            y = block(y, c.text, ops)
        return ops.add(self.site, x, self.proj_out(y).transpose(1, 2).unflatten(2, x.shape[2:]))


class Down(nn.Module):
    """Halve the resolution: a strided convolution, padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, c: Cond, ops: Ops) -> Tensor:
        return self.conv(x)


class Conditioned(nn.Module):
    """What the timestep, the pooled text and the size ids become: one embedding, added up."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        base, wide = cfg.channels[0], 4 * cfg.channels[0]
        self.cfg = cfg
        self.time = nn.Sequential(nn.Linear(base, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.vector = None
        if cfg.pooled_dim:
            cin = cfg.pooled_dim + cfg.ids * cfg.id_dim
            self.vector = nn.Sequential(nn.Linear(cin, wide), nn.SiLU(), nn.Linear(wide, wide))

    def embed(self, t: Tensor, context: Tensor, pooled: Tensor | None = None, ids: Tensor | None = None) -> Cond:
        """Timesteps (B,) in [0, 1000), text (B, M, C), pooled text (B, P), ids (B, 6) -> what conditions every block.

        `ids` are pixels, in the order of the configuration.  Pooled text and ids belong together: networks without
        them (Stable Diffusion 1 and 2) take neither.  A ValueError is raised for what is missing, too much or misshapen
        (Podell et al. 2023, section 2.2).
        """
        cfg, b, dtype = self.cfg, t.shape[0], next(self.parameters()).dtype
        if context.ndim != 3 or context.shape[0] != b or context.shape[2] != cfg.context_dim:
            raise ValueError(f"context is ({b}, tokens, {cfg.context_dim}); got {tuple(context.shape)}")
        emb = self.time(sinusoid(t, cfg.channels[0], cos_first=True, last_exponent=False).to(dtype))
        for name, value, width in (("pooled", pooled, cfg.pooled_dim), ("ids", ids, cfg.ids)):
            if self.vector is None and value is not None:
                raise ValueError(f"{name} is for networks of the XL kind; this one takes t and context alone")
            if self.vector is not None and (value is None or tuple(value.shape) != (b, width)):
                raise ValueError(f"{name} is ({b}, {width}); got {None if value is None else tuple(value.shape)}")
        if self.vector is None or pooled is None or ids is None:
            return Cond(emb, context)
        sizes = sinusoid(ids.to(t.device).flatten(), cfg.id_dim, cos_first=True, last_exponent=False)
        return Cond(emb + self.vector(torch.cat([pooled.to(dtype), sizes.view(b, -1).to(dtype)], dim=1)), context)


def words(net: nn.Module, context: Tensor, silent: int = 0) -> Words:
    """What a network reads of a text (B, M, C), once for all timesteps; the first `silent` rows of it are zeros.

    A verb `attend` is then told of the other rows alone, in attention to the text.
    """
    found = [part for part in net.modules() if isinstance(part, Attention) and part.site.kind == "cross"]
    return Words({f"{one.site.stage}.{one.site.depth}": one.read(context[silent:]) for one in found}, silent)


def stage(name: str, cin: int, cout: int, depth: int | None, cfg: UNetConfig) -> Stage:
    """A residual block, and a transformer where there is one."""
    block = ResBlock(cin, cout, cfg, name)
    return Stage([block] if depth is None else [block, Transformer(cout, depth, cfg, name)])


def encoder(cfg: UNetConfig) -> Iterator[tuple[Stage, int]]:
    """The encoder's stages, each with the width of its skip."""
    ch, k = cfg.channels[0], 1
    yield Stage([Stem(cfg.in_channels, ch)]), ch
    for level, (cout, depth) in enumerate(zip(cfg.channels, cfg.transformers, strict=True)):
        for _ in range(cfg.blocks):
            yield stage(f"enc.{k}", ch, cout, depth, cfg), cout
            k, ch = k + 1, cout
        if level < len(cfg.channels) - 1:
            yield Stage([Down(ch)]), ch
            k += 1


def bottleneck(cfg: UNetConfig) -> Stage:
    """A residual block, a transformer, a residual block; without a transformer the first alone."""
    ch = cfg.channels[-1]
    if cfg.plain_mid:
        return Stage([ResBlock(ch, ch, cfg, "mid")])
    transformer = Transformer(ch, cfg.mid_depth, cfg, "mid")
    return Stage([ResBlock(ch, ch, cfg, "mid"), transformer, ResBlock(ch, ch, cfg, "mid", 1)])


class UNet(Conditioned, ThreeLists):  # pyright: ignore[reportIncompatibleMethodOverride]
    """SDXL, x (B, 4, 128, 128): 9 skips, h (B, 1280, 32, 32); SD, x (B, 4, 64, 64): 12 skips, h (B, 1280, 8, 8).

    Other sizes need not halve evenly: n becomes the next integer above n / 2, and n again on the way up.
    """

    def __init__(self, cfg: UNetConfig = SDXL):
        super().__init__(cfg)
        self.in_channels, self.multiple = cfg.in_channels, 1
        stages, emitted = map(list, zip(*encoder(cfg), strict=True))
        self.enc, self.mid = nn.ModuleList(stages), bottleneck(cfg)
        self.dec, ch = nn.ModuleList(), cfg.channels[-1]
        for level, (cout, depth) in reversed(list(enumerate(zip(cfg.channels, cfg.transformers, strict=True)))):
            for i in range(cfg.blocks + 1):
                members = stage(f"dec.{len(self.dec)}", ch + emitted.pop(), cout, depth, cfg)
                ch = cout
                self.dec.append(Stage([*members, Up(ch)]) if level and i == cfg.blocks else members)
        self.norm_out = Norm(ch, Site("out", 0, "norm"), groups=cfg.groups)
        self.conv_out = nn.Conv2d(ch, cfg.out_channels, 3, padding=1)

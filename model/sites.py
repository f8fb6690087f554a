"""Names of places in a text-conditioned UNet: ours, those of the single files (LDM), and those of diffusers."""

import difflib
import re
from typing import Literal, NamedTuple

from .ops import Site
from .unet import UNetConfig

KINDS = {"self": "self", "cross": "cross", "ff": "ff", "attn1": "self", "attn2": "cross"}


class SiteError(ValueError):
    """A name that no place of the network has."""


class Place(NamedTuple):
    """One module between two skips under its three names."""

    ours: str  # "dec.1.1": the stage, then its place in the stage
    ldm: str  # "output_blocks.1.1"
    diffusers: str  # "up_blocks.0.attentions.1"
    kind: str  # stem, res, transformer, down, up

    @property
    def stage(self) -> str:
        """The stage it is in: "dec.1"."""
        return self.ours.rpartition(".")[0]


def places(cfg: UNetConfig) -> list[Place]:
    """Every module of a UNet, in order of execution."""
    last, n = len(cfg.channels) - 1, cfg.blocks
    out = [Place("enc.0.0", "input_blocks.0.0", "conv_in", "stem")]

    def pair(side: str, k: int, depth: int | None, block: str, i: int) -> list[Place]:
        ours, ldm = f"{side}.{k}", f"{'input' if side == 'enc' else 'output'}_blocks.{k}"
        both = [Place(f"{ours}.0", f"{ldm}.0", f"{block}.resnets.{i}", "res")]
        if depth is None:
            return both
        return [*both, Place(f"{ours}.1", f"{ldm}.1", f"{block}.attentions.{i}", "transformer")]

    for level, depth in enumerate(cfg.transformers):
        first, block = 1 + level * (n + 1), f"down_blocks.{level}"
        for i in range(n):
            out += pair("enc", first + i, depth, block, i)
        if level < last:
            down = f"{first + n}.0"
            out.append(Place(f"enc.{down}", f"input_blocks.{down}", f"{block}.downsamplers.0", "down"))
    middle = (("resnets.0", "res"), ("attentions.0", "transformer"), ("resnets.1", "res"))
    for i, (name, kind) in enumerate(middle[:1] if cfg.plain_mid else middle):
        out.append(Place(f"mid.{i}", f"middle_block.{i}", f"mid_block.{name}", kind))
    for block, depth in enumerate(reversed(cfg.transformers)):
        for i in range(n + 1):
            out += pair("dec", block * (n + 1) + i, depth, f"up_blocks.{block}", i)
        if block < last:
            up = f"{block * (n + 1) + n}.{1 if depth is None else 2}"
            out.append(Place(f"dec.{up}", f"output_blocks.{up}", f"up_blocks.{block}.upsamplers.0", "up"))
    return out


def place(cfg: UNetConfig, name: str) -> Place:
    """The module that any of the three names means.  Raises SiteError for a name that none has."""
    known = {spelled: p for p in places(cfg) for spelled in p[:3]}
    if name not in known:
        raise unknown(name, known)
    return known[name]


def stage(cfg: UNetConfig, name: str) -> str:
    """The stage ("enc.8", "mid", "dec.1") that a name means: of a stage or of a module in it, in any of the spellings.

    Raises SiteError for a name that none has.
    """
    known = {spelled: p.stage for p in places(cfg) for spelled in p[:3]}
    known |= {spelled.rpartition(".")[0]: p.stage for p in places(cfg) for spelled in p[:2]}
    known |= {"mid_block": "mid"}
    if name not in known:
        raise unknown(name, known)
    return known[name]


def site(cfg: UNetConfig, name: str) -> Site:
    """The site of a verb in a transformer: "up_blocks.0.attentions.1.transformer_blocks.3.attn2" or "dec.1.1.3.cross".

    Kinds are self, cross, ff, or attn1, attn2, ff.  Raises SiteError for a name that none has.
    """
    m = re.fullmatch(r"(.+?)\.(?:transformer_blocks\.|blocks\.)?(\d+)\.(\w+)", name, re.ASCII)
    if m is None or m[3] not in KINDS:
        raise SiteError(f"{name} is no site in a transformer: one is dec.1.1.3.cross (module, block, kind)")
    found = place(cfg, m[1])
    count = cfg.mid_depth if found.stage == "mid" else cfg.depth[level(cfg, found.stage)]
    count = count if found.kind == "transformer" else 0
    if int(m[2]) >= count:
        raise SiteError(f"there is no {name}: {m[1]} has {count} transformer blocks")
    return Site(found.stage, int(m[2]), KINDS[m[3]])


def level(cfg: UNetConfig, name: str) -> int:
    """The level of a stage, 0 the finest."""
    side, _, k = name.partition(".")
    per, last = cfg.blocks + 1, len(cfg.channels) - 1
    return last if side == "mid" else max(int(k) - 1, 0) // per if side == "enc" else last - int(k) // per


def spelled(cfg: UNetConfig, name: str, spelling: Literal["ours", "ldm", "diffusers"]) -> str:
    """A module's name in another spelling.  Raises SiteError for a name that no module has."""
    return getattr(place(cfg, name), spelling)


def unknown(name: str, known: dict) -> SiteError:
    """The error about a name, with the nearest that exists."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"the nearest is {near[0]}" if near else "they look like dec.1, output_blocks.1.1 or up_blocks.0.attentions.1"
    )
    return SiteError(f"there is no {name} in this network: {hint}")

"""How much of an image prompt at each attention to text: presets, places in three spellings, nested settings."""

from collections.abc import Mapping

from ..model.image_prompt import text_sites
from ..model.ops import Site
from ..model.sites import Place, SiteError, place, places, site, stage, unknown
from ..model.unet import UNetConfig

Scales = dict[Site, float | tuple[float, ...]]  # several numbers: one for each picture of an adapter that has masks
PRESETS = ("style", "layout", "style+layout", "all")
# InstantStyle's blocks (Wang et al. 2024) of SDXL, and those its authors name for Stable Diffusion 1
XL = {"style": ["up_blocks.0.attentions.1"], "layout": ["down_blocks.2.attentions.1"]}
SD = {"style": ["up_blocks.1"], "layout": ["down_blocks.2", "mid_block"]}


def scales(cfg: UNetConfig, value: object = "style") -> Scales:
    """What is said of places, as a number at each attention to text; what is not named has 0 and is left out.

    `value` is one of
    - a preset: style, layout, style+layout, all;
    - a number, for all;
    - names and numbers: of a stage, module or single attention in any spelling ("dec.1", "output_blocks.1.1",
      "up_blocks.0.attentions.1", "dec.1.1.3.cross"), of a whole block ("up_blocks.0"), of a preset; what comes later
      holds where two name the same;
    - diffusers' nested form, {"down": {"block_2": [0, 1]}, "mid": 0.5, "up": {"block_0": [0, 1, 0]}}.
    In place of a number a list says one for each picture of an adapter with masks.  SiteError: a name that no place
    has, or a place without attention to text.  ValueError: what is no number, or a list of another length.
    """
    everywhere = [found for found, _ in text_sites(cfg)]
    if isinstance(value, str):
        return dict.fromkeys(named(cfg, value), 1.0)
    if not isinstance(value, Mapping):
        return kept(dict.fromkeys(everywhere, number(value, "the scale")))
    if value and set(value) <= {"down", "mid", "up"}:
        return kept(nested(cfg, value))
    out: Scales = {}
    for name, what in value.items():
        out |= dict.fromkeys(named(cfg, str(name)), number(what, str(name)))
    return kept(out)


def kept(found: Scales) -> Scales:
    """Without zeros."""
    return {at: n for at, n in found.items() if any(n if isinstance(n, tuple) else (n,))}


def number(value: object, name: str) -> float | tuple[float, ...]:
    """A number, or one for each picture.  Raises ValueError."""
    if isinstance(value, list | tuple) and value and all(isinstance(number(v, name), float) for v in value):
        return tuple(float(v) for v in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e4 <= value <= 1e4:
        raise ValueError(f"{name}: a scale is a number, or a list of one for each picture; got {value!r}")
    return float(value)


def preset(cfg: UNetConfig, name: str) -> list[str]:
    """The places of style or layout.  Raises SiteError for networks of which none are published."""
    known = (XL if len(cfg.channels) == 3 else {}) if cfg.pooled_dim else SD if len(cfg.channels) == 4 else {}
    names = {spelled for p in places(cfg) for spelled in (p.diffusers, p.diffusers.split(".attentions")[0])}
    if name not in known or not set(known[name]) <= names:
        raise SiteError(f"no blocks of {name} are published for this network: name places, as in dec.1=1.0")
    return known[name]


def named(cfg: UNetConfig, name: str) -> list[Site]:
    """The attentions to text at a place, or of a preset.  Raises SiteError."""
    sites = [found for found, _ in text_sites(cfg)]
    if name == "all":
        return sites
    if name in PRESETS:
        return [found for part in name.split("+") for at in preset(cfg, part) for found in named(cfg, at)]
    found = places(cfg)
    block = [p for p in found if p.diffusers.startswith(f"{name}.attentions.") and p.kind == "transformer"]
    if not block and any(p.diffusers.startswith(f"{name}.resnets.") for p in found):
        raise barren(cfg, name)
    if block or any(name in p[:3] for p in found):
        kinds = block or [p for p in [place(cfg, name)] if p.kind == "transformer"]
        if here := [at for p in kinds for at in sites if at.stage == p.stage]:
            return here
        raise barren(cfg, name)
    try:
        one = site(cfg, name)
    except SiteError:
        one = None
    if one is not None:
        if one.kind != "cross":
            raise SiteError(f"{name} is not an attention to text, which image prompts are added to")
        return [one]
    try:
        here = [found for found in sites if found.stage == stage(cfg, name)]
    except SiteError as e:
        near = {spelled: p for p in found for spelled in (*p[:3], p.stage)} | dict.fromkeys(PRESETS)
        raise unknown(name, near) from e
    if not here:
        raise barren(cfg, name)
    return here


def barren(cfg: UNetConfig, name: str) -> SiteError:
    """The error about a place without attention to text."""
    having = ", ".join(dict.fromkeys(at.stage for at, _ in text_sites(cfg)))
    return SiteError(f"{name} has no attention to text: {having} have")


def nested(cfg: UNetConfig, value: Mapping[object, object]) -> Scales:
    """diffusers' form: side, block, attention; a list of one is for all of a block."""
    found: Scales = {}
    for side, said in value.items():
        if side == "mid":
            one = said[0] if isinstance(said, list | tuple) and len(said) == 1 else said
            found |= dict.fromkeys(named(cfg, "mid_block"), number(one, "mid"))
            continue
        blocks: dict[str, list[Place]] = {}
        for p in places(cfg):
            if p.kind == "transformer" and p.diffusers.startswith(f"{side}_blocks."):
                blocks.setdefault(f"block_{p.diffusers.split('.')[1]}", []).append(p)
        inside = said if isinstance(said, Mapping) else dict.fromkeys(blocks, said)
        for block, numbers in inside.items():
            if block not in blocks:
                raise SiteError(f"{side} has no {block} with attention to text: it has {', '.join(blocks)}")
            here = blocks[str(block)]
            each = numbers if isinstance(numbers, list | tuple) else [numbers]
            each = list(each) * len(here) if len(each) == 1 else each
            if len(each) != len(here):
                raise ValueError(f"{side}.{block} has {len(here)} attentions; got {len(each)} numbers")
            for p, n in zip(here, each, strict=True):
                found |= dict.fromkeys(named(cfg, p.diffusers), number(n, f"{side}.{block}"))
    return found

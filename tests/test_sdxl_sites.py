"""Names of places in a text-conditioned UNet: three spellings, one place."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diaphane.model import sites, unet
from diaphane.model.ops import Site
from torch import nn

from .latent_twins import CONFIGS, diffusers_unet

KINDS = {
    unet.Stem: "stem",
    unet.ResBlock: "res",
    unet.Transformer: "transformer",
    unet.Down: "down",
    unet.Up: "up",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_has_a_place_with_its_kind_and_diffusers_has_one_of_that_name(name: str):
    cfg = CONFIGS[name]
    with torch.device("meta"):
        net, twin = unet.UNet(cfg), dict(diffusers_unet(cfg).named_modules())
    table = sites.places(cfg)
    modules: dict[str, nn.Module] = dict(net.named_modules())
    stages = [name for name, module in modules.items() if isinstance(module, unet.Stage)]
    members = {f"{stage}.{i}" for stage in stages for i in range(len(modules[stage]))}  # type: ignore[arg-type]
    assert {p.ours for p in table} == members
    for p in table:
        assert KINDS[type(modules[p.ours])] == p.kind
        ours, theirs = (sum(q.numel() for q in m.parameters()) for m in (modules[p.ours], twin[p.diffusers]))
        assert ours == theirs
    assert len({name for p in table for name in p[:3]}) == 3 * len(table)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("up_blocks.0.attentions.1", "dec.1"),  # InstantStyle's style
        ("output_blocks.1.1", "dec.1"),
        ("down_blocks.2.attentions.1", "enc.8"),  # and its layout
        ("input_blocks.8.1", "enc.8"),
        ("enc.8.1", "enc.8"),
        ("enc.8", "enc.8"),
        ("input_blocks.8", "enc.8"),
        ("mid_block", "mid"),
        ("mid_block.attentions.0", "mid"),
        ("middle_block", "mid"),
        ("mid", "mid"),
        ("conv_in", "enc.0"),
        ("down_blocks.1.downsamplers.0", "enc.6"),
        ("output_blocks.5.2", "dec.5"),
        ("up_blocks.1.upsamplers.0", "dec.5"),
    ],
)
def test_a_stage_of_sdxl_is_found_by_any_of_its_names(name: str, stage: str):
    assert sites.stage(unet.SDXL, name) == stage


def test_every_spelling_leads_to_every_other():
    for cfg in (unet.SDXL, unet.SDXL_REFINER, unet.SD15):
        for p in sites.places(cfg):
            for name in p[:3]:
                assert sites.place(cfg, name) == p
                assert sites.spelled(cfg, name, "ldm") == p.ldm
                assert sites.spelled(cfg, name, "diffusers") == p.diffusers
                assert sites.stage(cfg, name) == p.stage


def test_a_site_inside_a_transformer_is_found_by_any_of_its_names():
    want = Site("dec.1", 9, "cross")
    for name in (
        "up_blocks.0.attentions.1.transformer_blocks.9.attn2",
        "output_blocks.1.1.transformer_blocks.9.attn2",
        "dec.1.1.9.cross",
    ):
        assert sites.site(unet.SDXL, name) == want
    assert sites.site(unet.SDXL, "mid_block.attentions.0.transformer_blocks.0.ff") == Site("mid", 0, "ff")
    assert sites.site(unet.SD15, "middle_block.1.transformer_blocks.0.attn1") == Site("mid", 0, "self")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("up_blocks.0.attention.1", "no up_blocks.0.attention.1 .* nearest is up_blocks.0.attentions.1"),
        ("up_blocks.2.attentions.0", "no up_blocks.2.attentions.0"),  # that level of SDXL has no attention
        ("enc.9", "no enc.9"),
        ("", "no  in this network: they look like"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_it_and_the_nearest(name: str, what: str):
    for find in (sites.stage, sites.place):
        with pytest.raises(sites.SiteError, match=what):
            find(unet.SDXL, name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("dec.1.1.10.cross", "dec.1.1 has 10 transformer blocks"),
        ("dec.1.0.0.cross", "dec.1.0 has 0 transformer blocks"),
        ("dec.1.1.0.attn3", "no site in a transformer"),
        ("dec.1.1", "no site in a transformer"),
        ("dec.9.1.0.cross", "there is no dec.9.1"),
    ],
)
def test_an_unknown_site_is_an_error_that_says_what_there_is(name: str, what: str):
    with pytest.raises(sites.SiteError, match=what):
        sites.site(unet.SDXL, name)


NATIVE = {"SDXL": 1024, "SDXL_REFINER": 1024, "SD15": 512, "SD21": 768}


def rows(name: str) -> Iterator[str]:
    """The lines of a configuration's table in docs/sites.md."""
    cfg: unet.UNetConfig = getattr(unet, name)
    side = NATIVE[name] // 8
    with torch.device("meta"):
        net = unet.UNet(cfg)
        more = (torch.empty(1, cfg.pooled_dim), torch.empty(1, cfg.ids)) if cfg.pooled_dim else ()
        c = net.embed(torch.empty(1), torch.empty(1, 77, cfg.context_dim), *more)
        h, skips = net.encode(torch.empty(1, cfg.in_channels, side, side), c)
        space = net.middle(h, c)

    def row(stage: str, says: str) -> str:
        here = [p for p in sites.places(cfg) if p.stage == stage]
        depth = cfg.mid_depth if stage == "mid" else cfg.depth[sites.level(cfg, stage)]
        kinds = " + ".join(f"{p.kind} × {depth}" if p.kind == "transformer" else p.kind for p in here)
        theirs = ", ".join(f"`{p.diffusers}`" for p in here)
        return f"| `{stage}` | {kinds} | {says} | `{here[0].ldm.rpartition('.')[0]}` | {theirs} |"

    def shape(x: torch.Tensor) -> str:
        return "×".join(map(str, x.shape[1:]))

    last = len(skips) - 1
    for i, skip in enumerate(skips):
        yield row(f"enc.{i}", f"skip {shape(skip)} for `dec.{last - i}`")
    yield row("mid", f"**h** {shape(space)}")
    for i in range(last + 1):
        yield row(f"dec.{i}", f"takes that of `enc.{last - i}`")


@pytest.mark.parametrize("name", NATIVE)
def test_the_table_in_the_docs_is_the_network(name: str):
    text = (Path(__file__).parent.parent / "docs" / "sites.md").read_text()
    section = next(part for part in text.split("\n## ") if f"(`{name}`)" in part.splitlines()[0])
    assert [line for line in section.splitlines() if line.startswith("| `")] == list(rows(name))

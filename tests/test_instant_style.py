"""InstantStyle on the tiny model: null settings, definitions, places, masks, ranges, gradients, one graph, refusals."""

import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.instant_style import (
    ImagePrompt,
    Pictures,
    Term,
    averaged,
    content,
    features,
    image_prompt,
    instant_style,
    ranged,
    subtracted,
)
from diaphane.methods.probe import blocks, looking, relative, spread
from diaphane.methods.prompt import encode, size_ids
from diaphane.methods.scales import scales
from diaphane.model.blocks import Cond
from diaphane.model.image_prompt import IPAdapter, IPAdapterConfig, text_sites, widths
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.sites import SiteError
from diaphane.model.unet import SD15, SDXL, SDXL_REFINER, Attention, UNet, UNetConfig
from diaphane.samplers.euler import euler
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from PIL import Image
from torch import Tensor

from .golden_image_prompt import LINEAR, LINEAR_H, PLUS, adapter
from .golden_instantstyle import tower
from .golden_latent import TINY, parts

DOCS = Path(__file__).parent.parent / "docs" / "instant_style.md"
CFG = parts().unet.cfg
LINES = Site("dec.1", 0, "cross")


@cache
def pictures(batch: int = 1, images: int = 1, file: str = LINEAR) -> Pictures:
    """Tokens of random embeddings, and of none."""
    g, net = torch.Generator().manual_seed(3), adapter(file)
    return Pictures(
        torch.stack([net(torch.randn(images, net.cfg.reads, generator=g)) for _ in range(batch)]),
        net(torch.zeros(1, net.cfg.reads))[None].expand(batch, -1, -1, -1),
    )


def prompted(scale: object = "all", batch: int = 1, images: int = 1, file: str = LINEAR, **more) -> ImagePrompt:
    return image_prompt(adapter(file), CFG, pictures(batch, images, file), scales(CFG, scale), **more)


@cache
def inputs(rows: int, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Cond]:
    """x and what conditions a batch."""
    g = torch.Generator().manual_seed(5)
    x, context = torch.randn(rows, 4, *size, generator=g), torch.randn(rows, 7, CFG.context_dim, generator=g)
    pooled = torch.randn(rows, CFG.pooled_dim or 0, generator=g)
    with torch.no_grad():
        return x, parts().unet.embed(torch.full((rows,), 601), context, pooled, size_ids((64, 64), rows))


def eps(*prompts: ImagePrompt, rows: int = 2, size: tuple[int, int] = (8, 8)) -> Tensor:
    x, c = inputs(rows, size)
    return parts().unet(x, c, instant_style(TORCH, prompts))


# null settings


def test_scale_0_is_the_network_without_an_adapter_bit_for_bit():
    x, c = inputs(2)
    assert instant_style(TORCH, [prompted(0.0), prompted({"dec.1": 0, "mid": [0.0]})]) is TORCH
    plain = parts().unet(x, c)
    assert torch.equal(eps(prompted(0.0)), plain)
    assert not torch.allclose(eps(prompted(0.5)), plain, atol=0.01)


def test_a_picture_of_strength_0_is_as_without_and_its_neighbour_is_not():
    plain = eps(rows=4)
    some = eps(prompted(batch=2, strength=torch.tensor([0.0, 1.0])), rows=4)
    whole = eps(prompted(batch=2), rows=4)
    assert torch.allclose(some[[0, 2]], plain[[0, 2]], atol=2e-6)
    assert torch.allclose(some[[1, 3]], whole[[1, 3]], atol=2e-6)
    assert not torch.allclose(whole[[0, 2]], plain[[0, 2]], atol=0.01)


def test_black_masks_are_the_network_without_an_adapter():
    masks = torch.zeros(1, 2, 64, 64)
    assert torch.allclose(eps(prompted(images=2, masks=masks, size=(8, 8))), eps(), atol=1e-6)


# definitions


def test_an_attention_is_that_to_text_plus_lambda_times_that_to_the_picture():
    net, g = deepcopy(adapter(LINEAR)).double(), torch.Generator().manual_seed(0)
    attn = Attention(96, CFG.context_dim, 6, LINES).double()
    y, text = (torch.randn(4, n, d, generator=g, dtype=torch.float64) for n, d in ((9, 96), (5, CFG.context_dim)))
    seen = Pictures(*(torch.randn(2, n, 4, CFG.context_dim, generator=g, dtype=torch.float64) for n in (3, 1)))
    prompt = image_prompt(net, CFG, seen, scales(CFG, {"dec.1": 0.7}))
    index = [site for site, _ in text_sites(CFG)].index(LINES)
    got = attn(y, text, instant_style(TORCH, [prompt]))
    q, k, v = attn.q(y), attn.k(text), attn.v(text)
    tokens = torch.cat([seen.nothing.expand(-1, 3, -1, -1), seen.tokens]).flatten(1, 2)
    rows = []
    for i in range(4):
        heads = []
        for h in range(attn.split[0]):
            cut = slice(16 * h, 16 * (h + 1))
            own = (q[i, :, cut] @ k[i, :, cut].T / 4).softmax(-1) @ v[i, :, cut]
            ki, vi = (m[index](tokens[i])[:, cut] for m in (net.k, net.v))
            heads.append(own + 0.7 * (q[i, :, cut] @ ki.T / 4).softmax(-1) @ vi)
        rows.append(attn.out(torch.cat(heads, -1)))
    assert torch.allclose(got, torch.stack(rows), atol=1e-12)


def test_without_guidance_the_rows_are_those_of_the_pictures():
    one = prompted(batch=2)
    x, c = inputs(4)
    both = parts().unet(x, c, instant_style(TORCH, [one]))
    half = Cond(c.emb[2:], c.context[2:] if c.context is not None else None)
    alone = parts().unet(x[2:], half, instant_style(TORCH, [one]))
    assert torch.allclose(alone, both[2:], atol=1e-5)


def test_a_batch_draws_each_picture_as_alone():
    several = prompted(batch=3)
    one = Pictures(*(t[1:2] for t in pictures(3)))
    alone = image_prompt(adapter(LINEAR), CFG, one, scales(CFG, "all"))
    x, c = inputs(6)
    both = Cond(c.emb[[1, 4]], c.context[[1, 4]] if c.context is not None else None)
    got = parts().unet(x[[1, 4]], both, instant_style(TORCH, [alone]))
    assert torch.allclose(got, eps(several, rows=6)[[1, 4]], atol=1e-5)
    assert torch.equal(pictures(1).repeated(2).tokens[0], pictures(1).tokens[0])


def test_several_adapters_are_separate_terms_and_their_order_does_not_matter():
    a, b = prompted("style"), prompted({"dec.1": 0.5, "enc.8": 1}, file=LINEAR_H)
    assert torch.allclose(eps(a, b), eps(b, a), atol=1e-5)
    assert not torch.allclose(eps(a, b), eps(a), atol=1e-3)


def test_a_mask_of_ones_is_no_mask_and_complementary_masks_divide_the_picture():
    one = torch.ones(1, 1, 64, 64)
    assert torch.allclose(eps(prompted(masks=one, size=(8, 8))), eps(prompted()), atol=1e-5)
    made = pictures(1, 2)
    twice = Pictures(made.tokens[:, :1].expand(-1, 2, -1, -1), made.nothing)
    left = torch.cat([torch.ones(1, 1, 64, 32), torch.zeros(1, 1, 64, 32)], dim=3)
    halves = image_prompt(adapter(LINEAR), CFG, twice, scales(CFG, "all"), masks=torch.cat([left, 1 - left], 1),
                          size=(8, 8))  # fmt: skip
    assert torch.allclose(eps(halves), eps(image_prompt(adapter(LINEAR), CFG, made._replace(
        tokens=made.tokens[:, :1]), scales(CFG, "all"))), atol=1e-5)  # fmt: skip


def test_masks_of_each_picture_of_a_batch_and_numbers_of_each_image_are_heeded():
    masks = torch.rand(2, 2, 64, 64, generator=torch.Generator().manual_seed(1)).round()
    both = eps(prompted({"all": [1.0, 0.5]}, 2, 2, masks=masks, size=(8, 8)), rows=4)
    one = Pictures(*(t[1:] for t in pictures(2, 2)))
    alone = image_prompt(adapter(LINEAR), CFG, one, scales(CFG, {"all": [1.0, 0.5]}), masks=masks[1:], size=(8, 8))
    x, c = inputs(4)
    rows = Cond(c.emb[[1, 3]], c.context[[1, 3]] if c.context is not None else None)
    assert torch.allclose(parts().unet(x[[1, 3]], rows, instant_style(TORCH, [alone])), both[[1, 3]], atol=1e-5)


def test_masks_fit_sizes_that_do_not_halve_evenly():
    size = (6, 10)
    masks = torch.ones(1, 1, 48, 80)
    want = eps(prompted(), size=size)
    assert torch.allclose(eps(prompted(masks=masks, size=size), size=size), want, atol=1e-5)


# what a picture says


def test_features_are_the_embedding_for_linear_and_the_states_for_plus_adapters():
    g, vit = torch.Generator().manual_seed(2), tower("image_encoder_vit_h")
    pixels = torch.randn(2, 3, vit.cfg.size, vit.cfg.size, generator=g)
    seen = vit(pixels)
    assert torch.equal(features(adapter(LINEAR_H), vit, pixels), seen.pooled)
    assert torch.equal(features(adapter(PLUS), vit, pixels), seen.hidden[-2])
    assert not adapter(LINEAR_H).nothing(vit).any()
    assert torch.equal(adapter(PLUS).nothing(vit), vit(torch.zeros_like(pixels[:1])).hidden[-2])


def test_the_mean_of_one_picture_is_itself_and_weights_choose():
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(averaged(states[:1]), states[:1])
    assert torch.allclose(averaged(states, [0, 2, 0]), states[1:2])
    assert torch.allclose(averaged(states), states.mean(0, keepdim=True))
    with pytest.raises(ValueError, match="weights are 3, one a picture"):
        averaged(states, [1, -1, 0])


def test_subtraction_takes_weighted_texts_out_and_weight_0_changes_nothing():
    e = torch.randn(2, adapter(LINEAR).cfg.reads, generator=torch.Generator().manual_seed(0))
    text = encode(parts(), "a rabbit").pooled
    assert text is not None
    assert torch.equal(subtracted(adapter(LINEAR), e, [(text, 0.0)]), e)
    assert torch.allclose(subtracted(adapter(LINEAR), e, [(text, 0.5), (text, 0.25)]), e - 0.75 * text, atol=1e-6)
    same = content(parts().towers[-1], parts().tokenizers[-1], "a rabbit")
    assert torch.allclose(same, text)


def test_texts_are_subtracted_from_embeddings_of_their_own_clip_only():
    text = torch.zeros(1, 40)
    with pytest.raises(ValueError, match="the text's embedding has 40 numbers, the picture's 24"):
        subtracted(adapter(LINEAR_H), torch.zeros(1, 24), [(text, 0.5)])
    with pytest.raises(ValueError, match="plus adapter reads states of patches"):
        subtracted(adapter(PLUS), torch.zeros(1, 17, 32), [(text, 0.5)])
    with pytest.raises(ValueError, match="no projection into the space of pictures"):
        content(parts().towers[0], parts().tokenizers[0], "a rabbit")


# places


def test_a_place_in_any_spelling_is_the_same_place():
    style = scales(CFG, "style")
    assert set(style) == {Site("dec.1", i, "cross") for i in range(3)}
    for name in ("dec.1", "dec.1.1", "output_blocks.1", "output_blocks.1.1", "up_blocks.0.attentions.1"):
        assert scales(CFG, {name: 1}) == style
    assert scales(CFG, {"up": {"block_0": [0.0, 1.0, 0.0]}}) == style
    one = {Site("dec.1", 2, "cross"): 0.5}
    for name in ("dec.1.1.2.cross", "up_blocks.0.attentions.1.transformer_blocks.2.attn2"):
        assert scales(CFG, {name: 0.5}) == one
    assert scales(CFG, {"style": 1.0, "dec.1": 0.5}) == dict.fromkeys(style, 0.5)  # the later one holds


def test_presets_are_the_published_blocks():
    both = scales(SDXL, "style+layout")
    assert both == scales(SDXL, {"down": {"block_2": [0, 1]}, "up": {"block_0": [0, 1, 0]}})
    assert set(both) == {Site(stage, i, "cross") for stage in ("dec.1", "enc.8") for i in range(10)}
    assert scales(SD15, "style") == scales(SD15, {"up_blocks.1": 1.0})
    assert {site.stage for site in scales(SD15, "layout")} == {"enc.7", "enc.8", "mid"}
    assert len(scales(SDXL, "all")) == 70
    assert scales(SDXL, 0.25) == dict.fromkeys(scales(SDXL, "all"), 0.25)
    with pytest.raises(SiteError, match="no blocks of style are published for this network"):
        scales(SDXL_REFINER, "style")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"dec.11": 1}, "there is no dec.11 in this network: the nearest is dec.1"),
        ("stile", "there is no stile in this network: the nearest is style"),
        ({"enc.0": 1}, "enc.0 has no attention to text: enc.4, enc.5"),
        ({"up_blocks.2": 1}, "up_blocks.2 has no attention to text"),
        ({"down_blocks.1.resnets.0": 1}, "has no attention to text"),
        ({"dec.1.1.2.self": 1}, "is not an attention to text"),
        ({"dec.1.1.9.cross": 1}, "there is no dec.1.1.9.cross"),
        ({"up": {"block_2": 1}}, "up has no block_2 with attention to text: it has block_0, block_1"),
        ({"up": {"blok_0": 1}}, "up has no blok_0"),
        ({"up": {"block_0": [0, 1]}}, "up.block_0 has 3 attentions; got 2 numbers"),
        ({"dec.1": "much"}, "a scale is a number"),
        ({"dec.1": True}, "a scale is a number"),
        (float("nan"), "a scale is a number"),
        ([], "a scale is a number"),
    ],
)
def test_what_is_no_place_or_no_number_is_refused_by_its_name(said: object, why: str):
    with pytest.raises(ValueError, match=why):
        scales(CFG, said)


def test_keys_and_values_are_made_for_the_places_in_use_alone():
    assert set(prompted("style").terms) == set(scales(CFG, "style"))
    assert len(prompted("all").terms) == len(text_sites(CFG)) == 28


# stacking


def test_the_text_attention_gets_every_argument_and_the_pictures_is_of_a_kind_of_its_own():
    heard = []

    def attend(site, q, k, v, bias=None, seen=None):
        heard.append((site, k.shape[2], bias, seen))
        return TORCH.attend(site, q, k, v)

    q = torch.randn(2, 6, 5, 16)
    bias, seen = object(), object()
    ops = instant_style(replace(TORCH, attend=attend), [prompted("style")])
    ops.attend(LINES, q, q, q, bias, seen)
    ops.attend(LINES._replace(kind="self"), q, q, q, bias, seen=seen)
    assert heard == [
        (LINES, 5, bias, seen),
        (LINES._replace(kind="image"), 4, None, None),
        (LINES._replace(kind="self"), 5, bias, seen),
    ]
    assert (ops.group_norm, ops.geglu, ops.join, ops.add) == (TORCH.group_norm, TORCH.geglu, TORCH.join, TORCH.add)


# walks


def denoiser(ops: Ops = TORCH):
    positive, negative = encode(parts(), "a cat"), encode(parts(), "low")
    return t2i.denoiser(parts().unet, positive, negative, schedule=scaled_linear(), ids=size_ids((64, 64)), ops=ops)


def test_a_range_is_on_at_its_timesteps_and_off_at_others_bit_for_bit():
    first, second = prompted("style", first=700, last=400), prompted("layout", last=600)
    denoise = ranged(denoiser, TORCH, [first, second])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, on in ((801, [second]), (601, [first, second]), (600, [first, second]), (401, [first]), (201, [])):
        want = denoiser(instant_style(TORCH, [replace(p, first=None, last=None) for p in on]))
        time = torch.tensor([t])
        assert torch.equal(denoise(x, time), want(x, time)), t


def test_a_guided_step_compiles_to_one_graph_and_steps_with_and_without_a_picture_to_two():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    cfg = UNetConfig(channels=(8, 16), depth=(0, 1), mid_depth=1, blocks=1, head_dim=8, context_dim=12, pooled_dim=6,
                     id_dim=2, groups=4)  # fmt: skip
    torch.manual_seed(0)
    unet, net = UNet(cfg).eval(), IPAdapter(IPAdapterConfig(reads=5, context_dim=12, sites=widths(cfg))).eval()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 12)
    seen = Pictures(net(torch.randn(2, 5))[None], net(torch.zeros(1, 5))[None])
    masks = {"masks": torch.ones(1, 2, 64, 64), "size": (8, 8)}
    prompts = [image_prompt(net, cfg, seen, scales(cfg, "all")),
               image_prompt(net, cfg, seen, scales(cfg, {"all": [0.5, 1]}), **masks),
               image_prompt(net, cfg, seen, scales(cfg, {"mid": 1}), strength=torch.tensor([0.5]))]  # fmt: skip
    ops = instant_style(TORCH, prompts)

    def predict(x: Tensor, t: Tensor, ops: Ops) -> Tensor:
        return unet(x, unet.embed(t, context, torch.ones(2, 6), size_ids((64, 64), 2)), ops)

    torch.compiler.reset()
    step = torch.compile(predict, fullgraph=True, backend=count)
    with torch.no_grad():
        for t in (801, 601, 401):
            time = torch.full((2,), t)
            assert torch.allclose(step(x, time, ops), predict(x, time, ops), atol=1e-5)
        assert len(graphs) == 1
        for verbs in (TORCH, ops, TORCH, ops):
            assert torch.allclose(step(x, time, verbs), predict(x, time, verbs), atol=1e-5)
    assert len(graphs) == 2
    torch.compiler.reset()


def test_gradients_reach_a_picture_through_a_walk():
    e = torch.randn(1, adapter(LINEAR).cfg.reads, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = Pictures(adapter(LINEAR)(e)[None], adapter(LINEAR)(torch.zeros_like(e))[None])
    ops = instant_style(TORCH, [image_prompt(adapter(LINEAR), CFG, seen, scales(CFG, "style"))])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    *_, last = euler(denoiser(ops), x, scaled_linear(), leading(2, offset=1))
    last.x.square().sum().backward()
    assert e.grad is not None
    assert float(e.grad.abs().min()) > 0


def test_half_precision_is_the_same_up_to_its_rounding():
    unet, net = UNet(CFG).eval(), adapter(LINEAR)
    unet.load_state_dict(parts().unet.state_dict())
    unet, x, c = unet.bfloat16(), *inputs(2)
    half = Cond(c.emb.bfloat16(), c.context.bfloat16() if c.context is not None else None)
    low = IPAdapter(net.cfg)
    low.load_state_dict(net.state_dict())
    for one in (net, low.bfloat16()):
        prompt = image_prompt(one, CFG, pictures(), scales(CFG, "all"))
        with torch.no_grad():
            got = unet(x.bfloat16(), half, instant_style(TORCH, [prompt]))
        assert got.dtype == torch.bfloat16
        want = eps(prompted())
        assert float((got.float() - want).norm() / want.norm()) < 0.05


# refusals


def test_an_adapter_of_another_network_or_another_encoder_is_refused_by_what_fits():
    sdxl = IPAdapterConfig(sites=widths(SDXL))
    with torch.device("meta"):
        net, small = IPAdapter(sdxl), IPAdapter(replace(sdxl, context_dim=768, sites=widths(SD15)))
        plus, other = IPAdapter(replace(sdxl, kind="plus", tokens=16)), IPAdapter(replace(sdxl, sites=widths(SD15)))
    net.fits(SDXL)
    small.fits(SD15)
    with pytest.raises(ValueError, match=r"tokens are 768 wide, the UNet reads 2048: it is for Stable Diffusion 1$"):
        small.fits(SDXL)
    with pytest.raises(ValueError, match=r"of 16 attentions \(2 x 320.*\), the UNet has 70 \(4 x 640, 50 x 1280"):
        other.fits(SDXL)
    with pytest.raises(ValueError, match=r"reads embeddings of 1280, the image encoder gives 24: CLIP bigG"):
        net.fits(SDXL, tower("image_encoder_vit_h"))
    with pytest.raises(ValueError, match=r"reads states of 1280, the image encoder gives 32: CLIP ViT-H"):
        plus.fits(SDXL, tower("image_encoder_vit_h"))
    with pytest.raises(ValueError, match=r"a linear adapter reads \(B, 40\); got \(1, 17, 40\)"):
        adapter(LINEAR)(torch.zeros(1, 17, 40))
    with pytest.raises(ValueError, match="kind is linear or plus or full"):
        IPAdapterConfig(kind="faceid")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"masks": torch.ones(1, 2, 64, 64)}, "masks need size="),
        ({"masks": torch.ones(1, 1, 64, 64), "size": (8, 8)}, r"masks are \(1 or 1, 2, H, W\)"),
        ({"masks": torch.ones(3, 2, 64, 64), "size": (8, 8)}, r"got \(3, 2, 64, 64\)"),
        ({"masks": torch.ones(1, 2, 64, 32), "size": (8, 8)}, "masks of 32 x 64 are of other proportions"),
        ({"masks": 2 * torch.ones(1, 2, 64, 64), "size": (8, 8)}, r"masks lie in \[0, 1\]"),
        ({"strength": torch.ones(3)}, r"strength is \(1,\), one a picture; got \(3,\)"),
    ],
)
def test_masks_and_strengths_that_do_not_fit_are_refused(more: dict, why: str):
    with pytest.raises(ValueError, match=why):
        prompted(images=2, **more)


def test_numbers_of_images_need_masks_and_a_batch_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"dec\.1 has 2 scales for images, the adapter has no masks"):
        prompted({"dec.1": [1.0, 0.5]}, images=2)
    with pytest.raises(ValueError, match="has 3 scales for images, the adapter has 2"):
        prompted({"dec.1": [1, 1, 1]}, images=2, masks=torch.ones(1, 2, 64, 64), size=(8, 8))
    with pytest.raises(ValueError, match="of 1 pictures, 2 rows with guidance; the batch has 4"):
        eps(prompted(), rows=4)
    half = {at: Term(term.k[:1], term.v[:1], term.scale) for at, term in prompted().terms.items()}
    with pytest.raises(ValueError, match="of 1 pictures has 2 rows, of none and of them; got 1"):
        eps(ImagePrompt(batch=1, terms=half), rows=1)
    with pytest.raises(ValueError, match="no mask is made for 64 queries"):
        eps(prompted(masks=torch.ones(1, 1, 32, 32), size=(4, 4)), size=(16, 16))
    with pytest.raises(ValueError, match="tokens are"):
        image_prompt(adapter(LINEAR), CFG, Pictures(*(t[0] for t in pictures())), {})


def test_the_docs_python_draws_a_picture(tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "painting.png")
    for old, new in {
        '"stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"': repr(str(TINY)),
        '"ip-adapter_sdxl.safetensors"': repr(str(TINY / "ip_adapter" / LINEAR)),
        '"image_encoder", "image_encoder"': f"{str(TINY)!r}, 'image_encoder'",
        '"painting.png"': repr(str(tmp_path / "painting.png")),
        "(1024, 1024)": "(64, 64)",
        "leading(30": "leading(1",
    }.items():
        assert old in code
        code = code.replace(old, new)
    names: dict = {}
    exec(code, names)
    assert names["picture"].shape == (1, 3, 64, 64)


def test_matrices_of_places_that_are_not_named_are_never_touched():
    net = deepcopy(adapter(LINEAR))
    used = {i for i, (at, _) in enumerate(text_sites(CFG)) if at.stage == "dec.1"}
    for part in (net.k, net.v):
        for i, matrix in enumerate(part):
            if i not in used:
                matrix.to("meta")
    prompt = image_prompt(net, CFG, pictures(), scales(CFG, "style"))
    assert torch.equal(eps(prompt), eps(prompted("style")))


def test_a_part_without_attention_to_text_is_refused_also_where_its_transformer_is_empty():
    with pytest.raises(SiteError, match=r"mid_block has no attention to text: enc\.4, enc\.5"):
        scales(replace(CFG, mid_depth=0), {"mid_block": 1})
    assert "mid" not in {at.stage for at in scales(replace(CFG, mid_depth=0), "all")}


def test_the_probe_looks_at_steps_spread_over_the_walk_once_each_and_leaves_eps_alone():
    path = [float(t) for t in leading(10, offset=1)]
    assert spread(path, 2) == [path[2], path[7]]
    assert spread(path, 99) == path[:-1]
    assert relative(torch.ones(2), torch.ones(2)) == 0
    assert relative(torch.zeros(3), torch.ones(3)) == pytest.approx(1)
    assert [place.stage for place in blocks(CFG)][:2] == ["enc.4", "enc.5"]
    seen: dict[str, list] = {}
    others = {"style": instant_style(TORCH, [prompted("style")]), "none": TORCH}
    denoise = looking(denoiser, TORCH, others, {601.0}, seen)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (601, 601, 401):
        assert torch.equal(denoise(x, torch.tensor([t])), denoiser()(x, torch.tensor([t])))
    assert seen["none"] == [0.0]
    assert len(seen["style"]) == 1
    assert seen["style"][0] > 0.01

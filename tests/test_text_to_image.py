"""Text to image by its definitions: settings that change nothing, seeds, sizes, paths, taps, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.methods import text_to_image as t2i
from diaphane.methods.asyrp import asyrp
from diaphane.methods.controlnet import Control, between, predicting
from diaphane.methods.prompt import Prompt, beside, conditioning, encode, score_ids, size_ids
from diaphane.methods.taps import tapped
from diaphane.model.components import Components, components
from diaphane.model.latent import build
from diaphane.model.ops import TORCH, Site
from diaphane.model.unet import UNet
from diaphane.model.vae import NonFiniteError
from diaphane.samplers.ddim import ddim
from diaphane.samplers.dpmpp import dpmpp
from diaphane.samplers.heun import heun
from diaphane.samplers.noise import seeded
from diaphane.samplers.parameterisation import as_eps
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights import latent, pipeline
from torch import Tensor

from . import latent_twins as twins

SCHEDULE, PATH, SIZE = scaled_linear(), leading(4, offset=1), (64, 96)


@pytest.fixture(scope="module")
def parts() -> Components:
    found = pipeline.load(twins.TINY)
    return components(found.parts, found.words, dtype=torch.float64)


@pytest.fixture(scope="module")
def control() -> Control:
    found = latent.load(twins.TINY / "controlnet")
    net = build(found.family, found.config, found.tensors, dtype=torch.float64)
    return Control(net=net, hint=torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)))


def setting(parts: Components, n: int = 1) -> tuple[Prompt, Prompt, Tensor, Tensor]:
    """Prompt, negative prompt, ids, and x of n pictures that are not square."""
    x = t2i.pure_noise(parts, seeded(range(n)), SIZE, n).double()
    return encode(parts, "a cat").repeated(n), encode(parts, "low").repeated(n), size_ids(SIZE, n), x


def walked(parts: Components, n: int = 1, **more: Any) -> Tensor:
    prompt, negative, ids, x = setting(parts, n)
    denoise = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, **more)
    return list(ddim(denoise, x, SCHEDULE, PATH))[-1].x


def test_a_prompt_guided_away_from_itself_is_not_guided(parts: Components):
    prompt, _, ids, x = setting(parts)
    t = torch.tensor([401.0])
    alone = t2i.denoiser(parts.unet, prompt, schedule=SCHEDULE, ids=ids)(x, t)
    same = t2i.denoiser(parts.unet, prompt, prompt, schedule=SCHEDULE, ids=ids, guidance=9.0)(x, t)
    assert (alone - same).abs().amax() < 1e-12
    assert torch.equal(alone, t2i.denoiser(parts.unet, prompt, prompt, schedule=SCHEDULE, ids=ids, guidance=1.0)(x, t))
    plain = parts.unet(x, parts.unet.embed(t.double(), prompt.context, prompt.pooled, ids))
    assert (alone - plain).abs().amax() < 1e-6  # t is float32 there


def test_guidance_is_one_for_each_picture_and_off_outside_its_interval(parts: Components):
    each = walked(parts, 2, guidance=torch.tensor([1.0, 6.0]))
    for i, g in enumerate((1.0, 6.0)):
        assert (each[i] - walked(parts, 2, guidance=g)[i]).abs().amax() < 1e-9
    off = walked(parts, guidance=6.0, interval=(2000, 3000))
    assert torch.equal(off, walked(parts, guidance=1.0))
    assert (off - walked(parts, guidance=6.0, interval=(400, 600))).abs().amax() > 1e-2


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(parts: Components):
    three = t2i.pure_noise(parts, seeded([5, 6, 7]), SIZE, 3)
    assert torch.equal(three[1:2], t2i.pure_noise(parts, seeded([6]), SIZE))
    assert three.shape == (3, 4, 8, 12)
    assert (walked(parts, 2)[:1] - walked(parts, 1)).abs().amax() < 1e-10


def test_v_is_converted_after_guidance(parts: Components):
    prompt, negative, ids, x = setting(parts)
    t = torch.tensor([601.0])
    got = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, prediction="v", rescale=0.5)(x, t)
    raw = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, rescale=0.5)
    assert torch.equal(got, as_eps(raw, SCHEDULE, "v")(x, t))


def test_half_precision_networks_walk_in_float32(parts: Components):
    found = pipeline.load(twins.TINY)
    small = components(found.parts, dtype=torch.bfloat16)
    prompt, negative, ids, x = setting(parts)
    denoise = t2i.denoiser(small.unet, prompt, negative, schedule=SCHEDULE, ids=ids)
    end = list(ddim(denoise, x.float(), SCHEDULE, PATH))[-1].x
    assert end.dtype == torch.float32
    assert (end - walked(parts)).abs().mean() < 0.2 * end.std()


def test_a_mask_of_ones_keeps_nothing_and_a_mask_of_zeros_everything(parts: Components):
    prompt, negative, ids, x = setting(parts)
    denoise = t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids)
    x0, z = torch.randn(2, 1, 4, 8, 12, dtype=torch.float64)
    plain = list(ddim(denoise, x, SCHEDULE, PATH))
    ones = list(t2i.repainted(ddim, denoise, x, SCHEDULE, PATH, x0, z, torch.ones(1, 1, *SIZE)))
    assert all(torch.equal(a.x, b.x) for a, b in zip(plain, ones, strict=True))
    for walk in (heun, dpmpp):
        plain = list(walk(denoise, x, SCHEDULE, PATH))
        ones = list(t2i.repainted(walk, denoise, x, SCHEDULE, PATH, x0, z, torch.ones(1, 1, *SIZE)))
        assert all(torch.equal(a.x, b.x) for a, b in zip(plain, ones, strict=True))
    zeros = list(t2i.repainted(ddim, denoise, x, SCHEDULE, PATH, x0, z, torch.zeros(1, 1, *SIZE)))
    assert torch.equal(zeros[-1].x, x0)
    assert (zeros[0].x - SCHEDULE(PATH[1]).sqrt() * x0 - (1 - SCHEDULE(PATH[1])).sqrt() * z).abs().amax() < 1e-12


def test_masks_go_to_latents_by_the_nearest_pixel_and_cover_pictures_in_grey(parts: Components):
    mask = torch.zeros(1, 1, 64, 96)
    mask[:, :, 8:16, 32:] = 1
    small = t2i.latent_mask(mask, torch.zeros(1, 4, 8, 12))
    assert torch.equal(small.repeat_interleave(8, 2).repeat_interleave(8, 3), mask)
    picture = torch.rand(2, 3, 64, 96) + 0.1
    covered = t2i.covered(picture, mask)
    assert torch.equal(covered == 0, mask.expand(2, 3, -1, -1) == 1)
    assert t2i.canvas(mask, torch.ones(2, 4, 8, 12)).shape == (2, 5, 8, 12)
    for wrong in (mask[0], mask.expand(-1, 3, -1, -1), 2 * mask):
        with pytest.raises(ValueError, match="mask"):
            t2i.latent_mask(wrong, torch.zeros(1, 4, 8, 12))


def test_a_tail_and_a_handoff_are_parts_of_the_path():
    path = leading(10, offset=1)
    assert t2i.tail(path, 1.0) == path
    assert t2i.tail(path, 0.3) == [201, 101, 1, -1]
    high, low = t2i.handoff(path, 0.2)
    assert (high[-1], low) == (101, [101, 1, -1])
    assert [*high, *low[1:]] == path
    for strength in (0.0, 0.05, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            t2i.tail(path, strength)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="without a step"):
            t2i.handoff(path, share)


def test_h_and_skips_of_every_step_are_values_and_asyrp_of_no_edit_changes_nothing(parts: Components):
    prompt, _, ids, x = setting(parts)
    embed = conditioning(parts.unet, prompt, ids)
    taps = list(tapped(parts.unet, x, SCHEDULE, PATH, embed=embed))
    denoise = predicting(parts.unet, prompt, ids)
    plain = list(ddim(denoise, x, SCHEDULE, PATH))
    assert all(torch.equal(tap.step.x, step.x) for tap, step in zip(taps, plain, strict=True))
    assert (taps[0].h.shape[1:], len(taps[0].skips)) == ((96, 2, 3), 9)
    edited = list(asyrp(parts.unet, x, SCHEDULE, PATH, lambda h, t, c: h, embed=embed))
    assert (edited[-1].x - plain[-1].x).abs().amax() < 1e-12
    moved = list(asyrp(parts.unet, x, SCHEDULE, PATH, lambda h, t, c: h + 1, embed=embed))
    assert (moved[-1].x - plain[-1].x).abs().amax() > 1e-3


def test_ops_hear_of_the_unet_with_negative_rows_first(parts: Components):
    prompt, negative, ids, x = setting(parts)
    heard: dict[Site, Tensor] = {}

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        heard[site] = k
        return TORCH.attend(site, q, k, v, bias)

    t = torch.tensor([401.0])
    ops = replace(TORCH, attend=attend)
    t2i.denoiser(parts.unet, prompt, negative, schedule=SCHEDULE, ids=ids, ops=ops)(x, t)
    both = dict(heard)
    site = Site("enc.4", 0, "cross")
    for row, one in enumerate((negative, prompt)):
        t2i.denoiser(parts.unet, one, schedule=SCHEDULE, ids=ids, ops=ops)(x, t)
        assert (heard[site][0] - both[site][row]).abs().amax() < 1e-12


def test_half_precision_changes_the_arithmetic_only_with_a_controlnet_of_any_type_and_an_odd_size():
    found, guide = pipeline.load(twins.TINY), latent.load(twins.TINY / "controlnet")
    hint = torch.rand(1, 3, 72, 56, generator=torch.Generator().manual_seed(1))
    half, brain, wide = torch.float16, torch.bfloat16, torch.float32

    def drawn(dtype: torch.dtype, other: torch.dtype) -> Tensor:
        parts = components(found.parts, found.words, dtype=dtype)
        net = build(guide.family, guide.config, guide.tensors, dtype=other)
        prompt, ids = encode(parts, ["a cat", "a dog"]), size_ids((72, 56), 2)
        controls = [Control(net=net, hint=hint, scale=torch.tensor([0.5, 1.0]))]
        denoise = t2i.denoiser(parts.unet, prompt, prompt.zeros(), schedule=SCHEDULE, ids=ids, controls=controls)
        x = t2i.pure_noise(parts, seeded([1, 2]), (72, 56), 2)
        picture = t2i.pictures(parts.vae, list(ddim(denoise, x, SCHEDULE, [601, 301, 1]))[-1].x)
        assert (picture.dtype, picture.shape) == (wide, (2, 3, 72, 56))
        back = parts.vae.latents(picture)
        assert (back.dtype, back.shape) == (wide, x.shape)
        return torch.cat([picture.flatten(), back.flatten()])

    want = drawn(wide, wide)
    for types, bound in (((half, half), 0.02), ((half, wide), 0.02), ((wide, half), 0.02), ((brain, brain), 0.1)):
        assert 0 < (drawn(*types) - want).abs().mean() < bound * want.std(), types


def test_a_controlnet_of_scale_0_or_never_on_changes_nothing(parts: Components, control: Control):
    prompt, _, ids, x = setting(parts)
    t = torch.tensor([401.0])
    plain = predicting(parts.unet, prompt, ids)(x, t)
    assert torch.equal(plain, predicting(parts.unet, prompt, ids, controls=[replace(control, scale=0.0)])(x, t))
    off = [replace(control, first=300.0), replace(control, last=500.0)]
    assert torch.equal(plain, predicting(parts.unet, prompt, ids, controls=off)(x, t))
    on = [replace(control, first=401.0, last=401.0)]
    assert (plain - predicting(parts.unet, prompt, ids, controls=on)(x, t)).abs().amax() > 1e-3


def test_a_controlnet_has_a_scale_for_each_picture(parts: Components, control: Control):
    each = walked(parts, 2, controls=[replace(control, scale=torch.tensor([0.0, 0.8], dtype=torch.float64))])
    assert (each[0] - walked(parts, 2)[0]).abs().amax() < 1e-10
    assert (each[1] - walked(parts, 2, controls=[replace(control, scale=0.8)])[1]).abs().amax() < 1e-10


def test_the_span_of_a_controlnet_is_named_in_fractions_of_the_path():
    path = leading(5, offset=1)
    assert between(path) == (801, 1)
    assert between(path, 0.2, 0.8) == (601, 201)
    with pytest.raises(ValueError, match="no step of 5"):
        between(path, 0.5, 0.55)


def test_stable_diffusion_1_reads_the_last_layer_under_the_final_norm_and_clip_skip_an_earlier(parts: Components):
    cfg = replace(twins.SD1, context_dim=24)
    torch.manual_seed(2)
    one = Components(UNet(cfg), parts.vae, parts.towers[:1], parts.tokenizers[:1], ("text_encoder",))
    tower, ids = one.towers[0], one.tokenizers[0](["a cat"])
    for skip in range(3):
        prompt = encode(one, "a cat", clip_skip=skip)
        assert torch.equal(prompt.context, tower.norm(tower(ids).hidden[-1 - skip]))
        assert prompt.pooled is None
    assert torch.equal(encode(one, "a cat").context, tower(ids).last)
    with pytest.raises(ValueError, match="clip skip is 0"):
        encode(one, "a cat", clip_skip=3)


def test_nothing_said_is_zeros_and_not_the_empty_text(parts: Components):
    empty = encode(parts, "")
    zeros = empty.zeros()
    assert zeros.pooled is not None
    assert not zeros.context.any()
    assert not zeros.pooled.any()
    assert empty.context.abs().amax() > 0.1


def test_ids_are_in_pixels_height_first():
    assert size_ids((64, 96)).tolist() == [[64, 96, 0, 0, 64, 96]]
    want = [1, 2, 3, 4, 5, 6]
    assert size_ids((64, 96), 2, original=(1, 2), crop=(3, 4), target=(5, 6)).tolist() == [want, want]
    assert score_ids((64, 96), score=2.5).tolist() == [[64, 96, 0, 0, 2.5]]


def test_what_does_not_fit_is_refused_in_one_line(parts: Components, control: Control):
    prompt, _, ids, x = setting(parts)

    def refused(call: Any) -> str:
        with pytest.raises(ValueError) as e:
            call()
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "multiples of 8, not (60, 96): (64, 96)" in refused(lambda: t2i.latent_size(parts, (60, 96)))
    assert "multiples of 8" in refused(lambda: t2i.latent_size(parts, (0, 96)))
    for size in (64, (64,), (64.0, 96), ("64", "96"), None, (64, 64, 3)):
        assert "two whole numbers, not" in refused(lambda size=size: t2i.pure_noise(parts, seeded([0]), size))
    for text, kind in ((None, "NoneType"), (3, "int"), (b"a cat", "bytes"), (["a", None], "NoneType"), ([], "an empty"),
                       ({"a": 1}, "dict"), (Path("a"), "PosixPath")):  # fmt: skip
        assert f"a list of texts, not {kind}" in refused(lambda text=text: encode(parts, text))
        if text is not None:
            assert f"not {kind}" in refused(lambda text=text: encode(parts, "a", text))
    assert "not int64" in refused(lambda: t2i.pictures(parts.vae, torch.ones(1, 4, 8, 8, dtype=torch.int64)))
    assert "not uint8" in refused(lambda: parts.vae.latents(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))
    assert "floating type" in refused(lambda: replace(control, hint=torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    assert "at least 1 wide" in refused(lambda: t2i.pictures(parts.vae, x, tile=0))
    assert "in [0, 1]" in refused(lambda: t2i.latent_mask(torch.full((1, 1, 8, 8), torch.nan), x))
    assert "3 masks" in refused(lambda: t2i.canvas(torch.zeros(3, 1, 64, 64), x))
    assert "came without a vocabulary" in refused(lambda: encode(replace(parts, tokenizers=()), "x"))
    assert "give as many" in refused(lambda: encode(parts, ["a", "b"], ["c"]))
    assert "as many tokens each" in refused(lambda: beside(prompt, Prompt(prompt.context[:, :9], prompt.pooled)))
    assert "pooled text and size ids" in refused(lambda: conditioning(parts.unet, prompt))
    t = torch.tensor([401.0])
    three = [replace(control, hint=control.hint.expand(3, -1, -1, -1))]
    assert "for 3 pictures" in refused(lambda: walked(parts, 2, controls=three))
    small = [replace(control, hint=control.hint[..., 8:])]
    assert "hint of x" in refused(lambda: predicting(parts.unet, prompt, ids, controls=small)(x, t))
    assert "x (B, 4" in refused(lambda: predicting(parts.unet, prompt, ids, canvas=x)(x, t))


def test_pictures_are_decoded_one_by_one_within_bounds_or_the_overflow_is_named(parts: Components):
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    got = t2i.pictures(parts.vae, z)
    assert (got.shape, got.dtype) == ((2, 3, 64, 64), torch.float32)
    assert torch.allclose(got, parts.vae.pictures(z).float().clamp(-1, 1), atol=1e-6)
    tiled = t2i.pictures(parts.vae, z, tile=8)
    assert torch.allclose(tiled, got, atol=1e-6)
    for tile in (None, 4):
        with pytest.raises(NonFiniteError):
            t2i.pictures(parts.vae, z * torch.inf, tile=tile)


def test_the_example_in_the_docs_runs():
    text = (Path(__file__).parent.parent / "docs" / "text_to_image.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "pure_noise" in block)
    shorter = {'"stabilityai/stable-diffusion-xl-base-1.0", variant="fp16"': repr(str(twins.TINY)), "1024": "64",
               "leading(30": "leading(2"}  # fmt: skip
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["picture"].shape == (1, 3, 64, 64)
    assert len(found["tap"].skips) == 9

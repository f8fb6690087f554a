"""The autoencoder: diffusers' numbers, the reference data, tiles, layouts, and where NaN came up."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from diaphane.methods.text_to_image import pictures
from diaphane.model import vae
from diaphane.model.ops import TORCH, Ops, Site
from diaphane.model.tiling import tiled_decode, tiled_encode, tiles
from diaphane.weights import vae as table
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

F64 = torch.float64
CONFIGS = {
    "published shape": vae.VAEConfig(channels=(8, 16, 24, 24), groups=4),
    "two levels": vae.VAEConfig(channels=(12, 8), blocks=1, latent_channels=3, groups=4, scaling=0.7),
    "one level": vae.VAEConfig(channels=(8,), blocks=3, in_channels=1, groups=2),
}
TINY = vae.VAEConfig(channels=(32, 32, 32, 64))


def diffusers_vae(cfg: vae.VAEConfig) -> AutoencoderKL:
    """diffusers' autoencoder of the same configuration."""
    n = len(cfg.channels)
    return AutoencoderKL(
        in_channels=cfg.in_channels,
        out_channels=cfg.in_channels,
        latent_channels=cfg.latent_channels,
        block_out_channels=cfg.channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=cfg.blocks,
        norm_num_groups=cfg.groups,
        scaling_factor=cfg.scaling,
    ).eval()  # type: ignore[return-value]


def same(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().amax() < bound * want.abs().amax()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_autoencoder_is_diffusers_autoencoderkl(name: str):
    torch.manual_seed(3)
    cfg = CONFIGS[name]
    twin = diffusers_vae(cfg).requires_grad_(False)
    twins.randomised(twin)
    net = vae.VAE(cfg).eval().requires_grad_(False)
    net.load_state_dict(twins.ours(twin.state_dict(), table, table.DIFFUSERS), strict=True, assign=True)
    m = net.multiple
    x, z = (
        torch.randn(2, cfg.in_channels, 3 * m, 5 * m, dtype=F64),
        torch.randn(2, cfg.latent_channels, 3, 5, dtype=F64),
    )
    for dtype, bound in ((torch.float32, 1e-5), (F64, 1e-10)):
        net, twin = net.to(dtype), twin.to(dtype)
        moments, want = net.encode(x.to(dtype)), twin.encode(x.to(dtype)).latent_dist
        same(moments.mean, want.mean, bound)
        same(moments.logvar, want.logvar, bound)
        same(net.decode(z.to(dtype)), twin.decode(z.to(dtype)).sample, bound)


@pytest.fixture(scope="module")
def tiny() -> vae.VAE:
    tensors = load_file(twins.TINY / "vae" / "diffusion_pytorch_model.safetensors")
    net = vae.VAE(TINY).eval().requires_grad_(False)
    net.load_state_dict(twins.ours({k: v.float() for k, v in tensors.items()}, table, table.DIFFUSERS), assign=True)
    return net


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(twins.CASES / "04_vae.safetensors")


def test_the_tiny_autoencoder_has_the_reference_moments_latents_and_pictures(tiny: vae.VAE, case: dict[str, Tensor]):
    moments = tiny.encode(case["image"])
    found = {
        "mean": moments.mean,
        "logvar": moments.logvar,
        "latents_scaled": tiny.latents(case["image"], case["eps"]),
        "mode_latents_scaled": tiny.latents(case["image"]),
        "decoded": tiny.pictures(case["dec_latents"]),
    }
    for name, got in found.items():
        assert (got - case[name]).abs().amax() < 5e-5, name


def test_a_tiled_decode_is_the_reference_one(tiny: vae.VAE, case: dict[str, Tensor]):
    got = tiled_decode(tiny, case["tile_latents"] / tiny.cfg.scaling, tile=16)
    assert (got - case["tile_decoded"]).abs().amax() < 2e-3
    whole = tiny.pictures(case["tile_latents"])
    assert (got - whole).abs().amax() > 0.01  # tiles are not the whole


def test_tiles_are_diffusers_tiles(tiny: vae.VAE):
    torch.manual_seed(8)
    twin = diffusers_vae(TINY).requires_grad_(False)
    theirs = load_file(twins.TINY / "vae" / "diffusion_pytorch_model.safetensors")
    twin.load_state_dict({k: v.float() for k, v in theirs.items()})
    twin.tile_sample_min_size, twin.tile_latent_min_size, twin.use_tiling = 64, 8, True
    z, x = torch.randn(1, 4, 11, 19), torch.randn(1, 3, 88, 104)
    same(tiled_decode(tiny, z, tile=8), twin.decode(z).sample, 1e-5)
    moments, want = tiled_encode(tiny, x, tile=64), twin.encode(x).latent_dist
    same(moments.mean, want.mean, 1e-5)
    same(moments.logvar, want.logvar, 1e-5)


def test_one_tile_is_the_whole_and_tiles_of_a_pointwise_function_show_no_seams(tiny: vae.VAE):
    torch.manual_seed(2)
    z = torch.randn(1, 4, 6, 8)
    assert torch.equal(tiled_decode(tiny, z, tile=8), tiny.decode(z))
    x = torch.randn(1, 2, 21, 13, dtype=F64)
    assert torch.allclose(tiles(lambda part: 3 * part, x, 8, 8, 0.25), 3 * x, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("tile", "overlap"), [(10, 0.25), (8, 1.0), (8, -0.5), (8, 0.3)])
def test_tiles_that_do_not_overlap_in_whole_pixels_are_an_error(tiny: vae.VAE, tile: int, overlap: float):
    with pytest.raises(ValueError, match="do not overlap"):
        tiled_decode(tiny, torch.zeros(1, 4, 12, 12), tile=tile, overlap=overlap)


def test_every_layout_is_the_same_autoencoder():
    tensors = load_file(twins.TINY / "vae" / "diffusion_pytorch_model.safetensors")
    folder = twins.ours(tensors, table, table.DIFFUSERS)
    prefix = "first_stage_model."
    single = load_file(twins.TINY / "single_file.safetensors")
    ldm = {key.removeprefix(prefix): tensor for key, tensor in single.items() if key.startswith(prefix)}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    then = {next((k.replace(a, b) for a, b in old.items() if a in k), k): t for k, t in tensors.items()}
    assert then.keys() != tensors.keys()
    for other in (twins.ours(ldm, table, table.LDM), twins.ours(then, table, table.DIFFUSERS)):
        assert list(other) == list(folder)
        assert all(torch.equal(other[name], folder[name]) for name in folder)


def test_the_published_autoencoder_has_its_parameters():
    with torch.device("meta"):
        net = vae.VAE(vae.SDXL_VAE)
        moments = net.encode(torch.empty(1, 3, 1024, 768))
        assert net.decode(moments.mean).shape == (1, 3, 1024, 768)
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (83_653_863, 248)
    assert moments.mean.shape == (1, 4, 128, 96)


def test_every_verb_is_spoken_at_a_site_of_its_own(tiny: vae.VAE):
    sites = []

    def group_norm(site: Site, *args: object) -> Tensor:
        sites.append(site)
        return TORCH.group_norm(site, *args)

    def add(site: Site, x: Tensor, dx: Tensor) -> Tensor:
        sites.append(site)
        return x + dx

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sites.append(site)
        assert q.shape[1] == 1
        return TORCH.attend(site, q, k, v)

    ops = Ops(group_norm=group_norm, add=add, attend=attend)
    x = torch.randn(1, 3, 16, 24)
    assert torch.equal(tiny.decode(tiny.encode(x, ops).mean, ops), tiny.decode(tiny.encode(x).mean))
    spoken = [site for site in sites if site.kind != "self"]
    assert len(spoken) == len(set(spoken))
    assert [s.stage for s in sites if s.kind == "self"] == ["enc.5", "enc.5", "dec.1", "dec.1"]


def test_a_decode_and_an_encode_are_one_graph_each():
    net = vae.VAE(CONFIGS["two levels"]).double().eval().requires_grad_(False)
    z, x = torch.randn(1, 3, 3, 5, dtype=F64), torch.randn(1, 3, 6, 10, dtype=F64)
    for run, y in ((net.decode, z), (net.encode, x)):
        got, want = torch.compile(run, backend="eager", fullgraph=True)(y), run(y)
        assert torch.equal(torch.cat([*got]), torch.cat([*want]))


def narrow(*, upcast: bool, spoilt: bool = True) -> vae.VAE:
    """A float16 autoencoder, one activation of each half of which overflows if it is spoilt."""
    torch.manual_seed(1)
    net = vae.VAE(replace(CONFIGS["two levels"], upcast=upcast)).half().eval().requires_grad_(False)
    if spoilt:
        names = ("dec.2.0.conv2", "dec.2.1.conv2", "enc.1.0.conv2", "enc.1.1.conv")
        blocks = [net.get_submodule(name) for name in names]
        for conv in blocks:
            conv.bias[0] = 6e4  # type: ignore[index]
        blocks[3].weight[0, 0, 1, 1] = 1.0  # type: ignore[index]
    return net


X, Z = torch.linspace(-1, 1, 48).view(1, 3, 4, 4).half(), torch.linspace(-2, 2, 12).view(1, 3, 2, 2).half()


def test_nan_and_infinity_are_errors_that_name_the_first_module_with_them_and_the_cure():
    net = narrow(upcast=True, spoilt=False)
    assert torch.equal(net.decode(Z, checked=True), net.decode(Z))
    assert torch.equal(net.encode(X, checked=True).logvar, net.encode(X).logvar)
    net.dec[2][1].conv2.weight.mul_(1e6)  # type: ignore[index]
    net.enc[1][0].conv1.bias[0] = math.nan  # type: ignore[index]
    for call, name in (
        (lambda: net.decode(Z, checked=True), r"dec\.2\.1"),
        (lambda: net.encode(X, checked=True), r"enc\.1\.0"),
        (lambda: tiled_decode(net, Z.repeat(1, 1, 4, 4), tile=4, checked=True), r"dec\.2\.1"),
    ):
        with pytest.raises(vae.NonFiniteError, match=rf"values of {name} are not finite in float16: compute it in bf"):
            call()
    assert not torch.isfinite(net.decode(Z)).all()
    with pytest.raises(vae.NonFiniteError, match="of the latents are not finite in float32: its input or weights"):
        net.float().decode(torch.full((1, 3, 2, 2), math.nan), checked=True)


def test_an_autoencoder_that_overflows_float16_is_float32_while_it_works_and_itself_afterwards():
    net = narrow(upcast=True)
    wide, before = copy.deepcopy(net).float(), list(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = net.pictures(Z), net.latents(X), net.latents(X.float(), X[..., :2, :2]), pictures(net, Z)
        tiled = pictures(net, Z.repeat(1, 1, 4, 4), tile=4)
    assert [y.dtype for y in found] == [torch.float16, torch.float16, torch.float32, torch.float32]
    assert torch.equal(found[0], wide.pictures(Z.float()).half())
    assert torch.equal(found[1], wide.latents(X.float()).half())
    assert torch.equal(found[2], wide.latents(X.float(), X[..., :2, :2].float()))
    assert torch.equal(found[3], wide.pictures(Z.float()).clamp(-1, 1))
    assert torch.isfinite(tiled).all()
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))
    with pytest.raises(vae.NonFiniteError):
        net.pictures(Z * torch.inf)
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))


def test_where_nothing_says_that_float16_overflows_a_warning_does_and_names_the_place():
    net = narrow(upcast=False)
    wide = copy.deepcopy(net).float()
    for run, want, name in (
        (lambda: net.pictures(Z), wide.pictures(Z.float()).half(), r"dec\.2\.1"),
        (lambda: net.latents(X), wide.latents(X.float()).half(), r"enc\.1\.1"),
        (lambda: pictures(net, Z), wide.pictures(Z.float()).clamp(-1, 1), r"dec\.2\.1"),
    ):
        with pytest.warns(UserWarning, match=rf"of {name} are not finite in float16.*; float32 is taken"):
            got = run()
        assert torch.equal(got, want)
    net = narrow(upcast=False, spoilt=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net.pictures(Z), net.decode(Z / net.cfg.scaling))
        assert torch.equal(net.bfloat16().pictures(Z.bfloat16()), net.decode(Z.bfloat16() / net.cfg.scaling))


def test_pictures_and_latents_of_the_wrong_shape_are_errors_that_say_the_right_one(tiny: vae.VAE):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) with H and W multiples of 8; got \(1, 3, 60, 64\)"):
        tiny.encode(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match=r"latents are \(B, 4, H, W\); got \(1, 3, 8, 8\)"):
        tiny.decode(torch.zeros(1, 3, 8, 8))

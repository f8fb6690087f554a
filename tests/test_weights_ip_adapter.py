"""IP-Adapter files: a bijection in both layouts, for every published kind, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.model import image_prompt as model
from diaphane.model import sites
from diaphane.model.image_prompt import IPAdapter, IPAdapterConfig
from diaphane.model.latent import build
from diaphane.model.unet import SD15, SDXL, UNetConfig
from diaphane.weights import ip_adapter
from diaphane.weights.catalogue import CATALOGUE
from diaphane.weights.errors import DtypeError, LayoutError, MissingFileError
from diaphane.weights.files import write
from safetensors.torch import load_file
from torch import Tensor

from . import latent_twins as twins

FOLDER = twins.TINY / "ip_adapter"
LINEAR = FOLDER / "ip-adapter_sdxl.safetensors"
# name -> its network, the UNet, and the number of parameters
PUBLISHED: dict[str, tuple[IPAdapterConfig, UNetConfig, int]] = {
    "sdxl": (model.SDXL_LINEAR, SDXL, 351_285_248),
    "sdxl-vit-h": (model.SDXL_LINEAR_H, SDXL, 349_188_096),
    "sdxl-plus": (model.SDXL_PLUS, SDXL, 423_748_864),
    "sd15": (model.SD15_LINEAR, SD15, 22_319_616),
    "sd15-plus": (model.SD15_PLUS, SD15, 49_087_488),
    "sd15-full": (model.SD15_FULL, SD15, 21_794_304),
}


def keys(cfg: IPAdapterConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the public layout, written out by hand."""
    d, w, inner = cfg.context_dim, cfg.width, cfg.heads * cfg.head_dim
    out: dict[str, tuple[int, ...]] = {}

    def pair(name: str, *shape: int):
        out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]

    if cfg.kind == "linear":
        pair("image_proj.proj", cfg.tokens * d, cfg.reads)
        pair("image_proj.norm", d)
    elif cfg.kind == "full":
        pair("image_proj.proj.0", cfg.mlp, cfg.reads)
        pair("image_proj.proj.2", d, cfg.mlp)
        pair("image_proj.proj.3", d)
    else:
        out["image_proj.latents"] = (1, cfg.tokens, w)
        pair("image_proj.proj_in", w, cfg.reads)
        pair("image_proj.proj_out", d, w)
        pair("image_proj.norm_out", d)
        for i in range(cfg.layers):
            at = f"image_proj.layers.{i}"
            pair(f"{at}.0.norm1", w)
            pair(f"{at}.0.norm2", w)
            pair(f"{at}.1.0", w)
            out |= {f"{at}.0.to_q.weight": (inner, w), f"{at}.0.to_kv.weight": (2 * inner, w)}
            out |= {f"{at}.0.to_out.weight": (w, inner), f"{at}.1.1.weight": (cfg.mlp, w)}
            out[f"{at}.1.3.weight"] = (w, cfg.mlp)
    for i, channels in enumerate(cfg.sites):
        for part in "kv":
            out[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = (channels, d)
    return out


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_adapters_keys_are_a_bijection_onto_our_network(name: str):
    cfg, unet, parameters = PUBLISHED[name]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys(cfg).items()}
    plan, ours = ip_adapter.renamed(tensors)
    assert sum(t.numel() for t in ours.values()) == parameters
    assert len(ours) == len(tensors)
    net = build("ip_adapter", plan.config(), ours)
    net.fits(unet)
    said = plan.config()
    assert {key: getattr(cfg, key) for key in said} == said


@pytest.mark.parametrize(("cfg", "count"), [(SDXL, 140), (SD15, 32)])
def test_the_numbers_of_a_file_are_those_of_diffusers_processors(cfg: UNetConfig, count: int):
    with torch.device("meta"):
        processors = list(twins.diffusers_unet(cfg).attn_processors)
    assert len(processors) == count
    for i, (site, channels) in enumerate(model.text_sites(cfg)):
        name = processors[2 * i + 1].removesuffix(".processor")
        assert sites.site(cfg, name) == site
        assert model.widths(cfg)[i] == channels


@pytest.mark.parametrize(
    ("name", "site"),
    [
        (29, ("enc.8", 0)),
        (47, ("enc.8", 9)),
        (69, ("dec.1", 0)),
        (87, ("dec.1", 9)),
        (121, ("mid", 0)),
        (139, ("mid", 9)),
    ],
)
def test_sdxls_numbers_are_the_published_ones(name: int, site: tuple[str, int]):
    assert model.text_sites(SDXL)[name // 2][0][:2] == site


def test_both_layouts_hold_the_same_tensors():
    flat, nested = ip_adapter.load(LINEAR), ip_adapter.load(FOLDER / "ip-adapter_sdxl.bin")
    assert flat.config == nested.config
    assert all(torch.equal(flat.tensors[name], nested.tensors[name]) for name in flat.tensors)
    assert isinstance(build(flat.family, flat.config, flat.tensors), IPAdapter)
    assert ip_adapter.load(FOLDER, file="ip-adapter_sdxl.bin").layout == "IP-Adapter, linear"


def changed(tmp_path: Path, change: Any, source: Path = LINEAR) -> Path:
    tensors = load_file(source)
    change(tensors)
    return write(tmp_path / "changed.safetensors", tensors)


def rename(old: str, new: str) -> Any:
    return lambda t: t.update({key.replace(old, new): t.pop(key) for key in list(t) if old in key})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("ip_adapter.5.to_v_ip.weight"), r"1 missing: ip_adapter\.5\.to_v_ip\.weight"),
        (lambda t: t.pop("ip_adapter.5.to_k_ip.weight"), r"ip_adapter\.5\.to_k_ip"),
        (lambda t: [t.pop(f"ip_adapter.5.to_{p}_ip.weight") for p in "kv"], r"1 missing: ip_adapter\.5\.to_k_ip"),
        (rename("ip_adapter.5.", "ip_adapter.6."), r"missing: ip_adapter\.5"),
        (lambda t: t.update({"ip_adapter.1.to_q.weight": torch.zeros(1)}), r"1 unexpected: ip_adapter\.1\.to_q"),
        (lambda t: t.update({"ip_adapter.3.to_v_ip.weight": torch.zeros(64, 63)}), r"3\.to_v_ip\.weight \(64, 63\) sh"),
        (rename("image_proj.proj.", "image_proj.perceiver_resampler.proj_in."), "it is a FaceID Plus adapter"),
        (rename("image_proj.proj.", "image_proj.proj.0."), "it is a FaceID adapter"),
        (rename("image_proj.", "image_proj_model."), "a checkpoint of IP-Adapter's training"),
        (rename("image_proj.", "other."), "it has no image_proj of an IP-Adapter"),
        (lambda t: t.update({"image_proj.proj.weight": torch.zeros(255, 40)}), r"proj\.weight \(255, 40\) should be"),
    ],
)
def test_a_file_that_is_not_whole_or_of_another_kind_is_refused_with_what_is_wrong(tmp_path: Path, change, why: str):
    with pytest.raises(LayoutError, match=why) as e:
        ip_adapter.load(changed(tmp_path, change))
    assert str(e.value).startswith(str(tmp_path / "changed.safetensors, as an IP-Adapter: "))
    assert "\n" not in str(e.value)


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(LayoutError, match="it is a latent diffusion UNet with text"):
        ip_adapter.load(twins.TINY / "unet")
    with pytest.raises(MissingFileError, match="there is no nowhere"):
        ip_adapter.load("nowhere")
    with pytest.raises(MissingFileError, match="holds 4 weight files"):
        ip_adapter.load(FOLDER)
    with pytest.raises(DtypeError, match=r"proj\.linear\.bias is int64"):
        ip_adapter.load(changed(tmp_path, lambda t: t.update({"image_proj.proj.bias": torch.zeros(256).long()})))
    torch.save({"image_proj": {"a": torch.zeros(1)}, "ip_adapter": {}, "step": 3}, tmp_path / "a.bin")
    with pytest.raises(LayoutError, match="it holds more than image_proj and ip_adapter: 1 unexpected: step"):
        ip_adapter.load(tmp_path / "a.bin")
    torch.save([1, 2], tmp_path / "b.bin")
    with pytest.raises(LayoutError, match="there are no named tensors in it, but list"):
        ip_adapter.load(tmp_path / "b.bin")
    torch.save({"image_proj": {"a": 1}, "ip_adapter": {}}, tmp_path / "c.bin")
    with pytest.raises(LayoutError, match=r"not all of it is named tensors: 1 unexpected: image_proj\.a"):
        ip_adapter.load(tmp_path / "c.bin")


def test_the_catalogue_has_adapters_with_their_encoders():
    adapters = [entry for entry in CATALOGUE.values() if entry.family == "ip_adapter"]
    encoders = [entry for entry in CATALOGUE.values() if entry.family == "clip_vision"]
    assert {"ip-adapter_sdxl", "ip-adapter_sdxl_vit-h", "ip-adapter-plus_sdxl_vit-h"} <= {a.name for a in adapters}
    assert {"ip-adapter-encoder-bigg", "ip-adapter-encoder-h"} == {e.name for e in encoders}
    assert all(entry.repo == "h94/IP-Adapter" for entry in (*adapters, *encoders))


def test_a_resampler_of_other_widths_is_told_by_its_shapes():
    cfg = IPAdapterConfig(
        kind="plus", reads=6, tokens=3, context_dim=8, width=10, layers=2, heads=3, mlp=20, sites=(4,)
    )
    tensors: dict[str, Tensor] = {key: torch.zeros(shape) for key, shape in keys(cfg).items()}
    plan, ours = ip_adapter.renamed(tensors)
    assert plan.config() == {key: getattr(cfg, key) for key in plan.config()}
    assert build("ip_adapter", plan.config(), ours)(torch.zeros(2, 5, 6)).shape == (2, 3, 8)
    tensors["image_proj.layers.0.0.to_q.weight"] = torch.zeros(100, 10)
    with pytest.raises(LayoutError, match=r"100 channels of .* do not divide into heads of 64"):
        ip_adapter.renamed(tensors)

"""The published key lists: bijections onto our networks with equal shapes, and the settings that they imply."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from diaphane.model.adm import ADM_256, ADM_512, P2_256, ADMConfig
from diaphane.model.ddpm import DDPM_256, DDPM_CIFAR10, DDPMConfig
from diaphane.model.ddpmpp import CIFAR10, CIFAR10_DEEP, DDPMppConfig
from diaphane.model.load import FAMILIES, build
from diaphane.weights import adm
from diaphane.weights.layout import (
    ADM_DIFFUSERS,
    DIFFUSERS,
    DIFFUSERS_2022,
    GUIDED,
    HO,
    LAYOUTS,
    SCORE_SDE,
    Layout,
    detect,
)
from diaphane.weights.names import rename, transposed
from diaphane.weights.plan import Plan
from diaphane.weights.settings import settings

KEYS = Path(__file__).parent / "keys"
Shapes = dict[str, tuple[int, ...]]


def listed(name: str) -> Shapes:
    """A key list of tests/keys."""
    lines = (line.split() for line in (KEYS / f"{name}.txt").read_text().splitlines())
    return {key: tuple(int(n) for n in shape.split(",")) for key, shape in lines}


def as_2022(shapes: Shapes) -> Shapes:
    """The names of attention in diffusers' files of 2022."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: old[m[0]], key): shape for key, shape in shapes.items()}


def adm_as_diffusers(widths: tuple[int, ...], attention: tuple[int, ...], blocks: int, classes: int | None) -> Shapes:
    """The keys of diffusers' own UNet2DModel when it is told to be an ADM."""
    diffusers = pytest.importorskip("diffusers")
    down = [f"{'Attn' * (i in attention)}DownBlock2D" for i in range(len(widths))]
    kinds = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}
    with torch.device("meta"):
        net = diffusers.UNet2DModel(
            block_out_channels=widths, layers_per_block=blocks, out_channels=6, num_class_embeds=classes,
            down_block_types=[kinds.get(kind, kind) for kind in down],
            up_block_types=[kinds.get(k, k) for kind in reversed(down) if (k := kind.replace("Down", "Up"))],
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32, attention_head_dim=64,
        )  # fmt: skip
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


PUBLISHED = {
    "ho-256": (listed("ho-256"), HO, DDPM_256, 113_673_219),
    "ho-cifar10": (listed("ho-cifar10"), HO, DDPM_CIFAR10, 35_746_307),
    "diffusers-256": (listed("diffusers-256"), DIFFUSERS, DDPM_256, 113_673_219),
    "diffusers-cifar10": (listed("diffusers-cifar10"), DIFFUSERS, DDPM_CIFAR10, 35_746_307),
    "diffusers-256-2022": (as_2022(listed("diffusers-256")), DIFFUSERS_2022, DDPM_256, 113_673_219),
    "diffusers-cifar10-2022": (as_2022(listed("diffusers-cifar10")), DIFFUSERS_2022, DDPM_CIFAR10, 35_746_307),
    "guided-p2": (listed("guided-p2"), GUIDED, P2_256, 93_563_910),
    "guided-256": (listed("guided-256"), GUIDED, ADM_256, 552_814_086),
    "guided-512": (listed("guided-512"), GUIDED, ADM_512, 558_997_638),
    "adm-diffusers-p2": (
        adm_as_diffusers((128, 128, 256, 256, 512, 512), (4,), 1, None), ADM_DIFFUSERS, P2_256, 93_563_910,
    ),
    "adm-diffusers-256": (
        adm_as_diffusers((256, 256, 512, 512, 1024, 1024), (3, 4, 5), 2, None), ADM_DIFFUSERS, ADM_256, 552_814_086,
    ),
    "score-sde": (listed("score-sde"), SCORE_SDE, CIFAR10, 61_804_419),
    "score-sde-deep": (listed("score-sde-deep"), SCORE_SDE, CIFAR10_DEEP, 106_632_579),
}  # fmt: skip


def meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that hold nothing."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_key_list_is_a_bijection_onto_our_network(name: str):
    shapes, layout, published, parameters = PUBLISHED[name]
    assert detect(shapes) is layout
    tensors = adm.fused(meta(shapes)) if layout is ADM_DIFFUSERS else meta(shapes)
    plan = layout.tables.plan({key: tuple(t.shape) for key, t in tensors.items()}, layout.column)
    table, want = layout.tables.table(plan, layout.column), layout.tables.want(plan)
    ours = rename(tensors, table, want, ignore=layout.tables.strays(plan, layout.column))
    assert sum(tensor.numel() for tensor in ours.values()) == parameters
    with torch.device("meta"):
        network, config = FAMILIES[layout.family]
        net = network(published)
    assert {key: tuple(t.shape) for key, t in net.state_dict().items()} == want
    kwargs = settings(layout, plan, {}, {})  # no config.json
    said, meant = config(**kwargs), published
    assert {**vars(said), "dropout": 0} == {**vars(meant), "dropout": 0}
    build(layout.family, kwargs, ours)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("ho-256", "f262069fda0bc523229f5f0bc82d5b8ed78a73ce9d31e3061709e03368d0e693"),
        ("ho-cifar10", "81ced0400d26098ed533bf17190a1e29bba97224a276f4db96e9c7561a7bbe2d"),
        ("guided-p2", "1f4f09f8b00638e8850586abfafd601d0ff0a1d82c5deae5a073de413d59c434"),
        ("guided-256", "77e18ded5689d791c0f80de615de87c7b701e6613a73e6856ce4baeebb4a6524"),
        ("guided-512", "ab03f15f765591ce8e1ffca2860c02fea26bbe6e0300e58ff6576c7660d272dd"),
    ],
)
def test_a_key_list_is_the_published_one(name: str, digest: str):
    lines = sorted(f"{key} {list(shape)}" for key, shape in listed(name).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


VARIANTS = [
    DDPMConfig(resolution=64, base=32, mult=(1, 2, 3), blocks=1, attention=(16, 32)),
    DDPMConfig(resolution=16, base=32, mult=(2,), blocks=3, attention=(16,)),
    DDPMConfig(resolution=64, base=32, mult=(3, 1), blocks=2, attention=(), in_channels=1, out_channels=2),
    ADMConfig(resolution=32, base=64, mult=(1, 2, 2), blocks=3, attention=(32, 16, 8), classes=10),
    ADMConfig(resolution=32, base=128, mult=(0.5, 1, 1.5), blocks=1, attention=(), scale_shift=False),
    ADMConfig(resolution=8, base=64, mult=(1,), blocks=2, attention=(8,), updown=False),
    ADMConfig(resolution=32, base=64, mult=(1, 2, 2), blocks=2, attention=(16,), updown=False, head_dim=None),
    ADMConfig(resolution=32, base=64, mult=(1, 1, 2), blocks=1, attention=(8,), updown=False, resample_conv=False),
    DDPMppConfig(resolution=64, base=32, mult=(1, 3, 2), blocks=2, attention=(16,)),
    DDPMppConfig(resolution=32, base=32, mult=(1, 2), blocks=1, attention=(16, 32)),
    DDPMppConfig(resolution=8, base=32, mult=(1,), blocks=3, attention=()),
]


def holds(layout: Layout, cfg: DDPMConfig | ADMConfig | DDPMppConfig) -> bool:
    """Whether a layout can tell such a network: diffusers' stem is as wide as its first level."""
    wide = len(cfg.mult) > 1 and cfg.mult[0] == 1
    return isinstance(cfg, FAMILIES[layout.family][1]) and layout is not DIFFUSERS_2022 and (layout.column == 1 or wide)


PAIRS = [(layout, cfg) for layout in LAYOUTS for cfg in VARIANTS if holds(layout, cfg)]


@pytest.mark.parametrize(("layout", "cfg"), PAIRS, ids=[f"{layout.name}-{i}" for i, (layout, _) in enumerate(PAIRS)])
def test_every_number_of_a_network_is_told_by_its_shapes(layout: Layout, cfg: DDPMConfig | ADMConfig | DDPMppConfig):
    with torch.device("meta"):
        net = FAMILIES[layout.family][0](cfg)
    want = {key: tuple(t.shape) for key, t in net.state_dict().items()}
    sides = [cfg.resolution >> level for level in range(len(cfg.mult))]
    only_adm = ("classes", "scale_shift", "updown", "resample_conv")
    plan = Plan(
        base=cfg.base,
        widths=tuple(int(cfg.base * m) for m in cfg.mult),
        blocks=cfg.blocks,
        attention=tuple(i for i, side in enumerate(sides) if side in cfg.attention),
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        **{name: getattr(cfg, name) for name in only_adm if hasattr(cfg, name)},
    )
    assert layout.tables.want(plan) == want
    rules = layout.tables.table(plan, layout.column)
    file = {r.key: tuple(reversed(want[r.name])) if r.view is transposed else want[r.name] for r in rules}
    old = re.compile(r"\.(query|key|value|proj_attn)\.")
    assert layout.tables.plan({key: shape for key, shape in file.items() if not old.search(key)}, layout.column) == plan

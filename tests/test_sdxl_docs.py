"""What docs/latent.md says in code and numbers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diaphane.model import clip, latent, unet
from diaphane.weights import latent as weights
from diaphane.weights.latent_settings import FREE

from .latent_twins import TINY

TEXT = (Path(__file__).parent.parent / "docs" / "latent.md").read_text()


def test_the_example_loads_a_network():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    single = str(TINY / "single_file.safetensors")
    said = code.replace('"sd_xl_base_1.0.safetensors", "unet"', f'"{single}", "unet", head_dim=16, id_dim=8')
    assert said != code
    names: dict[str, Any] = {}
    exec(said, names)
    assert isinstance(names["unet"], unet.UNet)


def test_every_part_and_setting_it_names_exists():
    parts = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", TEXT, re.MULTILINE)
    assert {name for row in parts for name in re.findall(r"\w+", row)} == set(weights.FAMILIES)
    assert set(weights.FAMILIES.values()) | {"ip_adapter"} == set(latent.PARTS)
    told = set(re.findall(r"`(\w+)=`", TEXT))
    assert told <= {name for names in FREE.values() for name in names}


def test_the_last_of_23_layers_is_the_penultimate_of_24_under_the_norm():
    torch.manual_seed(0)
    deep = clip.TextConfig(width=12, layers=3, heads=3, mlp=20, projection=None, vocabulary=30, positions=6)
    whole, short = clip.TextTower(deep).eval(), clip.TextTower(replace(deep, layers=2)).eval()
    short.load_state_dict({name: t for name, t in whole.state_dict().items() if not name.startswith("layers.2.")})
    ids = torch.randint(0, 30, (2, 6))
    assert torch.equal(short(ids).last, whole.norm(whole(ids).hidden[-2]))

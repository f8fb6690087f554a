"""`diaphane look` and what it looks with: looking changes nothing, and the numbers are the network's own."""

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diaphane.cli.errors import CommandError
from diaphane.cli.look import parser, words_of
from diaphane.cli.main import main
from diaphane.methods.inside import Inside
from diaphane.methods.prompt import Prompt, conditioning
from diaphane.methods.statistics import Statistics
from diaphane.methods.style_aligned import style_aligned
from diaphane.methods.text_to_image import denoiser
from diaphane.model.ops import TORCH
from diaphane.model.unet import UNet
from diaphane.samplers.ddim import ddim
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from PIL import Image
from torch import Tensor

from . import latent_twins as twins

CFG, SCHEDULE, PATH = twins.XL, scaled_linear(), leading(4, offset=1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(CFG).double().eval().requires_grad_(False)
    twins.randomised(net)
    return net


SAID = Prompt(draw(2, 7, CFG.context_dim, seed=1), draw(2, 10, seed=2))
X, IDS = draw(2, 4, 16, 24), torch.full((2, 6), 128.0)


def inside(refs: list[int] | None = None) -> Inside:
    return Inside(CFG, torch.tensor([[2, 3], [4, -1]]), PATH, set(PATH[:2]), 251, refs)


def walked(unet: UNet, ops=None, look: Inside | None = None) -> Tensor:
    def speaking(verbs):
        return denoiser(unet, SAID, SAID.zeros(), schedule=SCHEDULE, ids=IDS, ops=verbs)

    denoise = speaking(ops or TORCH) if look is None else look.around(speaking)
    return list(ddim(denoise, X, SCHEDULE, PATH))[-1].x


def test_looking_changes_nothing(unet: UNet):
    assert torch.equal(walked(unet, look=inside()), walked(unet))
    assert torch.equal(walked(unet, look=inside([0, 0])), walked(unet, style_aligned(TORCH, [0, 0])))


def test_what_is_held_is_of_the_texts_half_at_every_step(unet: UNet):
    look = inside([0, 0])
    walked(unet, look=look)
    assert look.calls == list(PATH[:-1]) == list(look.words)
    assert look.grid == (4, 6)
    assert all(maps.shape == (2, 24, 2) for maps in look.words.values())
    assert bool((look.mean_words()[1, :, 1] == 0).all())  # the second text has not the second word
    torch.testing.assert_close(look.mean_words(PATH[0]), look.words[PATH[0]])
    assert look.masks().shape == (2, 24)
    assert look.shared.mean(1, 24).shape == (24, 48)
    torch.testing.assert_close(look.shared.mean(1, 24).sum(1), torch.ones(24, dtype=torch.float64))
    found = look.matched()
    ours = found.distance[0, 0][look.masks()[0]]
    torch.testing.assert_close(ours, torch.zeros_like(ours), atol=1e-9, rtol=0)  # a picture is most like itself


def test_a_feature_that_was_not_come_by_is_an_error(unet: UNet):
    look = inside()
    look.feature_at = 500
    walked(unet, look=look)
    with pytest.raises(ValueError, match="no call was at timestep 500"):
        look.matched()


def test_the_statistics_are_those_of_h_and_of_the_skips_that_encode_emits(unet: UNet):
    heard, t = Statistics(2), torch.full((2,), 400.0, dtype=torch.float64)
    c = conditioning(unet, SAID, IDS)(t)
    unet(X, c, heard.watching(TORCH))
    deep, skips = unet.encode(X, c)
    want = {"h": unet.middle(deep, c)} | {f"skip {i}": skip for i, skip in enumerate(skips)}
    table = heard.table()
    assert list(table) == list(want)
    for name, x in want.items():
        flat = x.flatten(1)
        numbers = torch.stack([flat.square().mean(1).sqrt(), flat.mean(1), flat.std(1)], dim=-1)
        torch.testing.assert_close(table[name][0], numbers)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    words = ["--model", str(twins.TINY), "--size", "64x32", "--steps", "3", "--looks", "2", "--quiet"]
    assert main(["look", "a cat", "a dog", "--words", "a", "--share", *words, "--out", str(folder / "out")]) == 0
    assert main(["style-align", "a cat", "a dog", *words[:6], "--sampler", "euler", "--quiet",
                 "--out", str(folder / "drawn")]) == 0  # fmt: skip
    return folder / "out"


def test_the_command_writes_pictures_and_one_page_that_needs_nothing_else(out: Path):
    made = {"words.png", "masks.png", "layout.png", "gaze.png", "matches.png", "statistics.png"}
    assert {path.name for path in out.iterdir()} == made | {"0001.png", "0002.png", "statistics.csv", "index.html"}
    page = (out / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for code in re.findall(r"data:image/png;base64,([^\"]+)", page):
        Image.open(io.BytesIO(base64.b64decode(code))).verify()
    rows = list(csv.DictReader((out / "statistics.csv").open()))
    assert len(rows) == 3 * 10 * 2
    assert {row["tensor"] for row in rows} == {"h", *(f"skip {i}" for i in range(9))}


def test_with_share_the_pictures_are_those_of_style_align(out: Path):
    drawn = out.parent / "drawn"
    for ours, theirs in (("0001.png", "reference.png"), ("0002.png", "0001.png")):
        a, b = (np.array(Image.open(path)).astype(int) for path in (out / ours, drawn / theirs))
        assert np.abs(a - b).max() <= 1


def test_a_picture_of_what_was_held_is_made_again_bit_for_bit(out: Path, capfd):
    assert main(["redo", str(out / "words.png"), "--quiet"]) == 0
    assert "bit for bit" in capfd.readouterr().out


def test_with_an_adapter_the_pictures_are_those_of_instant_style_and_style_align(tmp_path: Path, capfd):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    adapter = ["--adapter", str(twins.TINY / "ip_adapter" / "ip-adapter_sdxl.safetensors"), "--image-encoder",
               str(twins.TINY / "image_encoder"), "--style-image", str(tmp_path / "a.png")]  # fmt: skip
    common = ["--model", str(twins.TINY), "--size", "64", "--steps", "2", "--quiet", *adapter]

    def drawn(name: str, *argv: str) -> Path:
        assert main([*argv, *common, "--out", str(tmp_path / name)]) == 0
        return tmp_path / name

    def same(one: Path, other: Path) -> bool:
        with Image.open(one) as a, Image.open(other) as b:
            return bool((np.abs(np.array(a).astype(int) - np.array(b)) <= 1).all())

    looked = drawn("looked", "look", "a cat", "--adapter-share", "1", "--adapter-scale", "0.8")
    assert same(looked / "0001.png", drawn("is", "instant-style", "a cat", "--scale", "0.8") / "0001.png")
    both = drawn("both", "look", "a cat", "a dog", "--share", "--range", "0", "0.5")
    set_ = drawn("set", "style-align", "a cat", "a dog", "--sampler", "euler", "--range", "0", "0.5")
    assert same(both / "0001.png", set_ / "reference.png")
    assert same(both / "0002.png", set_ / "0001.png")
    assert not same(both / "0001.png", looked / "0001.png")
    assert main(["redo", str(both / "words.png"), "--quiet"]) == 0
    assert main(["look", "a cat", *common, "--adapter-share", "2", "--out", str(tmp_path / "no")]) == 2
    assert "--adapter-share says" in capfd.readouterr().err


def test_the_words_that_are_looked_for_are_in_every_prompt_or_some_of_each():
    def found(*argv: str) -> list[str]:
        return words_of(parser().parse_args([*argv, "--model", "m"]))

    assert found("a toy train, origami", "a toy boat") == ["toy", "train", "origami"]
    assert found("a cat on a mat", "two dogs") == ["cat", "two", "mat", "dogs"]
    assert found("a", "b c", "--words", "z") == ["z"]
    with pytest.raises(CommandError, match="has no words"):
        found("a cat", "!!")


WRONG = {
    "no such word": (["a cat", "--words", "dog"], "'dog'"),
    "alone": (["a cat", "--share"], "second prompt"),
    "too many": (["a"] * 9, "1 ... 8 texts"),
    "nowhere": (["a cat", "--at", "2,3"], "say 0.25,0.75"),
    "controlled": (["a cat", "--control-model", str(twins.TINY / "controlnet")], "without ControlNets"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_looked_at_is_one_line(what: str, tmp_path: Path, capfd):
    words, says = WRONG[what]
    argv = ["look", *words, "--model", str(twins.TINY), "--size", "64", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(argv) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()

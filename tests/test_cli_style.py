"""`diaphane style-align` and `diaphane panorama` on the tiny model: what is drawn, recorded, refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diaphane.cli.main import main
from diaphane.methods import text_to_image as t2i
from diaphane.methods.prompt import encode, size_ids
from diaphane.methods.style_aligned import style_aligned
from diaphane.model.ops import TORCH
from diaphane.samplers.ddim import ddim
from diaphane.samplers.inversion import last
from diaphane.samplers.noise import seeded
from diaphane.samplers.path import leading
from diaphane.samplers.schedule import scaled_linear
from diaphane.weights.files import write
from PIL import Image

from .golden_latent import TINY, parts
from .latent_twins import scheduled

CONTROL = str(TINY / "controlnet")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def align(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """A run of style-align that succeeds; what it says."""
    common = ("--model", TINY, "--steps", 2, "--size", 64, "--quiet", "--out", out)
    code, said, error = run(capsys, "style-align", *words, *common)
    assert (code, error) == (0, "")
    return said


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return json.loads(picture.info["diaphane"])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that is neither square nor of the model's size."""
    rows = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(rows).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def lora(file: Path) -> Path:
    """A LoRA of one layer of the UNet and one of a tower."""
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    gen = torch.Generator().manual_seed(2)
    width, wide = 64, parts().towers[0].cfg.width
    tensors = {}
    for name, side in ((key, width), (text, wide)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, side, generator=gen)
        tensors[f"{name}.lora_up.weight"] = torch.randn(side, 2, generator=gen)
    write(file, tensors)
    return file


def test_a_set_is_what_the_functions_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    align(capsys, tmp_path / "o", "a cat", "a dog", "--style", "ink", "--seed", 4)
    prompts = encode(parts(), ["a cat, ink.", "a dog, ink."])
    denoise = t2i.denoiser(
        parts().unet, prompts, prompts.zeros(), schedule=scaled_linear(), ids=size_ids((64, 64), 2), guidance=5.0,
        ops=style_aligned(TORCH, [0, 0]),
    )  # fmt: skip
    x = t2i.pure_noise(parts(), seeded([4, 5]), (64, 64), 2)
    with torch.no_grad():
        want = t2i.pictures(parts().vae, last(ddim(denoise, x, scaled_linear(), leading(2, offset=1))).x)
    for name, row in zip(("reference.png", "0001.png"), want, strict=True):
        got = pixels(tmp_path / "o" / name)
        assert np.abs(got - ((row + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1


def test_where_the_schedule_ends_in_noise_alone_the_reference_is_the_picture_of_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    says = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduled(tmp_path / "model", says)
    common = ("--model", tmp_path / "model", "--steps", 3, "--size", 64, "--sampler", "ddim", "--quiet", "--out")
    assert run(capsys, "generate", "a", *common, tmp_path / "alone")[0] == 0
    assert run(capsys, "style-align", "a", "b", *common, tmp_path / "set")[0] == 0
    assert run(capsys, "panorama", "x", "--window", 64, "--styles", "a", *common, tmp_path / "wide")[0] == 0
    want = pixels(tmp_path / "alone" / "0001.png")
    assert (pixels(tmp_path / "wide" / "style-1.png") == want).all()
    assert (pixels(tmp_path / "set" / "reference.png") != want).mean() < 0.01  # by rounding, in a batch of two


def test_targets_do_not_depend_on_what_is_drawn_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for batch in (1, 2, 3):
        align(capsys, tmp_path / str(batch), "a", "b", "c", "d", "--batch", batch, "--preset", "defaults")
    names = ["0001.png", "0002.png", "0003.png", "reference.png", "sheet.png"]
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == names
    for name in names[:4]:
        for batch in ("2", "3"):
            assert np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / batch / name)).max() <= 1
    said = record(tmp_path / "2" / "0003.png")
    assert (said["seed"], said["prompt"], said["settings"]["preset"]) == (3, "d", "defaults")
    with Image.open(tmp_path / "2" / "0003.png") as picture:
        assert picture.info["parameters"].splitlines()[0] == "d"
        assert "CFG scale: 5, Seed: 3" in picture.info["parameters"]
    code, told, _ = run(capsys, "redo", tmp_path / "2" / "0003.png", "--quiet")
    assert (code, told.splitlines()[-1]) == (0, "the same, bit for bit")


@pytest.mark.parametrize("more", [("--preset", "defaults"), ("--attention", "off"), ("--sampler", "euler-a"), "lora",
                                  "control", "reference"])  # fmt: skip
def test_a_reference_that_is_kept_for_all_batches_draws_the_same(
    more: tuple | str, tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    words = {
        "lora": ("--lora-targets", lora(tmp_path / "l.safetensors")),
        "control": ("--control", photo, photo, photo, "--control-model", CONTROL),
        "reference": ("--reference", photo, "--noised"),
    }.get(str(more), more)
    texts = ("b", "c", "d") if more == "reference" else ("a", "b", "c", "d")
    for name, keep in (("alone", ()), ("kept", ("--keep",))):
        align(capsys, tmp_path / name, *texts, "--batch", 2, *words, *keep)
    for name in ("reference.png", "0001.png", "0002.png", "0003.png"):
        assert np.abs(pixels(tmp_path / "alone" / name) - pixels(tmp_path / "kept" / name)).max() <= 1
    before = pixels(tmp_path / "kept" / "0003.png")
    code, told, _ = run(capsys, "redo", tmp_path / "kept" / "0003.png", "--quiet")
    assert (code, told.splitlines()[-1]) == (0, "the same, bit for bit")
    for name in ("0003.png", "reference.png"):
        (tmp_path / "kept" / name).unlink()
    align(capsys, tmp_path / "kept", *texts, "--batch", 2, *words, "--keep", "--resume")
    assert np.abs(pixels(tmp_path / "kept" / "0003.png") - before).max() <= 1


def test_every_option_of_style_changes_the_targets_and_not_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ways = {
        "as it is": (),
        "scale": ("--scale", 0.5),
        "shift": ("--shift", 1.5),
        "norms": ("--norms", "on"),
        "adain": ("--adain", "v"),
        "none": ("--adain", "none"),
        "attention": ("--attention", "off"),
        "level": ("--level", 0.5),
        "sites": ("--sites", "mid", "up_blocks.0.attentions.1"),
        "nothing": ("--level", 1),
    }
    for name, words in ways.items():
        align(capsys, tmp_path / name, "a", "b", *words)
    first = pixels(tmp_path / "as it is" / "reference.png")
    assert all(np.abs(pixels(tmp_path / name / "reference.png") - first).max() <= 1 for name in ways)
    drawn = [pixels(tmp_path / name / "0001.png") for name in ways]
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_picture_is_the_reference_inverted_or_noised(tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path):
    drawn = []
    ways = ((), ("--noised",), ("--invert-guidance", 1), ("--offset", 1), ("--preset", "famous"))
    for i, words in enumerate(ways):
        out = tmp_path / str(i)
        told = ("--reference", photo, "--reference-prompt", "noise", "--style", "ink", *words)
        align(capsys, out, "a cat", "--n", 2, *told)
        assert sorted(p.name for p in out.iterdir()) == ["0001.png", "0002.png", "reference.png", "sheet.png"]
        drawn.append(pixels(out / "0001.png"))
        assert (pixels(out / "reference.png") == pixels(tmp_path / "0" / "reference.png")).all()
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])
    assert record(tmp_path / "0" / "0001.png")["prompt"] == "a cat, ink."
    assert record(tmp_path / "0" / "reference.png")["prompt"] == "noise"
    code, told, _ = run(capsys, "redo", tmp_path / "1" / "0002.png", "--quiet")
    assert (code, told.splitlines()[-1]) == (0, "the same, bit for bit")


def test_a_picture_that_was_inverted_before_is_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path
):
    words = ("--model", TINY, "--prompt", "noise", "--steps", 3, "--size", 64, "--quiet", "--out", tmp_path / "i")
    assert run(capsys, "invert", photo, *words)[0] == 0
    (found,) = (tmp_path / "i").glob("*trajectory.safetensors")
    words = ("--reference-trajectory", found, "--model", TINY, "--quiet")
    assert run(capsys, "style-align", "a", "b", *words, "--out", tmp_path / "o")[0] == 0
    said = record(tmp_path / "o" / "0002.png")["settings"]
    assert (said["size"], said["steps"]) == ("64x64", 3)
    code, told, _ = run(capsys, "redo", tmp_path / "o" / "0001.png", "--quiet")
    assert (code, told.splitlines()[-1]) == (0, "the same, bit for bit")
    for more, why in ((("--size", 128), "is of 64x64"), (("--noised",), "not inverted yet"),
                      (("--reference", photo), "two references")):  # fmt: skip
        code, _, error = run(capsys, "style-align", "a", *words, *more, "--out", tmp_path / "x")
        assert (code, error.count("\n"), why in error) == (2, 1, True), error
    code, _, error = run(capsys, "style-align", "a", "--reference-trajectory", photo, "--model", TINY)
    assert (code, "is no trajectory" in error) == (2, True)


def test_hints_are_for_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path):
    Image.new("RGB", (64, 64), (200, 30, 90)).save(tmp_path / "b.png")
    align(capsys, tmp_path / "plain", "a", "b", "c")
    align(capsys, tmp_path / "one", "a", "b", "c", "--control", photo, "--control-model", CONTROL, "--batch", 1)
    align(capsys, tmp_path / "two", "a", "b", "c", "--control", photo, tmp_path / "b.png", "--control-model", CONTROL)
    assert np.abs(pixels(tmp_path / "plain" / "reference.png") - pixels(tmp_path / "two" / "reference.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "one" / "0001.png") - pixels(tmp_path / "two" / "0001.png")).max() <= 1
    for other in ("plain", "one"):
        assert (pixels(tmp_path / other / "0002.png") != pixels(tmp_path / "two" / "0002.png")).any()


def test_a_lora_for_targets_is_not_for_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora(tmp_path / "lora.safetensors")
    align(capsys, tmp_path / "plain", "a", "b")
    said = align(capsys, tmp_path / "lora", "a", "b", "--lora-targets", f"{tmp_path / 'lora.safetensors'}:0.7")
    assert "targets only: 1 of unet, 1 of text_encoder" in said
    names = [tmp_path / way / "reference.png" for way in ("plain", "lora")]
    assert np.abs(pixels(names[0]) - pixels(names[1])).max() <= 1
    assert (pixels(tmp_path / "plain" / "0001.png") != pixels(tmp_path / "lora" / "0001.png")).any()
    assert record(names[0])["weights"]["sha256"] != record(names[1])["weights"]["sha256"]


def test_a_style_that_no_tower_reads_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = align(capsys, tmp_path / "o", "a cat", "a dog", "--style", "ink " * 90)
    assert said.count("are cut off: ink ink") == 2


def test_a_set_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lines.txt").write_text("a\n\nb\nc\n")
    words = ("--prompts", tmp_path / "lines.txt", "--batch", 1)
    align(capsys, tmp_path / "o", *words)
    before = pixels(tmp_path / "o" / "0002.png")
    (tmp_path / "o" / "0002.png").unlink()
    stamp = (tmp_path / "o" / "0001.png").stat().st_mtime_ns
    align(capsys, tmp_path / "o", *words, "--resume")
    assert (pixels(tmp_path / "o" / "0002.png") == before).all()
    assert (tmp_path / "o" / "0001.png").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "give prompts, or --prompts FILE"),
        (("a", "--prompts", "lines.txt"), "and not both"),
        (("a",), "no other to be like"),
        (("a", "b", "--reference-prompt", "x"), "give --reference"),
        (("a", "b", "--noised"), "--noised says what becomes of a reference picture"),
        (("a", "b", "--offset", 0), "--offset says what becomes of a reference picture"),
        (("a", "b", "--level", 0.01), "less than one of 28 layers"),
        (("a", "b", "--level", 0.5, "--sites", "mid"), "give one"),
        (("a", "b", "--sites", "dec.9"), "there is no dec.9"),
        (("a", "b", "--sites", "enc.1"), "enc.1 has no self-attention"),
        (("a", "b", "--adain", "none", "q"), "none, or some of q k v"),
        (("a", "b", "--scale", -1), "not a number in 0"),
        (("a", "b", "--eta", 0.5, "--sampler", "euler"), "give --sampler ddim"),
        (("a", "b", "--control", "x.png"), "give both"),
        (("a", "b", "--control-model", CONTROL), "give both"),
        (("a", "b", "--reference", "nowhere.png"), "cannot read nowhere.png"),
        (("a", "b", "--reference", "x.png", "--offset", 2), "0 ... 1"),
        (("a", "b", "--control", "x.png", "y.png", "z.png", "--control-model", CONTROL), "one for each of 1 targets"),
        (("a", "b", "c", "--all-see-all", "--batch", 1), "give --batch 2"),
        (("a", "b", "--all-see-all", "--keep"), "leave --keep out"),
        (("a", "b", "--all-see-all", "--scale", 0.5), "--scale says nothing with --all-see-all"),
        (("a", "b", "--all-see-all", "--attention", "off"), "--attention says nothing with --all-see-all"),
        (("a", "b", "--attention", "off", "--shift", 1), "--shift says nothing with --attention off"),
        (("a", "b", "--size", "63"), "multiples of 8"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple, why: str):
    size = () if "--size" in words else ("--size", 64)
    code, _, error = run(capsys, "style-align", *words, "--model", TINY, "--steps", 2, *size, "--out", tmp_path / "o")
    assert code == 2
    assert error.startswith("diaphane style-align: ")
    assert error.count("\n") == 1
    assert why in error
    assert not (tmp_path / "o").exists()


def wide(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> tuple[int, str]:
    """A run of panorama."""
    common = ("--model", TINY, "--steps", 2, "--window", 64, "--stride", 32, "--quiet", "--out", out)
    code, _, error = run(capsys, "panorama", *words, *common)
    return code, error


def test_panoramas_have_their_size_styles_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path):
    styled = ("--styles", "b, ink", "--reference", photo, "--reference-prompt", "c", "--at", 1, 0)
    for name, words in {"plain": (), "round": ("--circular",), "two": styled, "batch": (*styled, "--batch", 1)}.items():
        assert wide(capsys, tmp_path / name, "a", "--size", "160x64", *words) == (0, "")
        assert pixels(tmp_path / name / "0001.png").shape == (64, 160, 3)
    names = ["0001.png", "sheet.png", "style-1.png", "style-2.png"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == names
    assert pixels(tmp_path / "two" / "style-2.png").shape == (64, 64, 3)
    assert np.abs(pixels(tmp_path / "two" / "0001.png") - pixels(tmp_path / "batch" / "0001.png")).max() <= 1
    assert (pixels(tmp_path / "plain" / "0001.png") != pixels(tmp_path / "round" / "0001.png")).any()
    code, told, _ = run(capsys, "redo", tmp_path / "two" / "0001.png", "--quiet")
    assert (code, told.splitlines()[-1]) == (0, "the same, bit for bit")


def test_a_panorama_of_one_window_is_a_picture_of_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert wide(capsys, tmp_path / "o", "a", "--size", 64, "--seed", 3) == (0, "")
    words = ("a", "--size", 64, "--seed", 3, "--sampler", "ddim", "--steps", 2, "--model", TINY, "--quiet")
    assert run(capsys, "generate", *words, "--out", tmp_path / "g")[0] == 0
    assert (pixels(tmp_path / "o" / "0001.png") == pixels(tmp_path / "g" / "0001.png")).all()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("a", "--stride", 72), "would leave gaps"),
        (("a", "--window", 60), "--window is a multiple of 8"),
        (("a", "--stride", 30), "--stride is a multiple of 8"),
        (("a", "--at", 0.5), "one place for each of 0 styles"),
        (("a", "--reference-prompt", "x"), "one for each of 0 --reference"),
        (("a", "--control-model", CONTROL), "not with windows"),
        (("a", "--noised"), "give --reference"),
        ((), "give a prompt"),
    ],
)
def test_bad_panoramas_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple, why: str):
    code, error = run(capsys, "panorama", "--model", TINY, "--window", 64, "--size", "96x64", "--out", tmp_path / "o",
                      *words)[::2]  # fmt: skip
    assert (code, error.count("\n"), why in error) == (2, 1, True), error
    assert not (tmp_path / "o").exists()

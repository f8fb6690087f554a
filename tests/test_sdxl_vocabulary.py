"""CLIP's own vocabulary, which ships with the package: what it is, and transformers' ids on 2,000 adversarial texts."""

import hashlib
import json
import random
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from diaphane.cli.main import main
from diaphane.model.tokenizer import END, START, Tokenizer, read_merges, vocabulary_of
from diaphane.weights import pipeline
from diaphane.weights.words import MERGES, own_words
from safetensors.torch import load_file, save_file

from .latent_twins import TINY

PADS = {"text_encoder": END, "text_encoder_2": "!"}
RANGES = {  # of code points, by what they are
    "latin and greek": (0x20, 0x400),
    "hebrew and arabic, right to left": (0x590, 0x700),
    "indic, with marks": (0x900, 0xE00),
    "combining marks": (0x300, 0x370),
    "controls": (0x00, 0x20),
    "more controls": (0x7F, 0xA1),
    "zero width, directions, spaces": (0x2000, 0x2070),
    "hangul": (0xAC00, 0xD7A4),
    "cjk": (0x4E00, 0x9FFF),
    "half and full width": (0xFF00, 0xFFEF),
    "emoji": (0x1F300, 0x1FAFF),
    "flags and tags": (0xE0001, 0xE0080),
    "mathematical letters": (0x1D400, 0x1D800),
    "variation selectors": (0xFE00, 0xFE10),
    "private": (0xE000, 0xF8FF),
    "the last ones": (0x10FF00, 0x110000),
    "anything below the surrogates": (0x00, 0xD800),
}
SENTENCES = """
a photo of an armchair in the shape of an avocado, trending on artstation, 8k, f/1.8 (masterpiece:1.2) they're I'LL
don't rock'n'roll 1girl!! best_quality --no text <lora:x:1> BREAK [a|b] C++ $5.99 50% e\u0301 ﬁ ß İ ǅ Σας ½ Ⅷ x² 한국어
日本語 עברית العربية हिन्दी 👩\u200d👩\u200d👧 👍🏽 🏳\ufe0f\u200d🌈 \u202eevil\u202c \ufeff \u00ad \x00 \x1b[31m
<|endoftext|> <|startoftext|> </w>
"""
WORDS = SENTENCES.split()
GAPS = (" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "")


def texts() -> list[str]:
    """2,000 of them."""
    draw = random.Random(3)
    out = ["", " ", "\n\t ", "!", "a" * 10_000, "quality " * 1250, "\u0301" * 10_000, "日" * 10_000, "👩\u200d" * 3333]
    out += ["!" * 10_000, "ａ" * 500, "<|endoftext|>" * 100, "'s" * 1000, " " * 10_000 + "end", "\U0001f1e9\U0001f1ea"]
    for low, high in RANGES.values():
        for n in (1, 2, 5, 16):
            out += ["".join(chr(draw.randrange(low, high)) for _ in range(n)) for _ in range(14)]
    while len(out) < 2000:
        pieces = [draw.choice(WORDS) + draw.choice(GAPS) for _ in range(draw.randint(1, 20))]
        if draw.random() < 0.3:
            low, high = draw.choice(list(RANGES.values()))
            pieces.insert(draw.randrange(len(pieces)), "".join(chr(draw.randrange(low, high)) for _ in range(4)))
        out.append("".join(pieces))
    return [text for text in out if not any("\ud800" <= ch <= "\udfff" for ch in text)]


def own(text: str, **options: bool) -> Tokenizer:
    """The package's tokeniser of a text encoder."""
    vocabulary, merges, pad = own_words({"text_encoder": True, "text_encoder_2": False})[text]
    return Tokenizer(vocabulary, merges, pad=pad, **options)


def test_the_vocabulary_is_256_bytes_twice_the_merges_and_two_ends():
    pairs = read_merges(MERGES)
    words = vocabulary_of(pairs)
    assert (len(pairs), len(words)) == (48_894, 49_408)
    assert sorted(words.values()) == list(range(49_408))
    assert [words[token] for token in ("!", "!</w>", "in", START, END)] == [0, 256, 512, 49_406, 49_407]
    said = (MERGES.parent / "README.md").read_text()
    assert hashlib.sha256(MERGES.read_bytes()).hexdigest() in said


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_a_published_vocabulary_is_the_one_that_its_merges_give(folder: str):
    want = json.loads((TINY / folder / "vocab.json").read_bytes())
    assert vocabulary_of(read_merges(TINY / folder / "merges.txt")) == want


def test_texts_have_the_ids_that_are_in_clips_papers_and_readmes():
    tokens = own("text_encoder")
    assert tokens.ids("a photo of a cat") == [49_406, 320, 1125, 539, 320, 2368, 49_407]
    assert tokens.ids("a diagram") == [49_406, 320, 22_697, 49_407]
    assert own("text_encoder_2")("a dog").tolist() == [[49_406, 320, 1929, 49_407, *[0] * 73]]


@pytest.mark.parametrize("text", PADS)
def test_two_thousand_adversarial_texts_have_transformers_ids(tmp_path: Path, text: str):
    from transformers import CLIPTokenizer

    words = vocabulary_of(read_merges(MERGES))
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_bytes(MERGES.read_bytes())
    said = {"pad_token": PADS[text], "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    theirs, ours, many = CLIPTokenizer.from_pretrained(tmp_path), own(text), texts()
    assert len(many) >= 1990
    for one, want in zip(many, theirs(many)["input_ids"], strict=True):
        assert ours.ids(one) == want, repr(one[:80])
    assert ours(many).tolist() == theirs(many, padding="max_length", max_length=77, truncation=True)["input_ids"]


def test_pieces_spell_their_text():
    tokens = own("text_encoder")
    for said in ("a photo of a cat", "日本語 👍🏽 ünï", "x² 50 % of ½", "\x00 \x1b \u200d"):
        assert tokens.text(tokens.pieces(said)[1:-1]).replace(" ", "") == said.replace(" ", "")
    assert tokens.text(["ðŁ", "ĳ"]) == "\ufffd"


def test_an_exclamation_mark_is_the_padding_of_the_second_tower_or_text():
    assert own("text_encoder").ids("wow!")[-2] == 256
    assert own("text_encoder_2").ids("wow!")[-2] == 0
    assert own("text_encoder_2", cut_pad=False).ids("wow!")[-2] == 256


@pytest.mark.parametrize("half", ["\ud83d", "a\udc00b", "\udfff\ud800"])
def test_half_a_character_is_an_error_that_says_where(half: str):
    with pytest.raises(ValueError, match=r"half a character \(a lone surrogate\) at [01]"):
        own("text_encoder").ids(half)


def test_the_command_cuts_prompts_with_it(capsys: pytest.CaptureFixture[str]):
    assert main(["tokens", "a photo of a cat!", "--ids"]) == 0
    said = capsys.readouterr().out
    assert "cat</w>(2368) !</w>(256)" in said
    assert "cat</w>(2368) !(0)" in said


def test_a_folder_without_tokenisers_gets_it_where_its_towers_have_as_many_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    left = shutil.ignore_patterns("single*", "ip_adapter", "image*", "controlnet", "tokenizer*")
    shutil.copytree(TINY, tmp_path / "m", ignore=left)
    assert pipeline.load(tmp_path / "m").words == {}
    for name in PADS:
        config = tmp_path / "m" / name / "config.json"
        config.chmod(0o644)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 49_408}))
        tensors = load_file(config.with_name("model.safetensors"))
        key = next(key for key in tensors if key.endswith("token_embedding.weight"))
        tensors[key] = tensors[key].repeat(62, 1)[:49_408]
        config.with_name("model.safetensors").unlink()
        save_file(tensors, config.with_name("model.safetensors"))
    assert pipeline.load(tmp_path / "m").words == own_words({"text_encoder": True, "text_encoder_2": False})
    words = ["generate", "a cat", "--model", str(tmp_path / "m"), "--size", "32", "--steps", "1", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    assert main([*words, "--out", str(tmp_path / "o"), "--tokenizer", str(TINY)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "text_encoder has 49408 tokens, its tokeniser" in error
    assert "has 800: they are of different models" in error


def test_its_licence_and_its_card_are_in_the_package():
    folder = files("diaphane.weights") / "embedded" / "clip"
    assert "Copyright (c) 2021 OpenAI" in (folder / "LICENSE").read_text()
    assert "MIT" in (folder / "README.md").read_text()

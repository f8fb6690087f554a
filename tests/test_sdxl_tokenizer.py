"""CLIP's tokeniser: the reference ids, transformers' on difficult texts, both pads, and what it refuses."""

import json
import random
from pathlib import Path

import pytest
from diaphane.model.tokenizer import END, Tokenizer
from diaphane.weights.words import Folder, words_in

from .latent_twins import CASES, TINY

PADS = {"tokenizer": END, "tokenizer_2": "!"}
PIECES = [
    *(
        "a",
        "B",
        "é",
        "e\u0301",
        "ẞ",
        "İ",
        "日本",
        "☕",
        "👩\u200d👩\u200d👧",
        "\u200d",
        "\ufe0f",
        "!",
        "!!",
        "'s",
        "'RE",
        "’s",
    ),
    *("1", "23", "½", "Ⅷ", "_", "-", "#", "…", "ﬁ", "\u0301", "ǅ", "Σ", "ς", "\U0010ffff", "in", "quality", "</w>"),
    *("<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "<|endof", "|>", "\x00", "\x07", "\x7f", "\u180e", "\x85"),
    *(" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028"),
]


def tiny(folder: str, **options: object) -> Tokenizer:
    settings = {"pad": PADS[folder]} | options
    return Tokenizer(TINY / folder / "vocab.json", TINY / folder / "merges.txt", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("folder", "k"), [("tokenizer", 1), ("tokenizer_2", 2)])
def test_the_reference_texts_have_the_reference_ids(folder: str, k: int):
    tokenizer, cases = tiny(folder), json.loads((CASES / "01_tokenizer.json").read_text())
    for case in cases:
        assert tokenizer.ids(case["text"]) == case[f"unpadded_{k}"], case["text"]
    assert tokenizer([case["text"] for case in cases]).tolist() == [case[f"ids_{k}"] for case in cases]


@pytest.mark.parametrize("folder", PADS)
def test_difficult_texts_have_transformers_ids(folder: str):
    from transformers import CLIPTokenizer

    theirs, ours = CLIPTokenizer.from_pretrained(TINY / folder), tiny(folder)
    draw = random.Random(folder)
    texts = ["".join(draw.choice(PIECES) for _ in range(draw.randint(0, 12))) for _ in range(1500)]
    texts += ["".join(chr(draw.randrange(0x20, 0xD800)) for _ in range(8)) for _ in range(500)]
    texts += ["quality " * 1250, "!" * 1000, "\u0301" * 300]
    for text in texts:
        assert ours.ids(text) == theirs(text)["input_ids"], text
    padded = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ours(texts).tolist() == padded


def test_a_literal_exclamation_mark_is_the_pad_only_where_the_pad_is_cut_out():
    cut, whole = tiny("tokenizer_2"), tiny("tokenizer_2", cut_pad=False)
    assert cut.ids("a!!")[2:-1] == [0, 0]
    assert whole.ids("a!") == [798, 320, 256, 799]
    assert whole.ids("a!!") == tiny("tokenizer").ids("a!!")
    assert whole("a").tolist() == cut("a").tolist()
    assert whole("a")[0, -1] == 0


def test_a_long_text_is_cut_with_its_end_last_and_a_short_one_is_padded():
    tokenizer = tiny("tokenizer_2")
    long, short = tokenizer(["a " * 200, "a"])
    assert (int(long[0]), int(long[-1])) == (tokenizer.start, tokenizer.end)
    assert short.tolist()[2:] == [tokenizer.end] + [tokenizer.pad] * 74
    assert tiny("tokenizer", length=5)(["a " * 9]).shape == (1, 5)
    assert tokenizer([]).shape == (0, 77)


def test_pieces_say_what_ids_number():
    assert tiny("tokenizer").pieces("in Quality") == ["<|startoftext|>", "in</w>", "quality</w>", "<|endoftext|>"]


def test_what_is_no_text_is_an_error():
    tokenizer = tiny("tokenizer")
    with pytest.raises(ValueError, match="a prompt is text, not int"):
        tokenizer([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"half a character \(a lone surrogate\) at 2"):
        tokenizer("ab\ud800")


@pytest.mark.parametrize("folder", PADS)
@pytest.mark.parametrize("joined", [False, True])
def test_a_tokeniser_in_one_file_is_the_same(tmp_path: Path, folder: str, joined: bool):
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(TINY / folder).save_pretrained(tmp_path / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    if joined:  # as older files have their pairs
        whole = json.loads(file.read_text())
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        file.write_text(json.dumps(whole))
    words = words_in(Folder(str(tmp_path)), "tokenizer")
    assert words == (file, file, PADS[folder])
    ours, theirs = Tokenizer(words.vocabulary, words.merges, pad=words.pad), tiny(folder)
    texts = ["In the Quality of a cat's ½ ☕, 42!!", "", "<|endoftext|>"]
    assert ours(texts).tolist() == theirs(texts).tolist()
    assert ours.size == theirs.size


@pytest.mark.parametrize(
    ("whole", "what"),
    [
        ('{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}', "has no merges"),
        ('{"model": {"vocab": {"a": 0}, "merges": [["a"]]}}', "merge 1: 'a' is no pair"),
        ('{"model": {"vocab": {"a": 0}, "merges": []}}', r"has no <\|startoftext\|>"),
        ('{"model": {"vocab": {"a": "b"}, "merges": []}}', "should map tokens to ids"),
        ("[]", "has no merges"),
        ("{", "is not json"),
    ],
)
def test_one_file_that_is_no_tokeniser_of_clip_is_an_error_that_names_it(tmp_path: Path, whole: str, what: str):
    (tmp_path / "tokenizer.json").write_text(whole)
    with pytest.raises(ValueError, match=what):
        Tokenizer(tmp_path / "tokenizer.json", tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("vocabulary", "merges", "what"),
    [
        ("{", "", "is not json"),
        ("[1]", "", "should map tokens to ids"),
        ('{"a": "b"}', "", "should map tokens to ids"),
        ('{"a": 0}', "", r"has no <\|startoftext\|>"),
        ('{"<|startoftext|>": 0, "<|endoftext|>": 1}', "#version: 0.2\na b c\n", "line 2: 'a b c' is no pair"),
        ('{"<|startoftext|>": 0, "<|endoftext|>": 1}', "a b\n", "does not fit"),
    ],
)
def test_files_that_are_no_vocabulary_are_errors_that_name_them(
    tmp_path: Path, vocabulary: str, merges: str, what: str
):
    (tmp_path / "v.json").write_text(vocabulary)
    (tmp_path / "m.txt").write_text(merges)
    with pytest.raises(ValueError, match=what):
        Tokenizer(tmp_path / "v.json", tmp_path / "m.txt")

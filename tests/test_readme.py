"""The README's own code, names and commands."""

import re
import shlex
from pathlib import Path

import pytest
from diaphane.cli.main import COMMANDS, main
from diaphane.weights.load import embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TINY = str(Path(__file__).parent / "golden" / "tiny-ddpm")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


def test_the_readmes_python_taps_h_and_skips(capsys: pytest.CaptureFixture[str]):
    exec(code().replace('load("shapes")', f"load({TINY!r})"), {})
    assert capsys.readouterr().out.startswith("torch.Size([2, 64, 8, 8]) [(32, 32, 32)")


@pytest.mark.skipif("shapes" not in embedded(), reason="the embedded model is not there")
def test_the_readmes_python_runs_as_it_stands(capsys: pytest.CaptureFixture[str]):
    exec(code(), {})
    assert capsys.readouterr().out.startswith("torch.Size([2, 128, 4, 4])")


def test_the_python_is_about_twenty_lines():
    lines = [line for line in code().splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 20


def test_the_make_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) == {"demo", "test"} <= set(targets)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_and_commands_that_are_named_exist(path: Path):
    text = path.read_text()
    named = re.findall(r"`((?:model|samplers|kernels|methods|weights|tests|docs|examples)/[\w./-]*)`", text)
    named += [link for link in re.findall(r"\]\(([\w./-]+)\)", text) if "://" not in link]
    for name in named:
        assert (ROOT / name).exists() or (path.parent / name).exists(), name
    said = set(re.findall(r"diaphane (\w[\w-]*)", " ".join(re.findall(r"`[^`]+`|^diaphane .*$", text, re.MULTILINE))))
    assert said <= {*COMMANDS, "COMMAND"}


def test_the_examples_in_the_help_are_understood(capsys: pytest.CaptureFixture[str]):
    from importlib import import_module

    for command in COMMANDS:
        parser = import_module(f"diaphane.cli.{command.replace('-', '_')}").parser()
        epilog = re.sub(r"\\\n *", "", parser.epilog or "")  # a line that goes on
        for words in re.findall(rf"^  diaphane {command}(| .*)$", epilog, re.MULTILINE):
            parser.parse_args(shlex.split(words))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("diaphane ")

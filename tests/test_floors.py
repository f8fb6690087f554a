"""Which folder may import which, what the package holds, and what its files may not do."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "samplers": set(),
    "weights": set(),
    "model": {"kernels"},
    "methods": {"model", "samplers", "kernels"},
    "cli": {"model", "samplers", "kernels", "methods", "weights"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).glob("*.py"))
OUTSIDE = sorted(path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str, int, bool]]:
    """(relative level, dotted name, line, whether at the top of the file) of every import of a file."""
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name, node.lineno, top) for name in names)


def breach(folder: str, level: int, name: str) -> str | None:
    """What is wrong with one import, or None."""
    first = name.split(".")[0]
    if level == 0 and (first == "diaphane" or first in MAY_IMPORT):
        return f"imports {name} absolutely; inside the package imports are relative"
    if level == 0 and first in ("diffusers", "transformers"):
        return f"imports {name}, which is for tests, benchmarks and examples"
    if level == 2 and first not in MAY_IMPORT[folder]:
        return f"imports {first}, which is not below {folder}"
    if level > 2:
        return "imports from outside the package"
    return None


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_folder_imports_only_the_floors_below_it(path: Path):
    for level, name, line, _ in imports(path):
        wrong = breach(path.parent.name, level, name)
        assert wrong is None, f"{name_of(path)}:{line} {wrong}"


@pytest.mark.parametrize(
    ("folder", "level", "name"),
    [
        ("kernels", 2, "model.ops"),
        ("samplers", 2, "model"),
        ("weights", 2, "samplers.path"),
        ("model", 2, "methods.asyrp"),
        ("model", 2, "weights"),
        ("methods", 2, "weights.hub"),
        ("methods", 2, "cli"),
        ("methods", 0, "model.blocks"),
        ("cli", 0, "diaphane.model"),
        ("weights", 0, "diffusers"),
        ("cli", 3, "tests"),
    ],
)
def test_the_floors_test_sees_a_breach(folder: str, level: int, name: str):
    assert breach(folder, level, name)


def test_there_is_something_on_the_floors():
    assert {"model/blocks.py", "kernels/reference.py"} <= {name_of(path) for path in SOURCES}


def test_files_beside_the_package_import_it_by_its_name():
    for path in OUTSIDE:
        for level, name, line, _ in imports(path):
            assert level or name.split(".")[0] not in MAY_IMPORT, (
                f"{name_of(path)}:{line} imports {name}, not diaphane.{name}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_needs_nothing_at_import_that_a_plain_install_lacks(path: Path):
    declared = {re.split(r"[<>=;\[ ]", d)[0] for d in PROJECT["project"]["dependencies"]}
    have = {"pillow": "PIL"} | {name: name for name in declared - {"pillow"}}
    known = set(have.values()) | set(sys.stdlib_module_names)
    kernel = path.stem.endswith("_triton")  # Linux alone has Triton: such files are imported where there is a GPU
    known -= set() if kernel else {"triton"}
    for level, name, line, top in imports(path):
        assert level or not top or name.split(".")[0] in known, f"{name_of(path)}:{line} imports {name} at its top"
        assert kernel or not top or not name.endswith("_triton"), f"{name_of(path)}:{line} imports {name} at its top"


def test_the_package_list_is_the_folders_on_disk():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert set(setuptools["packages"]) == {f"diaphane.{folder}" for folder in folders}
    assert setuptools["package-dir"] == {f"diaphane.{folder}": folder for folder in folders}
    assert all("py.typed" in setuptools["package-data"][f"diaphane.{folder}"] for folder in folders)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_is_flat_and_typed_and_its_init_is_one_docstring(folder: str):
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, []))
    assert (ROOT / folder / "py.typed").is_file()
    assert not list((ROOT / folder).glob("*/**/*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_opens_with_a_sentence_and_is_short_enough_to_read(path: Path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, f"{name_of(path)} opens without saying what it is"
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ":", "?")), f"{name_of(path)}'s first sentence has no end"
    assert len(text.splitlines()) <= 300, f"{name_of(path)} has more than 300 lines"


def in_place(tree: ast.AST) -> list[str]:
    """Calls that change a tensor where it lies, by name and line."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(c, c.func.attr) for c in calls if isinstance(c.func, ast.Attribute)]
    found = [(c.lineno, n) for c, n in named if re.fullmatch(r"[a-z]\w*[^_]_", n) and n != "requires_grad_"]
    found += [(c.lineno, k.arg) for c in calls for k in c.keywords if k.arg in ("inplace", "out")]
    return [f"{line}: {name}" for line, name in found]


@pytest.mark.parametrize("path", sorted((ROOT / "model").glob("*.py")), ids=name_of)
def test_nothing_in_a_network_is_in_place(path: Path):
    assert in_place(ast.parse(path.read_text())) == []


def test_the_in_place_test_sees_what_is_in_place():
    seen = (
        "x.add_(y); F.relu(x, inplace=True); torch.add(x, y, out=x); x.__len__(); x.add(y); net.requires_grad_(False)"
    )
    assert in_place(ast.parse(seen)) == ["1: add_", "1: inplace", "1: out"]

"""The reference data: every case file under --golden DIR, one test a case; what is not known there is a failure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import golden_consistory, golden_hspace, golden_instantstyle, golden_stylealigned
from .golden_reader import Case, Folder

GOLDEN = Path(__file__).parent / "golden"

METHODS = {
    "consistory": golden_consistory.cases,
    "hspace": golden_hspace.cases,
    "instantstyle": golden_instantstyle.cases,
    "stylealigned": golden_stylealigned.cases,
}


def collect(root: Path) -> list[Case]:
    """Every case under a folder of method folders, or in one of these; the tiny networks beside them are not cases."""
    if not root.is_dir():
        raise pytest.UsageError(f"--golden {root}: no such folder")
    cases: list[Case] = []
    alone = root.name in METHODS and not any((root / name).is_dir() for name in METHODS)
    for path in [root] if alone else sorted(root.iterdir()):
        if path.name.startswith("tiny-") or path.name == "README.md":
            continue
        if path.name not in METHODS:
            cases.append(Case(f"{path.name}", refuse, Folder(path)))
            continue
        for case in METHODS[path.name](Folder(path)):
            case.name = f"{path.name}/{case.name}"
            cases.append(case)
    if not cases:
        raise pytest.UsageError(f"--golden {root}: no method folder in it; known are {', '.join(METHODS)}")
    return cases


def refuse(case: Case):
    raise AssertionError(f"{case.folder.path} is of no known method: known are {', '.join(METHODS)}")


def pytest_generate_tests(metafunc: pytest.Metafunc):
    if "golden_case" in metafunc.fixturenames:
        cases = collect(metafunc.config.option.golden)
        metafunc.parametrize("golden_case", cases, ids=[case.name for case in cases])


def test_golden(golden_case: Case):
    if golden_case.skip:
        pytest.skip(golden_case.skip)
    golden_case.check()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder whose hspace may be changed: the small files of the reference data."""
    small = [
        p for p in (GOLDEN / "hspace").iterdir() if not p.stem.startswith(("unet", "formula", "asyrp_", "steps_adm"))
    ]
    (tmp_path / "hspace").mkdir()
    for path in small:
        shutil.copy(path, tmp_path / "hspace")
    return tmp_path


def failures(root: Path, only: str = "") -> list[str]:
    """The names of the cases under a folder that fail, of those whose name contains `only`."""
    found = []
    for case in collect(root):
        if not case.skip and only in case.name:
            try:
                case.check()
            except AssertionError:
                found.append(case.name)
    return found


def edit_json(root: Path, stem: str, change: Callable[[dict], object]):
    path = root / "hspace" / f"{stem}.json"
    document = json.loads(path.read_text())
    change(document)
    path.chmod(0o644)
    path.write_text(json.dumps(document))


def edit_tensors(root: Path, stem: str, change: Callable[[dict[str, Tensor]], object]):
    path = root / "hspace" / f"{stem}.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def test_one_method_s_folder_may_be_named_alone(copy: Path):
    assert [case.name for case in collect(copy / "hspace")] == [case.name for case in collect(copy)]


def test_case_files_may_be_absent(copy: Path):
    assert failures(copy, "unknown") == []
    skipped = {case.name: case.skip for case in collect(copy) if case.skip}
    assert skipped["hspace/inject.steps.adm"] == "steps_adm.safetensors is not in this folder"


def test_an_unknown_folder_fails_by_its_name(copy: Path):
    (copy / "watercolour").mkdir()
    assert failures(copy, "watercolour") == ["watercolour"]


@pytest.mark.parametrize("name", ["steps_ncsn.safetensors", "steps.safetensors", "notes.txt", "other.json"])
def test_an_unknown_file_fails_by_its_name(copy: Path, name: str):
    source = copy / "hspace" / ("steps_ddpm.safetensors" if name.endswith("safetensors") else "asyrp.json")
    shutil.copy(source, copy / "hspace" / name)
    assert f"hspace/unknown file {name}" in failures(copy, "unknown file")


def test_an_unknown_json_key_fails_by_its_name(copy: Path):
    edit_json(copy, "inject", lambda d: d.update(weather={}))
    edit_json(copy, "asyrp", lambda d: d["t_select"].update(celeba_x=[[1, 0.1]]))
    wrong = {"hspace/unknown t_select table celeba_x", "hspace/unknown key weather in inject.json"}
    assert set(failures(copy, "unknown")) == wrong


def test_a_setting_that_no_case_reads_fails(copy: Path):
    edit_json(copy, "inject", lambda d: d["steps"]["ddpm"]["slerp"].update(sharpness=2))
    edit_json(copy, "inject", lambda d: d["diffstyle"][0]["args"].update(sharpness=2))
    assert failures(copy, "steps_ddpm-slerp") == ["hspace/steps_ddpm-slerp"]
    assert failures(copy, "diffstyle_ddpm-basic") == ["hspace/diffstyle_ddpm-basic"]


@pytest.mark.parametrize("name", ["slerp.x_wrong", "watercolour", "x_t3"])
def test_a_tensor_that_no_case_reads_fails(copy: Path, name: str):
    edit_tensors(copy, "steps_ddpm", lambda t: t.update({name: t["x_t0"].clone()}))
    wrong = "hspace/steps_ddpm-slerp" if "." in name else f"hspace/unknown tensor {name} in steps_ddpm.safetensors"
    assert wrong in failures(copy, "steps_ddpm")


@pytest.mark.parametrize(
    ("stem", "group", "changed"),
    [
        ("2_sdsa_attention", "full", {"curr_iter": 0}),  # nothing is seen of others yet
        ("4_dift_injection", "dift", {"step": 17}),  # nothing is carried any more
        ("4_dift_injection", "dift", {"alpha": 0.5}),
        ("5_unet_sdsa", "unet", {"curr_iter": 17}),
        ("5_unet_sdsa", "unet", {"query_iter": 6}),  # nor blended
        ("5_unet_sdsa", "unet", {"freeu": None}),
    ],
)
def test_a_changed_setting_of_consistory_changes_what_is_computed(tmp_path: Path, stem: str, group: str, changed: dict):
    folder = tmp_path / "consistory"
    folder.mkdir()
    shutil.copy(GOLDEN / "consistory" / f"{stem}.safetensors", folder)
    document = json.loads((GOLDEN / "consistory" / f"{stem}.json").read_text())
    document[group] |= changed
    (folder / f"{stem}.json").write_text(json.dumps(document))
    assert f"consistory/{stem}-{group}" in failures(tmp_path)


def test_a_changed_tensor_and_a_changed_figure_fail(copy: Path):
    edit_tensors(copy, "steps_ddpm", lambda t: t.update({"slerp.x_next": t["slerp.x_next"] + 0.002}))
    edit_json(copy, "inject", lambda d: d["steps"]["ddpm"]["calib"]["x_next"].__setitem__(1, 0.9862))
    edit_json(copy, "inject", lambda d: d["diffstyle"][0]["steps"][4].update(t=556))
    assert failures(copy, "ddpm-") == [
        "hspace/diffstyle_ddpm-basic",
        "hspace/steps_ddpm-slerp",
        "hspace/steps_ddpm-calib",
    ]

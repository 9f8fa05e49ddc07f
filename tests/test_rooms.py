"""The house rules that a reader relies on: imports go one way and in no circle, and guests enter through one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import ROOMS, House, circles, package_of

ROOT = Path(__file__).parent.parent
HOUSE = House(ROOT)
A = "/".join(("lasp", "a.py"))  # of planted houses
GUESTS = {  # the only files that import a guest; None: whichever one file does
    "datasets": None,
    "deepspeed": None,
    "fla": None,
    "ray": "launch/launchers/ray_cluster.py",
    "tokenizers": "launch/data/tokenizer.py",
    "transformers": None,
    "wandb": None,
}
MOST_FLAT = 12  # files that lie in a room beside its sub-rooms
MOST_LINES = {"kernels": 500}  # of a file; elsewhere 350


def planted(tmp_path, **sources):
    """A house of these files alone: ``lasp__a__b="..."`` is b in the folder a of lasp."""
    for name, text in sources.items():
        path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(tmp_path)


def wrong_ways(house):
    """Imports of a room further right."""
    rank = {package_of(room): ROOMS.index(room) for room in ROOMS}
    found = []
    for module in house.files:
        for name, _ in house.imports(module):
            owner = ".".join(name.split(".")[:2])
            owner = owner if owner in rank else name.split(".")[0]
            if rank.get(owner, -1) > ROOMS.index(house.room(module)):
                found.append(f"{house.relative(module)} imports {name}")
    return found


def misplaced_traffic(house):
    """Collectives of kernels/, and those of lasp/ outside its comm folder."""
    return [line for line in house.traffic() if line.startswith(("kernels/", "lasp/")) and "lasp/comm/" not in line]


def test_rooms_import_one_way():
    assert not wrong_ways(HOUSE)
    for module in HOUSE.files:
        for name, _ in HOUSE.imports(module):
            assert name.split(".")[0] not in ("kernels", "parallel", "launch"), f"{module}: write lasp.{name}"


def test_a_wrong_way_is_found(tmp_path):
    late = "def f():\n    from lasp.launch.cli import main\n"
    found = wrong_ways(planted(tmp_path, lasp__a=late))
    assert found == [f"{A} imports lasp.launch.cli{name}" for name in ("", ".main")]


def test_no_circle_between_files_or_folders():
    assert not circles(HOUSE.file_graph())
    assert not circles(HOUSE.folder_graph())


@pytest.mark.parametrize(
    "back",
    [
        "from lasp.b import y\n",
        "import lasp.b\n",
        "def f():\n    from lasp import b\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lasp.b import y\n",
    ],
)
def test_a_circle_of_files_is_found(tmp_path, back):
    house = planted(tmp_path, lasp__a=back, lasp__b="from lasp.c import z\n", lasp__c="from lasp.a import x\n")
    assert circles(house.file_graph()) == [["lasp.a", "lasp.b", "lasp.c"]]


def test_a_circle_of_folders_is_found(tmp_path):
    sources = {"lasp__a__one": "import lasp.b.one\n", "lasp__b__two": "import lasp.a.two\n"}
    house = planted(tmp_path, **sources, lasp__a__two="", lasp__b__one="")
    assert not circles(house.file_graph())
    assert circles(house.folder_graph()) == [["lasp/a", "lasp/b"]]


def test_a_guest_is_no_circle(tmp_path):
    house = planted(tmp_path, lasp__a="def f():\n    import ray\n", lasp__b="from lasp.a import f\n")
    assert not circles(house.file_graph())


def test_modules_are_imported_by_statements():
    assert {line.partition(":")[0] for line in HOUSE.imports_by_name()} == {"lasp/__init__.py"}  # its lazy names


def test_an_import_by_name_is_found(tmp_path):
    house = planted(tmp_path, lasp__a='import importlib\nx = importlib.import_module("lasp.b")\n')
    assert house.imports_by_name() == [f"{A}:2"]


def test_only_comm_issues_attention_traffic():
    assert not misplaced_traffic(HOUSE)
    assert any("lasp/comm/" in line for line in HOUSE.traffic())


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist\ndist.all_gather_into_tensor(1, 2)\n",
        "import torch\ntorch.distributed.send(1, 2)\n",
        "from torch.distributed import all_reduce as r\nr(1)\n",
    ],
)
def test_traffic_in_a_wrong_room_is_found(tmp_path, text):
    house = planted(tmp_path, lasp__linear=text, lasp__comm__collectives=text, launch__run=text, kernels__state=text)
    found = [line.split(":")[0] for line in misplaced_traffic(house)]
    assert found == ["kernels/state.py", "lasp/linear.py"]


def test_kernels_know_one_device():
    for module, path in HOUSE.files.items():
        if HOUSE.room(module) == "kernels":
            assert "torch.distributed" not in path.read_text(), path


def test_rooms_and_files_keep_their_size():
    for room in ROOMS:
        flat = [path.name for path in (ROOT / room).glob("*.py")]
        assert len(flat) <= MOST_FLAT + 1, f"{room}: {len(flat)} files lie flat: {flat}"  # and __init__.py
    long = {
        HOUSE.relative(module): lines
        for module, path in HOUSE.files.items()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES.get(HOUSE.room(module), 350)
    }
    assert not long


def test_the_package_has_every_folder():
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package_of(room): room for room in ROOMS}
    for module, path in HOUSE.files.items():
        if path.name == "__init__.py" and module not in folders:
            folders[module] = path.parent.relative_to(ROOT).as_posix()
    assert tools["package-dir"] == folders
    assert sorted(tools["packages"]) == sorted(folders)
    assert {path.parent for path in HOUSE.files.values()} == {ROOT / folder for folder in folders.values()}


@pytest.mark.parametrize("guest", GUESTS)
def test_optional_dependencies_enter_through_one_adapter_inside_functions(guest):
    doors = {
        (HOUSE.relative(module), at_top)
        for module in HOUSE.files
        for name, at_top in HOUSE.imports(module)
        if name.split(".")[0] == guest
    }
    assert all(not at_top for _, at_top in doors), doors
    assert len({door for door, _ in doors}) <= 1, doors
    if GUESTS[guest] is not None:
        assert {door for door, _ in doors} == {GUESTS[guest]}


def test_megatron_has_a_folder_of_its_own():
    for module in HOUSE.files:
        own = HOUSE.place(module) == "parallel/megatron"  # subclasses its modules, so each file imports it
        for name, at_top in HOUSE.imports(module):
            assert own or name.split(".")[0] != "megatron", module
            assert own or not (name.startswith("lasp.parallel.megatron") and at_top), module


def test_the_reference_is_the_oracle_and_no_fast_path():
    users = {module for module in HOUSE.files if "lasp.kernels.reference" in HOUSE.own_imports(module)}
    assert users <= {"lasp.linear"}, users  # impl="reference"


def test_importing_lasp_needs_torch_alone_and_is_quick():
    code = """
import sys, time
import lasp.launch.cli
assert "torch" not in sys.modules  # a Ctrl-C while it loads finds the command ready
for name in ("triton", "yaml", "rich", "click", "pydantic", "matplotlib", "safetensors"):
    sys.modules[name] = None  # an import of it raises
import torch
started = time.process_time()
import lasp, lasp.kernels
sys.modules["megatron"] = None
import lasp.parallel
assert all(hasattr(lasp, name) for name in lasp.__all__)
print(time.process_time() - started)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.0


def test_every_test_module_stands_for_itself():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert not node.module.split(".")[-1].startswith("test_"), f"{path.name} imports {node.module}"

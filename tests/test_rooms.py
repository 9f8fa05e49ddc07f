"""The house rules that a reader relies on: rooms import one way, and guests enter through one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "lasp", "parallel", "launch")  # each may import those to its left
MEGATRON = ROOT / "parallel" / "megatron"  # subclasses its modules, so each file imports it
GUESTS = {
    "deepspeed": None,
    "ray": "launch/launchers/ray_cluster.py",
    "fla": None,
    "tokenizers": "launch/data/tokenizer.py",
}


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """(imported module, whether at module level) of every import in a file; type-checking imports are not imports."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def room_of(module):
    parts = module.split(".")
    if parts[0] != "lasp":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "lasp"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room):
    for path in modules(room):
        for module, _ in imports(path):
            assert module.split(".")[0] not in ("kernels", "parallel", "launch"), f"{path.name}: write lasp.{module}"
            owner = room_of(module)
            assert owner is None or ROOMS.index(owner) <= ROOMS.index(room), f"{room}/{path.name} imports {module}"


def test_kernels_know_one_device():
    for path in modules("kernels"):
        assert not any(m.startswith("torch.distributed") for m, _ in imports(path)), path
        assert "torch.distributed" not in path.read_text(), path


def test_only_comm_issues_attention_traffic():
    traffic = (
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "all_reduce",
        "isend",
        "irecv",
        "broadcast",
        "send",
        "recv",
    )
    for path in modules("lasp"):
        if path.name == "comm.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed"):
                assert not node.attr.startswith(traffic), f"{path.name}: dist.{node.attr}"


@pytest.mark.parametrize("guest", GUESTS)
def test_optional_dependencies_enter_through_one_adapter_inside_functions(guest):
    doors = {
        (path.relative_to(ROOT).as_posix(), at_top)
        for room in ROOMS
        for path in modules(room)
        for module, at_top in imports(path)
        if module.split(".")[0] == guest
    }
    assert all(not at_top for _, at_top in doors), doors
    assert len({door for door, _ in doors}) <= 1, doors
    if GUESTS[guest] is not None:
        assert {door for door, _ in doors} == {GUESTS[guest]}


def test_megatron_has_a_folder_of_its_own():
    for room in ROOMS:
        for path in modules(room):
            for module, at_top in imports(path):
                own = path.is_relative_to(MEGATRON)
                assert own or module.split(".")[0] != "megatron", path
                assert own or not (module.startswith("lasp.parallel.megatron") and at_top), path


def test_the_reference_is_the_oracle_and_no_fast_path():
    users = {p.name for room in ROOMS for p in modules(room) for m, _ in imports(p) if m == "lasp.kernels.reference"}
    assert users <= {"linear.py"}, users  # impl="reference"


def test_importing_lasp_needs_torch_alone_and_is_quick():
    code = """
import sys, time
import lasp.launch.cli
assert "torch" not in sys.modules  # a Ctrl-C while it loads finds the command ready
for name in ("triton", "yaml", "rich", "click", "pydantic", "matplotlib", "safetensors"):
    sys.modules[name] = None  # an import of it raises
import torch
started = time.perf_counter()
import lasp, lasp.kernels
sys.modules["megatron"] = None
import lasp.parallel
assert all(getattr(lasp, name).__name__.endswith(name) for name in lasp.__all__)
print(time.perf_counter() - started)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.0


def test_the_documents_have_no_place_left_to_fill():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in path.read_text(), path

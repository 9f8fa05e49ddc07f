"""The package as pip sees it: versions, extras, and what works without them."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import lasp
from lasp.launch import versions

ROOT = Path(__file__).parent.parent.parent
WITHOUT_EXTRA = """
import sys
for name in {modules}:
    sys.modules[name] = None  # an import of it raises
sys.argv = ["lasp", *{arguments}]
from lasp.launch.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules or {torch}
"""


def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lasp_without_extra(*arguments, torch=False):
    code = WITHOUT_EXTRA.format(modules=versions.CLI_MODULES, arguments=arguments, torch=torch)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_version_stands_in_one_place():
    assert lasp.__version__ == importlib.metadata.version("lasp")
    assert {"__version__", "ExchangeOptions"} <= set(lasp.__all__)


@pytest.mark.parametrize(("argument", "text"), [("--version", f"lasp {lasp.__version__}"), ("--help", "Usage: lasp")])
def test_help_and_version_need_neither_torch_nor_the_extra(argument, text):
    done = lasp_without_extra(argument)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text)


def test_the_version_names_torch_and_the_commit():
    assert f"torch {importlib.metadata.version('torch')}" in versions.version_line()
    assert (versions.commit() is None) == (not (ROOT / ".git").exists())


def test_a_command_without_the_extra_names_it():
    done = lasp_without_extra("train", "run.yaml", torch=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this command needs the extra lasp[cli], of which ")
    assert done.stderr.endswith("is not installed: pip install 'lasp[cli]'.\n")


def test_a_missing_module_of_no_extra_is_a_fault_of_ours():
    assert versions.missing_extra(ModuleNotFoundError("", name="lasp.nowhere")) is None


def test_the_extra_is_all_that_a_command_needs():
    names = {"pyyaml": "yaml"}
    extra = [canonicalize_name(Requirement(text).name) for text in project()["optional-dependencies"]["cli"]]
    assert sorted(names.get(name, name) for name in extra) == sorted(versions.CLI_MODULES)


def test_upper_ends_are_the_tested_ones():
    ends = {}
    for requirements in project()["optional-dependencies"].values():
        for text in requirements:
            requirement = Requirement(text)
            if "<" in str(requirement.specifier):
                ends[requirement.name] = requirement.specifier
    expected = {name: SpecifierSet(tested) for name, tested in versions.TESTED.items() if name != "torch"}
    assert ends == expected


def test_what_is_outside_of_the_tested_range_is_named(monkeypatch):
    found = {
        "torch": "2.14.0+cu130",
        "triton": "3.7.1",
        "ray": "2.59.0",
        "deepspeed": None,
        "megatron-core": "0.16.1rc0",
    }
    monkeypatch.setattr(versions, "installed", found.get)
    assert set(versions.untested()) == {"torch", "ray"}
    assert versions.untested()["ray"].startswith("ray 2.59.0 is outside of the tested range >=2.60,<2.61: ")


def test_this_environment_is_tested():
    assert not versions.untested()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_direct_dependency_is_pinned_once(python):
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                assert requirement.name not in pinned, line
                pinned[canonicalize_name(requirement.name)] = requirement
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        name = canonicalize_name(requirement.name)
        if name != "lasp":
            (pin,) = pinned[name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), name

"""Which versions there are of this package and of those that it uses, and which were tested. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from lasp import __version__

# What the tests have passed with. These packages are used beyond what they promise: names without documentation, or
# the order of their own steps.
TESTED = {
    "torch": ">=2.11,<2.14",  # aten's flash operators; sequence numbers of process groups
    "triton": ">=3.6,<3.8",  # what the ahead-of-time compiler reads of a kernel
    "megatron-core": ">=0.16,<0.17",  # layers, schedules and optimizers that are subclassed
    "deepspeed": ">=0.19,<0.20",  # where a stage of ZeRO keeps what
    "ray": ">=2.60,<2.61",  # states of workers and placement groups
}
# Modules of the extra lasp[cli]. Only click is there without it.
CLI_MODULES = ("matplotlib", "packaging", "pydantic", "rich", "safetensors", "tensorboard", "yaml")


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What a user should install when a command has not found a module; None where no extra has it."""
    module = (error.name or "").partition(".")[0]
    if module not in CLI_MODULES:
        return None
    return f"this command needs the extra lasp[cli], of which {module} is not installed: pip install 'lasp[cli]'."


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested() -> dict[str, str]:
    """Installed packages outside the range of :data:`TESTED`, each with a sentence that says so."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = {}
    for package, tested in TESTED.items():
        version = installed(package)
        if version is not None and Version(Version(version).base_version) not in SpecifierSet(tested):
            found[package] = (
                f"{package} {version} is outside of the tested range {tested}: names that this package reads of it may "
                f"be gone. Install one within: pip install '{package}{tested}'."
            )
    return found


def commit() -> str | None:
    """The commit of this source tree; None where it has no history of its own."""
    folder, name = str(Path(__file__).parent), Path(__file__).name
    if printed("git", "-C", folder, "ls-files", name) != name:  # an installed copy inside of another project
        return None
    return printed("git", "-C", folder, "describe", "--always", "--dirty") or None


def version_line() -> str:
    """Version, commit where it is known, and torch."""
    source = commit()
    return f"lasp {__version__}{f' ({source})' if source else ''}, torch {installed('torch') or 'not installed'}"


def printed(*command: str) -> str:
    """What a program prints; nothing where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

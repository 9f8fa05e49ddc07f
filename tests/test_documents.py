"""Documents and docstrings name what exists: files, modules, make targets."""

import re
from pathlib import Path

import pytest

from tests.house import ROOMS, House

ROOT = Path(__file__).parent.parent
HOUSE = House(ROOT)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = (*ROOMS, "benchmarks", "examples", "tests", "configs")
SOURCES = [
    path for folder in FOLDERS for end in ("py", "yaml", "sh") for path in sorted((ROOT / folder).rglob(f"*.{end}"))
]
ROOM = "(?:kernels|lasp|parallel|launch|configs|docs|tests|benchmarks|examples)"
PATH = re.compile(rf"(?<![\w/.<-]){ROOM}/[\w./]*\.(?:py|md|yaml|sh|png)\b")
DOTTED = re.compile(r"(?<![\w./])lasp(?:\.[a-z_]\w*)+")
TELLS_THE_PAST = ("CHANGELOG.md",)


def shown(path):
    return path.relative_to(ROOT).as_posix()


def test_files_that_are_named_exist():
    missing = {
        f"{shown(text)}: {name}"
        for text in [*DOCUMENTS, *SOURCES]
        if text.name not in TELLS_THE_PAST
        for name in PATH.findall(text.read_text())
        if not (ROOT / name).exists() and "NAME" not in name  # a file to be written
    }
    assert not missing


def test_modules_that_are_named_exist():
    """``lasp.a.b`` is a module, a name that one defines, or a name that a package exports."""
    missing = set()
    for text in [*DOCUMENTS, *HOUSE.files.values()]:
        if text.name in TELLS_THE_PAST:
            continue
        for name in DOTTED.findall(text.read_text()):
            parts = name.split(".")
            known = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in HOUSE.files), 0)
            module, rest = ".".join(parts[:known]), parts[known:]
            if rest and not re.search(rf"\b{re.escape(rest[0])}\b", HOUSE.files[module].read_text()):
                missing.add(f"{shown(text)}: {name}")
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_targets_of_make_exist(document):
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (document.parent / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "@@" not in text, "a place left to fill"

"""The lists in docs/ that follow from tables in the code; ``python -m tests.doc_lists`` writes them anew."""

from collections.abc import Callable
from pathlib import Path

from lasp.models.features import FEATURES
from lasp.models.gates import GATES

DOCS = Path(__file__).parent.parent / "docs"


def gates() -> str:
    rows = []
    for name, gate in GATES.items():
        options = ", ".join(f"`{option}` ({default:g})" for option, default in gate.options.items())
        rows.append((f"`{name}`", f"`{gate.formula}`", options or "none"))
    return table(("gate", "g", "options, with their defaults"), rows)


def feature_maps() -> str:
    rows = []
    for name, feature in FEATURES.items():
        width = "`feature_dim`" if feature.width is None else str(feature.width(16))
        learnt = any(True for _ in feature.make(16, 16, device="meta").parameters())
        marks = ["yes" if mark else "no" for mark in (feature.non_negative, learnt)]
        rows.append((f"`{name}`", f"`{feature.formula}`", width, *marks))
    return table(("feature", "phi(x)", "width, K = 16", "goes with `normaliser: sum`", "parameters"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


# file in docs/ and marker to what follows the line ``<!-- marker -->``, up to ``<!-- end -->``
LISTS: dict[tuple[str, str], Callable[[], str]] = {
    ("models.md", "gates"): gates,
    ("models.md", "feature maps"): feature_maps,
}


def split(file: str, marker: str) -> tuple[str, str, str]:
    """The text of a file before a list, the list, and the text after it."""
    before, begin, rest = (DOCS / file).read_text().partition(f"<!-- {marker} -->\n")
    listed, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise ValueError(f"docs/{file} must have a line <!-- {marker} --> and a line <!-- end --> after it. Add them.")
    return before + begin, listed.strip(), end + after


def write() -> None:
    for (file, marker), listed in LISTS.items():
        before, _, after = split(file, marker)
        (DOCS / file).write_text(f"{before}{listed()}\n{after}")


if __name__ == "__main__":
    write()

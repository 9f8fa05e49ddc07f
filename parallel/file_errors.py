"""Files that cannot be read or written end a run with one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def reading(path: str | Path):
    """A context in which a failure to read ``path`` says what and why."""
    return _one_sentence("cannot read", path, "Name a file that can be read.")


def writing(path: str | Path):
    """A context in which a failure to write ``path`` says what and why."""
    return _one_sentence("cannot write", path, "Free the disk or name a folder that can be written.")


def replace_text(path: Path, text: str) -> None:
    """Write ``path`` in one step, so that a killed program leaves a whole file, the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


@contextmanager
def _one_sentence(failure: str, path: str | Path, remedy: str) -> Iterator[None]:
    """Reword what the block raises; the error's own file name, of a rename the new one, is more exact than ``path``.

    Raises:
        OSError: ``FAILURE PATH: reason. REMEDY``.
    """
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        if str(error).startswith(("cannot read", "cannot write")):
            raise
        name = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or error
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        raise OSError(f"{failure} {name}: {reason}. {remedy}") from error

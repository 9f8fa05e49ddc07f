"""Files that cannot be written end a run with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_PREFIX = "cannot write"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Failures to write while the block runs say what and why.

    Args:
        path: what the block writes; the error's own file name is more exact where it has one.

    Raises:
        OSError: ``cannot write PATH: reason``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if str(error).startswith(_PREFIX):
            raise
        name = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{_PREFIX} {name}: {reason}") from error

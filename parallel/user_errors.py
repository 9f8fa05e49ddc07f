"""Which errors a user can mend: their message is the whole story, so they end a run with one sentence, no traceback.

Command line, ranks of a launcher, ranks of a benchmark and :meth:`lasp.parallel.mesh.Mesh.on_first` ask here; any other
error is a fault of ours and is shown with its traceback.
"""

from __future__ import annotations

from lasp.comm import CommError

USER_ERRORS = (ValueError, FloatingPointError, OSError, CommError)


def kind_of(error: BaseException) -> type[Exception] | None:
    """The entry of ``USER_ERRORS`` that the error is of; None if it is not the user's to mend."""
    return next((kind for kind in USER_ERRORS if isinstance(error, kind)), None)


def told(error: BaseException) -> str:
    """What to say of an error: the sentence of one that a user can mend, type and message of any other."""
    return sentence(error) if kind_of(error) else f"{type(error).__name__}: {error}"


def sentence(error: BaseException) -> str:
    """The error's message; of an OSError that nobody worded, without Python's number and quotes."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename}: {error.strerror}. Name a path that exists and can be used."
    return str(error)

"""How a job ends without success, in the words of the launcher that started it."""

from __future__ import annotations

_UNSAVED = "interrupted; not every rank could save its place. Run again: it goes on from what is saved."


class RankFailure(RuntimeError):
    """One rank failed and the job with it. ``details`` is its traceback, where it left one."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


class Interrupted(RankFailure):
    """A signal ended the job before every rank could save."""

    def __init__(self, message: str = _UNSAVED):
        super().__init__(message)

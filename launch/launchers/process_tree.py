"""Processes that a launcher starts: who descends from whom, and how to end them all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that still run; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(entry.parent.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """:func:`children`, and theirs, and so on."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started, parents first, so that nothing is started again."""
    below = children(pid)
    send(pid, signal.SIGKILL)
    for child in below:
        kill_tree(child)


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def ending_with_parent() -> Callable[[], Any] | None:
    """What a new process calls so that the system ends it when the one that started it is gone; None if it cannot."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, pr_set_pdeathsig = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(pr_set_pdeathsig, signal.SIGTERM)

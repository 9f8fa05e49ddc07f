"""The newest collectives of a rank, in memory that outlives it: a neighbour on the same machine can read them.

A rank that is killed, or that gloo aborts when two ranks enter collectives of different sizes, cannot say where it was.
So it writes each collective it enters into a ring of slots in shared memory, about a microsecond each, and the ranks
beside it hold that memory. Nothing is left on disk: the memory goes when the last of them ends.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

_SLOTS, _WIDTH = 512, 160  # bytes per slot


class Recorder:
    """This rank's ring. ``address`` is what neighbours need to read it; of no machine where it cannot be shared."""

    def __init__(self) -> None:
        self.address = "none 0 0"
        self._count = 0
        if not hasattr(os, "memfd_create"):
            self._ring = mmap.mmap(-1, _SLOTS * _WIDTH)
            return
        self._file = os.memfd_create("lasp-collectives")
        os.ftruncate(self._file, _SLOTS * _WIDTH)
        self._ring = mmap.mmap(self._file, _SLOTS * _WIDTH)
        self.address = f"{_machine()} {os.getpid()} {self._file}"

    def write(self, group: str, number: int, place: str) -> None:
        """A collective is entered."""
        text = f"{self._count}\t{group}\t{number}\t{place}".encode()[:_WIDTH]
        at = self._count % _SLOTS * _WIDTH
        self._ring[at : at + _WIDTH] = text.ljust(_WIDTH, b"\0")
        self._count += 1

    def history(self) -> list[tuple[str, int, str]]:
        """Group, number and place of the newest ones, the oldest first."""
        return _parse(self._ring)


class Neighbour:
    """Another rank's ring, held open.

    Args:
        address: of its recorder.

    Raises:
        OSError: it is on another machine, or ended, or of another user.
    """

    def __init__(self, address: str):
        machine, pid, number = address.rsplit(" ", 2)
        if machine != _machine():
            raise OSError("not on this machine")
        self._pid = int(pid)
        file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY)
        try:
            self._ring = mmap.mmap(file, _SLOTS * _WIDTH, access=mmap.ACCESS_READ)
        finally:
            os.close(file)

    def history(self) -> list[tuple[str, int, str]]:
        """See :meth:`Recorder.history`."""
        return _parse(self._ring)

    def fate(self) -> str:
        """``died`` or ``is stopped``; empty while the process runs."""
        try:
            state = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "died"
        return {"Z": "died", "X": "died", "T": "is stopped", "t": "is stopped"}.get(state, "")


def _machine() -> str:
    """Equal for two processes that see each other in /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def _parse(ring: mmap.mmap) -> list[tuple[str, int, str]]:
    slots = (ring[at : at + _WIDTH].rstrip(b"\0").decode(errors="replace") for at in range(0, len(ring), _WIDTH))
    entries = [parts for slot in slots if len(parts := slot.split("\t", 3)) == 4]
    return [(group, int(number), place) for _, group, number, place in sorted(entries, key=lambda e: int(e[0]))]

"""A signal that ends a benchmark is an exception in it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from lasp.launch.launchers.local import Interrupted


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM in the block is an exception, so that everything that was started is ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Interrupted("interrupted: the ranks were ended, and nothing more is measured.")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

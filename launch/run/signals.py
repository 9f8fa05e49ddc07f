"""SIGINT and SIGTERM ask a job to end: who counts them, passes them on, or lets them wait.

Only the main thread of a process can set handlers; a block that another thread runs leaves signals as they are.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator

from lasp.launch.run.failures import Interrupted

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def handled(handler: Callable[[], None], numbers: Collection[signal.Signals] = ENDING) -> Iterator[None]:
    """Each of the signals calls ``handler`` while the block runs; what it raises is raised in the block."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class SignalCount:
    """Counts SIGINT and SIGTERM while the block runs.

    Args:
        then: called with the new count after each.
    """

    def __init__(self, then: Callable[[int], None] = lambda count: None):
        self.count, self._then = 0, then
        self._handling = handled(self._note)

    def __enter__(self) -> SignalCount:
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(*error)

    def _note(self) -> None:
        self.count += 1
        self._then(self.count)


def interrupting(message: str) -> contextlib.AbstractContextManager[None]:
    """SIGTERM is an exception in the block, as SIGINT is anyway, so that everything that it started is ended.

    Raises:
        Interrupted: with ``message``.
    """

    def stop() -> None:
        raise Interrupted(message)

    return handled(stop, [signal.SIGTERM])


@contextlib.contextmanager
def blocked(numbers: Collection[signal.Signals] = ENDING) -> Iterator[set[signal.Signals]]:
    """Signals that the system hands to this thread wait until the block is over; a process started in it gets none.

    Gives the mask from before. Where the process has other threads, the system may hand a signal to one of those.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(numbers))
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

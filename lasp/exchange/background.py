"""Work beside the caller's: on a CUDA device on a stream of its own, on the CPU in a thread.

An exchange that goes through several rounds must compute between them. Here these rounds run while the caller does its
local work; ``wait()`` joins the two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Background(Generic[T]):
    """``fn()`` has begun; :meth:`wait` once returns what it returns, or raises what it raised.

    Args:
        fn: returns tensors, in tuples, lists or dicts, or None. Runs without autograd.
        device: where its tensors are.
        blocks: whether it waits on the host. If not, a CPU runs it at once: a thread would cost more.
    """

    def __init__(self, fn: Callable[[], T], device: torch.device, *, blocks: bool = True):
        self._fn, self._error, self._thread, self._stream = fn, None, None, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                self._run()
        elif blocks:
            self._thread = threading.Thread(target=self._run, name="lasp-exchange", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._result = self._fn()
        except BaseException as error:
            self._error = error
        self._fn = None

    def wait(self) -> T:
        """The result, complete on the current stream."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            _record(self._result, current)
        return self._result


def _record(result: object, stream: torch.cuda.Stream) -> None:
    """Tensors of another stream must not be reused before this one is through with them."""
    if isinstance(result, Tensor):
        result.record_stream(stream)
    elif isinstance(result, dict):
        _record(tuple(result.values()), stream)
    elif isinstance(result, (tuple, list)):
        for one in result:
            _record(one, stream)

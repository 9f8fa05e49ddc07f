"""Test tools: a pool of gloo ranks that serves many cases, tolerances, and tensors poisoned with NaN."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankPool:
    """``world_size`` processes that live as long as the pool. Make one per test session. With nccl, one per GPU.

    ``pool.run(fn, *args, size=2)`` calls ``fn(group, *args)`` on the first two ranks, with a cp_group of just these,
    and returns their results in rank order. ``fn`` is a module-level function; results must pickle. When a rank
    raises, its traceback is the failure; when one does not answer in time, the pool says which.
    """

    def __init__(self, world_size: int = 4, backend: str = "gloo"):
        self.world_size, self.backend = world_size, backend
        self._start()

    def _start(self):
        self._dir = tempfile.TemporaryDirectory(prefix="lasp-ranks-")
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(self.world_size):
            parent, child = context.Pipe()
            args = (rank, self.world_size, self.backend, f"file://{self._dir.name}/rendezvous", child)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._pipes.append(parent)
            self._processes.append(process)

    def run(self, fn: Callable, *args, size: int, timeout_s: float = 120.0) -> list:
        """Results of ``fn(group, *args)`` on ranks 0..size-1."""
        results = self.outcomes(fn, *args, size=size, timeout_s=timeout_s)
        failed = [(rank, text) for rank, (ok, text) in enumerate(results) if not ok]
        assert not failed, "\n".join(f"rank {rank} of {size}:\n{text}" for rank, text in failed)
        return [value for _, value in results]

    def outcomes(self, fn: Callable, *args, size: int, timeout_s: float = 120.0) -> list[tuple[bool, object]]:
        """Like :meth:`run`, but ``(True, result)`` or ``(False, traceback text)`` per rank: for tests of errors."""
        for pipe in self._pipes[:size]:
            pipe.send((fn, args, size))
        deadline = time.monotonic() + timeout_s
        results: list = [None] * size
        for rank in range(size):
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                silent = [r for r in range(rank, size) if not self._pipes[r].poll(0)]
                self.restart()
                raise TimeoutError(f"{fn.__name__}: ranks {silent} of {size} gave no answer in {timeout_s} s")
            results[rank] = self._pipes[rank].recv()
        return results

    def restart(self):
        """Fresh processes, after a case that broke the groups."""
        self.close()
        self._start()

    def close(self):
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        self._dir.cleanup()


def _serve(rank: int, world_size: int, backend: str, rendezvous: str, pipe):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    groups = {n: dist.new_group(range(n), timeout=timeout) for n in range(1, world_size + 1)}
    own = set(dist.distributed_c10d._world.pg_map)
    while True:
        fn, args, size = pipe.recv()
        _let_go(own)  # here: now every rank is through with the case before
        try:
            with poisoned_memory():
                pipe.send((True, fn(groups[size], *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _let_go(own: set) -> None:
    """Destroy the groups that a case made: each has threads of gloo that wake a hundred times a second."""
    made = [group for group in dist.distributed_c10d._world.pg_map if group not in own]
    for group in made:
        dist.destroy_process_group(group)
    if made:
        del group, made
        gc.collect()


@contextlib.contextmanager
def poisoned_memory():
    """``torch.empty`` and friends return NaN: an output that nobody wrote cannot pass for a zero."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point() and not out.is_meta:
                out.detach().fill_(float("nan"))  # detached: it may be a leaf that requires grad
            return out

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest value of ``expected``; NaN never passes as small."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    return float("inf") if error != error else error / max(largest, 1e-30)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float, terms: float = 0.0):
    """``relative_error <= tolerance``; ``terms`` is the size of the terms that cancel in ``expected``, if larger."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    largest = max(expected.double().abs().max().item(), terms, 1e-30)
    assert error <= tolerance * largest, f"{name}: error {error:.3e} of {largest:.3e} exceeds {tolerance:.1e}"

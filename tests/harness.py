"""Test tools: a pool of gloo ranks that serves many cases, tolerances, and tensors poisoned with NaN."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

KEPT: set[dist.ProcessGroup] = set()  # of a rank: groups that later cases use again; who puts them in takes them out
PRELOADED = ("lasp.linear", "pytest", "hypothesis", "torch._dynamo", "torch.distributed.fsdp")  # of most tests


class RankPool:
    """``world_size`` processes that live as long as the pool. Make one per test session. With nccl, one per GPU.

    ``pool.run(fn, *args, size=2)`` calls ``fn(group, *args)`` on the first two ranks, with a cp_group of just these,
    and returns their results in rank order. ``fn`` is a module-level function; results must pickle. When a rank
    raises, its traceback is the failure; when one does not answer in time, the pool says which.

    The ranks are copies of one process that has imported what they need: eight cost little more than one.
    """

    def __init__(self, world_size: int = 4, backend: str = "gloo"):
        self.world_size, self.backend = world_size, backend
        self._start()

    def _start(self):
        self._dir = tempfile.TemporaryDirectory(prefix="lasp-ranks-")
        context = mp.get_context("spawn")
        self._pipes, theirs = zip(*(context.Pipe() for _ in range(self.world_size)), strict=True)
        self._alive, alive = context.Pipe()
        args = self.backend, f"file://{self._dir.name}/rendezvous", theirs, alive
        self._parent = context.Process(target=_copy_ranks, args=args)
        self._parent.start()
        for pipe in (*theirs, alive):
            pipe.close()

    def run(self, fn: Callable, *args, size: int, timeout_s: float = 120.0) -> list:
        """Results of ``fn(group, *args)`` on ranks 0..size-1."""
        results = self.outcomes(fn, *args, size=size, timeout_s=timeout_s)
        failed = [(rank, text) for rank, (ok, text) in enumerate(results) if not ok]
        assert not failed, "\n".join(f"rank {rank} of {size}:\n{text}" for rank, text in failed)
        return [value for _, value in results]

    def run_to_break(self, fn: Callable, *args, size: int) -> list:
        """Results of ``fn(group, *args, limit_s)`` with a group of its own, which it may break.

        ``limit_s`` is the group's timeout: what a first collective in a new group takes now, times a margin, so that a
        rank that is merely slow, on a loaded machine, is not taken for one that does not come.
        """
        started = time.monotonic()
        self.run(_in_new_group, size, 60.0, _meet, (fn,), size=self.world_size)
        limit_s = max(2.0, 10 * (time.monotonic() - started))
        args, patience_s = (size, limit_s, fn, (*args, limit_s)), 120 + 20 * limit_s
        return self.run(_in_new_group, *args, size=self.world_size, timeout_s=patience_s)[:size]

    def outcomes(self, fn: Callable, *args, size: int, timeout_s: float = 120.0) -> list[tuple[bool, object]]:
        """Like :meth:`run`, but ``(True, result)`` or ``(False, traceback text)`` per rank: for tests of errors."""
        message = pickle.dumps((fn, args, size))  # once for all; tensors by value, not as files that processes share
        for pipe in self._pipes[:size]:
            pipe.send_bytes(message)
        deadline = time.monotonic() + timeout_s
        results: list = [None] * size
        for rank in range(size):
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                silent = [r for r in range(rank, size) if not self._pipes[r].poll(0)]
                self.restart()
                raise TimeoutError(f"{fn.__name__}: ranks {silent} of {size} gave no answer in {timeout_s} s")
            results[rank] = pickle.loads(self._pipes[rank].recv_bytes())
        return results

    def restart(self):
        """Fresh processes, after a case that broke the default group."""
        self.close()
        self._start()

    def close(self):
        """End the ranks."""
        self._alive.close()
        self._parent.join()
        self._dir.cleanup()


def _copy_ranks(backend: str, rendezvous: str, pipes: Sequence[Connection], alive: Connection):
    """Make the ranks, and end them when the pool closes or its process is gone."""
    if backend == "gloo":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, for the whole process
        for name in PRELOADED:  # not where they might look for GPUs, whose driver does not outlive a copy
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    context = mp.get_context("fork")
    args = backend, rendezvous, pipes
    ranks = [context.Process(target=_serve, args=(rank, *args), daemon=True) for rank in range(len(pipes))]
    for process in ranks:
        process.start()
    for pipe in pipes:
        pipe.close()
    with contextlib.suppress(EOFError):
        alive.recv()
    for process in ranks:
        process.kill()
        process.join()


def _serve(rank: int, backend: str, rendezvous: str, pipes: Sequence[Connection]):
    pipe, world_size = pipes[rank], len(pipes)
    for other in pipes:
        if other is not pipe:
            other.close()  # so that the pool sees the end of a rank that dies
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    groups = {n: dist.new_group(range(n), timeout=timeout) for n in range(1, world_size + 1)}
    own = set(dist.distributed_c10d._world.pg_map)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        _let_go(own)  # here: now every rank is through with the case before
        try:
            fn, args, size = pickle.loads(message)
            with poisoned_memory():
                reply = pickle.dumps((True, fn(groups[size], *args)))
        except Exception:
            reply = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(reply)


def _let_go(own: set) -> None:
    """Destroy the groups that a case made: each has threads of gloo that wake a hundred times a second."""
    made = [group for group in dist.distributed_c10d._world.pg_map if group not in own and group not in KEPT]
    for group in made:
        dist.destroy_process_group(group)
    if made:
        del group, made
        gc.collect()


def _in_new_group(_group: dist.ProcessGroup, size: int, timeout_s: float, fn: Callable, args: tuple):
    """``fn`` on the first ranks with a group that nobody else has; torch makes one with the help of all ranks.

    It stays until the next case: where a group goes its connections close, which others would see as a death.
    """
    own = dist.new_group(range(size), timedelta(seconds=timeout_s))
    return fn(own, *args) if dist.get_rank() < size else None


def _meet(group: dist.ProcessGroup, _fn: Callable):
    """Meet once; ``_fn`` has been imported to come here."""
    dist.barrier(group)


@contextlib.contextmanager
def poisoned_memory():
    """``torch.empty`` and friends return NaN: an output that nobody wrote cannot pass for a zero."""
    with torch.device("meta"):  # at its first use it notes the functions that it serves: not those below
        torch.empty(0)

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

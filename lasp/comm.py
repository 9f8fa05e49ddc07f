"""The only collectives of the attention operators, and those who look on: the ledger that counts them, the watchdog.

Every function returns a :class:`Pending`: the operation is in flight until ``wait()``, so that a caller can work
meanwhile. A wait never lasts longer than the group's timeout; when it fails, the error says which collective it was
and who is missing. Which collectives run must depend only on values that are equal on all ranks of the group.

A collective is known by its group, its number in the group, which torch counts, and its place: the names of the
:func:`scope` blocks around it, as ``layer 7``, and those that its operator gives, as ``linear, forward``. A backward
may run on another thread, outside the blocks, so an operator makes its place in the forward and keeps it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.hangs import Report, Wait, explain

_SILENCE_S = 3.0  # how long the other ranks have to say where they are


class CommError(RuntimeError):
    """Other ranks cannot be met or waited for. The message is the whole story: who, where, for how long."""


@dataclass(eq=False)
class Call:
    """A collective that this rank has entered.

    Attributes:
        name: ``all_gather``, ``reduce_scatter``, ``all_to_all``, or what a block waits for.
        group: the process group.
        number: in the group, counted from 1. A block may issue more than one: that of the first.
        place: names of the scopes and of the operator; equal on all ranks.
        started: ``time.monotonic()`` when it was entered.
        num_bytes: this rank's input; None where the collective is not issued here.
        done: on a CUDA device, what has happened when the device is through with it, once that has been asked of it.
    """

    name: str
    group: dist.ProcessGroup | None
    number: int
    place: str
    started: float
    num_bytes: int | None = None
    done: torch.cuda.Event | None = None


class Observer:
    """Sees the collectives of this process, in any thread, between :meth:`attach` and :meth:`detach`."""

    def entered(self, call: Call) -> None:
        """``call`` is about to be issued."""

    def left(self, call: Call) -> None:
        """The host goes on; on a CUDA device ``call`` has ended when ``call.done`` has happened."""

    def moved(self, scope: tuple[str, ...]) -> None:
        """A scope was entered or left; ``scope`` is what is around the code now."""

    def explain(self, call: Call | None, error: str) -> str | None:
        """Why ``call`` failed, None being the newest of any group; None from an observer that cannot tell."""

    def attach(self) -> None:
        """Begin to see."""
        _observers.append(self)

    def detach(self) -> None:
        """See no more."""
        _observers.remove(self)


# Shared by all threads on purpose: autograd runs a backward on threads of its own.
_observers: list[Observer] = []
_scope: ContextVar[tuple[str, ...]] = ContextVar("lasp_scope", default=())


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Collectives of the block are of ``name``: a layer, or a part of a step. Blocks nest; also a decorator."""
    before = _scope.get()
    token = _scope.set((*before, name))
    for observer in _observers:
        observer.moved((*before, name))
    try:
        yield
    finally:
        _scope.reset(token)
        for observer in _observers:
            observer.moved(before)


def place(*names: str) -> str:
    """The names of the scopes around the caller, then ``names``."""
    return ", ".join((*_scope.get(), *names))


@dataclass
class Ledger(Observer):
    """What this rank handed to collectives while a :func:`record` block was open.

    Attributes:
        calls: number of collectives per name: ``all_gather``, ``reduce_scatter``, ``all_to_all``.
        bytes: size of this rank's input to them, per name.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def entered(self, call: Call) -> None:
        """Count it."""
        if call.num_bytes is not None:
            self.calls[call.name] += 1
            self.bytes[call.name] += call.num_bytes


@contextlib.contextmanager
def record() -> Iterator[Ledger]:
    """Count the collectives issued inside the block, forward and backward, in any thread of this process."""
    ledger = Ledger()
    ledger.attach()
    try:
        yield ledger
    finally:
        ledger.detach()


class Pending:
    """A collective in flight. ``wait()`` once returns its result."""

    def __init__(self, call: Call, work: dist.Work, x: Tensor, out: Tensor):
        self.call, self._work = call, work
        self._x, self._out = x, out  # the input must stay alive until the wait

    def wait(self) -> Tensor:
        """The result, complete on the current stream.

        Raises:
            CommError: the collective failed or timed out; the message names the ranks that are missing.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _failure(self.call, error) from error
        _leave(self.call)
        self._x = None
        return self._out


def all_gather(x: Tensor, group: dist.ProcessGroup | None, place: str | None = None) -> Pending:
    """Every rank's ``x`` (equal shapes) stacked along a new dim 0, in group-rank order: [cp_size, *x.shape].

    ``place``, here and below: what to call the collective; default: the scopes around and its name.
    """
    x = x.contiguous()
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return _issue("all_gather", x, group, out, place, lambda: gather(out.view(-1), x.view(-1), group, async_op=True))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None, place: str | None = None) -> Pending:
    """The sum over ranks of ``x[cp_rank]``, for ``x`` [cp_size, ...]."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    issue = lambda: scatter(out.view(-1), x.view(-1), dist.ReduceOp.SUM, group, async_op=True)  # noqa: E731
    return _issue("reduce_scatter", x, group, out, place, issue)


def all_to_all(
    x: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: dist.ProcessGroup | None,
    place: str | None = None,
) -> Pending:
    """Send ``send_counts[r]`` consecutive rows of ``x`` to each rank r, receive ``receive_counts[r]`` from it.

    Counts come from the host plan, so no rank asks another for them. The result has the received rows in rank order.
    """
    x = x.contiguous()
    out = x.new_empty((sum(receive_counts), *x.shape[1:]))
    counts = list(receive_counts), list(send_counts)
    issue = lambda: dist.all_to_all_single(out, x, *counts, group, async_op=True)  # noqa: E731
    return _issue("all_to_all", x, group, out, place, issue)


def _issue(
    name: str, x: Tensor, group: dist.ProcessGroup | None, out: Tensor, place: str | None, start: Callable
) -> Pending:
    call = _enter(name, group, place, x.numel() * x.element_size())
    try:
        work = start()
    except RuntimeError as error:
        raise _failure(call, error) from error
    return Pending(call, work, x, out)


@contextlib.contextmanager
def explained(name: str, group: dist.ProcessGroup | None, *, timed: bool = True) -> Iterator[None]:
    """Collectives that are not issued here are seen, and explained when they fail, as those of this file are.

    Args:
        name: what the block waits for.
        group: on which group.
        timed: whether the block does nothing else. Otherwise only its failure is explained.

    Raises:
        CommError: a collective failed or timed out.
    """
    call = _enter(name, group, None, None) if timed else None
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no error type of its own
            raise
        raise _failure(call, error) from error
    finally:
        if call is not None:
            _leave(call)


def last_number(group: dist.ProcessGroup | None) -> int:
    """How many collectives this rank has entered in the group: torch's count, equal on ranks that did the same."""
    return _group(group)._get_sequence_number_for_group()


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return dist.group.WORLD if group is None else group


def _enter(name: str, group: dist.ProcessGroup | None, where: str | None, num_bytes: int | None) -> Call:
    where = place(name) if where is None else where
    call = Call(name, _group(group), last_number(group) + 1, where, time.monotonic(), num_bytes)
    for observer in _observers:
        observer.entered(call)
    return call


def _leave(call: Call) -> None:
    if not _observers:
        return
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        call.done = torch.cuda.Event()
        call.done.record()
    for observer in _observers:
        observer.left(call)


def _failure(call: Call | None, error: RuntimeError) -> CommError:
    """The error that says who is missing, from an observer that knows, else from what ranks leave in the store."""
    found = (observer.explain(call, str(error)) for observer in tuple(_observers))
    text = next((text for text in found if text is not None), None)
    return CommError(_ask_the_failed(call, str(error)) if text is None else text)


def _ask_the_failed(call: Call | None, error: str) -> str:
    """Without a watchdog on every rank: each rank whose wait failed leaves its place in the job's store."""
    group, me = _group(None if call is None else call.group), dist.get_rank()
    number, what = (last_number(group), "issued by torch") if call is None else (call.number, call.place)
    age = 0.0 if call is None else time.monotonic() - call.started
    ranks = tuple(dist.get_process_group_ranks(group))
    wait = Wait(group.group_name, ranks, number, what, age)
    history = {wait.group: {number: what}}
    own = Report(reached={wait.group: number}, history=history, waits=(wait,), answered=True)
    keys = {rank: f"lasp/waiting/{wait.group}/{rank}" for rank in ranks}
    deadline = time.monotonic() + _SILENCE_S
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[me], own.to_json())
        while not store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        reports = {rank: Report.from_json(store.get(key)) for rank, key in keys.items() if store.check([key])}
    except RuntimeError:
        reason = error.partition("\n")[0]
        return (
            f"collective {number} ({what}) failed on rank {me} after {age:.1f} s ({reason}), and the job's store is "
            "gone as well: look at rank 0's first error."
        )
    return explain(wait, reports, error, watched=False)

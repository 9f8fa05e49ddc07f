"""What this process has asked of its process groups: places, numbers, those who look on, and why a wait failed.

A collective is known by its group, its number in the group, which torch counts, and its place: the names of the
:func:`scope` blocks around it, as ``layer 7``, and those that its operator gives, as ``linear, forward``. A backward
may run on another thread, outside the blocks, so an operator makes its place in the forward and keeps it. Messages
between two ranks have no number of their own: the exchange that they belong to has one, on every rank.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from lasp.comm.hangs import Report, Wait, explain

_SILENCE_S = 3.0  # how long the other ranks have to say where they are


class CommError(RuntimeError):
    """Other ranks cannot be met or waited for. The message is the whole story: who, where, for how long."""


@dataclass(eq=False)
class Call:
    """A collective that this rank has entered.

    Attributes:
        name: ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``messages``, or what a block waits for.
        group: the process group.
        number: in the group, counted from 1. A block may issue more than one: that of the first.
        place: names of the scopes and of the operator; equal on all ranks.
        started: ``time.monotonic()`` when it was entered.
        num_bytes: this rank's input; None where it is not one collective that is issued here.
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

    def sent(self, call: Call, num_bytes: int) -> None:
        """One message to another rank, part of ``call``, is about to be sent."""

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
# Per group, what to add to torch's count so that an exchange by messages counts as one, whatever a rank sends in it.
_correction: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
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
        calls: number of collectives per name: ``all_gather``, ``reduce_scatter``, ``all_to_all``; of messages to one
            rank: ``send``.
        bytes: size of this rank's input to them, per name.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def entered(self, call: Call) -> None:
        """Count it."""
        if call.num_bytes is not None:
            self.calls[call.name] += 1
            self.bytes[call.name] += call.num_bytes

    def sent(self, call: Call, num_bytes: int) -> None:
        """Count a message."""
        self.calls["send"] += 1
        self.bytes["send"] += num_bytes


@contextlib.contextmanager
def record() -> Iterator[Ledger]:
    """Count the collectives issued inside the block, forward and backward, in any thread of this process."""
    ledger = Ledger()
    ledger.attach()
    try:
        yield ledger
    finally:
        ledger.detach()


@contextlib.contextmanager
def explained(name: str, group: dist.ProcessGroup | None, *, timed: bool = True) -> Iterator[None]:
    """Collectives that are issued elsewhere are seen, and explained when they fail, as those of lasp.comm are.

    Args:
        name: what the block waits for.
        group: on which group.
        timed: whether the block does nothing else. Otherwise only its failure is explained.

    Raises:
        CommError: a collective failed or timed out.
    """
    call = enter(name, group, None, None) if timed else None
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no error type of its own
            raise
        raise failure(call, error) from error
    finally:
        if call is not None:
            leave(call)


def last_number(group: dist.ProcessGroup | None) -> int:
    """How many collectives this rank has entered in the group: torch's count, equal on ranks that did the same."""
    group = group_of(group)
    return group._get_sequence_number_for_group() + _correction.get(group, 0)


def group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that None stands for."""
    return dist.group.WORLD if group is None else group


def enter(name: str, group: dist.ProcessGroup | None, where: str | None, num_bytes: int | None) -> Call:
    """Tell the observers of a collective that is about to be issued; ``where``: its place, None: scopes and name."""
    where = place(name) if where is None else where
    call = Call(name, group_of(group), last_number(group) + 1, where, time.monotonic(), num_bytes)
    for observer in _observers:
        observer.entered(call)
    return call


def enter_messages(group: dist.ProcessGroup | None, where: str) -> Call:
    """:func:`enter` for an exchange by messages: it counts as one collective, also on ranks that send nothing."""
    call = enter("messages", group, where, None)
    _correction[call.group] = _correction.get(call.group, 0) + 1
    return call


def count_messages(call: Call, sent: list[int], received: int) -> None:
    """Messages of ``call`` are about to be posted: ``sent`` holds their bytes."""
    if dist.get_backend(call.group) == "gloo":  # it counts them as collectives
        _correction[call.group] -= len(sent) + received
    for num_bytes in sent:
        for observer in _observers:
            observer.sent(call, num_bytes)


def leave(call: Call) -> None:
    """Tell the observers that the host goes on."""
    if not _observers:
        return
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        call.done = torch.cuda.Event()
        call.done.record()
    for observer in _observers:
        observer.left(call)


def failure(call: Call | None, error: RuntimeError) -> CommError:
    """The error that says who is missing, from an observer that knows, else from what ranks leave in the store."""
    found = (observer.explain(call, str(error)) for observer in tuple(_observers))
    text = next((text for text in found if text is not None), None)
    return CommError(_ask_the_failed(call, str(error)) if text is None else text)


def _ask_the_failed(call: Call | None, error: str) -> str:
    """Without a watchdog on every rank: each rank whose wait failed leaves its place in the job's store."""
    group, me = group_of(None if call is None else call.group), dist.get_rank()
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

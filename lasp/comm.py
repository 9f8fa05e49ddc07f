"""The only collectives of the attention operators, and the ledger that counts them.

Every function returns a :class:`Pending`: the operation is in flight until ``wait()``, so that a caller can work
meanwhile. A wait never lasts longer than the group's timeout; when it fails, the error names the ranks that did not
take part. Which collectives run must depend only on values that are equal on all ranks of the group.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


class CommError(RuntimeError):
    """Other ranks cannot be met or waited for. The message is the whole story: who, where, for how long."""


@dataclass
class Ledger:
    """What this rank handed to collectives while a :func:`record` block was open.

    Attributes:
        calls: number of collectives per name: ``all_gather``, ``reduce_scatter``, ``all_to_all``.
        bytes: size of this rank's input to them, per name.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


# Open ledgers. Shared by all threads on purpose: autograd runs a backward on threads of its own.
_open_ledgers: list[Ledger] = []


@contextlib.contextmanager
def record() -> Iterator[Ledger]:
    """Count the collectives issued inside the block, forward and backward, in any thread of this process."""
    ledger = Ledger()
    _open_ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _open_ledgers.remove(ledger)


class Pending:
    """A collective in flight. ``wait()`` once returns its result."""

    def __init__(self, place: str, work: dist.Work, x: Tensor, out: Tensor, group: dist.ProcessGroup | None):
        self._place, self._work, self._group = place, work, group
        self._x, self._out = x, out  # the input must stay alive until the wait
        self._started = time.monotonic()

    def wait(self) -> Tensor:
        """The result, complete on the current stream.

        Raises:
            CommError: the collective failed or timed out; the message names the ranks that are missing.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise CommError(_describe_failure(self._place, self._group, self._started, error)) from error
        self._x = None
        return self._out


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Every rank's ``x`` (equal shapes) stacked along a new dim 0, in group-rank order: [cp_size, *x.shape]."""
    x = x.contiguous()
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    return _issue("all_gather", x, group, out, lambda: gather(out.view(-1), x.view(-1), group, async_op=True))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """The sum over ranks of ``x[cp_rank]``, for ``x`` [cp_size, ...]."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    issue = lambda: scatter(out.view(-1), x.view(-1), dist.ReduceOp.SUM, group, async_op=True)  # noqa: E731
    return _issue("reduce_scatter", x, group, out, issue)


def all_to_all(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
) -> Pending:
    """Send ``send_counts[r]`` consecutive rows of ``x`` to each rank r, receive ``receive_counts[r]`` from it.

    Counts come from the host plan, so no rank asks another for them. The result has the received rows in rank order.
    """
    x = x.contiguous()
    out = x.new_empty((sum(receive_counts), *x.shape[1:]))
    counts = list(receive_counts), list(send_counts)
    return _issue("all_to_all", x, group, out, lambda: dist.all_to_all_single(out, x, *counts, group, async_op=True))


def _issue(name: str, x: Tensor, group: dist.ProcessGroup | None, out: Tensor, start: Callable) -> Pending:
    for ledger in _open_ledgers:
        ledger.calls[name] += 1
        ledger.bytes[name] += x.numel() * x.element_size()
    try:
        work = start()
    except RuntimeError as error:
        raise CommError(_describe_failure(_place(name, group), group, time.monotonic(), error)) from error
    return Pending(_place(name, group), work, x, out, group)


@contextlib.contextmanager
def explained(name: str, group: dist.ProcessGroup | None, *, timed: bool = True) -> Iterator[None]:
    """A collective that is not issued here and fails in the block says who is missing, as those of this file do.

    Args:
        name: what the block waits for.
        group: on which group.
        timed: whether the block does nothing else, so that its time is that of the wait.

    Raises:
        CommError: a collective failed or timed out.
    """
    started = time.monotonic() if timed else None
    try:
        yield
    except CommError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no error type of its own
            raise
        raise CommError(_describe_failure(_place(name, group), group, started, error)) from error


def _place(name: str, group: dist.ProcessGroup | None) -> str:
    """The newest collective of the group by name and number: equal on two ranks that are at the same place."""
    return f"{name} {_group(group)._get_sequence_number_for_group()}"


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return dist.group.WORLD if group is None else group


def _describe_failure(
    place: str, group: dist.ProcessGroup | None, started: float | None, error: RuntimeError, grace_s: float = 3.0
) -> str:
    """Who is missing: each rank whose wait failed leaves its place in the job's store."""
    waited = "" if started is None else f" after {time.monotonic() - started:.1f} s"
    ranks, me = dist.get_process_group_ranks(_group(group)), dist.get_rank()
    message = f"{place} failed on rank {me} (group of ranks {ranks}){waited}."
    try:
        places = _meet(place, f"lasp/waiting/{_group(group).group_name}", ranks, time.monotonic() + grace_s)
    except RuntimeError:
        return f"{message} The job's store is gone as well: look at rank 0's first error."
    missing = [rank for rank in ranks if rank not in places]
    elsewhere = [f"rank {rank} in {other}" for rank, other in places.items() if other != place]
    if elsewhere:
        message += f" Others wait in another one: {', '.join(elsewhere)}; those with the lower number are behind."
    if not missing:
        reason = str(error).partition("\n")[0]
        return message if elsewhere else f"{message} All ranks of the group entered it. The error was: {reason}"
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return (
            f"{message} Rank(s) {missing} never entered it or died: look at their first error, or raise the group's "
            "timeout (timeout_s) if they are slow."
        )
    return (
        f"{message} A connection was lost. Rank(s) {missing} have not reported: one of them died, others may wait for "
        "it still. Look at the first error of those."
    )


def _meet(place: str, prefix: str, ranks: list[int], deadline: float) -> dict[int, str]:
    """Say where this rank waits; the places of all that have said so by the deadline."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{prefix}/{dist.get_rank()}", place)
    while True:
        known = [rank for rank in ranks if store.check([f"{prefix}/{rank}"])]
        if len(known) == len(ranks) or time.monotonic() >= deadline:
            return {rank: store.get(f"{prefix}/{rank}").decode() for rank in known}
        time.sleep(0.05)

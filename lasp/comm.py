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

    def __init__(self, name: str, work: dist.Work, x: Tensor, out: Tensor, group: dist.ProcessGroup | None):
        self._name, self._work, self._group = name, work, group
        self._x, self._out = x, out  # the input must stay alive until the wait
        self._started = time.monotonic()

    def wait(self) -> Tensor:
        """The result, complete on the current stream.

        Raises:
            RuntimeError: the collective failed or timed out; the message names the ranks that are missing.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RuntimeError(_describe_failure(self._name, self._group, self._started, error)) from error
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
        raise RuntimeError(_describe_failure(name, group, time.monotonic(), error)) from error

    return Pending(name, work, x, out, group)


def _describe_failure(
    name: str, group: dist.ProcessGroup | None, started: float, error: RuntimeError, grace_s: float = 3.0
) -> str:
    """Who is missing: each rank whose wait failed leaves its mark in the job's store."""
    waited = time.monotonic() - started
    group = dist.group.WORLD if group is None else group
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    message = f"{name} failed on rank {me} (group of ranks {ranks}) after {waited:.1f} s."
    try:
        store = dist.distributed_c10d._get_default_store()
        prefix = f"lasp/waiting/{group.group_name}"
        store.set(f"{prefix}/{me}", name)
        deadline = time.monotonic() + grace_s
        missing = ranks
        while missing and time.monotonic() < deadline:
            missing = [r for r in missing if not store.check([f"{prefix}/{r}"])]
            time.sleep(0.05)
    except RuntimeError:
        return f"{message} The job's store is gone as well: look at rank 0's first error."
    if not missing:
        return f"{message} All ranks of the group entered a collective: look at each rank's error below."
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return f"{message} Rank(s) {missing} never entered it or died: look at their first error."
    return (
        f"{message} A connection was lost. Rank(s) {missing} have not reported: one of them died, others may wait for "
        "it still. Look at the first error of those."
    )

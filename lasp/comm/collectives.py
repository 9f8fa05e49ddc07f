"""The only collectives and messages of the attention operators.

Every function returns what is in flight: a :class:`Pending`, or :class:`Messages`, so that a caller can work meanwhile.
A wait never lasts longer than the group's timeout; when it fails, the error says which collective it was and who is
missing. Which collectives run must depend only on values that are equal on all ranks of the group. Who counts and
watches them is in :mod:`lasp.comm.calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.comm.calls import Call, count_messages, enter, enter_messages, failure, leave


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
            raise failure(self.call, error) from error
        leave(self.call)
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

    def issue() -> dist.Work:
        return scatter(out.view(-1), x.view(-1), dist.ReduceOp.SUM, group, async_op=True)

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

    def issue() -> dist.Work:
        return dist.all_to_all_single(out, x, *counts, group, async_op=True)

    return _issue("all_to_all", x, group, out, place, issue)


class Messages:
    """Messages between single ranks, in rounds: one exchange of the group, which every rank opens and closes.

    Rank r's n-th message to rank s is what s receives n-th from r, so both must go through the same rounds. To those
    who look on it is one collective, on ranks that have nothing to say as well.

    Args:
        group: the process group; peers are named by their rank in it.
        place: what to call the exchange.
    """

    def __init__(self, group: dist.ProcessGroup | None, place: str):
        self._group = group
        self._call = enter_messages(group, place)
        backend = self._call.group._get_backend(torch.device("cpu")) if dist.get_backend(group) == "gloo" else None
        self._limit = () if backend is None else (backend.options._timeout,)  # gloo's messages know no later one
        self._works: list[dist.Work] = []  # sends in flight
        self._sent: list[Tensor] = []  # they must stay alive

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> list[dist.Work]:
        """Send contiguous tensors to ``(rank, tensor)``, begin to receive into them; pass the result to :meth:`wait`.

        On NCCL the messages of one round travel together, and rounds one after the other.
        """
        if not sends and not receives:
            return []
        count_messages(self._call, [x.numel() * x.element_size() for _, x in sends], len(receives))
        ops = [dist.P2POp(dist.irecv, x, group=self._group, group_peer=rank) for rank, x in receives]
        ops += [dist.P2POp(dist.isend, x, group=self._group, group_peer=rank) for rank, x in sends]
        self._sent += [x for _, x in sends]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise failure(self._call, error) from error
        if len(works) < len(ops):  # one for the whole round
            return works
        self._works += works[len(receives) :]
        return works[: len(receives)]

    def wait(self, works: list[dist.Work]) -> None:
        """Until what these receive is there, on the current stream.

        Raises:
            CommError: a message did not come; it names the ranks that are missing.
        """
        try:
            for work in works:
                work.wait(*self._limit)
        except RuntimeError as error:
            raise failure(self._call, error) from error

    def flush(self) -> None:
        """Until all that this rank has sent is on its way, and its memory free. Wait for what the rounds receive first.

        Raises:
            CommError: a message was not taken; it names the ranks that are missing.
        """
        self.wait(self._works)
        self._works, self._sent = [], []

    def close(self) -> None:
        """:meth:`flush`; nothing follows."""
        self.flush()
        leave(self._call)


def _issue(
    name: str, x: Tensor, group: dist.ProcessGroup | None, out: Tensor, place: str | None, start: Callable
) -> Pending:
    call = enter(name, group, place, x.numel() * x.element_size())
    try:
        work = start()
    except RuntimeError as error:
        raise failure(call, error) from error
    return Pending(call, work, x, out)

"""The ranks of one job as a grid of dp x cp: who shares a sequence, who shares a place in it.

    global rank = dp_rank * cp_size + cp_rank            dp_size = 2, cp_size = 4

                cp_rank 0  1  2  3
    dp_rank 0           0  1  2  3      a row is a cp_group: neighbouring ranks, one sequence cut in four
    dp_rank 1           4  5  6  7      a column is a dp_group: different sequences, the same place in them

Parameters are replicated over the whole grid, so gradients, counts and losses are summed over all of it:
the world group. A mesh of one rank needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp import comm
from lasp.cp_context import CPContext, ExchangeOptions
from lasp.layout import SequenceLayout
from lasp.parallel.user_errors import USER_ERRORS, kind_of, told


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the grid. Make it with :meth:`build`.

    Attributes:
        dp_size, cp_size: the grid.
        dp_rank, cp_rank: this rank's place in it.
        tp_size, pp_size, tp_rank, pp_rank: where a model is cut too, as Megatron does it: tp ranks are neighbours, then
            cp, dp, pp. All ranks of one (dp_rank, cp_rank) see the same tokens.
        ranks: the job's ranks in the default process group, in the order of the grid.
        world_group, dp_group, cp_group: process groups; None where it would hold one rank.
        device: where small control tensors live.
    """

    dp_size: int
    cp_size: int
    dp_rank: int
    cp_rank: int
    ranks: tuple[int, ...]
    world_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    cp_group: dist.ProcessGroup | None
    device: torch.device
    tp_size: int = 1
    pp_size: int = 1
    tp_rank: int = 0
    pp_rank: int = 0

    @classmethod
    def build(
        cls,
        cp_size: int = 1,
        dp_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout: timedelta = timedelta(minutes=10),
    ) -> Mesh:
        """The grid over the ranks of ``group``. Every rank of ``group`` calls it, at the same time.

        Args:
            cp_size: ranks that share one sequence.
            dp_size: sequences in flight. None: the number of ranks over ``cp_size``.
            group: the job; None is the default group, or one process alone where none is initialised.
            device: the device that the backend of the group serves.
            timeout: how long a rank waits for another one in a collective.

        Raises:
            ValueError: the grid does not have as many places as there are ranks.
        """
        alone = group is None and not dist.is_initialized()
        world_size = 1 if alone else dist.get_world_size(group)
        _check_grid(world_size, cp_size, dp_size)
        dp_size = world_size // cp_size
        device = torch.device(device)
        if alone:
            return cls(1, 1, 0, 0, (0,), None, None, None, device)

        world_group = dist.group.WORLD if group is None else group
        ranks = tuple(dist.get_process_group_ranks(world_group))
        dp_rank, cp_rank = divmod(dist.get_rank(world_group), cp_size)
        rows = [ranks[d * cp_size : (d + 1) * cp_size] for d in range(dp_size)]
        columns = [ranks[c::cp_size] for c in range(cp_size)]
        if dp_size > 1 and cp_size > 1 and len(ranks) < dist.get_world_size():
            raise ValueError(
                f"a mesh with both sizes above 1 needs all {dist.get_world_size()} ranks of the default group, got "
                f"a group of {len(ranks)}: new groups are made by all of them together. "
                "Pass group=None, or set one size to 1."
            )
        cp_group = _own_group(rows, dp_rank, world_group, timeout)
        dp_group = _own_group(columns, cp_rank, world_group, timeout)
        return cls(dp_size, cp_size, dp_rank, cp_rank, ranks, world_group, dp_group, cp_group, device)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.dp_size * self.cp_size * self.copies

    @property
    def copies(self) -> int:
        """Ranks that see the same tokens: tp_size * pp_size."""
        return self.tp_size * self.pp_size

    @property
    def rank(self) -> int:
        """This rank's number in the grid."""
        data_rank = (self.pp_rank * self.dp_size + self.dp_rank) * self.cp_size + self.cp_rank
        return data_rank * self.tp_size + self.tp_rank

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def cp_context(self, layout: SequenceLayout, options: ExchangeOptions | None = None) -> CPContext:
        """The context of one batch on this rank's cp_group."""
        return (options or ExchangeOptions()).context(layout, self.cp_group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, in place: equal on every rank."""
        if self.world_size > 1:
            with comm.explained("all_reduce", self.world_group):
                dist.all_reduce(x, group=self.world_group)
        return x

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. All ranks get the same answer, so all can act on it together."""
        count = torch.tensor([float(flag)], device=self.device)
        return bool(self.sum(count).item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order. For reports: small host objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with comm.explained("all_gather", self.world_group):
            dist.all_gather_object(values, value, group=self.world_group)
        return values

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's ``x`` on every rank, in place."""
        if self.world_size > 1:
            with comm.explained("broadcast", self.world_group):
                dist.broadcast(x, self.ranks[0], group=self.world_group)
        return x

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the first rank alone; its result, or its failure, is everybody's.

        Without this a failed save would leave the other ranks waiting in their next collective.

        Raises:
            ValueError, FloatingPointError, OSError, CommError: what ``work`` raised, on every rank; any other error
                is a RuntimeError on the other ranks.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome = [("result", work())]
            except Exception as caught:
                error, kind = caught, kind_of(caught)
                outcome = [(kind.__name__ if kind else "failed", told(caught))]
        with comm.explained("broadcast", self.world_group):
            dist.broadcast_object_list(outcome, self.ranks[0], group=self.world_group)
        kind, value = outcome[0]
        if error is not None:
            raise error
        for known in USER_ERRORS:
            if kind == known.__name__:
                raise known(value)
        if kind == "failed":
            raise RuntimeError(f"rank 0 failed: {value}")
        return value


def _own_group(
    parts: list[tuple[int, ...]], index: int, world_group: dist.ProcessGroup, timeout: timedelta
) -> dist.ProcessGroup | None:
    """The group of ``parts[index]``; every rank makes those of all parts, in the same order."""
    if len(parts) == 1:
        return world_group
    if len(parts[0]) == 1:
        return None
    with comm.explained("new_group", world_group):
        return [dist.new_group(part, timeout=timeout) for part in parts][index]


def _check_grid(world_size: int, cp_size: int, dp_size: int | None) -> None:
    for name, size in (("cp_size", cp_size), ("dp_size", dp_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}. Set it to the ranks there are.")
    if dp_size is None and world_size % cp_size:
        raise ValueError(
            f"cp_size must divide the number of ranks: {world_size} ranks, cp_size = {cp_size}. "
            f"Start a multiple of {cp_size} ranks or choose another cp_size."
        )
    if dp_size is not None and dp_size * cp_size != world_size:
        raise ValueError(
            f"the mesh must have one place per rank: dp_size * cp_size = {dp_size} * {cp_size} = "
            f"{dp_size * cp_size}, but {world_size} rank(s) run. Start {dp_size * cp_size} ranks or change "
            "the sizes."
        )

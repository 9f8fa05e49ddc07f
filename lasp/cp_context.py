"""CPContext: what a user binds to a cp_group, once per batch, and passes to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.checks import not_one_of
from lasp.comm.nodes import node_ids
from lasp.context.context import Context
from lasp.cost.fabric import PRESETS, Fabric
from lasp.exchange import AUTO, EXCHANGES, names
from lasp.layout import SequenceLayout
from lasp.softmax.table import SOFTMAX_EXCHANGES, softmax_names


@dataclass(frozen=True)
class Alone:
    """Stands in the place of a group: one device, no process group.

    Attributes:
        replaceable: see :meth:`CPContext.local`.
    """

    replaceable: bool = False


class CPContext(Context):
    """Binds a :class:`~lasp.layout.SequenceLayout` to a process group. Make one per batch and pass it to every layer.

    Args:
        layout: who owns which tokens, and the packed documents.
        group: the cp_group; None is the default group. :meth:`local` puts :class:`Alone` here.
        exchange: how linear layers turn state maps into entry states: a name in :data:`lasp.exchange.EXCHANGES`, or
            ``auto``: the one that is predicted to be fastest on ``fabric`` for each kind of layer. All give the same
            numbers.
        nodes: the node of each cp rank, for exchanges that treat nodes apart (``hierarchical``) and wherever ``fabric``
            is given. None: asked once per group, from host names, by one all-gather.
        fabric: the links, for ``auto``; it sets the number of slices where a state travels in slices (``all_scan``,
            ``hierarchical``). A :class:`~lasp.cost.fabric.Fabric`, the name of a preset, or a file of measurements.
        wire_dtype: ``torch.bfloat16`` halves the states on the wire, at 2^-9 relative per rounding: once for
            ``all_gather``, once per hop in a chain. None: as they are.
        softmax_exchange: that of the model's softmax layers, see :func:`lasp.softmax_attention`.

    Raises:
        ValueError: no layout; a group whose size is not the layout's cp_size; an unknown exchange or fabric; ``auto``
            without a fabric; an option without effect; node ids that are not one per rank.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        group: dist.ProcessGroup | Alone | None = None,
        exchange: str = "all_gather",
        *,
        nodes: Sequence[int] | None = None,
        fabric: Fabric | str | Path | None = None,
        wire_dtype: torch.dtype | None = None,
        softmax_exchange: str = "all_gather",
    ):
        if not isinstance(layout, SequenceLayout):
            raise ValueError(
                f"layout must be a SequenceLayout, got {layout!r:.80}. Make one: "
                "SequenceLayout.contiguous(cu_seqlens_or_length, cp_size)."
            )
        check_exchange(exchange, nodes, fabric, wire_dtype, softmax_exchange)
        if isinstance(group, Alone):
            if layout.cp_size != 1:
                raise ValueError(f"CPContext.local needs a layout of one rank, got cp_size = {layout.cp_size}.")
            super().__init__(layout, None, 0, nodes=(0,), replaceable=group.replaceable)
            return
        _check_group(layout, group, nodes)
        nodes = None if nodes is None else tuple(nodes)
        if _goes_by_messages(exchange, softmax_exchange):
            found = node_ids(group)  # also where it is known: NCCL's first collective must be one of all ranks
            nodes = found if nodes is None else nodes
        super().__init__(
            layout,
            group,
            dist.get_rank(group),
            nodes=nodes,
            exchange=exchange,
            softmax_exchange=softmax_exchange,
            fabric=None if fabric is None else Fabric.of(fabric),
            wire_dtype=wire_dtype,
        )

    @classmethod
    def local(
        cls, cu_seqlens_or_length: int | Sequence[int] | Tensor | SequenceLayout, *, replaceable: bool = False
    ) -> CPContext:
        """One device, no process group, the same code path: cp_size = 1.

        Args:
            cu_seqlens_or_length: document borders, one document's length, or a layout of one rank.
            replaceable: make tables with room for any layout of as many tokens and documents, none empty, so that
                :meth:`replace_layout` works under a captured CUDA graph.
        """
        layout = cu_seqlens_or_length
        if not isinstance(layout, SequenceLayout):
            layout = SequenceLayout.contiguous(layout, 1)
        return cls(layout, Alone(replaceable))

    @staticmethod
    @lru_cache(maxsize=16)
    def whole(length: int) -> CPContext:
        """The context of calls that pass none: one device, one document per row. Kept for the lengths last seen."""
        return CPContext.local(length)

    @classmethod
    def of(cls, cp: CPContext | None, length: int) -> CPContext:
        """``cp``; for None one device with one document of ``length`` tokens per row.

        Raises:
            ValueError: ``cp`` is something else.
        """
        if cp is None:
            return cls.whole(length)
        if not isinstance(cp, CPContext):
            raise ValueError(
                f"cp must be a CPContext or None, got {type(cp).__name__}. Wrap a layout: CPContext(layout)."
            )
        return cp


@dataclass(frozen=True)
class ExchangeOptions:
    """The same for every batch of a run; the fields are those of :class:`CPContext`.

    Raises:
        ValueError: as :class:`CPContext`, before there is a process group.
    """

    exchange: str = "all_gather"
    softmax_exchange: str = "all_gather"
    fabric: Fabric | None = None
    wire_dtype: torch.dtype | None = None

    def __post_init__(self):
        check_exchange(self.exchange, None, self.fabric, self.wire_dtype, self.softmax_exchange)

    def context(self, layout: SequenceLayout, group: dist.ProcessGroup | None) -> CPContext:
        """The context of one batch; of one device where the layout has one rank."""
        if layout.cp_size == 1:
            return CPContext.local(layout)
        return CPContext(
            layout,
            group,
            self.exchange,
            fabric=self.fabric,
            wire_dtype=self.wire_dtype,
            softmax_exchange=self.softmax_exchange,
        )


def _check_group(layout: SequenceLayout, group: dist.ProcessGroup | None, nodes: Sequence[int] | None) -> None:
    """Refuse a group that does not fit the layout, and node ids that are not one per rank."""
    if group is None and not dist.is_initialized():
        raise ValueError(
            "group is None, the default process group, but torch.distributed is not initialised. "
            "Start with torchrun and init_process_group, or use CPContext.local(...) on one device."
        )
    size = dist.get_world_size(group)
    if size != layout.cp_size:
        raise ValueError(
            f"the group must have as many ranks as the layout: layout.cp_size = {layout.cp_size}, group size "
            f"{size}. Build the layout with cp_size={size} or pass the cp_group."
        )
    if nodes is not None and not all(isinstance(node, int) for node in nodes):
        raise ValueError(
            f"nodes must hold integers, equal on ranks that share a machine, got {nodes!r:.80}. Leave it None to "
            "ask the hosts."
        )
    if nodes is not None and len(nodes) != size:
        raise ValueError(
            f"nodes must hold the node of each rank of the group: {size} ranks, got {len(nodes)} entries. Leave "
            "it None to ask the hosts."
        )


def _goes_by_messages(exchange: str, softmax_exchange: str) -> bool:
    """Whether layers under these names may send from rank to rank."""
    named = (EXCHANGES.get(exchange), SOFTMAX_EXCHANGES.get(softmax_exchange))
    return any(entry is None or not entry.in_collective for entry in named)  # None: auto


def check_exchange(exchange, nodes, fabric, wire_dtype, softmax_exchange) -> None:
    """Refuse what cannot be, and options that would have no effect."""
    if exchange not in names():
        raise ValueError(f"exchange {not_one_of(names(), exchange)}")
    if softmax_exchange not in softmax_names():
        raise ValueError(f"softmax_exchange {not_one_of(softmax_names(), softmax_exchange)}")
    for key, value, known in (
        ("exchange", exchange, tuple(EXCHANGES)),
        ("softmax_exchange", softmax_exchange, tuple(SOFTMAX_EXCHANGES)),
    ):
        if value == AUTO and fabric is None:
            raise ValueError(
                f"{key}='auto' chooses by the links between ranks: fabric must name a preset, {', '.join(PRESETS)}, or "
                f"a file that `lasp bench fabric` wrote, got None. Or name one of {known}."
            )
    by_fabric = exchange == AUTO or EXCHANGES[exchange].takes_fabric
    if fabric is not None and not by_fabric and softmax_exchange != AUTO:
        name = getattr(fabric, "name", fabric)
        sliced = " and ".join(repr(e.name) for e in EXCHANGES.values() if e.takes_fabric)
        raise ValueError(
            f"fabric has no effect on exchange={exchange!r}; leave it None, got {str(name)!r:.80}. It chooses for "
            f"'auto', and the number of slices for {sliced}."
        )
    if nodes is not None and fabric is None and not EXCHANGES[exchange].needs_nodes:
        raise ValueError(f"nodes has no effect on exchange={exchange!r}; leave it None, got {nodes!r:.80}.")
    if wire_dtype not in (None, torch.bfloat16):
        raise ValueError(f"wire_dtype must be torch.bfloat16 or None, got {wire_dtype!r}.")

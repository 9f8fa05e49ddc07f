"""CPContext: one batch's layout on one context-parallel group, as this rank sees it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.chains import ChainPlan
from lasp.exchange import AUTO, EXCHANGES
from lasp.fabric import PRESETS, Fabric
from lasp.hosts import node_ids
from lasp.kernels.segments import SegmentTable, to_device
from lasp.layout import Segment, SequenceLayout

if TYPE_CHECKING:
    from lasp.recompute import ExchangeTape

T = TypeVar("T")
SOFTMAX_EXCHANGES = ("all_gather", "ring", "ulysses")


class CPContext:
    """Binds a :class:`~lasp.layout.SequenceLayout` to a process group. Make one per batch and pass it to every layer.

    Args:
        layout: who owns which tokens, and the packed documents.
        group: the cp_group; None is the default group.
        exchange: how linear layers turn state maps into entry states: ``all_gather`` (LASP-2), ``ring`` (LASP-1),
            ``all_scan`` (ZeCO), ``log_scan``, ``hierarchical``, or ``auto``: the one that is predicted to be fastest
            on ``fabric`` for each kind of layer. All give the same numbers.
        nodes: the node of each cp rank, for ``hierarchical`` and wherever ``fabric`` is given. None: asked once per
            group, from host names, by one all-gather.
        fabric: the links, for ``auto``; for ``all_scan`` and ``hierarchical`` it sets the number of slices. A
            :class:`~lasp.fabric.Fabric`, the name of a preset, or a file of measurements.
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
        group: dist.ProcessGroup | None = None,
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
        self.layout, self.group, self.exchange = layout, group, exchange
        self.softmax_exchange, self.wire_dtype = softmax_exchange, wire_dtype
        self.fabric = None if fabric is None else Fabric.of(fabric)
        self.cp_rank, self.cp_size = dist.get_rank(group), size
        self.nodes = None if nodes is None else tuple(nodes)
        if exchange != "all_gather" or softmax_exchange in ("ring", AUTO):
            found = node_ids(group)  # also where it is known: NCCL's first collective must be one of all ranks
            self.nodes = found if self.nodes is None else self.nodes
        self.tape: ExchangeTape | None = None
        self._made: dict[Hashable, object] = {}
        self._replaceable = False

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
        if layout.cp_size != 1:
            raise ValueError(f"CPContext.local needs a layout of one rank, got cp_size = {layout.cp_size}.")
        self = cls.__new__(cls)
        self.layout, self.group, self.exchange = layout, None, "all_gather"
        self.softmax_exchange, self.wire_dtype, self.fabric, self.nodes = "all_gather", None, None, (0,)
        self.cp_rank, self.cp_size = 0, 1
        self.tape = None
        self._made = {}
        self._replaceable = replaceable
        if replaceable:
            self._check_no_empty_document(layout)
        return self

    def replace_layout(self, cu_seqlens: int | Sequence[int] | Tensor) -> None:
        """Write another layout into the device tables that linear layers with the Triton kernels read.

        A CUDA graph that captured such layers then computes with the new layout when it is replayed. What else of the
        layout the graph holds, as position ids, its owner replaces likewise.

        Args:
            cu_seqlens: borders of as many documents over as many tokens as before, none of them empty.

        Raises:
            ValueError: the context was not made ``replaceable``; the numbers differ; a layer has used this context
                whose work depends on the layout on the host: softmax, convolution, linear with ``impl="torch"``.
        """
        layout = SequenceLayout.contiguous(cu_seqlens, 1)
        self._check_no_empty_document(layout)
        host = [key[0] for key in self._made if key[0] in ("softmax", "window", "halo")]
        have, want = [(x.num_documents, x.num_tokens(0)) for x in (self.layout, layout)]
        if not self._replaceable or host or have != want:
            raise ValueError(
                "replace_layout needs CPContext.local(..., replaceable=True), as many documents and tokens, and no "
                f"layer that plans on the host: replaceable={self._replaceable}, (documents, tokens) {have} and "
                f"{want}, plans of {host or 'none'}. Make a context of its own for this layout."
            )
        for table in [x for x in self._made.values() if isinstance(x, SegmentTable)]:
            table.replace([(s.start, s.stop) for s in layout.segments(0)])
        self.layout = layout
        for key, plan in [item for item in self._made.items() if isinstance(item[1], ChainPlan)]:
            del self._made[key]
            lengths = self.chain_plan(*key[1:]).lengths
            for old in [k for k in self._made if k[:2] == (plan.lengths, torch.float64)]:
                tensor = self._made.pop(old)
                self._made[lengths, torch.float64, old[2]] = tensor.copy_(torch.tensor(lengths))
        self.__dict__.pop("position_ids", None)

    @staticmethod
    def _check_no_empty_document(layout: SequenceLayout) -> None:
        if len(layout.segments(0)) != layout.num_documents:
            raise ValueError(
                f"a replaceable layout must have no empty document: {layout.num_documents} documents, "
                f"{len(layout.segments(0))} of them with tokens. Drop the empty ones."
            )

    @staticmethod
    @lru_cache(maxsize=16)
    def whole(length: int) -> CPContext:
        """The context of calls that pass none: one device, one document per row. Kept for the lengths last seen."""
        return CPContext.local(length)

    @property
    def num_tokens(self) -> int:
        """T_local: tokens that this rank owns."""
        return self.layout.num_tokens(self.cp_rank)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """This rank's segments in local order."""
        return self.layout.segments(self.cp_rank)

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each local token in its document, int64 [T_local], on the CPU."""
        return self.layout.position_ids(self.cp_rank)

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns, made once per context: plans and tables that all layers share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def on_device(self, values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers of the host plan as a tensor, copied once: indexing with a list would stall the device every time."""
        return self.remember((values, dtype, device), lambda: to_device(torch.tensor(values, dtype=dtype), device))

    def segment_table(self, device: torch.device) -> SegmentTable:
        """Chunk and tile tables of this rank's segments for the kernels."""
        bounds = [(s.start, s.stop) for s in self.segments]
        return self.remember(
            ("segment_table", device), lambda: SegmentTable(bounds, device, replaceable=self._replaceable)
        )

    def chain_plan(self, causal: bool, final_states: bool) -> ChainPlan:
        """This rank's part in every document's chain of segments."""
        make = lambda: ChainPlan.make(self.layout, self.cp_rank, causal=causal, final_states=final_states)  # noqa: E731
        return self.remember(("chain_plan", causal, final_states), make)

    def check_tokens(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Raise a ValueError unless ``x`` holds this rank's tokens along ``dim`` and packs documents with B = 1."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"{name} must hold the {self.num_tokens} tokens of cp rank {self.cp_rank} along dim {dim}, got "
                f"{x.shape[dim]}: shape {tuple(x.shape)}. Cut the batch with layout.shard(x, cp_rank)."
            )
        if self.layout.num_documents > 1 and x.shape[0] != 1:
            raise ValueError(
                f"{name} must have B = 1 when the layout packs more than one document: B = {x.shape[0]}, "
                f"{self.layout.num_documents} documents. Concatenate the rows into one stream."
            )


def check_exchange(exchange, nodes, fabric, wire_dtype, softmax_exchange) -> None:
    """Refuse what cannot be, and options that would have no effect."""
    if exchange not in (*EXCHANGES, AUTO):
        raise ValueError(f"exchange must be one of {(*EXCHANGES, AUTO)}, got {exchange!r}.")
    if softmax_exchange not in (*SOFTMAX_EXCHANGES, AUTO):
        raise ValueError(f"softmax_exchange must be one of {(*SOFTMAX_EXCHANGES, AUTO)}, got {softmax_exchange!r}.")
    for key, value, names in (
        ("exchange", exchange, tuple(EXCHANGES)),
        ("softmax_exchange", softmax_exchange, SOFTMAX_EXCHANGES),
    ):
        if value == AUTO and fabric is None:
            raise ValueError(
                f"{key}='auto' chooses by the links between ranks: fabric must name a preset, {', '.join(PRESETS)}, or "
                f"a file that `lasp bench fabric` wrote, got None. Or name one of {names}."
            )
    if fabric is not None and exchange not in (AUTO, "all_scan", "hierarchical") and softmax_exchange != AUTO:
        name = getattr(fabric, "name", fabric)
        raise ValueError(
            f"fabric has no effect on exchange={exchange!r}; leave it None, got {str(name)!r:.80}. It chooses for "
            "'auto', and the number of slices for 'all_scan' and 'hierarchical'."
        )
    if nodes is not None and exchange != "hierarchical" and fabric is None:
        raise ValueError(f"nodes has no effect on exchange={exchange!r}; leave it None, got {nodes!r:.80}.")
    if wire_dtype not in (None, torch.bfloat16):
        raise ValueError(f"wire_dtype must be torch.bfloat16 or None, got {wire_dtype!r}.")

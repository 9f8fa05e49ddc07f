"""Context: one batch's layout as one rank sees it. What the exchanges and operators know of a CPContext."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.context.chains import ChainPlan
from lasp.context.tables import SharedTables
from lasp.context.tape import ExchangeTape
from lasp.cost.fabric import Fabric
from lasp.kernels.segments import SegmentTable
from lasp.layout import Segment, SequenceLayout

T = TypeVar("T")


class Context:
    """A layout, this rank's place in the cp_group, and how its layers exchange. Users make a :class:`lasp.CPContext`.

    Args:
        layout: who owns which tokens, and the packed documents.
        group: the cp_group; None on one device without a process group.
        cp_rank: this rank's number in it.
        nodes: the node of each cp rank, None where nobody has asked.
        exchange, softmax_exchange: names in the tables of the exchanges, or ``auto``.
        fabric: the links between the ranks.
        wire_dtype: of states under way; None: as they are.
        replaceable: the tables have room for any layout of as many tokens and documents.

    Attributes:
        cp_size: ranks of the group.
        tape: where exchanges are recorded and replayed while activations are made again.
        tables: what has been made from the layout so far.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        group: dist.ProcessGroup | None,
        cp_rank: int,
        *,
        nodes: tuple[int, ...] | None = None,
        exchange: str = "all_gather",
        softmax_exchange: str = "all_gather",
        fabric: Fabric | None = None,
        wire_dtype: torch.dtype | None = None,
        replaceable: bool = False,
    ):
        if replaceable:
            _check_no_empty_document(layout)
        self.layout, self.group, self.cp_rank, self.cp_size = layout, group, cp_rank, layout.cp_size
        self.exchange, self.softmax_exchange = exchange, softmax_exchange
        self.nodes, self.fabric, self.wire_dtype = nodes, fabric, wire_dtype
        self.tape: ExchangeTape | None = None
        self.tables = SharedTables()
        self._replaceable = replaceable

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
        _check_no_empty_document(layout)
        host = [key[0] for key in self.tables.plans if key[0] in ("softmax", "window", "halo")]
        have, want = [(x.num_documents, x.num_tokens(0)) for x in (self.layout, layout)]
        if not self._replaceable or host or have != want:
            raise ValueError(
                "replace_layout needs CPContext.local(..., replaceable=True), as many documents and tokens, and no "
                f"layer that plans on the host: replaceable={self._replaceable}, (documents, tokens) {have} and "
                f"{want}, plans of {host or 'none'}. Make a context of its own for this layout."
            )

        def chain(causal: bool, final_states: bool) -> ChainPlan:
            return ChainPlan.make(layout, 0, causal=causal, final_states=final_states)

        self.tables.replace([(s.start, s.stop) for s in layout.segments(0)], chain)
        self.layout = layout
        self.__dict__.pop("position_ids", None)

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

    def plan(self, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """The host plan of this name, which ``make`` returns the first time; all layers share it."""
        return self.tables.plan(key, make)

    def on_device(self, values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers of a host plan as a tensor, copied once."""
        return self.tables.on_device(values, dtype, device)

    def segment_table(self, device: torch.device) -> SegmentTable:
        """Chunk and tile tables of this rank's segments for the kernels."""
        found = self.tables.segments
        if device not in found:
            bounds = [(s.start, s.stop) for s in self.segments]
            found[device] = SegmentTable(bounds, device, replaceable=self._replaceable)
        return found[device]

    def chain_plan(self, causal: bool, final_states: bool) -> ChainPlan:
        """This rank's part in every document's chain of segments."""
        found, key = self.tables.chains, (causal, final_states)
        if key not in found:
            found[key] = ChainPlan.make(self.layout, self.cp_rank, causal=causal, final_states=final_states)
        return found[key]

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


def _check_no_empty_document(layout: SequenceLayout) -> None:
    if len(layout.segments(0)) != layout.num_documents:
        raise ValueError(
            f"a replaceable layout must have no empty document: {layout.num_documents} documents, "
            f"{len(layout.segments(0))} of them with tokens. Drop the empty ones."
        )

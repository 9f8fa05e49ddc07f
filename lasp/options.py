"""How the layers of a run exchange: what a context is made with, beside layout and group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lasp.context import CPContext, check_exchange
from lasp.fabric import Fabric
from lasp.layout import SequenceLayout


@dataclass(frozen=True)
class ExchangeOptions:
    """The same for every batch of a run; the fields are those of :class:`~lasp.context.CPContext`.

    Raises:
        ValueError: as :class:`~lasp.context.CPContext`, before there is a process group.
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

"""What a context makes once and all layers share: plans on the host, tables and numbers on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from lasp.context.chains import ChainPlan
from lasp.kernels.segments import SegmentTable, to_device

T = TypeVar("T")


class SharedTables:
    """Each entry is made when it is first asked for.

    Attributes:
        segments: chunk and tile tables of the kernels, by device.
        chains: this rank's part in every document's chain of segments, by ``(causal, final_states)``.
        plans: host plans that exchanges and layers make of the layout, by a key whose first entry names the plan.
        numbers: numbers of host plans as tensors, by ``(values, dtype, device)``.
    """

    def __init__(self) -> None:
        self.segments: dict[torch.device, SegmentTable] = {}
        self.chains: dict[tuple[bool, bool], ChainPlan] = {}
        self.plans: dict[Hashable, object] = {}
        self.numbers: dict[tuple[tuple, torch.dtype, torch.device], Tensor] = {}

    def plan(self, key: Hashable, make: Callable[[], T]) -> T:
        """The plan of this name, which ``make`` returns the first time."""
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]

    def on_device(self, values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers of a host plan as a tensor, copied once: indexing with a list would stall the device every time."""
        key = values, dtype, device
        if key not in self.numbers:
            self.numbers[key] = to_device(torch.tensor(values, dtype=dtype), device)
        return self.numbers[key]

    def replace(self, bounds: Iterable[tuple[int, int]], chain: Callable[[bool, bool], ChainPlan]) -> None:
        """Write another layout of as many segments and tokens into the device tensors, at their addresses.

        Args:
            bounds: first and last local token of each segment.
            chain: makes the plan of a key of ``chains`` from the new layout.
        """
        bounds = list(bounds)
        for table in self.segments.values():
            table.replace(bounds)
        for key, plan in list(self.chains.items()):
            self.chains[key] = chain(*key)
            lengths = self.chains[key].lengths
            for old in [k for k in self.numbers if k[:2] == (plan.lengths, torch.float64)]:
                tensor = self.numbers.pop(old)
                self.numbers[lengths, torch.float64, old[2]] = tensor.copy_(torch.tensor(lengths))

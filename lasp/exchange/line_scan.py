"""Exchanges by messages from rank to rank: states travel along the line, rank by rank, and no rank gathers them all.

What enters a fragment comes from the scan; documents that begin inside one start from their initial states. A
bidirectional layer scans both ways and adds. Final states, and their gradients, take one more all-to-all: from and to
the ranks where documents end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lasp import comm
from lasp.context.chains import ChainPlan
from lasp.context.context import Context
from lasp.exchange.algorithm import Algorithm, InStep, run
from lasp.exchange.background import Background
from lasp.exchange.base import StateExchange
from lasp.exchange.chain import Chain, chain_rounds
from lasp.exchange.doubling import Doubling, doubling_rounds
from lasp.exchange.hierarchical import Hierarchical, NodePlan
from lasp.exchange.line import Line, Round
from lasp.exchange.wire import Wire
from lasp.kernels.state import StateMap, apply, transition


class Scan(StateExchange):
    """A scan along the line of fragments, beside the caller's work.

    Args:
        part: makes this rank's part of the scan from the context, the line, the maps of own places, V and the number
            of slices; it keeps its host plans in the context.
        slices: pieces in which a state travels.
    """

    def __init__(self, part: Callable[..., Algorithm], cp: Context, plan: ChainPlan, slices: int = 1):
        super().__init__(cp, plan)
        self._part, self._slices = part, slices

    def start(self, maps: StateMap, fixed: Tensor | None) -> None:
        self._log_decay, self._matrix, self._fixed = maps.log_decay, maps.matrix, fixed
        self._begin(lambda messages: self._forward(maps, messages), maps.state, "forward")

    def wait(self, initial: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        entered, finals, like = self._joined()
        for n, chain in enumerate(self.cp.layout.chains if finals is not None else ()):
            if not chain and initial is not None:  # a document without tokens
                finals[n] = initial[n]
        if initial is None and not any(self.plan.before):
            return None, finals
        entry = self._per_document(like, initial, self.plan.begins)
        for i, state in entered.items():
            entry[i] = state
        return entry, finals

    def start_backward(self, grads: Tensor, d_final: Tensor | None) -> None:
        self._begin(lambda messages: self._backward(grads, d_final, messages), grads, "backward")

    def wait_backward(self) -> Tensor | None:
        entered, d_final, like = self._joined()
        if d_final is None and not any(self.plan.after):
            return None
        d_exit = self._per_document(like, d_final, self.plan.ends)
        for i, grad in entered.items():
            d_exit[i] = grad
        return d_exit

    def _begin(self, work: Callable[[comm.Messages | None], tuple], like: Tensor, direction: str) -> None:
        self._now = f"{self._place}, {direction}"
        alone = self.cp.cp_size == 1

        def exchange() -> tuple:
            messages = None if alone else comm.Messages(self.cp.group, self._now)
            result = work(messages)
            if messages is not None:
                messages.close()
            return (*result, like)

        self._running = Background(exchange, like.device, blocks=not alone)

    def _joined(self) -> tuple:
        running, self._running = self._running, None
        return running.wait()

    def _forward(self, maps: StateMap, messages: comm.Messages | None) -> tuple[dict[int, Tensor], Tensor | None]:
        entered = self._scan(maps, messages, backward=False)
        if not self.plan.finals:
            return entered, None
        return entered, self._gather_finals(maps, entered)

    def _backward(
        self, grads: Tensor, d_final: Tensor | None, messages: comm.Messages | None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        maps = StateMap(grads, self._log_decay, self._matrix).transpose()
        if self.plan.finals:
            d_final = self._scatter_finals(d_final)
            state = grads.clone()
            for i in self.plan.ending:
                state[i] += transition(_one(maps, i), d_final[self.plan.documents[i]])
            maps = StateMap(state, maps.log_decay, maps.matrix)
        return self._scan(maps, messages, backward=True), d_final

    def _scan(self, maps: StateMap, messages: comm.Messages | None, *, backward: bool) -> dict[int, Tensor]:
        """What enters own segments, by their index."""
        directions = (backward,) if self.plan.causal else (False, True)
        lines = {d: self.cp.plan(("line", d), lambda d=d: Line.make(self.cp.layout, backward=d)) for d in directions}
        parts: dict[object, Algorithm] = {}
        for d, line in lines.items():
            own = {p: _one(maps, line.maps[p]) for p in line.own(self.cp.cp_rank)}
            parts[d] = self._part(self.cp, line, own, maps.state.shape[-1], self._slices, backward=d)
        wire = Wire.of(maps, self._fixed, self.cp.wire_dtype)
        if messages is not None:
            run(InStep(parts) if len(parts) > 1 else parts[backward], wire, messages)
        entered: dict[int, Tensor] = {}
        for d, part in parts.items():
            for place, state in part.entered().items():
                i = lines[d].arrivals[place]
                entered[i] = state + entered[i] if i in entered else state
        if self.plan.causal:
            return entered
        return {i: state + maps.state[i] for i, state in entered.items()}

    def _gather_finals(self, maps: StateMap, entered: dict[int, Tensor]) -> Tensor:
        """The state after every document [N, B, H, K, V], equal on all ranks."""
        ends = [_one(maps, i) for i in self.plan.ending]
        own = [apply(m, entered[i]) if i in entered else m.state for i, m in zip(self.plan.ending, ends, strict=True)]
        own = torch.stack(own) if own else maps.state[:0]
        if self.cp.cp_size > 1:
            counts = self.plan.ends_per_rank
            sent = [counts[self.cp.cp_rank]] * self.cp.cp_size
            place = f"{self._now}, final states"
            own = comm.all_to_all(own.repeat(self.cp.cp_size, 1, 1, 1, 1), sent, counts, self.cp.group, place).wait()
        finals = own.new_zeros(len(self.plan.finals), *own.shape[1:])
        order = self.cp.on_device(self.plan.ends_in_order, torch.int64, own.device)
        return finals.index_copy(0, order, own)

    def _scatter_finals(self, d_final: Tensor) -> Tensor:
        """The sum of all ranks' shares [N, B, H, K, V]: of the documents that end here, elsewhere zero."""
        order = self.cp.on_device(self.plan.ends_in_order, torch.int64, d_final.device)
        shares, counts = d_final.index_select(0, order), self.plan.ends_per_rank
        if self.cp.cp_size == 1:
            return d_final
        own = counts[self.cp.cp_rank]
        place = f"{self._now}, final states"
        received = comm.all_to_all(shares, counts, [own] * self.cp.cp_size, self.cp.group, place).wait()
        total = received.unflatten(0, (self.cp.cp_size, own)).sum(0)
        mine = tuple(self.plan.documents[i] for i in self.plan.ending)
        index = self.cp.on_device(mine, torch.int64, d_final.device)
        return torch.zeros_like(d_final).index_copy(0, index, total)


def chain_part(
    cp: Context, line: Line, maps: dict[int, StateMap], value_dim: int, slices: int, *, backward: bool
) -> Algorithm:
    """LASP-1 (arXiv 2404.02882) in one slice; ZeCO's all-scan (arXiv 2507.01004) in several that follow one another."""

    def make() -> tuple[Round, ...]:
        return chain_rounds(line, cp.cp_rank, value_dim, slices)

    return Chain(line, cp.plan(("chain", backward, value_dim, slices), make), maps, value_dim, slices)


def doubling_part(
    cp: Context, line: Line, maps: dict[int, StateMap], value_dim: int, slices: int, *, backward: bool
) -> Algorithm:
    """Recursive doubling: maps are combined, in as many steps as the logarithm of the ranks."""
    assert slices == 1, "its states travel in one piece"

    def make() -> tuple[Round, ...]:
        return doubling_rounds(line, cp.cp_rank, value_dim)

    return Doubling(line, cp.plan(("doubling", backward, value_dim), make), maps)


def node_part(
    cp: Context, line: Line, maps: dict[int, StateMap], value_dim: int, slices: int, *, backward: bool
) -> Algorithm:
    """Node-sliced: inside a node each rank gets one slice of all states; between nodes each slice scans by itself."""

    def make() -> NodePlan:
        return NodePlan(line, cp.nodes, cp.cp_rank, value_dim, slices)

    return Hierarchical(cp.plan(("nodes", backward, value_dim, slices), make), maps)


def _one(maps: StateMap, i: int) -> StateMap:
    """The i-th of stacked maps."""
    picked = (None if x is None else x[i] for x in (maps.state, maps.log_decay, maps.matrix))
    return StateMap(*picked)

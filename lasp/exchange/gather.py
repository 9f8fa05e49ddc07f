"""LASP-2: every rank gathers the maps of all ranks, in one message per direction and layer, and folds those it needs.

Every document is a chain of segments, spread over the ranks. The state that enters a segment is the fold of the maps
before it in its chain; the gradient of the state that leaves a segment is the fold, backwards, of what comes after:

    S_in = A_{i-1} ( ... A_0 S_initial + b_0 ... ) + b_{i-1}           dS_out = C_{i+1} + A_{i+1}^T ( C_{i+2} + ... )

The size of a message does not depend on the length of the sequence (LASP-2, arXiv 2502.07563, section 3.2). Which maps
travel and who folds what is planned on the host by :class:`lasp.context.chains.ChainPlan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp import comm
from lasp.context.chains import Slots
from lasp.exchange.base import StateExchange
from lasp.exchange.wire import pack, unpack
from lasp.kernels.state import StateMap, fold


class AllGather(StateExchange):
    """LASP-2: every rank gathers all maps and folds those it needs (arXiv 2502.07563, algorithms 1-4)."""

    def start(self, maps: StateMap, fixed: Tensor | None) -> None:
        self._shape, self._fixed = maps.state.shape[1:], fixed
        slots, rank = self.plan.forward, self.cp.cp_rank
        sent = [_pick(x, slots, rank) for x in (maps.log_decay, maps.matrix) if x is not None and fixed is None]
        self._dense = maps.matrix is not None
        sent.append(self._narrow(_pick(maps.state, slots, rank)))
        self._message = self._send(self._packed(sent, maps.state.dtype), "forward")

    def wait(self, initial: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        *rest, state = [x.flatten(0, 1) for x in self._receive()]
        self._transition = rest[0] if rest else None
        if self._fixed is not None:
            lengths = self.cp.on_device(self.plan.lengths, torch.float64, state.device)
            log_decay = lengths[:, None, None, None] * self._fixed.double()[None, None, :, None]
            self._transition = log_decay.to(state.dtype)
        finals = None
        if self.plan.finals:
            finals = torch.stack([self._final(n, state, initial) for n in range(len(self.plan.finals))])
        if initial is None and not any(self.plan.before):
            return None, finals
        entry = self._per_document(state, initial, self.plan.begins)
        for i, slots in enumerate(self.plan.before):
            if slots:
                entry[i] = fold(self._maps(state, slots))
        return entry, finals

    def start_backward(self, grads: Tensor, d_final: Tensor | None) -> None:
        sent = [d_final] if self.plan.finals else []
        sent.append(self._narrow(_pick(grads, self.plan.backward, self.cp.cp_rank)))
        self._message = self._send(self._packed(sent, grads.dtype), "backward")

    def wait_backward(self) -> Tensor | None:
        *rest, grads = self._receive()
        grads = grads.flatten(0, 1)
        d_final = rest[0].sum(0) if rest else None  # every rank held a share
        if d_final is None and not any(self.plan.after):
            return None
        d_exit = self._per_document(grads, d_final, self.plan.ends)
        for i, (document, slots) in enumerate(zip(self.plan.documents, self.plan.after, strict=True)):
            if slots:
                there, back = tuple(f or 0 for _, f in slots), tuple(b for b, _ in slots)
                maps = self._maps(grads, back, there)
                d_exit[i] = fold(maps.transpose(), None if d_final is None else d_final[document])
        return d_exit

    def _narrow(self, state: Tensor) -> Tensor:
        return state if self.cp.wire_dtype is None else state.to(self.cp.wire_dtype)

    def _packed(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The message, uint8 [n]. ``dtype``: of the tensors when they arrive."""
        self._expected = [(x.shape, x.dtype) for x in tensors], dtype
        return pack(tensors, dtype.itemsize)

    def _send(self, message: Tensor, direction: str) -> comm.Pending | Tensor:
        if self.cp.cp_size == 1:
            return message
        return comm.all_gather(message, self.cp.group, f"{self._place}, {direction}")

    def _receive(self) -> list[Tensor]:
        """The gathered tensors, each [cp_size, *shape]."""
        packed = self._message.unsqueeze(0) if isinstance(self._message, Tensor) else self._message.wait()
        self._message = None
        shapes, dtype = self._expected
        return [x.to(dtype) for x in unpack(packed, shapes, dtype.itemsize)]

    def _maps(self, state: Tensor, slots: tuple[int, ...], transition_slots: tuple[int, ...] = ()) -> StateMap:
        """The maps in these slots, stacked in this order."""

        def index(values: tuple[int, ...]) -> Tensor:
            return self.cp.on_device(values, torch.int64, state.device)

        transitions, state = self._transition, state.index_select(0, index(slots))
        if transitions is None:
            return StateMap(state)
        transition = transitions.index_select(0, index(transition_slots or slots))
        return StateMap(state, matrix=transition) if self._dense else StateMap(state, transition)

    def _final(self, document: int, state: Tensor, initial: Tensor | None) -> Tensor:
        slots = self.plan.finals[document]
        if slots:
            return fold(self._maps(state, slots))
        empty = state.new_zeros(self._shape)
        return empty if initial is None else initial[document].expand_as(empty)  # a document without tokens


def _pick(x: Tensor, slots: Slots, cp_rank: int) -> Tensor:
    """This rank's message: its sent segments' rows of ``x``, padded with zeros to ``slots.per_rank`` rows."""
    own = slots.sent[cp_rank]
    out = x.new_zeros(slots.per_rank, *x.shape[1:])
    if own:
        torch.stack([x[i] for i in own], out=out[: len(own)])
    return out

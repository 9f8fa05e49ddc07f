"""How ranks turn their state maps into the state that enters each segment: one message per direction and layer.

Every document is a chain of segments, spread over the ranks. The state that enters a segment is the fold of the maps
before it in its chain; the gradient of the state that leaves a segment is the fold, backwards, of what comes after:

    S_in = A_{i-1} ( ... A_0 S_initial + b_0 ... ) + b_{i-1}           dS_out = C_{i+1} + A_{i+1}^T ( C_{i+2} + ... )

The size of a message does not depend on the length of the sequence (LASP-2, arXiv 2502.07563, section 3.2). Which maps
travel and who folds what is planned on the host by :class:`lasp.chains.ChainPlan`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lasp import comm
from lasp.chains import ChainPlan, Slots
from lasp.kernels.state import StateMap, fold

if TYPE_CHECKING:
    from lasp.context import CPContext


class StateExchange(ABC):
    """One layer's exchange: forward once, then at most one backward. ``start_*`` sends, ``wait_*`` returns.

    All states are [..., B, H, K, V]. Every method that communicates runs on every rank of the group.
    """

    def __init__(self, cp: CPContext, plan: ChainPlan):
        self.cp, self.plan = cp, plan
        self._place = comm.place("linear")  # here, since a backward runs outside the layer's scope

    @abstractmethod
    def start(self, maps: StateMap, fixed: Tensor | None) -> None:
        """Send this rank's maps, stacked per own segment, those that begin a document with its initial state in ``b``.

        ``fixed``: a decay equal for all tokens, log-decay [H]. Ranks know its maps from lengths, so it is not sent.
        """

    @abstractmethod
    def wait(self, initial: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The state that enters each own segment [segments, B, H, K, V] (None if all are zero), and final states.

        ``initial``: initial state of each document [N, B, H, K, V]. Final states are None unless planned.
        """

    @abstractmethod
    def start_backward(self, grads: Tensor, d_final: Tensor | None) -> None:
        """Send the entry-state gradients of own segments and this rank's share of the final states' gradients."""

    @abstractmethod
    def wait_backward(self) -> Tensor | None:
        """The gradient of the state after each own segment, None if all are zero."""


class AllGather(StateExchange):
    """LASP-2: every rank gathers all maps and folds those it needs (arXiv 2502.07563, algorithms 1-4)."""

    def start(self, maps: StateMap, fixed: Tensor | None) -> None:
        self._shape, self._fixed = maps.state.shape[1:], fixed
        sent = [_pick(maps.state, self.plan.forward, self.cp.cp_rank)]
        if maps.log_decay is not None and fixed is None:
            sent.append(_pick(maps.log_decay, self.plan.forward, self.cp.cp_rank))
        if maps.matrix is not None:
            sent.append(_pick(maps.matrix, self.plan.forward, self.cp.cp_rank))
        self._dense, self._shapes = maps.matrix is not None, [x.shape for x in sent]
        self._message = self._send(sent, "forward")

    def wait(self, initial: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        state, *rest = [x.flatten(0, 1) for x in self._receive(self._shapes)]
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
        sent = [_pick(grads, self.plan.backward, self.cp.cp_rank)]
        if self.plan.finals:
            sent.append(d_final.contiguous())
        self._grad_shapes = [x.shape for x in sent]
        self._message = self._send(sent, "backward")

    def wait_backward(self) -> Tensor | None:
        grads, *rest = self._receive(self._grad_shapes)
        d_final = rest[0].sum(0) if rest else None  # every rank held a share
        if d_final is None and not any(self.plan.after):
            return None
        d_exit = self._per_document(grads, d_final, self.plan.ends)
        for i, (document, slots) in enumerate(zip(self.plan.documents, self.plan.after, strict=True)):
            if slots:
                there, back = tuple(f or 0 for _, f in slots), tuple(b for b, _ in slots)
                maps = self._maps(grads.flatten(0, 1), back, there)
                d_exit[i] = fold(maps.transpose(), None if d_final is None else d_final[document])
        return d_exit

    def _send(self, tensors: list[Tensor], direction: str) -> comm.Pending | Tensor:
        packed = torch.cat([x.flatten() for x in tensors])
        if self.cp.cp_size == 1:
            return packed
        return comm.all_gather(packed, self.cp.group, f"{self._place}, {direction}")

    def _receive(self, shapes: list[torch.Size]) -> list[Tensor]:
        """The gathered tensors, each [cp_size, *shape]."""
        packed = self._message.unsqueeze(0) if isinstance(self._message, Tensor) else self._message.wait()
        self._message = None
        parts = packed.split([shape.numel() for shape in shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _maps(self, state: Tensor, slots: tuple[int, ...], transition_slots: tuple[int, ...] = ()) -> StateMap:
        """The maps in these slots, stacked in this order."""
        index = lambda values: self.cp.on_device(values, torch.int64, state.device)  # noqa: E731
        state = state.index_select(0, index(slots))
        if self._transition is None:
            return StateMap(state)
        transition = self._transition.index_select(0, index(transition_slots or slots))
        return StateMap(state, matrix=transition) if self._dense else StateMap(state, transition)

    def _final(self, document: int, state: Tensor, initial: Tensor | None) -> Tensor:
        slots = self.plan.finals[document]
        if slots:
            return fold(self._maps(state, slots))
        empty = state.new_zeros(self._shape)
        return empty if initial is None else initial[document].expand_as(empty)  # a document without tokens

    def _per_document(self, like: Tensor, values: Tensor | None, wanted: tuple[bool, ...]) -> Tensor:
        """``values`` [N, B, H, K, V] for each own segment where ``wanted``, zero elsewhere; dtype as ``like``."""
        out = like.new_zeros(len(wanted), *self._shape)
        for i, (document, want) in enumerate(zip(self.plan.documents, wanted, strict=True)):
            if want and values is not None:
                out[i] = values[document]
        return out


EXCHANGES: dict[str, type[StateExchange]] = {"all_gather": AllGather}


def _pick(x: Tensor, slots: Slots, cp_rank: int) -> Tensor:
    """This rank's message: its sent segments' rows of ``x``, padded with zeros to ``slots.per_rank`` rows."""
    own = slots.sent[cp_rank]
    out = x.new_zeros(slots.per_rank, *x.shape[1:])
    if own:
        torch.stack([x[i] for i in own], out=out[: len(own)])
    return out

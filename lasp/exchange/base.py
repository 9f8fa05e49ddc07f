"""What every exchange does for one layer: forward once, then at most one backward."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lasp import comm
from lasp.context.chains import ChainPlan
from lasp.context.context import Context
from lasp.kernels.state import StateMap


class StateExchange(ABC):
    """One layer's exchange. ``start_*`` sends, ``wait_*`` returns.

    All states are [..., B, H, K, V]. Every method that communicates runs on every rank of the group.
    """

    def __init__(self, cp: Context, plan: ChainPlan):
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

    def _per_document(self, like: Tensor, values: Tensor | None, wanted: tuple[bool, ...]) -> Tensor:
        """``values`` [N, B, H, K, V] for each own segment where ``wanted``, zero elsewhere: [segments, B, H, K, V]."""
        out = like.new_zeros(len(wanted), *like.shape[1:])
        for i, (document, want) in enumerate(zip(self.plan.documents, wanted, strict=True)):
            if want and values is not None:
                out[i] = values[document]
        return out

"""What an operator of linear attention is: a forward and a backward in stages, with the exchange between them.

    forward     state_maps   reads k, v and the gates: what every segment does to a state; the exchange can start
                local        reads q too: all work that needs no state of other segments, while the exchange flies
                finish       what the entry states add
    backward    state_maps   reads q and the output's gradient: what every segment adds to the gradient of its entry
                local        all work that needs no gradient of exit states
                finish       what these add

Everything is linear in the states that enter, so any operator whose segments have a map ``S -> A S + b`` can be cut
like this (:mod:`lasp.kernels.state`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.kernels.state import StateMap, apply, transition


class Gradients(NamedTuple):
    """What a backward returns, each in its input's shape and dtype; None where not asked for, or without that input.

    ``d_entry``: of the state that enters each segment, [segments, B, H, K, V].
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dbeta: Tensor | None
    d_entry: Tensor | None


class ForwardStages(Protocol):
    """One forward: ``Forward(k, v, g, beta, table, num_heads, causal, scale)``, then each stage once.

    Made of:
        k, v: [B, T, Hx, K], [B, T, Hx, V]; every Hx divides H.
        g: log-decay <= 0: None, [Hx], [B, T, Hx] or [B, T, Hx, K].
        beta: step of the delta rule [B, T, Hx], or None.
        table: segments and chunks of the T local tokens.
        num_heads: H.
        causal: False reads the state of the whole document (then there are no gates, and no state enters).
        scale: factor of the output.

    Attributes:
        dtype: of states.
        saved: tensors, or None, that the backward needs beside its arguments.
        kept_gates: what else the two share.
    """

    dtype: object
    saved: Sequence[Tensor | None]
    kept_gates: object

    def state_maps(self, initial: Tensor | None = None, *, q: Tensor | None = None) -> StateMap:
        """The map of every segment, stacked: state [segments, B, H, K, V] and its transition.

        Args:
            initial: a state that enters each segment and is known here: the initial state where a document begins, else
                zero [segments, B, H, K, V]. The maps then begin with it: their state is what leaves the segment.
            q: where no exchange is to be overlapped, so that :meth:`local` is not called.
        """

    def local(self, q: Tensor, entered: Sequence[bool] | None) -> None:
        """Work that needs no state from other segments.

        Args:
            q: [B, T, Hx, K].
            entered: which segments a state may enter beside ``initial``; None: any.
        """

    def finish(self, entry: Tensor | None, entered: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """The output [B, T, H, V] in v's dtype, and the state after each segment [segments, B, H, K, V].

        Args:
            entry: what enters each segment, ``initial`` included [segments, B, H, K, V]; None where all is zero. Not
                causal: the state of each segment's whole document.
            entered: as in :meth:`local`.
        """


class BackwardStages(Protocol):
    """One backward: made like the forward, and of ``q, do, saved, kept_gates, entry, exits, needs_dg, needs_d_entry``.

    Made of:
        q, do: queries, and the gradient of the output [B, T, H, V].
        saved, kept_gates: of the forward.
        entry: as given to the forward's ``finish``.
        exits: the state after each segment that ``finish`` returned, with the transitions of the maps.
        needs_dg, needs_d_entry: whether the gradients of the gates, and of entry states, are asked for.
    """

    def state_maps(self, *, local: bool = False) -> Tensor:
        """What this rank's outputs add to the gradient of each segment's entry state, [segments, B, H, K, V].

        ``local``: where no exchange is to be overlapped, so that :meth:`local` is not called.
        """

    def local(self) -> None:
        """Work that needs no gradient of exit states."""

    def finish(self, d_exit: Tensor | None, reached: Sequence[bool] | None = None) -> Gradients:
        """The gradients.

        Args:
            d_exit: gradient of the state after each segment [segments, B, H, K, V], None where all are zero; not
                causal: the gradient of each segment's document state.
            reached: which of them may differ from zero; None: any.
        """


class Operator(Protocol):
    """A module, or anything else with both."""

    Forward: Callable[..., ForwardStages]
    Backward: Callable[..., BackwardStages]


def num_heads(*tensors: Tensor | None) -> int:
    """H: the largest head count among q, k, v, g, beta."""
    return max(x.shape[0] if x.dim() == 1 else x.shape[2] for x in tensors if x is not None)


def begun(maps: StateMap, initial: Tensor | None) -> StateMap:
    """The maps with the states ``initial`` before them: as :meth:`ForwardStages.state_maps` returns them."""
    return maps if initial is None else StateMap(apply(maps, initial), maps.log_decay, maps.matrix)


def left(maps: StateMap, entry: Tensor | None, causal: bool) -> Tensor:
    """The state after each segment that ``entry`` enters; not causal: the segment's own part."""
    return maps.state if entry is None or not causal else apply(maps, entry)


def entry_grads(grads: Tensor, exits: StateMap, d_exit: Tensor | None) -> Tensor:
    """Gradient of entry states: what a segment's outputs add, ``grads``, and what comes through its transition."""
    return grads if d_exit is None else transition(exits.transpose(), d_exit) + grads

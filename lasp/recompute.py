"""Activation checkpointing that does not repeat the exchange.

A block whose activations are dropped runs its forward again in the backward pass. What an exchange brought is small
(one state per segment), so it is kept aside in the first run and taken from there in the second: recomputation costs
no linear-attention message. Softmax layers and convolutions do fetch their keys and inputs again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.context import CPContext
from lasp.exchange import StateExchange


class ExchangeTape:
    """What the exchanges of one checkpointed call brought, in the order of the calls.

    Args:
        outer: the tape of the checkpointed call around this one. What is recorded here it keeps as well; while it is
            replayed itself, this call, made again, records from it instead of exchanging.
    """

    def __init__(self, outer: ExchangeTape | None = None) -> None:
        self._entries: list[tuple[StateExchange, Tensor | None, Tensor | None]] = []
        self._next: int | None = None  # None while recording
        self._outer = outer

    @property
    def replaying(self) -> bool:
        """Whether the next exchange is to be read from here."""
        return self._next is not None or (self._outer is not None and self._outer.replaying)

    def record(self, exchange: StateExchange, entry: Tensor | None, finals: Tensor | None) -> None:
        """Keep what an exchange brought, and itself: the backward pass needs the transitions that it gathered."""
        kept = None if finals is None else finals.clone()  # the caller may change final states
        self._entries.append((exchange, entry, kept))
        if self._outer is not None:
            self._outer.record(exchange, entry, finals)

    def read(self) -> tuple[StateExchange, Tensor | None, Tensor | None]:
        """The exchange of the first run, and what it brought."""
        if self._next is None:
            exchange, entry, finals = self._outer.read()
            self._entries.append((exchange, entry, finals))
        else:
            exchange, entry, finals = self._entries[self._next]
            self._next += 1
        return exchange, entry, None if finals is None else finals.clone()


class AttachedTape:
    """While entered, exchanges under ``cp`` are recorded on ``tape``, or replayed from its first one on.

    Entered once per run of the checkpointed call: with a retained graph its forward runs again in every backward.
    """

    def __init__(self, tape: ExchangeTape, cp: CPContext, *, replay: bool):
        self._tape, self._cp, self._replay = tape, cp, replay
        self._before: list[tuple[ExchangeTape | None, int | None]] = []

    def __enter__(self) -> None:
        self._before.append((self._cp.tape, self._tape._next))
        self._cp.tape, self._tape._next = self._tape, 0 if self._replay else None

    def __exit__(self, *_: object) -> None:
        self._cp.tape, self._tape._next = self._before.pop()


def recompute(fn: Callable, *args, cp: CPContext | None):
    """``fn(*args)`` without keeping its activations; the backward runs it again, its linear exchanges excepted.

    Calls may be nested, and a retained graph may be run backward more than once.
    """
    if cp is None:
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    tape = ExchangeTape(outer=cp.tape)
    contexts = lambda: (AttachedTape(tape, cp, replay=False), AttachedTape(tape, cp, replay=True))  # noqa: E731
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

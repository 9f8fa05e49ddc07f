"""Activation checkpointing that does not repeat the exchange.

A block whose activations are dropped runs its forward again in the backward pass; what its linear exchanges brought is
read from a tape, so recomputation costs no linear-attention message. Softmax layers and convolutions do fetch their
keys and inputs again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.checkpoint import checkpoint

from lasp.context.context import Context
from lasp.context.tape import ExchangeTape


class AttachedTape:
    """While entered, exchanges under ``cp`` are recorded on ``tape``, or replayed from its first one on.

    Entered once per run of the checkpointed call: with a retained graph its forward runs again in every backward.
    """

    def __init__(self, tape: ExchangeTape, cp: Context, *, replay: bool):
        self._tape, self._cp, self._replay = tape, cp, replay
        self._before: list[tuple[ExchangeTape | None, int | None]] = []

    def __enter__(self) -> None:
        self._before.append((self._cp.tape, self._tape.position))
        self._cp.tape, self._tape.position = self._tape, 0 if self._replay else None

    def __exit__(self, *_: object) -> None:
        self._cp.tape, self._tape.position = self._before.pop()


def recompute(fn: Callable, *args, cp: Context | None):
    """``fn(*args)`` without keeping its activations; the backward runs it again, its linear exchanges excepted.

    Calls may be nested, and a retained graph may be run backward more than once.
    """
    if cp is None:
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    tape = ExchangeTape(outer=cp.tape)

    def contexts() -> tuple[AttachedTape, AttachedTape]:
        return AttachedTape(tape, cp, replay=False), AttachedTape(tape, cp, replay=True)

    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

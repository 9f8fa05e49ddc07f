"""Activation checkpointing that does not repeat the exchange.

A block whose activations are dropped runs its forward again in the backward pass. What an exchange brought is small
(one state per segment), so it is kept aside in the first run and taken from there in the second: recomputation costs
no linear-attention message. Softmax layers and convolutions do fetch their keys and inputs again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.context import CPContext


class ExchangeTape:
    """The entry states of the linear layers of one checkpointed call, in the order of the calls."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor | None, Tensor | None]] = []
        self._next: int | None = None  # None while recording

    @contextlib.contextmanager
    def attached(self, cp: CPContext, *, replay: bool) -> Iterator[None]:
        """While open, exchanges under ``cp`` are recorded here, or replayed from the first one on."""
        before, cp.tape = cp.tape, self
        self._next = 0 if replay else None
        try:
            yield
        finally:
            cp.tape = before

    @property
    def replaying(self) -> bool:
        """Whether the next exchange is to be read from here."""
        return self._next is not None

    def record(self, entry: Tensor | None, finals: Tensor | None) -> None:
        """Keep what an exchange brought."""
        self._entries.append((entry, finals))

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """What the same exchange brought in the first run."""
        self._next += 1
        return self._entries[self._next - 1]


def recompute(fn: Callable, *args, cp: CPContext | None):
    """``fn(*args)`` without keeping its activations; the backward runs it again, its linear exchanges excepted."""
    if cp is None:
        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    tape = ExchangeTape()
    contexts = lambda: (tape.attached(cp, replay=False), tape.attached(cp, replay=True))  # noqa: E731
    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

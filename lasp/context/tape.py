"""What exchanges brought, kept aside so that activations can be made again without repeating them.

A block whose activations are dropped runs its forward again in the backward pass. What an exchange brought is small
(one state per segment): it is recorded in the first run and read in the second.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

E = TypeVar("E")  # the exchange of a layer: the backward pass needs the transitions that it gathered


class ExchangeTape(Generic[E]):
    """What the exchanges of one checkpointed call brought, in the order of the calls.

    Args:
        outer: the tape of the checkpointed call around this one. What is recorded here it keeps as well; while it is
            replayed itself, this call, made again, records from it instead of exchanging.

    Attributes:
        position: the entry that the next exchange gets; None while recording.
    """

    def __init__(self, outer: ExchangeTape[E] | None = None) -> None:
        self._entries: list[tuple[E, Tensor | None, Tensor | None]] = []
        self.position: int | None = None
        self._outer = outer

    @property
    def replaying(self) -> bool:
        """Whether the next exchange is to be read from here."""
        return self.position is not None or (self._outer is not None and self._outer.replaying)

    def record(self, exchange: E, entry: Tensor | None, finals: Tensor | None) -> None:
        """Keep what an exchange brought, and itself: the backward pass needs the transitions that it gathered."""
        kept = None if finals is None else finals.clone()  # the caller may change final states
        self._entries.append((exchange, entry, kept))
        if self._outer is not None:
            self._outer.record(exchange, entry, finals)

    def read(self) -> tuple[E, Tensor | None, Tensor | None]:
        """The exchange of the first run, and what it brought."""
        if self.position is None:
            exchange, entry, finals = self._outer.read()
            self._entries.append((exchange, entry, finals))
        else:
            exchange, entry, finals = self._entries[self.position]
            self.position += 1
        return exchange, entry, None if finals is None else finals.clone()

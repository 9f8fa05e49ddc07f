"""The chain: each place gets the state of the one before it, applies its map, and sends the result on.

LASP-1 (arXiv 2404.02882) sends the state in one piece, so that all other ranks wait meanwhile. ZeCO's all-scan (arXiv
2507.01004) cuts it in slices and keeps every link busy: slice j leaves place p in wave p + j. Slices are value columns
here, so that a dense transition, which mixes key rows, acts on each slice alone. A fresh place waits for nobody:
documents begin chains of their own.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from lasp.exchange.algorithm import Algorithm, columns
from lasp.exchange.line import Line, Parcel, Round, widths
from lasp.kernels.state import StateMap, apply


def chain_rounds(line: Line, rank: int, value_dim: int, slices: int) -> tuple[Round, ...]:
    """What ``rank`` sends and receives: slice j of place p, ``key = (p, j)``, in round p - start(p) + j."""
    cut = widths(value_dim, slices)
    depths = [p - line.start[p] for p in range(len(line) - 1) if _travels(line, p)]
    count = max(depths) + len(cut) if depths else 0
    sends, receives = ([[] for _ in range(count)] for _ in range(2))
    for own in line.own(rank):
        for source, found in ((own, sends), (own - 1, receives)):
            if not 0 <= source < len(line) - 1 or not _travels(line, source):
                continue
            peer = line.owners[source + 1] if source == own else line.owners[source]
            for j, width in enumerate(cut):
                found[source - line.start[source] + j].append(Parcel(peer, (source, j), width))
    return tuple(Round(tuple(s), tuple(r)) for s, r in zip(sends, receives, strict=True))


def _travels(line: Line, place: int) -> bool:
    """Whether what leaves ``place`` is wanted on another rank."""
    return line.wanted[place + 1] and line.owners[place] != line.owners[place + 1]


class Chain(Algorithm):
    """One rank's part of a chain.

    Args:
        line: the places.
        rounds: from :func:`chain_rounds`.
        maps: the map of each own place.
        value_dim, slices: the cut.
    """

    def __init__(self, line: Line, rounds: tuple[Round, ...], maps: dict[int, StateMap], value_dim: int, slices: int):
        self.rounds = rounds
        self._line, self._maps = line, maps
        borders = (0, *accumulate(widths(value_dim, slices)))
        self._cuts = list(zip(borders, borders[1:], strict=False))
        self._entries: dict[tuple, Tensor] = {}

    def outgoing(self, key: tuple) -> StateMap:
        return StateMap(self._exit(*key))

    def incoming(self, key: tuple, value: StateMap) -> None:
        place, j = key
        self._entries[place + 1, j] = value.state

    def entered(self) -> dict[int, Tensor]:
        found = {}
        for place in self._maps:
            if self._line.wanted[place]:
                slices = [self._entry(place, j) for j in range(len(self._cuts))]
                found[place] = slices[0] if len(slices) == 1 else torch.cat(slices, -1)
        return found

    def _entry(self, place: int, j: int) -> Tensor:
        if (place, j) not in self._entries:  # the place before is on this rank too
            self._entries[place, j] = self._exit(place - 1, j)
        return self._entries[place, j]

    def _exit(self, place: int, j: int) -> Tensor:
        own = columns(self._maps[place], *self._cuts[j])
        return own.state if self._line.fresh[place] else apply(own, self._entry(place, j))

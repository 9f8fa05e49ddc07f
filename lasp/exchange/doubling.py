"""Recursive doubling: after step s every place knows the map of the 2^s places before it, so log2 steps are enough.

The parallel prefix of Hillis and Steele (1986) on the associative combine of maps (A, b). A message holds a transition
beside the state until the run of places that it covers begins with a fresh one: then what enters does not matter.
"""

from __future__ import annotations

from torch import Tensor

from lasp.exchange.algorithm import Algorithm, after
from lasp.exchange.line import Line, Parcel, Round
from lasp.kernels.state import StateMap


def doubling_rounds(line: Line, rank: int, value_dim: int) -> tuple[Round, ...]:
    """What ``rank`` sends and receives: the map of places [p - 2^s + 1, p], ``key = (p, s)``, to place p + 2^s."""
    reach = [p - line.start[p - 1] for p in range(len(line)) if line.wanted[p]]
    own, rounds = line.own(rank), []
    for step in range(max(reach, default=0).bit_length()):
        distance = 1 << step

        def parcel(place: int, peer: int, step: int = step, distance: int = distance) -> Parcel:
            tokens = None if _closed(line, place, distance) else line.tokens(place - distance + 1, place)
            return Parcel(peer, (place, step), value_dim, tokens)

        sends = [parcel(p, line.owners[p + distance]) for p in own if _travels(line, p, distance)]
        sources = [p - distance for p in own if p >= distance and _travels(line, p - distance, distance)]
        receives = [parcel(p, line.owners[p]) for p in sources]
        rounds.append(Round(tuple(sends), tuple(receives)))
    return tuple(rounds)


def _travels(line: Line, place: int, distance: int) -> bool:
    """Whether the map of the ``distance`` places up to ``place`` is wanted ``distance`` places on, on another rank."""
    to = place + distance
    if to >= len(line) or not line.wanted[to] or line.start[to - 1] > place:
        return False
    return line.owners[place] != line.owners[to]


def _closed(line: Line, place: int, distance: int) -> bool:
    """Whether the ``distance`` places up to ``place`` hold a fresh one."""
    return place - line.start[place] < distance


class Doubling(Algorithm):
    """One rank's part of a recursive doubling.

    Args:
        line: the places.
        rounds: from :func:`doubling_rounds`.
        maps: the map of each own place.
    """

    def __init__(self, line: Line, rounds: tuple[Round, ...], maps: dict[int, StateMap]):
        self.rounds = rounds
        self._line, self._maps = line, maps
        self._runs: dict[tuple, StateMap] = {}  # (place, step): [place - 2^step + 1, place]
        self._before: dict[tuple, StateMap | None] = {}  # (place, step): [place - 2^step + 1, place - 1]

    def outgoing(self, key: tuple) -> StateMap:
        return self._run(*key)

    def incoming(self, key: tuple, value: StateMap) -> None:
        self._runs[key] = value

    def entered(self) -> dict[int, Tensor]:
        found = {}
        for place in self._maps:
            if self._line.wanted[place]:
                steps = (place - self._line.start[place - 1]).bit_length()
                found[place] = self._earlier(place, steps).state
        return found

    def _run(self, place: int, step: int) -> StateMap:
        """The map of the 2^step places up to ``place``, or of as many as a fresh one leaves."""
        if (place, step) not in self._runs:
            own, earlier = self._maps[place], self._earlier(place, step)
            if earlier is not None and not self._line.fresh[place]:
                own = after(own, earlier, closed=_closed(self._line, place, 1 << step))
            self._runs[place, step] = own
        return self._runs[place, step]

    def _earlier(self, place: int, step: int) -> StateMap | None:
        """The map of the 2^step - 1 places before ``place``, or of as many as a fresh one leaves; step 0: None."""
        if step == 0 or not self._line.wanted[place]:
            return None
        if (place, step) not in self._before:
            distance, begin = 1 << (step - 1), self._line.start[place - 1]
            later = self._earlier(place, step - 1)
            if begin > place - distance:  # it has all there is
                found = later
            else:
                found = self._run(place - distance, step - 1)
                if later is not None:
                    found = after(later, found, closed=begin > place - 2 * distance)
            self._before[place, step] = found
        return self._before[place, step]

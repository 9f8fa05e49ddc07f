"""A line: the fragments of all ranks in the order in which a state passes through them.

Forward a state goes through the fragments in global order, backward its gradient goes the other way. At each *place*
of the line one rank has one map, and the state that enters the place is wanted there or not. In the worked example of
:mod:`lasp.layout`, zigzag, the forward line is

    place                 0        1        2        3
    fragment            [0, 3)   [3, 6)   [6, 9)   [9, 12)
    owner                 0        1        1        0
    fresh                yes      yes       no       no        its map forgets what enters: a document begins in it
    wanted                no      yes      yes      yes        its document continues from the place before

Host plans of plain ints, made from the layout alone and therefore equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lasp.layout import SequenceLayout


@dataclass(frozen=True)
class Line:
    """Places, first to last. A place that is not wanted is fresh.

    Attributes:
        owners: rank of each place.
        maps: local index of the segment whose map counts: the fragment's last one in the direction of travel.
        arrivals: local index of the segment that the state enters: the fragment's first one.
        fresh: whether the map forgets what enters.
        wanted: whether a state enters.
        lengths: tokens of the segment whose map counts.
    """

    owners: tuple[int, ...]
    maps: tuple[int, ...]
    arrivals: tuple[int, ...]
    fresh: tuple[bool, ...]
    wanted: tuple[bool, ...]
    lengths: tuple[int, ...]

    @classmethod
    def make(cls, layout: SequenceLayout, *, backward: bool) -> Line:
        """The line of a layout."""
        found = []  # (global start, owner, first segment, last segment, indices)
        for rank in range(layout.cp_size):
            segments = layout.segments(rank)
            for fragment in range(len(layout.fragments[rank])):
                own = [i for i, s in enumerate(segments) if s.fragment == fragment]
                found.append((segments[own[0]].start_global, rank, own[0], own[-1]))
        places = []
        for _, rank, first, last in sorted(found, reverse=backward):
            segments = layout.segments(rank)
            if backward:
                fresh, wanted = segments[first].ends_document, not segments[last].ends_document
                places.append((rank, first, last, fresh, wanted, len(segments[first])))
            else:
                fresh, wanted = segments[last].begins_document, not segments[first].begins_document
                places.append((rank, last, first, fresh, wanted, len(segments[last])))
        return cls(*zip(*places, strict=True))

    def __len__(self) -> int:
        return len(self.owners)

    def own(self, rank: int) -> list[int]:
        """The places of a rank."""
        return [p for p, owner in enumerate(self.owners) if owner == rank]

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Per place, the newest fresh place up to it: where the state that leaves it began."""
        starts: list[int] = []
        for place, fresh in enumerate(self.fresh):
            starts.append(place if fresh else starts[-1])
        return tuple(starts)

    def tokens(self, first: int, last: int) -> int:
        """Tokens of the maps of places ``first`` to ``last``, both included."""
        return sum(self.lengths[first : last + 1])


@dataclass(frozen=True)
class Parcel:
    """One value on its way from rank to rank.

    Attributes:
        peer: the other rank.
        key: what it is, as sender and receiver know it.
        columns: value columns of the state.
        tokens: those of the map, None for a state alone: then no transition travels.
    """

    peer: int
    key: tuple
    columns: int
    tokens: int | None = None


@dataclass(frozen=True)
class Round:
    """What a rank sends and receives before it computes again. All ranks count the same rounds.

    Several parcels from one rank to another in one round are in the same order on both.
    """

    sends: tuple[Parcel, ...] = ()
    receives: tuple[Parcel, ...] = ()

    @classmethod
    def merged(cls, rounds: list[Round]) -> Round:
        """Rounds of one time as one."""
        return cls(tuple(p for r in rounds for p in r.sends), tuple(p for r in rounds for p in r.receives))


def widths(columns: int, slices: int) -> tuple[int, ...]:
    """``columns`` dealt to at most ``slices`` slices whose widths differ by at most one."""
    slices = min(slices, columns)
    size, longer = divmod(columns, slices)
    return tuple(size + (i < longer) for i in range(slices))

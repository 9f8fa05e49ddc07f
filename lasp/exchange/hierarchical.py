"""The node-sliced scan: between nodes each rank carries one slice of the states of its whole node.

    1. inside a node   each rank gives slice s of its map, value columns, to the rank that carries s
    2. between nodes   the carriers of s scan the map of their node's run of places, on an interface each
    3. inside a node   the carriers give every place its slice of the state that enters it

So all interfaces of a node work at once, each with 1 / R of the state, R ranks per node, and the line between nodes is
R times shorter than the line of ranks. Stage 2 is a recursive doubling, or with ``slices`` above 1 a chain in as many
slices: log2 steps where latency counts, one state per link where bandwidth does. A *run* is as many places in a row as
one node owns: a node has one of a contiguous layout, and of zigzag two, or one where the line turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lasp.exchange.algorithm import Algorithm, InStep, after, columns, merge
from lasp.exchange.chain import Chain, chain_rounds
from lasp.exchange.doubling import Doubling, doubling_rounds
from lasp.exchange.line import Line, Parcel, Round, widths
from lasp.kernels.state import StateMap, apply


@dataclass(frozen=True)
class NodePlan:
    """Who carries what, as one rank sees it.

    Attributes:
        line: of places.
        nodes: node of each rank.
        rank: this one.
        value_dim: value columns of a state.
        slices: of the chain between nodes; 1: recursive doubling.
    """

    line: Line
    nodes: tuple[int, ...]
    rank: int
    value_dim: int
    slices: int

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The ranks of each node."""
        found: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            found.setdefault(node, []).append(rank)
        return found

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Columns of each slice: as many slices as the largest node has ranks."""
        return widths(self.value_dim, max(map(len, self.members.values())))

    @cached_property
    def cuts(self) -> list[tuple[int, int]]:
        """First and last column of each slice."""
        borders = (0, *accumulate(self.widths))
        return list(zip(borders, borders[1:], strict=False))

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """First and last place of each run."""
        node_of = [self.nodes[owner] for owner in self.line.owners]
        firsts = [p for p, node in enumerate(node_of) if p == 0 or node != node_of[p - 1]]
        return list(zip(firsts, [*(p - 1 for p in firsts[1:]), len(node_of) - 1], strict=True))

    def carrier(self, rank: int, piece: int) -> int:
        """Who carries slice ``piece`` in the node of ``rank``."""
        members = self.members[self.nodes[rank]]
        return members[piece * len(members) // len(self.widths)]

    @cached_property
    def carried(self) -> list[int]:
        """The slices that this rank carries."""
        return [s for s in range(len(self.widths)) if self.carrier(self.rank, s) == self.rank]

    def needed(self, place: int) -> bool:
        """Whether the map of ``place`` matters to the place after it."""
        return place + 1 < len(self.line) and self.line.wanted[place + 1]

    @cached_property
    def run_lines(self) -> dict[int, Line]:
        """Per carried slice, the line of runs, each owned by the carrier of the slice."""
        line, runs = self.line, self.runs
        fresh = tuple(line.start[last] >= first for first, last in runs)
        wanted = tuple(line.wanted[first] for first, _ in runs)
        lengths = tuple(line.tokens(max(first, line.start[last]), last) for first, last in runs)
        nothing = (0,) * len(runs)
        owners = {s: tuple(self.carrier(line.owners[first], s) for first, _ in runs) for s in self.carried}
        return {s: Line(owners[s], nothing, nothing, fresh, wanted, lengths) for s in self.carried}

    @cached_property
    def run_rounds(self) -> dict[int, tuple[Round, ...]]:
        """Per carried slice, the scan between nodes."""
        if self.slices == 1:
            return {s: doubling_rounds(line, self.rank, self.widths[s]) for s, line in self.run_lines.items()}
        return {s: chain_rounds(line, self.rank, self.widths[s], self.slices) for s, line in self.run_lines.items()}

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """All three stages."""
        line, rank = self.line, self.rank
        out, back, into, home = [], [], [], []
        for p, owner in enumerate(line.owners):
            if self.nodes[owner] != self.nodes[rank]:
                continue
            tokens = None if line.fresh[p] else line.lengths[p]
            for s, width in enumerate(self.widths):
                carrier = self.carrier(rank, s)
                if owner == carrier or rank not in (owner, carrier):
                    continue
                peer = carrier if rank == owner else owner
                if self.needed(p):
                    (out if rank == owner else into).append(Parcel(peer, ("map", p, s), width, tokens))
                if line.wanted[p]:
                    (home if rank == owner else back).append(Parcel(peer, ("entry", p, s), width))
        return Round(tuple(out), tuple(into)), *merge(self.run_rounds), Round(tuple(back), tuple(home))


class Hierarchical(Algorithm):
    """One rank's part of a node-sliced scan.

    Args:
        plan: who carries what.
        maps: the map of each own place.
    """

    def __init__(self, plan: NodePlan, maps: dict[int, StateMap]):
        self.rounds = plan.rounds
        self._plan, self._maps = plan, maps
        self._pieces: dict[tuple[int, int], StateMap] = {}  # (place, slice): the map, of carried slices
        self._entries: dict[tuple[int, int], Tensor] = {}  # (place, slice): what enters

    def outgoing(self, key: tuple) -> StateMap:
        kind, *rest = key
        if kind == "map":
            return self._piece(*rest)
        if kind == "entry":
            return StateMap(self._entry(*rest))
        return self._between.outgoing(key)

    def incoming(self, key: tuple, value: StateMap) -> None:
        kind, *rest = key
        if kind == "map":
            self._pieces[tuple(rest)] = value
        elif kind == "entry":
            self._entries[tuple(rest)] = value.state
        else:
            self._between.incoming(key, value)

    def entered(self) -> dict[int, Tensor]:
        found = {}
        for place in self._maps:
            if self._plan.line.wanted[place]:
                found[place] = torch.cat([self._entry(place, s) for s in range(len(self._plan.widths))], -1)
        return found

    @cached_property
    def _between(self) -> InStep:
        """The scans of the carried slices; made when all maps of the node are here."""
        plan, parts = self._plan, {}
        for s, line in plan.run_lines.items():
            maps = {n: self._run(n, s) for n in line.own(plan.rank)}
            if plan.slices == 1:
                parts[s] = Doubling(line, plan.run_rounds[s], maps)
            else:
                parts[s] = Chain(line, plan.run_rounds[s], maps, plan.widths[s], plan.slices)
        return InStep(parts)

    @cached_property
    def _run_entries(self) -> dict[tuple[int, int], Tensor]:
        """(first place of a run, slice): the state that enters the run; after the scan between nodes."""
        found = {}
        for s, part in self._between.parts.items():
            for n, state in part.entered().items():
                found[self._plan.runs[n][0], s] = state
        return found

    def _piece(self, place: int, s: int) -> StateMap:
        if (place, s) not in self._pieces:
            self._pieces[place, s] = columns(self._maps[place], *self._plan.cuts[s])
        return self._pieces[place, s]

    def _run(self, n: int, s: int) -> StateMap | None:
        """Slice s of the map of run n, None where nobody needs it."""
        first, last = self._plan.runs[n]
        if not self._plan.needed(last):
            return None
        start = max(first, self._plan.line.start[last])
        closed, map_ = start == self._plan.line.start[last], self._piece(start, s)
        for place in range(start + 1, last + 1):
            map_ = after(self._piece(place, s), map_, closed=closed)
        return map_

    def _entry(self, place: int, s: int) -> Tensor:
        """What enters ``place``: from the scan, from this node's place before, or, another's slice, received."""
        key = place, s
        if key not in self._entries:
            if key in self._run_entries:
                self._entries[key] = self._run_entries[key]
            else:
                before = self._piece(place - 1, s)
                fresh = self._plan.line.fresh[place - 1]
                self._entries[key] = before.state if fresh else apply(before, self._entry(place - 1, s))
        return self._entries[key]

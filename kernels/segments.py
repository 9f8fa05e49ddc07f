"""Host tables that cut a rank's segments into chunks and chunks into tiles.

A *segment* is a run of local tokens that belongs to one document. A *chunk* is at most ``chunk_size`` consecutive
tokens of one segment: chunks never straddle a document border, so no decay has to express one. A *tile* is a group of
consecutive chunks that the PyTorch path handles at once; its size bounds the temporary memory.

Inside a tile with n chunks, *position* p in 0..n names the state between chunk p - 1 and chunk p. States travel
between positions of one segment only, which a *route* describes: which sources reach which reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which sources reach which reads inside a tile.

    Attributes:
        pairs: later * (n + 1) + earlier, of the two positions between which each state travels, int64 [R * S].
        reached: 1 where a source reaches a read, else 0, float32 [R, S].
    """

    pairs: Tensor
    reached: Tensor


class TileShape:
    """What tiles of equal shape share: index tensors and routes.

    Args:
        lengths: tokens of each of the n chunks.
        ids: segment of each chunk, counted from the first chunk's.
        enters, leaves: whether the first chunk's segment began in an earlier tile, the last one's ends in a later.
        size: tokens per full chunk, C.
        device: where the tensors live.

    Attributes:
        gather: token index, from the tile's start, of each padded slot, int64 [n * C]; None when all chunks are full.
        padding: whether a slot holds no token, bool [n * C, 1, 1]; None when all chunks are full.
        scatter: padded slot of each token, int64 [tokens]; None when all chunks are full.
        counts: tokens of a chunk up to and including each slot, float64 [n, C], or [1, C] when all are full.
        segments: ``ids`` as a tensor, int64 [n].
        anchors: which ``exit`` read the segment of each chunk has, int64 [n].
        later: 1 where chunk j lies after chunk i in the same segment, float32 [n (i), n (j)].
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        ids: tuple[int, ...],
        enters: bool,
        leaves: bool,
        size: int,
        device: torch.device,
    ):
        self.ids, self.enters, self.leaves, self.device = ids, enters, leaves, device
        n = self.num_chunks = len(lengths)
        self._routes: dict[tuple[str, bool, bool], Route] = {}
        self._begin = [(j, s) for j, s in enumerate(ids) if (not enters if j == 0 else ids[j - 1] != s)]
        self._end = [(j + 1, s) for j, s in enumerate(ids) if (not leaves if j == n - 1 else ids[j + 1] != s)]
        exits = {s: i for i, (_, s) in enumerate(self._end)}
        self.gather = self.padding = self.scatter = None
        counts = torch.arange(1, size + 1, dtype=torch.float64).unsqueeze(0)
        if min(lengths) < size:
            length, slot = torch.tensor(lengths).unsqueeze(1), torch.arange(size).unsqueeze(0)
            first = length.cumsum(0) - length
            is_token = (slot < length).flatten()
            self.gather = torch.minimum(first + slot, first + length - 1).flatten().to(device)
            self.padding = (~is_token).view(-1, 1, 1).to(device)
            self.scatter = is_token.nonzero().flatten().to(device)
            counts = torch.minimum(counts, length.double())
        segments, order = torch.tensor(ids), torch.arange(n)
        self.counts, self.segments = counts.to(device), segments.to(device)
        self.anchors = torch.tensor([exits.get(s, len(self._end)) for s in ids]).to(device)
        later = (segments[:, None] == segments[None, :]) & (order[None, :] > order[:, None])
        self.later = later.float().to(device)

    def route(self, reads: str, *, entries: bool = False, reverse: bool = False) -> Route:
        """How states reach ``reads`` from what each chunk adds, or from entry states.

        Args:
            reads: ``in`` (state before each chunk), ``out`` (after each chunk), ``exit`` (after each segment ended
                here, then the state carried out if ``leaves``), ``begin`` (before each segment begun here, then the
                gradient carried out to earlier tiles if ``enters``).
            entries: the sources are, not what each chunk adds, but the state that runs into the tile (if ``enters``)
                and the entry states of the segments begun here.
            reverse: gradients, which travel the other way: what each chunk adds before it; with ``entries`` the
                gradient that runs in from later tiles (if ``leaves``) and those of the segments ended here.
        """
        key = (reads, entries, reverse)
        if key not in self._routes:
            self._routes[key] = self._make_route(*key)
        return self._routes[key]

    def _make_route(self, reads: str, entries: bool, reverse: bool) -> Route:
        ids, begin, end = self.ids, self._begin, self._end
        carried_in = [(0, ids[0])] if self.enters else []
        carried_out = [(self.num_chunks, ids[-1])] if self.leaves else []
        before, after = list(enumerate(ids)), [(j + 1, s) for j, s in enumerate(ids)]
        wanted = {"in": before, "out": after, "exit": end + carried_out, "begin": begin + carried_in}[reads]
        if reverse:
            sources = carried_out + end if entries else before
        else:
            sources = carried_in + begin if entries else after
        reached = [[float(s == t and (q >= p if reverse else q <= p)) for q, t in sources] for p, s in wanted]
        size = self.num_chunks + 1
        pairs = [q * size + p if reverse else p * size + q for p, _ in wanted for q, _ in sources]
        return Route(
            torch.tensor(pairs, dtype=torch.int64, device=self.device),
            torch.tensor(reached, dtype=torch.float32, device=self.device).view(len(wanted), len(sources)),
        )


@dataclass(frozen=True)
class Tile:
    """A group of chunks: the local tokens [start, stop).

    Attributes:
        start, stop: local token range.
        first, last: segment of the first and of the last chunk.
        begun, ended: half-open ranges of the segments that begin / end in this tile.
        shape: what it shares with tiles of the same shape.
    """

    start: int
    stop: int
    first: int
    last: int
    begun: tuple[int, int]
    ended: tuple[int, int]
    shape: TileShape


@dataclass(frozen=True)
class Tiling:
    """All tiles, and where they lie among the borders of a rank's chunks (0..N for N chunks), int64 on the device.

    Attributes:
        tiles: in local order.
        starts, stops: border before and after each tile [tiles].
        begins: border where the segment of a tile's first chunk begins [tiles].
        ends: border where the segment of a tile's last chunk ends [tiles].
    """

    tiles: tuple[Tile, ...]
    starts: Tensor
    stops: Tensor
    begins: Tensor
    ends: Tensor


class SegmentTable:
    """Chunks and tiles of one rank's segments on one device.

    Args:
        bounds: ``(start, stop)`` of each segment in local tokens: consecutive, none empty.
        device: where the tables live.
        chunk_size: tokens per chunk, a power of two. Default: up to 64, smaller where segments are short.

    Attributes:
        num_chunks: N.
        begins, ends: chunk border where each segment begins and ends, int64 [segments].
    """

    def __init__(self, bounds: Sequence[tuple[int, int]], device: torch.device, chunk_size: int | None = None):
        self.bounds, self.device = tuple(bounds), device
        if chunk_size is None:
            mean = self.bounds[-1][1] / len(self.bounds)
            chunk_size = next(size for size in (16, 32, 64) if size >= mean or size == 64)
        self.chunk_size = chunk_size
        self._chunks = [  # (segment, start, stop)
            (s, at, min(at + chunk_size, stop))
            for s, (start, stop) in enumerate(self.bounds)
            for at in range(start, stop, chunk_size)
        ]
        self.num_chunks = len(self._chunks)
        self._begins = [i for i, (s, start, _) in enumerate(self._chunks) if start == self.bounds[s][0]]
        self._ends = [*self._begins[1:], self.num_chunks]
        self.begins, self.ends = self._index(self._begins), self._index(self._ends)
        self._tilings: dict[int, Tiling] = {}
        self._shapes: dict[tuple, TileShape] = {}

    def tiling(self, chunks_per_tile: int) -> Tiling:
        """The tiles of up to ``chunks_per_tile`` chunks each."""
        if chunks_per_tile not in self._tilings:
            starts = range(0, self.num_chunks, chunks_per_tile)
            stops = [min(at + chunks_per_tile, self.num_chunks) for at in starts]
            tiles = tuple(self._make_tile(self._chunks[a:b]) for a, b in zip(starts, stops, strict=True))
            begins, ends = [self._begins[tile.first] for tile in tiles], [self._ends[tile.last] for tile in tiles]
            self._tilings[chunks_per_tile] = Tiling(tiles, *map(self._index, (starts, stops, begins, ends)))
        return self._tilings[chunks_per_tile]

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)

    def _make_tile(self, chunks: list[tuple[int, int, int]]) -> Tile:
        first, last = chunks[0][0], chunks[-1][0]
        enters = chunks[0][1] != self.bounds[first][0]
        leaves = chunks[-1][2] != self.bounds[last][1]
        key = (tuple(b - a for _, a, b in chunks), tuple(s - first for s, _, _ in chunks), enters, leaves)
        if key not in self._shapes:
            self._shapes[key] = TileShape(*key, self.chunk_size, self.device)
        begun, ended = (first + enters, last + 1), (first, last + 1 - leaves)
        return Tile(chunks[0][1], chunks[-1][2], first, last, begun, ended, self._shapes[key])

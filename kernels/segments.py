"""Tables that cut a rank's segments into chunks, and group chunks into tiles. The host makes them.

A *segment* is a run of local tokens that belongs to one document. A *chunk* is at most ``chunk_size`` consecutive
tokens of one segment. No chunk crosses a document border, so no decay has to express one. A *tile* is a group of
consecutive chunks that the PyTorch operator handles at once; the size of a tile bounds the temporary memory.

A tile with n chunks has the *positions* 0..n: the state at position p is the one between chunk p - 1 and chunk p.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

Bounds = Sequence[tuple[int, int]]  # (start, stop) of each segment


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a table of the host to ``device``, without waiting for the device."""
    with torch.inference_mode(False):  # so that the copy may be used and changed after inference mode as well
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True)
        return x.to(device) if device.type != "cpu" else x.clone()


class TileShape:
    """What tiles of equal shape share.

    Args:
        lengths: tokens of each of the n chunks.
        ids: segment of each chunk; the first chunk's segment is 0.
        enters: whether the first chunk's segment begins in an earlier tile.
        leaves: whether the last chunk's segment ends in a later tile.
        size: tokens per full chunk, C.
        device: where the tensors live.

    Attributes:
        gather: the token that each slot of the n * C padded slots holds, counted from the tile's start, int64 [n * C].
        padding: whether a slot holds no token, bool [n * C, 1, 1].
        scatter: the slot that holds each token, int64 [tokens].
        counts: how many tokens of its chunk lie at or before each slot, float64 [n, C]; [1, C] when all are full.
        segments: ``ids`` as a tensor, int64 [n].
        joined: for each of the positions 1..n - 1, whether one segment runs through it.
        begins: the positions where segments begin, without those that enter from an earlier tile, int64.
        ends: the positions where segments end, without those that leave for a later tile, int64.
        borders: the positions of both, each once.
        anchors: for each chunk, the index in ``ends`` of its segment's end; ``len(ends)`` if it has none; int64 [n].
        later: 1 where chunk j lies after chunk i in the same segment, float32 [n (i), n (j)].

    ``gather``, ``padding`` and ``scatter`` are None when all chunks are full.
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
        self.joined = tuple(a == b for a, b in zip(ids[:-1], ids[1:], strict=True))
        inner = [p for p, joined in enumerate(self.joined, 1) if not joined]
        begins, ends = [0] * (not enters) + inner, inner + [n] * (not leaves)
        exits = {ids[p - 1]: i for i, p in enumerate(ends)}
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
        self.begins, self.ends, self.borders = (
            torch.tensor(x, dtype=torch.int64, device=device) for x in (begins, ends, sorted({*begins, *ends}))
        )
        segments, order = torch.tensor(ids), torch.arange(n)
        self.counts, self.segments = counts.to(device), segments.to(device)
        self.anchors = torch.tensor([exits.get(s, len(ends)) for s in ids]).to(device)
        later = (segments[:, None] == segments[None, :]) & (order[None, :] > order[:, None])
        self.later = later.float().to(device)


@dataclass(frozen=True)
class Tile:
    """A group of chunks: the local tokens [start, stop).

    Attributes:
        start, stop: local token range.
        chunks: which of the rank's chunks it holds.
        first, last: segments of its first and of its last chunk.
        begun, ended: half-open ranges of the segments that begin in this tile, and of those that end in it.
        shape: what it shares with tiles of the same shape.
    """

    start: int
    stop: int
    chunks: slice
    first: int
    last: int
    begun: tuple[int, int]
    ended: tuple[int, int]
    shape: TileShape


class Borders(NamedTuple):
    """Where segments begin and end among the borders of a :class:`SegmentTable`.

    Attributes:
        begins, ends: the border where each segment begins, and where it ends, int64 [segments].
        chunk_begins, chunk_ends: the same for the segment of each chunk, int64 [N].
    """

    begins: torch.Tensor
    ends: torch.Tensor
    chunk_begins: torch.Tensor
    chunk_ends: torch.Tensor


def default_chunk_size(tokens: int, segments: int) -> int:
    """Tokens per chunk for so many tokens in so many segments: 64, or less where segments are short on average."""
    return next(size for size in (16, 32, 64) if size >= tokens / segments or size == 64)


class SegmentTable:
    """Chunks and tiles of one rank's segments on one device.

    Args:
        bounds: ``(start, stop)`` of each segment in local tokens; each starts where the last one stops, none is empty.
        device: where the tables live.
        chunk_size: tokens per chunk, a power of two. None: :func:`default_chunk_size`.
        replaceable: whether the tables have room for any layout with the same numbers of segments and tokens: see
            :meth:`replace`.

    Attributes:
        num_chunks: N. Border b in 0..N lies between chunk b - 1 and chunk b.
        kept: tables that operators derive from this one, so that each is made once.
    """

    def __init__(
        self, bounds: Bounds, device: torch.device, chunk_size: int | None = None, *, replaceable: bool = False
    ):
        self.bounds, self.device, self.replaceable = tuple(bounds), device, replaceable
        if chunk_size is None:
            chunk_size = default_chunk_size(self.bounds[-1][1], len(self.bounds))
        self.chunk_size = chunk_size
        self._chunks = [  # (segment, start, stop)
            (s, at, min(at + chunk_size, stop))
            for s, (start, stop) in enumerate(self.bounds)
            for at in range(start, stop, chunk_size)
        ]
        self.num_chunks = len(self._chunks)
        self.kept: dict[Hashable, object] = {}
        self._tiles: dict[int, tuple[Tile, ...]] = {}
        self._shapes: dict[tuple, TileShape] = {}

    @cached_property
    def borders(self) -> Borders:
        """Where segments begin and end. The Triton kernels never ask, so it is made when it is first asked for."""
        begins = [i for i, (s, start, _) in enumerate(self._chunks) if start == self.bounds[s][0]]
        segments = torch.tensor([begins, [*begins[1:], self.num_chunks]])
        chunks = segments[:, [s for s, _, _ in self._chunks]]
        return Borders(*(to_device(x, self.device) for x in (*segments, *chunks)))

    def replace(self, bounds: Bounds) -> None:
        """Take other segments, as many and with as many tokens in all, into the device memory that kernels read.

        When a captured CUDA graph of the Triton kernels is replayed, it then computes with the new layout.

        Raises:
            ValueError: the table is not ``replaceable``; the number of segments or of tokens differs; or an operator
                that reads the layout on the host, such as the PyTorch one, has used the table.
        """
        have, want = (len(self.bounds), self.bounds[-1][1]), (len(bounds), bounds[-1][1])
        if not self.replaceable or have != want:
            raise ValueError(
                f"bounds must be as many segments and tokens as the table of {have} that was made replaceable, got "
                f"{want}, replaceable={self.replaceable}. Capture again, with tables of their own."
            )
        if self._tiles or not all(hasattr(kept, "load") for kept in self.kept.values()):
            raise ValueError("only the Triton kernels can be given another layout, and impl='torch' used this table.")
        kept = self.kept
        for table in kept.values():
            table.load(bounds)
        self.__dict__.pop("borders", None)
        self.__init__(bounds, self.device, replaceable=True)
        self.kept = kept

    def tiles(self, chunks_per_tile: int) -> tuple[Tile, ...]:
        """Tiles of up to ``chunks_per_tile`` chunks each, in local order."""
        if chunks_per_tile not in self._tiles:
            starts = range(0, self.num_chunks, chunks_per_tile)
            self._tiles[chunks_per_tile] = tuple(
                self._make_tile(slice(at, min(at + chunks_per_tile, self.num_chunks))) for at in starts
            )
        return self._tiles[chunks_per_tile]

    def _make_tile(self, which: slice) -> Tile:
        chunks = self._chunks[which]
        first, last = chunks[0][0], chunks[-1][0]
        enters = chunks[0][1] != self.bounds[first][0]
        leaves = chunks[-1][2] != self.bounds[last][1]
        key = (tuple(b - a for _, a, b in chunks), tuple(s - first for s, _, _ in chunks), enters, leaves)
        if key not in self._shapes:
            self._shapes[key] = TileShape(*key, self.chunk_size, self.device)
        begun, ended = (first + enters, last + 1), (first, last + 1 - leaves)
        return Tile(chunks[0][1], chunks[-1][2], which, first, last, begun, ended, self._shapes[key])

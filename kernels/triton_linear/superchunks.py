"""Tables that cut a rank's segments into superchunks. A superchunk is the run of tokens that one GPU program visits.

It has at most ``length`` consecutive tokens of one segment. So no program meets a document border, and no decay has to
express one. Its chunks are counted from its own first token, so only its last chunk can be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.segments import Bounds, SegmentTable, to_device


@dataclass(frozen=True)
class Superchunks:
    """Device tables, made once per layout.

    Attributes:
        length: most tokens per superchunk, L.
        count: N, how many there are. In a replaceable table the last ones may hold no token.
        first: first superchunk of each segment, then the number of all that hold tokens: S + 1 numbers on the host.
        pieces: start, stop, segment, start and stop of the segment, int32 [5, N].
        segments: first superchunk of each segment, and the one behind its last, int32 [2, S].
        lengths: tokens of each segment, float64 [S].
    """

    length: int
    count: int
    first: list[int]
    pieces: Tensor
    segments: Tensor
    lengths: Tensor

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.first) - 1

    def load(self, bounds: Bounds) -> None:
        """Write the tables of other segments, as many and with as many tokens, into the memory that kernels read."""
        first, *tables = _tables(bounds, self.length, self.count)
        self.first[:] = first
        for mine, new in zip((self.pieces, self.segments, self.lengths), tables, strict=True):
            mine.copy_(new)


def superchunks(table: SegmentTable, length: int) -> Superchunks:
    """The superchunks of ``table``, kept with it."""
    key = ("superchunks", length)
    if key not in table.kept:
        count = None
        if table.replaceable:  # the most that as many segments can need
            segments = len(table.bounds)
            count = (table.bounds[-1][1] - segments) // length + segments
        first, *tables = _tables(table.bounds, length, count)
        pieces, segments, lengths = (to_device(t, table.device) for t in tables)
        table.kept[key] = Superchunks(length, pieces.shape[1], first, pieces, segments, lengths)
    return table.kept[key]


def _tables(bounds: Bounds, length: int, count: int | None) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """``first``, ``pieces``, ``segments`` and ``lengths``, with empty pieces up to ``count``."""
    pieces, first = [], []
    for s, (start, stop) in enumerate(bounds):
        first.append(len(pieces))
        pieces += [(at, min(at + length, stop), s, start, stop) for at in range(start, stop, length)]
    first.append(len(pieces))
    pieces += [(0, 0, 0, 0, 0)] * ((count or 0) - len(pieces))
    return (
        first,
        torch.tensor(pieces, dtype=torch.int32).t().contiguous(),
        torch.tensor([first[:-1], first[1:]], dtype=torch.int32),
        torch.tensor([stop - start for start, stop in bounds], dtype=torch.float64),
    )

"""Host tables that cut a rank's segments into superchunks, the runs of tokens that one GPU program walks through.

A superchunk is at most ``length`` consecutive tokens of one segment, so no program meets a document border and no decay
has to express one. Its chunks start at its own first token; only its last chunk can be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.segments import SegmentTable


@dataclass(frozen=True)
class Superchunks:
    """Device tables, made once per layout.

    Attributes:
        count: N superchunks.
        num_segments: S.
        pieces: start, stop, segment, start and stop of the segment, int32 [5, N].
        segments: first superchunk and the one behind the last, int32 [2, S].
        lengths: tokens of each segment, float64 [S].
    """

    count: int
    num_segments: int
    pieces: Tensor
    segments: Tensor
    lengths: Tensor


def superchunks(table: SegmentTable, length: int) -> Superchunks:
    """The superchunks of ``table``, kept with it."""
    key = ("superchunks", length)
    if key not in table.kept:
        table.kept[key] = _make(table.bounds, length, table.device)
    return table.kept[key]


def _make(bounds: tuple[tuple[int, int], ...], length: int, device: torch.device) -> Superchunks:
    pieces = [
        (at, min(at + length, stop), s, start, stop)
        for s, (start, stop) in enumerate(bounds)
        for at in range(start, stop, length)
    ]
    ends = torch.bincount(torch.tensor([piece[2] for piece in pieces]), minlength=len(bounds)).cumsum(0)
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    return Superchunks(
        count=len(pieces),
        num_segments=len(bounds),
        pieces=torch.tensor(pieces, dtype=torch.int32).t().contiguous().to(device),
        segments=torch.stack([starts, ends]).int().to(device),
        lengths=torch.tensor([stop - start for start, stop in bounds], dtype=torch.float64).to(device),
    )

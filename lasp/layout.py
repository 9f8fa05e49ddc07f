"""Who owns which tokens: how a global token stream is cut over the ranks of a context-parallel group.

The worked example of the glossary, used in tests as well. Two documents of 5 and 7 tokens, two ranks:

    global index        0  1  2  3  4 | 5  6  7  8  9 10 11         cu_seqlens_global = (0, 5, 12)
    contiguous          0  0  0  0  0   0  1  1  1  1  1  1         fragments ((0, 6),), ((6, 12),)
    zigzag              0  0  0  1  1   1  1  1  1  0  0  0         fragments ((0, 3), (9, 12)), ((3, 6), (6, 9))

Everything in this file is a host plan: plain ints, equal on all ranks, testable without a process group. Tensors
for a device are made from it in :mod:`lasp.context`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The part of one document inside one fragment. ``_global`` counts global tokens, ``start``/``stop`` local ones.

    Attributes:
        cp_rank, fragment: the owner, and the fragment's place in the owner's local order.
        document: index of the document.
        start, stop: range in the owner's local order.
        start_global, stop_global: range in the global token stream.
        begins_document, ends_document: whether the document's first / last token is in this segment.
    """

    cp_rank: int
    fragment: int
    document: int
    start: int
    stop: int
    start_global: int
    stop_global: int
    begins_document: bool
    ends_document: bool

    def __len__(self) -> int:
        return self.stop - self.start


class SequenceLayout:
    """A tiling of ``[0, T)`` by the fragments of all ranks, and the documents packed into ``[0, T)``.

    Args:
        cu_seqlens_global: document borders in global tokens, ``(0, ..., T)``, non-decreasing: ints or a CPU tensor.
            Equal neighbours are an empty document.
        fragments: ``fragments[cp_rank] = ((start, stop), ...)`` in the rank's local order. Any tiling is allowed.

    Raises:
        ValueError: the borders do not start at 0, decrease, or hold no token; the fragments do not tile ``[0, T)``
            exactly once; a rank owns no token.
    """

    def __init__(self, cu_seqlens_global: Sequence[int] | Tensor, fragments: Sequence[Sequence[tuple[int, int]]]):
        self.cu_seqlens_global = _borders(cu_seqlens_global)
        self.fragments = _fragments(fragments)
        self.total_tokens = self.cu_seqlens_global[-1]
        self.cp_size = len(self.fragments)
        self._check_tiling()

    @classmethod
    def contiguous(cls, cu_seqlens_global: int | Sequence[int] | Tensor, cp_size: int) -> SequenceLayout:
        """Rank r owns the r-th of ``cp_size`` runs whose lengths differ by at most one.

        Args:
            cu_seqlens_global: document borders, or an int: one document of that length.
            cp_size: number of ranks.
        """
        borders = _borders(cu_seqlens_global)
        blocks = _even_blocks(borders[-1], cp_size, cp_size)
        return cls(borders, [(block,) for block in blocks])

    @classmethod
    def zigzag(cls, cu_seqlens_global: int | Sequence[int] | Tensor, cp_size: int) -> SequenceLayout:
        """Rank r owns blocks r and ``2 * cp_size - 1 - r`` of ``2 * cp_size``: causal softmax work is balanced.

        The order that Megatron-Core uses. Blocks that get no token (fewer than ``2 * cp_size`` tokens) are left out.
        """
        borders = _borders(cu_seqlens_global)
        blocks = _even_blocks(borders[-1], 2 * cp_size, cp_size)
        pairs = ((blocks[r], blocks[2 * cp_size - 1 - r]) for r in range(cp_size))
        return cls(borders, [tuple((a, b) for a, b in pair if a < b) for pair in pairs])

    @property
    def num_documents(self) -> int:
        """Documents in the stream, empty ones included."""
        return len(self.cu_seqlens_global) - 1

    @property
    def max_fragments(self) -> int:
        """F: the most fragments of any rank. It sets the message size of a state exchange."""
        return max(len(owned) for owned in self.fragments)

    def num_tokens(self, cp_rank: int) -> int:
        """Tokens that ``cp_rank`` owns."""
        return sum(stop - start for start, stop in self.fragments[self._rank(cp_rank)])

    def shard(self, x: Tensor, cp_rank: int, dim: int = 1) -> Tensor:
        """The tokens of ``cp_rank``, in its local order, of a tensor that holds all tokens along ``dim``.

        Raises:
            ValueError: ``x`` does not have ``total_tokens`` entries along ``dim``; ``cp_rank`` is out of range.
        """
        if _length(x, dim) != self.total_tokens:
            raise ValueError(
                f"x must hold all {self.total_tokens} tokens of the layout along dim {dim}, got {_shape(x)}. "
                "Shard the full sequence once, or build the layout for this length."
            )
        owned = self.fragments[self._rank(cp_rank)]
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in owned], dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The inverse of :meth:`shard`: the full sequence from every rank's local tensor, in rank order.

        Raises:
            ValueError: not one part per rank, or a part whose length is not its rank's token count.
        """
        if not hasattr(parts, "__len__") or len(parts) != self.cp_size:
            got = f"{len(parts)} parts" if hasattr(parts, "__len__") else type(parts).__name__
            raise ValueError(
                f"parts must hold one tensor per rank: {self.cp_size} ranks, got {got}. Gather them into a list."
            )
        pieces = []
        for rank, part in enumerate(parts):
            if _length(part, dim) != self.num_tokens(rank):
                raise ValueError(
                    f"parts[{rank}] must hold the {self.num_tokens(rank)} tokens of rank {rank} along dim {dim}, "
                    f"got {_shape(part)}. Pass the local tensors in rank order."
                )
            lengths = [stop - start for start, stop in self.fragments[rank]]
            starts = [start for start, _ in self.fragments[rank]]
            pieces += zip(starts, part.split(lengths, dim), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], dim)

    def position_ids(self, cp_rank: int) -> Tensor:
        """Position of each local token inside its document, int64 [T_local]."""
        segments = self.segments(cp_rank)
        starts = [s.start_global - self.cu_seqlens_global[s.document] for s in segments]
        return torch.cat([torch.arange(a, a + len(s)) for a, s in zip(starts, segments, strict=True)])

    def cu_seqlens(self, cp_rank: int) -> Tensor:
        """Borders of this rank's segments in local order, int32 [segments + 1]."""
        segments = self.segments(cp_rank)
        return torch.tensor([0, *(s.stop for s in segments)], dtype=torch.int32)

    def segments(self, cp_rank: int) -> tuple[Segment, ...]:
        """The segments of ``cp_rank`` in local order."""
        return self._segments[self._rank(cp_rank)]

    @cached_property
    def chains(self) -> tuple[tuple[Segment, ...], ...]:
        """Per document, its segments on all ranks in the order of its tokens. Empty documents have an empty chain."""
        chains: list[list[Segment]] = [[] for _ in range(self.num_documents)]
        for owned in self._segments:
            for segment in owned:
                chains[segment.document].append(segment)
        return tuple(tuple(sorted(chain, key=lambda s: s.start_global)) for chain in chains)

    @cached_property
    def _segments(self) -> tuple[tuple[Segment, ...], ...]:
        documents = [
            (n, a, b)
            for n, (a, b) in enumerate(zip(self.cu_seqlens_global, self.cu_seqlens_global[1:], strict=False))
            if a < b
        ]
        ordered = sorted((f, r, i) for r, owned in enumerate(self.fragments) for i, f in enumerate(owned))
        found: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {}
        d = 0
        for (start, stop), rank, index in ordered:  # one sweep over fragments and documents together
            here = found.setdefault((rank, index), [])
            at = start
            while at < stop:
                n, a, b = documents[d]
                here.append((n, at, min(b, stop), a, b))
                at = min(b, stop)
                d += at == b
        result = []
        for rank, owned in enumerate(self.fragments):
            local, segments = 0, []
            for index in range(len(owned)):
                for n, at, end, a, b in found[rank, index]:
                    length = end - at
                    segments.append(Segment(rank, index, n, local, local + length, at, end, at == a, end == b))
                    local += length
            result.append(tuple(segments))
        return tuple(result)

    def _rank(self, cp_rank: int) -> int:
        if isinstance(cp_rank, bool) or not isinstance(cp_rank, int) or not 0 <= cp_rank < self.cp_size:
            raise ValueError(f"cp_rank must be in [0, {self.cp_size}) for this layout, got {cp_rank!r}.")
        return cp_rank

    def _check_tiling(self) -> None:
        for rank, owned in enumerate(self.fragments):
            if not owned:
                raise ValueError(
                    f"every rank must own at least one token; fragments[{rank}] is empty. "
                    f"Use fewer ranks than {self.cp_size} or a longer sequence than {self.total_tokens} tokens."
                )
        at = 0
        everything = sorted((f, r) for r, owned in enumerate(self.fragments) for f in owned)
        for (start, stop), rank in everything:
            if start != at or stop <= start:
                raise ValueError(
                    f"fragments must tile [0, {self.total_tokens}) exactly once, without empty ones: expected a "
                    f"fragment that starts at {at}, got ({start}, {stop}) of rank {rank}."
                )
            at = stop
        if at != self.total_tokens:
            raise ValueError(
                f"fragments must tile [0, {self.total_tokens}) exactly once: they end at {at}. "
                "Let the last border of cu_seqlens_global and the fragments agree."
            )

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, SequenceLayout) and self.cu_seqlens_global == other.cu_seqlens_global
        return same and self.fragments == other.fragments

    def __hash__(self) -> int:
        return hash((self.cu_seqlens_global, self.fragments))

    def __repr__(self) -> str:
        return f"SequenceLayout(cu_seqlens_global={self.cu_seqlens_global}, fragments={self.fragments})"


def _length(x: object, dim: int) -> int | None:
    """Entries of a tensor along ``dim``; None for what has no such dim."""
    known = isinstance(x, Tensor) and isinstance(dim, int) and -x.dim() <= dim < x.dim()
    return x.shape[dim] if known else None


def _shape(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _borders(cu_seqlens: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """Checked document borders as ints; an int is one document of that length."""
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            raise ValueError(
                f"cu_seqlens_global must be ints or a CPU tensor, got a tensor on {cu_seqlens.device}: reading it "
                "would stall the device. Keep the borders on the host."
            )
        if cu_seqlens.dtype.is_floating_point or cu_seqlens.dim() > 1:
            raise ValueError(
                f"cu_seqlens_global must be a 1-d integer tensor, got {cu_seqlens.dtype} of shape "
                f"{tuple(cu_seqlens.shape)}."
            )
        cu_seqlens = cu_seqlens.tolist()
    try:
        whole = not hasattr(cu_seqlens, "__len__")
        borders = (0, _integer(cu_seqlens)) if whole else tuple(_integer(b) for b in cu_seqlens)
    except TypeError:
        raise ValueError(
            f"cu_seqlens_global must hold integers, or be one, got {cu_seqlens!r}. Pass borders like (0, 40, 232)."
        ) from None
    if len(borders) < 2 or borders[0] != 0 or any(a > b for a, b in zip(borders, borders[1:], strict=False)):
        raise ValueError(f"cu_seqlens_global must start at 0 and never decrease, like (0, 40, 232); got {borders}.")
    if borders[-1] < 1:
        raise ValueError(f"cu_seqlens_global must hold at least one token, got {borders}.")
    return borders


def _integer(value: object) -> int:
    """Any integer type as an int; a TypeError for floats, bools and the rest."""
    if isinstance(value, bool):
        raise TypeError("a bool is no count")
    return operator.index(value)


def _fragments(fragments: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Checked fragments as ints."""
    try:
        return tuple(tuple((_integer(a), _integer(b)) for a, b in owned) for owned in fragments)
    except (TypeError, ValueError):
        raise ValueError(
            f"fragments must hold, per rank, pairs of integers (start, stop), got {fragments!r}. For two ranks of one "
            "fragment each: [((0, 6),), ((6, 12),)]."
        ) from None


def _even_blocks(total: int, num_blocks: int, cp_size: int) -> list[tuple[int, int]]:
    """``num_blocks`` runs that tile ``[0, total)``, the first ones longer by one where it does not divide."""
    if isinstance(cp_size, bool) or not isinstance(cp_size, int) or cp_size < 1:
        raise ValueError(f"cp_size must be at least 1 and an int, got {cp_size!r}.")
    if total < cp_size:
        raise ValueError(
            f"a sequence of {total} tokens cannot be cut over cp_size = {cp_size} ranks: each needs one token or more. "
            "Use a longer sequence or a smaller cp_size."
        )
    size, longer = divmod(total, num_blocks)
    edges = [i * size + min(i, longer) for i in range(num_blocks + 1)]
    return list(zip(edges, edges[1:], strict=False))

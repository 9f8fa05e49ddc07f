"""Halos: the few tokens before each segment, fetched from the ranks that own them.

Cutting a document moves the tokens that a local operator looks back at to other ranks. The *halo* of a segment is the
``width`` tokens before it in its document, fewer where the document begins: on the example of :mod:`lasp.layout` with
two contiguous ranks and width 3, rank 1 owns tokens 6..11, its segment continues document 1 (tokens 5..11), and its
halo is token 5, the only one before it. A halo wider than a fragment comes from as many fragments as that takes. All
of a rank's halos come in one all-to-all, and one more brings their gradients back to the owners, which add them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lasp import comm
from lasp.context.context import Context
from lasp.layout import SequenceLayout


@dataclass(frozen=True)
class HaloPlan:
    """Which tokens this rank fetches and which it sends: ints, from the layout alone. See :func:`halo_plan`.

    Attributes:
        cp_rank: this rank.
        width: most tokens of a halo.
        lengths: per segment of this rank, the tokens of its halo; 0 where it begins its document.
        pieces: ``(owner rank, owner's local start, length)``, in the order of the halos' tokens.
        sends: ``sends[r] = ((local start, length), ...)`` of this rank's tokens in rank r's halos, in r's order.
        silent: no rank of the group needs a token of another, so no collective runs.
    """

    cp_rank: int
    width: int
    lengths: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]
    sends: tuple[tuple[tuple[int, int], ...], ...]
    silent: bool

    @classmethod
    def build(cls, layout: SequenceLayout, cp_rank: int, width: int) -> HaloPlan:
        """The plan of ``cp_rank`` for halos of at most ``width`` tokens."""
        needed = [_needed(layout, rank, width) for rank in range(layout.cp_size)]
        pieces = [tuple(piece for halo in halos for piece in halo) for halos in needed]
        return cls(
            cp_rank,
            width,
            tuple(sum(length for _, _, length in halo) for halo in needed[cp_rank]),
            pieces[cp_rank],
            tuple(tuple((a, n) for owner, a, n in theirs if owner == cp_rank) for theirs in pieces),
            all(owner == rank for rank, theirs in enumerate(pieces) for owner, _, _ in theirs),
        )

    @property
    def send_counts(self) -> list[int]:
        """Tokens for each rank; what stays on this rank is not sent."""
        counts = [sum(n for _, n in pieces) for pieces in self.sends]
        counts[self.cp_rank] = 0
        return counts

    @property
    def receive_counts(self) -> list[int]:
        """Tokens from each rank."""
        counts = [0] * len(self.sends)
        for owner, _, length in self.pieces:
            counts[owner] += length * (owner != self.cp_rank)
        return counts


def halo_plan(cp: Context, width: int) -> HaloPlan:
    """The plan of this rank, made once per context and width."""
    return cp.plan(("halo", width), lambda: HaloPlan.build(cp.layout, cp.cp_rank, width))


class HaloExchange:
    """The halos of ``xs``, tensors [B, T_local, ..., D_i], in flight, packed along the last dim.

    ``place`` is the name of the collective, here and in :class:`HaloReturn`.
    """

    def __init__(self, xs: Sequence[Tensor], plan: HaloPlan, group: dist.ProcessGroup | None, place: str | None = None):
        self._xs, self._plan, self._halo, self._pending = xs, plan, None, None
        if not plan.silent:
            theirs = [piece for r, pieces in enumerate(plan.sends) if r != plan.cp_rank for piece in pieces]
            rows = torch.cat([_cat_rows(x, theirs) for x in xs], -1)
            rows = rows.transpose(0, 1)  # tokens first: [n, B, ...]
            self._pending = comm.all_to_all(rows, plan.send_counts, plan.receive_counts, group, place)

    def wait(self) -> Tensor:
        """[B, sum(plan.lengths), ..., sum(D_i)]: segment after segment, each halo in the order of its tokens."""
        if self._halo is None:
            received = None if self._pending is None else self._pending.wait().transpose(0, 1)
            parts = [torch.cat([x[:, :0] for x in self._xs], -1)]
            for owner, start, length in _received_pieces(self._plan):
                if owner == self._plan.cp_rank:
                    parts.append(torch.cat([x[:, start : start + length] for x in self._xs], -1))
                else:
                    parts.append(received[:, start : start + length])
            self._halo = torch.cat(parts, 1)
            self._xs = self._pending = None
        return self._halo


class HaloReturn:
    """The gradient of the halos on its way to the owners of their tokens: the adjoint of :class:`HaloExchange`."""

    def __init__(self, dhalo: Tensor, plan: HaloPlan, group: dist.ProcessGroup | None, place: str | None = None):
        self._plan, self._pending = plan, None
        parts = dhalo.split([length for _, _, length in plan.pieces], 1)
        self._own = [part for part, piece in zip(parts, plan.pieces, strict=True) if piece[0] == plan.cp_rank]
        if not plan.silent:
            order = sorted(range(len(parts)), key=lambda i: plan.pieces[i][0])  # stable: by owner, in halo order
            theirs = [parts[i] for i in order if plan.pieces[i][0] != plan.cp_rank]
            rows = torch.cat([dhalo[:, :0], *theirs], 1).transpose(0, 1)
            self._pending = comm.all_to_all(rows, plan.receive_counts, plan.send_counts, group, place)

    def add_to(self, dxs: Sequence[Tensor]) -> None:
        """Add what all ranks' halos contribute to the gradients ``dxs``, tensors [B, T_local, ..., D_i]."""
        received, at = (None if self._pending is None else self._pending.wait().transpose(0, 1)), 0
        sizes = [dx.shape[-1] for dx in dxs]
        for rank, pieces in enumerate(self._plan.sends):
            for i, (start, length) in enumerate(pieces):
                if rank == self._plan.cp_rank:
                    part = self._own[i]
                else:
                    part = received[:, at : at + length]
                    at += length
                for dx, share in zip(dxs, part.split(sizes, -1), strict=True):
                    dx[:, start : start + length] += share


def _needed(layout: SequenceLayout, cp_rank: int, width: int) -> list[list[tuple[int, int, int]]]:
    """Per segment of ``cp_rank``, its halo as ``(owner, owner's local start, length)`` in the order of the tokens."""
    halos = []
    for segment in layout.segments(cp_rank):
        halo: list[tuple[int, int, int]] = []
        if width > 0 and not segment.begins_document:
            chain = layout.chains[segment.document]
            first = max(chain[0].start_global, segment.start_global - width)
            i = bisect_left(chain, segment.start_global, key=lambda s: s.start_global)
            while i > 0 and chain[i - 1].stop_global > first:
                i -= 1
                skipped = max(0, first - chain[i].start_global)
                halo.insert(0, (chain[i].cp_rank, chain[i].start + skipped, len(chain[i]) - skipped))
        halos.append(halo)
    return halos


def _received_pieces(plan: HaloPlan) -> list[tuple[int, int, int]]:
    """``plan.pieces`` with starts counted in what arrives (rank after rank) instead of at the owner."""
    counts = plan.receive_counts
    at = [sum(counts[:rank]) for rank in range(len(counts))]
    placed = []
    for owner, start, length in plan.pieces:
        placed.append((owner, start if owner == plan.cp_rank else at[owner], length))
        at[owner] += length
    return placed


def _cat_rows(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens of all ``(start, length)`` of x [B, T, ...], one range behind the other."""
    return torch.cat([x[:, :0], *(x[:, start : start + length] for start, length in ranges)], 1)

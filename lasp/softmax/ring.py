"""Ring Attention: shards of keys and values travel from rank to rank while each is computed.

Rank r computes its queries on its own keys, then on those of rank r - 1, r - 2, ...: in hop s it has the shard of rank
r - s, passes it on to rank r + 1 and receives the next one meanwhile (arXiv 2310.01889, section 3). What each shard
adds merges by the log of the sum of exponentials, in fp32 (fp64 for fp64 inputs). In the backward the shards travel
again, and a shard's dK, dV, summed on the way in fp32, follow one hop behind and then go home:

    for s in 0 .. cp_size - 1:   K, V = shard of rank r - s;   o, lse += attention(q, K, V)
    backward:                    the same;   dq += ...;   dK, dV of rank r - s += ...;   the last rank sends them home

Besides its own keys a rank holds two shards, the one it reads and the one that arrives. With the zigzag layout all
ranks have as much to compute in every hop; with the contiguous one the last rank computes while the first waits.

*What travels*: of a rank's tokens those that any other rank reads (causality, documents), the shard, packed as one
message [B, n, Hkv, D + Dv] in k's dtype; as far along the ring as the last rank that reads any of it. For one document
in zigzag order that is everything on cp_size - 1 hops, except that rank 0's last block stays at home; contiguous, the
shard of rank r goes cp_size - 1 - r hops; documents that no cut meets do not travel. A rank without a query that
reads a shard passes it on. Per hop of a shard of n tokens one message of ``B * n * Hkv * (D + Dv)`` elements, forward
and backward, and in the backward another of as many fp32 elements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.context.context import Context
from lasp.kernels.softmax import Piece, softmax_backward, softmax_forward
from lasp.kernels.softmax_parts import add_gradients, add_keys
from lasp.kernels.state import state_dtype
from lasp.layout import Segment, SequenceLayout


class RingAttention(torch.autograd.Function):
    """The shards of all ranks one after the other, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, q, k, v, cp, causal, scale):
        plan = cp.plan(("softmax", "ring", causal), lambda: _RingPlan.build(cp, causal))
        ctx.place, dtype = comm.place("softmax"), state_dtype(q.dtype)
        for hop, keys, values in _shards_of_keys(k, v, cp, plan, f"{ctx.place}, forward"):
            if hop == 0:
                o, lse = softmax_forward(q, keys, values, plan.own, causal=causal, scale=scale, out_dtype=dtype)
            add_keys(o, lse, q, keys, values, plan.pieces[hop], scale=scale)
            del keys, values  # a third shard is about to arrive
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.cp, ctx.plan, ctx.options = cp, plan, {"causal": causal, "scale": scale}
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        cp, plan, place, dtype = ctx.cp, ctx.plan, f"{ctx.place}, backward", state_dtype(q.dtype)
        do, widths = do.contiguous(), [k.shape[-1], v.shape[-1]]
        options = {"scale": ctx.options["scale"]}
        returning = _ShardsOfGradients(k, v, cp, plan, place)
        for hop, keys, values in _shards_of_keys(k, v, cp, plan, place):
            row = (do, q, keys, values, o, lse, plan.pieces[hop])
            if hop == 0:
                dq, dk, dv = softmax_backward(*row[:-1], plan.own, **ctx.options, out_dtype=dtype)
                add_gradients(dq, dk, dv, *row, **options)
            elif keys is None:
                returning.follow(hop, None)
            else:
                share = returning.buffer(plan.owner(hop)).zero_()
                add_gradients(dq, *share.split(widths, -1), *row, **options)
                returning.follow(hop, share)
            del keys, values, row
        returning.add_to(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _shards_of_keys(
    k: Tensor, v: Tensor, cp: Context, plan: _RingPlan, place: str
) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    """Per hop the keys and values of rank ``plan.owner(hop)``, None where its shard does not come here.

    The next shard arrives while the caller works on this one, which it must let go of afterwards.
    """
    right, left = (cp.cp_rank + 1) % cp.cp_size, (cp.cp_rank - 1) % cp.cp_size
    messages = comm.Messages(cp.group, place) if plan.hops else None
    keys, values, held = k, v, _packed(k, v, plan.shards[cp.cp_rank])
    for hop in range(plan.hops):
        arriving = k.new_empty(_shape(k, v, plan.shards[plan.owner(hop + 1)])) if plan.arrives(hop + 1) else None
        sends = [(right, held)] if plan.goes_on(hop) else []
        works = messages.post(sends, [] if arriving is None else [(left, arriving)])
        del sends
        yield hop, keys, values
        del keys, values
        messages.wait(works)
        messages.flush()
        held, arriving = arriving, None
        keys, values = (None, None) if held is None else held.split([k.shape[-1], v.shape[-1]], -1)
    yield plan.hops, keys, values
    if messages is not None:
        messages.close()


class _ShardsOfGradients:
    """dK, dV of the shards: each follows its shard one hop behind, and goes home from the last rank that has it."""

    def __init__(self, k: Tensor, v: Tensor, cp: Context, plan: _RingPlan, place: str):
        self._k, self._v, self._cp, self._plan = k, v, cp, plan
        self._messages = comm.Messages(cp.group, place) if plan.hops else None
        self._works, self._arriving, self._home = [], None, None

    def buffer(self, owner: int) -> Tensor:
        """For the gradient of the owner's shard, in fp32 (fp64): [B, n, Hkv, D + Dv]."""
        return self._k.new_empty(_shape(self._k, self._v, self._plan.shards[owner]), dtype=state_dtype(self._k.dtype))

    def follow(self, hop: int, share: Tensor | None) -> None:
        """Add ``share``, this rank's part for the shard of ``hop``, to what came behind it, and pass the sum on."""
        plan, rank, size = self._plan, self._cp.cp_rank, self._cp.cp_size
        self._messages.wait(self._works)
        self._messages.flush()
        if self._arriving is not None:
            share += self._arriving
        self._arriving = self.buffer(plan.owner(hop + 1)) if plan.arrives(hop + 1) else None
        receives = [] if self._arriving is None else [((rank - 1) % size, self._arriving)]
        if plan.shards[rank].hops == hop:
            self._home = self.buffer(rank)
            receives.append(((rank + hop) % size, self._home))
        to = (rank + 1) % size if plan.goes_on(hop) else plan.owner(hop)
        self._works = self._messages.post([] if share is None else [(to, share)], receives)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add what the other ranks' queries contribute to this rank's dk, dv [B, T_local, Hkv, ...]."""
        if self._messages is None:
            return
        self._messages.wait(self._works)
        self._messages.close()
        if self._home is not None:
            ranges = self._plan.shards[self._cp.cp_rank].ranges
            parts = self._home.split([b - a for a, b in ranges], 1)
            for (start, stop), part in zip(ranges, parts, strict=True):
                share = part.split([dk.shape[-1], dv.shape[-1]], -1)
                dk[:, start:stop] += share[0]
                dv[:, start:stop] += share[1]


@dataclass(frozen=True)
class _Shard:
    """What travels of a rank's keys.

    Attributes:
        segments: those that another rank reads, in the owner's local order: the tokens of the message.
        hops: how far: to rank ``owner + hops``, the last one that reads any of it. 0 where nobody does.
    """

    segments: tuple[Segment, ...]
    hops: int

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """The tokens, as runs of the owner's local order."""
        return _runs((s.start, s.stop) for s in self.segments)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the message."""
        return sum(len(s) for s in self.segments)

    @property
    def placed(self) -> list[tuple[Segment, int]]:
        """The segments, each with its place in the message."""
        return list(zip(self.segments, accumulate((len(s) for s in self.segments), initial=0), strict=False))


@dataclass(frozen=True)
class _RingPlan:
    """Host plan of :class:`RingAttention`.

    Attributes:
        cp_rank: this rank.
        shards: what travels, by owner.
        own: this rank's segments with themselves, and with own keys right before them: each query once.
        pieces: per hop, what else this rank's queries read: rectangles, see :mod:`lasp.kernels.softmax_parts`.
    """

    cp_rank: int
    shards: tuple[_Shard, ...]
    own: tuple[Piece, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def hops(self) -> int:
        """The farthest that any shard goes; equal on all ranks."""
        return len(self.pieces) - 1

    def owner(self, hop: int) -> int:
        """Whose shard is here in ``hop``, if it arrives."""
        return (self.cp_rank - hop) % len(self.shards)

    def arrives(self, hop: int) -> bool:
        """Whether that shard comes as far as this rank."""
        return 0 < hop <= self.shards[self.owner(hop)].hops

    def goes_on(self, hop: int) -> bool:
        """Whether it goes to the next rank after ``hop``."""
        return hop < self.shards[self.owner(hop)].hops

    @classmethod
    def build(cls, cp: Context, causal: bool) -> _RingPlan:
        """From the layout alone."""
        shards = _shards(cp.layout, causal)
        own, rest = [], []
        for query, runs in _reads(cp.segments, [(s, s.start) for s in cp.segments], causal):
            before = [run for run in runs if run[1] == query.start]
            own.append((query.start, query.stop, before[0][0] if before else query.start, query.stop))
            rest.append((query, [run for run in runs if run not in before]))
        pieces = [_rectangles(rest)]
        for hop in range(1, 1 + max(shard.hops for shard in shards)):
            shard = shards[(cp.cp_rank - hop) % cp.cp_size]
            keys = shard.placed if hop <= shard.hops else []
            pieces.append(_rectangles(_reads(cp.segments, keys, causal)))
        return cls(cp.cp_rank, shards, tuple(own), tuple(pieces))


def _shards(layout: SequenceLayout, causal: bool) -> tuple[_Shard, ...]:
    """What travels, by owner."""
    size = layout.cp_size
    hops, travels = [0] * size, [[] for _ in range(size)]
    for chain in layout.chains:
        first, last = {}, {}  # places of each rank's segments in the chain
        for i, segment in enumerate(chain):
            first.setdefault(segment.cp_rank, i)
            last[segment.cp_rank] = i
        for owner in first:
            readers = [rank for rank in last if rank != owner and (not causal or last[rank] > first[owner])]
            hops[owner] = max([hops[owner], *((rank - owner) % size for rank in readers)])
        ends = sorted(last, key=last.get)[-2:]  # the owner of the last segment, and who has the last one beside it
        for i, segment in enumerate(chain):
            others = [last[rank] for rank in ends if rank != segment.cp_rank]
            if others and (not causal or i < others[-1]):
                travels[segment.cp_rank].append(segment)
    ordered = (tuple(sorted(segments, key=lambda s: s.start)) for segments in travels)
    return tuple(_Shard(segments, n) for segments, n in zip(ordered, hops, strict=True))


def _reads(
    queries: Iterable[Segment], keys: Iterable[tuple[Segment, int]], causal: bool
) -> Iterator[tuple[Segment, list[tuple[int, int]]]]:
    """Per query segment, the runs of keys that all its tokens read; the segment itself is none of them."""
    documents = defaultdict(list)
    for key, start in keys:
        documents[key.document].append((key, start))
    for query in queries:
        seen = [(key, start) for key, start in documents[query.document] if key != query]
        if causal:
            seen = [(key, start) for key, start in seen if key.stop_global <= query.start_global]
        yield query, _runs((start, start + len(key)) for key, start in seen)


def _rectangles(reads: Iterable[tuple[Segment, list[tuple[int, int]]]]) -> tuple[Piece, ...]:
    """One piece for neighbouring queries that read the same run."""
    rows: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for query, runs in reads:
        for run in runs:
            rows[run].append((query.start, query.stop))
    return tuple((*some, *run) for run, found in rows.items() for some in _runs(found))


def _runs(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, joined where one begins at the end of the one before."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def _shape(k: Tensor, v: Tensor, shard: _Shard) -> tuple[int, ...]:
    return k.shape[0], shard.num_tokens, k.shape[2], k.shape[3] + v.shape[3]


def _packed(k: Tensor, v: Tensor, shard: _Shard) -> Tensor | None:
    """Keys and values of this rank's shard in one tensor, None where it does not travel."""
    parts = [torch.cat([k[:, a:b], v[:, a:b]], -1) for a, b in shard.ranges]
    return torch.cat(parts, 1) if parts else None

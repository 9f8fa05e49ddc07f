"""Softmax attention by all-gather: the keys and values of all ranks, head group by head group.

LASP-2H (arXiv 2502.07563, section 3.4) gives the softmax layers of a hybrid model the same shape as its linear ones:
queries stay where they are, one all-gather brings what the other ranks own. Here, as in Llama 3's context parallelism
(arXiv 2407.21783, section 3.3.2), what travels is K and V, which grouped-query attention makes small. They travel in
:data:`HEAD_GROUPS` groups of kv heads, the next group in flight while the current one is computed, so that a rank never
holds all heads of the whole sequence; the backward gathers again instead of saving, and scatters dK, dV in fp32:

    for each group of kv heads:  K, V = all_gather(K_local, V_local);  o = attention(q, K, V)
    backward:                    K, V = all_gather(...);  dq, dK, dV;  dK_local, dV_local = reduce_scatter(dK, dV)

Per rank, with n = min(HEAD_GROUPS, Hkv) or fewer groups and T_max the longest shard: forward n all-gathers of
``B * T_max * Hkv * (D + Dv)`` elements in all; backward the same and n reduce-scatters of cp_size times as many fp32
elements. None when cp_size is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.context.context import Context
from lasp.kernels.softmax import Piece, softmax_backward, softmax_forward
from lasp.kernels.state import state_dtype

HEAD_GROUPS = 4  # messages per all-gather of all kv heads; fewer if there are fewer heads


class GatherAttention(torch.autograd.Function):
    """All keys of this rank's documents, gathered by head group, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, q, k, v, cp, causal, scale):
        plan = cp.plan(("softmax", causal), lambda: _GatherPlan.build(cp, causal))
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=state_dtype(q.dtype))
        ctx.place = comm.place("softmax")
        for _, heads, keys, values in _head_groups(q, k, v, cp, plan, f"{ctx.place}, forward"):
            part = softmax_forward(q[:, :, heads], keys, values, plan.pieces, causal=causal, scale=scale)
            o[:, :, heads], lse[:, heads] = part
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.cp, ctx.plan, ctx.options = cp, plan, {"causal": causal, "scale": scale}
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        scattering, place = None, f"{ctx.place}, backward"
        for kv_heads, heads, keys, values in _head_groups(q, k, v, ctx.cp, ctx.plan, place):
            row = (x[:, :, heads] for x in (do, q))
            dq[:, :, heads], dkeys, dvalues = softmax_backward(
                *row, keys, values, o[:, :, heads], lse[:, heads], ctx.plan.pieces, **ctx.options
            )
            previous, scattering = scattering, _Scatter(dkeys, dvalues, kv_heads, ctx.cp, ctx.plan, place)
            if previous is not None:
                previous.store(dk, dv)
        scattering.store(dk, dv)
        return dq, dk, dv, None, None, None


@dataclass(frozen=True)
class _GatherPlan:
    """Host plan of :class:`GatherAttention`.

    Attributes:
        run: ``(owner rank, owner's local start, length)`` that make up the needed keys, in global order.
        pieces: this rank's segments, with their keys' places in the run.
        longest: most tokens of any rank, the length of a message.
    """

    run: tuple[tuple[int, int, int], ...]
    pieces: tuple[Piece, ...]
    longest: int

    @classmethod
    def build(cls, cp: Context, causal: bool) -> _GatherPlan:
        """From the first to the last global token that any query of this rank reads."""
        layout, borders = cp.layout, cp.layout.cu_seqlens_global
        seen = [(borders[s.document], s.stop_global if causal else borders[s.document + 1]) for s in cp.segments]
        first, last = min(a for a, _ in seen), max(b for _, b in seen)
        run = []
        for rank, fragments in enumerate(layout.fragments):
            local = 0
            for start, stop in fragments:
                a, b = max(start, first), min(stop, last)
                if a < b:
                    run.append((a, (rank, local + a - start, b - a)))
                local += stop - start
        pieces = [(s.start, s.stop, a - first, b - first) for s, (a, b) in zip(cp.segments, seen, strict=True)]
        longest = max(layout.num_tokens(rank) for rank in range(layout.cp_size))
        return cls(tuple(piece for _, piece in sorted(run)), tuple(pieces), longest)


def _head_groups(
    q: Tensor, k: Tensor, v: Tensor, cp: Context, plan: _GatherPlan, place: str
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Per group of kv heads: the kv heads, their query heads, and all needed keys and values in global order.

    The gather of the next group is in flight while the caller works on the current one.
    """
    kv_heads, ratio = k.shape[2], q.shape[2] // k.shape[2]
    if cp.cp_size == 1:
        everything = _in_order([k], plan.run), _in_order([v], plan.run)
        yield slice(0, kv_heads), slice(0, q.shape[2]), *everything
        return
    size = math.ceil(kv_heads / HEAD_GROUPS)
    groups = [slice(a, min(a + size, kv_heads)) for a in range(0, kv_heads, size)]
    pending = comm.all_gather(_message(k, v, groups[0], plan.longest), cp.group, place)
    for i, group in enumerate(groups):
        gathered = pending.wait()  # [cp_size, B, longest, heads, D + Dv]
        if i + 1 < len(groups):
            pending = comm.all_gather(_message(k, v, groups[i + 1], plan.longest), cp.group, place)
        ordered = _in_order(gathered.unbind(0), plan.run)
        del gathered
        heads = slice(group.start * ratio, group.stop * ratio)
        yield group, heads, *ordered.split([k.shape[-1], v.shape[-1]], -1)


def _message(k: Tensor, v: Tensor, heads: slice, longest: int) -> Tensor:
    """K and V of one group of kv heads in one tensor, padded to the longest shard: [B, longest, heads, D + Dv]."""
    packed = torch.cat([k[:, :, heads], v[:, :, heads]], -1)
    return torch.nn.functional.pad(packed, (0, 0, 0, 0, 0, longest - k.shape[1]))


def _in_order(parts: Sequence[Tensor], run: Sequence[tuple[int, int, int]]) -> Tensor:
    """The tokens of ``run``, one behind the other, from every rank's tensor [B, T, ...]."""
    pieces = [parts[rank][:, start : start + length] for rank, start, length in run]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class _Scatter:
    """dK, dV of one head group on the way to the owners of their tokens: the adjoint of :func:`_head_groups`."""

    def __init__(self, dkeys: Tensor, dvalues: Tensor, heads: slice, cp: Context, plan: _GatherPlan, place: str):
        packed = torch.cat([dkeys, dvalues], -1)
        self._heads = heads
        shape = (cp.cp_size, packed.shape[0], plan.longest, *packed.shape[2:])
        shares = packed.new_zeros(shape)  # by owner; zero for keys that this rank does not read
        pieces = packed.split([length for _, _, length in plan.run], 1)
        for (rank, start, length), piece in zip(plan.run, pieces, strict=True):
            shares[rank, :, start : start + length] = piece
        self._pending = None if cp.cp_size == 1 else comm.reduce_scatter(shares, cp.group, place)
        self._sum = shares[0] if cp.cp_size == 1 else None

    def store(self, dk: Tensor, dv: Tensor) -> None:
        """Write the sums over all ranks into this rank's dk, dv [B, T_local, Hkv, ...]."""
        total = self._sum if self._pending is None else self._pending.wait()
        total = total[:, : dk.shape[1]].split([dk.shape[-1], dv.shape[-1]], -1)
        dk[:, :, self._heads], dv[:, :, self._heads] = total

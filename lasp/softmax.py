"""Softmax attention over a cp_group: the keys and values of all ranks are gathered, head group by head group.

LASP-2H (arXiv 2502.07563, section 3.4) gives the softmax layers of a hybrid model the same shape as its linear ones:
queries stay where they are, one all-gather brings what the other ranks own. Here, as in Llama 3's context parallelism
(arXiv 2407.21783, section 3.3.2), what travels is K and V, which grouped-query attention makes small. They travel in
:data:`HEAD_GROUPS` groups of kv heads, the next group in flight while the current one is computed, so that a rank never
holds all heads of the whole sequence; the backward gathers again instead of saving, and scatters dK, dV in fp32:

    for each group of kv heads:  K, V = all_gather(K_local, V_local);  o = attention(q, K, V)
    backward:                    K, V = all_gather(...);  dq, dK, dV;  dK_local, dV_local = reduce_scatter(dK, dV)

With ``window=W`` a token reads at most W - 1 older ones, so instead of the gather each fragment fetches the halo of
W - 1 tokens before it (:mod:`lasp.halo`): traffic that does not grow with the length of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.checks import check_not_empty, check_scale, check_tensors, context_of
from lasp.context import CPContext
from lasp.halo import HaloExchange, HaloReturn, halo_plan
from lasp.kernels.softmax import Piece, softmax_backward, softmax_forward
from lasp.kernels.state import state_dtype

EXCHANGES = ("all_gather",)
HEAD_GROUPS = 4  # messages per all-gather of all kv heads; fewer if there are fewer heads


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: CPContext | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    exchange: str = "all_gather",
) -> Tensor:
    """Softmax attention over documents that may continue on other ranks; equal to the run on one device.

    Sums run in fp32 (fp64 for fp64 inputs). Per rank and with n = min(HEAD_GROUPS, Hkv) or fewer groups, T_max the
    longest shard: forward n all-gathers of ``B * T_max * Hkv * (D + Dv)`` elements in all; backward the same and n
    reduce-scatters of cp_size times as many fp32 elements. With ``window``, one all-to-all per direction instead, of
    at most ``F * (window - 1)`` tokens received, F fragments. None when cp_size is 1.

    Args:
        q: [B, T_local, H, D], this rank's tokens in local order.
        k, v: [B, T_local, Hkv, D] and [B, T_local, Hkv, Dv]; Hkv divides H, head h reads ``h // (H // Hkv)``.
        cp: the batch's context; None is one device with one document per row.
        causal: token i reads ``j <= i`` of its document; False: the whole document.
        window: keep only ``i - window < j <= i``. Needs ``causal=True``.
        scale: default ``D ** -0.5``.
        exchange: ``"all_gather"`` (LASP-2H).

    Returns:
        [B, T_local, H, Dv] in q's dtype. Gradients have the same dtype.

    Raises:
        ValueError: shapes, dtypes, devices or head counts do not fit each other or the context; a window below 1 or
            without ``causal``; an unknown exchange.
    """
    _check(q, k, v, causal, window, scale, exchange)
    cp = context_of(cp, q.shape[1])
    cp.check_tokens("q", q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if window is not None:
        return _WindowAttention.apply(q, k, v, cp, window, scale)
    return _GatherAttention.apply(q, k, v, cp, causal, scale)


class _GatherAttention(torch.autograd.Function):
    """All keys of this rank's documents, gathered by head group, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, q, k, v, cp, causal, scale):
        plan = cp.remember(("softmax", causal), lambda: _GatherPlan.build(cp, causal))
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


class _WindowAttention(torch.autograd.Function):
    """Keys of this rank, with the window - 1 tokens before each of its segments put in front of the segment."""

    @staticmethod
    def forward(ctx, q, k, v, cp, window, scale):
        plan = cp.remember(("window", window), lambda: _WindowPlan.build(cp, window))
        ctx.place = comm.place("softmax")
        halo = HaloExchange((k, v), halo_plan(cp, window - 1), cp.group, f"{ctx.place}, forward").wait()
        ctx.options = {"window": window, "scale": scale}
        ctx.cp, ctx.plan = cp, plan
        o, lse = softmax_forward(q, *_with_halo(k, v, halo, plan), plan.pieces, **ctx.options)
        ctx.save_for_backward(q, k, v, halo, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, halo, o, lse = ctx.saved_tensors
        plan, window = ctx.plan, ctx.options["window"]
        keys, values = _with_halo(k, v, halo, plan)
        dq, dkeys, dvalues = softmax_backward(do, q, keys, values, o, lse, plan.pieces, **ctx.options)
        dk_parts, dv_parts = (x.split(plan.sizes, 1) for x in (dkeys, dvalues))
        halves = (torch.cat([x[:, :0], *parts[1::2]], 1) for x, parts in ((dkeys, dk_parts), (dvalues, dv_parts)))
        dhalo = torch.cat(list(halves), -1)
        back = HaloReturn(dhalo, halo_plan(ctx.cp, window - 1), ctx.cp.group, f"{ctx.place}, backward")
        dk, dv = torch.cat(dk_parts[0::2], 1), torch.cat(dv_parts[0::2], 1)
        back.add_to((dk, dv))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


@dataclass(frozen=True)
class _GatherPlan:
    """Host plan of :class:`_GatherAttention`.

    Attributes:
        run: ``(owner rank, owner's local start, length)`` that make up the needed keys, in global order.
        pieces: this rank's segments, with their keys' places in the run.
        longest: most tokens of any rank, the length of a message.
    """

    run: tuple[tuple[int, int, int], ...]
    pieces: tuple[Piece, ...]
    longest: int

    @classmethod
    def build(cls, cp: CPContext, causal: bool) -> _GatherPlan:
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
    q: Tensor, k: Tensor, v: Tensor, cp: CPContext, plan: _GatherPlan, place: str
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

    def __init__(self, dkeys: Tensor, dvalues: Tensor, heads: slice, cp: CPContext, plan: _GatherPlan, place: str):
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


@dataclass(frozen=True)
class _WindowPlan:
    """Host plan of :class:`_WindowAttention`.

    Attributes:
        sizes: how the keys are made up: own tokens, halo, own tokens, ..., halo, own tokens.
        pieces: this rank's segments, with the places of their halo and their own tokens in the keys.
    """

    sizes: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def build(cls, cp: CPContext, window: int) -> _WindowPlan:
        """Each halo stands in front of its segment, so keys are in global order within a fragment."""
        sizes, pieces, added = [0], [], 0
        for segment, halo in zip(cp.segments, halo_plan(cp, window - 1).lengths, strict=True):
            if halo:
                sizes += [halo, 0]
            sizes[-1] += len(segment)
            start = segment.start + added
            added += halo
            pieces.append((segment.start, segment.stop, start, segment.stop + added))
        return cls(tuple(sizes), tuple(pieces))


def _with_halo(k: Tensor, v: Tensor, halo: Tensor, plan: _WindowPlan) -> list[Tensor]:
    """k and v with each halo in front of its segment."""
    extended = []
    for x, part in zip((k, v), halo.split([k.shape[-1], v.shape[-1]], -1), strict=True):
        own, halos = x.split(plan.sizes[0::2], 1), part.split(plan.sizes[1::2], 1)
        mixed = [own[0]]
        for before, after in zip(halos, own[1:], strict=True):
            mixed += [before, after]
        extended.append(x if len(own) == 1 else torch.cat(mixed, 1))
    return extended


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, exchange: str):
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}.")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an int of at least 1 (the token itself) or None, got {window!r}.")
        if not causal:
            raise ValueError(f"window={window} needs causal=True: it keeps the newest keys. Leave window None.")
    check_scale(scale, "D ** -0.5", positive=True)
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or min(x.shape[2:]) < 1:
            raise ValueError(
                f"{name} must have shape [B, T_local, heads, head dim], without empty heads, got {tuple(x.shape)}. "
                "Split the projection with unflatten(-1, (heads, -1))."
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must have one floating-point dtype: q has {q.dtype}, {name} has {x.dtype}. "
                "Cast them to the dtype that the attention shall use."
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}. Move it there.")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must have q's batch size and tokens, {tuple(q.shape[:2])}, got {tuple(x.shape[:2])}. "
                "Pass the same rank's shard of all three."
            )
    check_not_empty(q=q, k=k, v=v)
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dim: q has D = {q.shape[3]}, k has {k.shape[3]}.")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have as many heads: k has {k.shape[2]}, v has {v.shape[2]}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the kv heads must divide the query heads: q has H = {q.shape[2]}, k has Hkv = {k.shape[2]}. "
            "Repeat k and v's heads to a divisor of H."
        )

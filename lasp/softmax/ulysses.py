"""Ulysses: an all-to-all gives each rank all tokens of some heads, so that attention itself is one device's.

DeepSpeed-Ulysses (arXiv 2309.14509, section 3.2) cuts the heads instead of the tokens while attention runs:

    q, k, v [B, T_local, all heads]  -- all-to-all -->  [B, T, heads / cp_size], in global order
    o = attention(q, k, v) on whole documents, windows included
    o [B, T, heads / cp_size]        -- all-to-all -->  [B, T_local, all heads]

and the backward is the mirror: do goes to the heads, dq, dk, dv come back. Rank r has the query heads
``[r * H / cp_size, (r + 1) * H / cp_size)`` and the kv heads that these read. Where there are fewer kv heads than ranks
each is sent to the cp_size / Hkv ranks that read it, and the sum of their gradients is made at home, in fp32.

Per rank, in elements handed to the two all-to-alls of a direction (1 / cp_size of it stays), with h = H / cp_size,
Hkv' = max(Hkv, cp_size), h' = Hkv' / cp_size: forward ``B * T_local * (H * D + Hkv' * (D + Dv))``, then
``B * T * h * Dv``; backward ``B * T_local * H * Dv``, then ``B * T * (h * D + h' * (D + Dv))``, of which the last term
is fp32 where kv heads are shared. So a rank's traffic does not grow with the number of ranks at a given T_local. None
when cp_size is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.context.context import Context
from lasp.kernels.softmax import Piece, softmax_backward, softmax_forward


class UlyssesAttention(torch.autograd.Function):
    """All tokens of this rank's heads; what was received is saved, so the backward fetches do alone."""

    @staticmethod
    def forward(ctx, q, k, v, cp, causal, window, scale):
        ctx.place, ctx.cp = comm.place("softmax"), cp
        ctx.options = {"causal": causal, "window": window, "scale": scale}
        ctx.copies = max(1, cp.cp_size // k.shape[2])  # ranks that share a kv head
        shared = [x if ctx.copies == 1 else x.repeat_interleave(ctx.copies, 2) for x in (k, v)]
        q, k, v = _to_heads([q, *shared], cp, f"{ctx.place}, forward")
        o, lse = softmax_forward(q, k, v, _documents(cp), **ctx.options)
        ctx.save_for_backward(q, k, v, o, lse)
        return _to_tokens([o], cp, f"{ctx.place}, forward")[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        cp, copies, place = ctx.cp, ctx.copies, f"{ctx.place}, backward"
        (do,) = _to_heads([do], cp, place)
        dq, dk, dv = softmax_backward(do, q, k, v, o, lse, _documents(cp), **ctx.options)
        if copies == 1:
            dq, dk, dv = _to_tokens([dq, dk.to(k.dtype), dv.to(v.dtype)], cp, place)
        else:
            wide = dk.dtype
            shares = [x.view(q.dtype) for x in (dk, dv)]  # the bits of fp32, in a message of q's dtype
            dq, *shares = _to_tokens([dq, *shares], cp, place)
            shares = [x.contiguous().view(wide).unflatten(2, (-1, copies)).sum(3) for x in shares]
            dk, dv = (x.to(k.dtype) for x in shares)
        return dq, dk, dv, None, None, None, None


def heads_fit(heads: int, kv_heads: int, cp_size: int) -> bool:
    """Whether query and kv heads can be dealt to ``cp_size`` ranks."""
    return heads % cp_size == 0 and (kv_heads % cp_size == 0 or cp_size % kv_heads == 0)


def _documents(cp: Context) -> list[Piece]:
    """Every document of the batch, with itself."""

    def make() -> list[Piece]:
        borders = cp.layout.cu_seqlens_global
        return [(a, b, a, b) for a, b in zip(borders, borders[1:], strict=False) if a < b]

    return cp.plan(("softmax", "documents"), make)


def _to_heads(xs: Sequence[Tensor], cp: Context, place: str) -> list[Tensor]:
    """[B, T_local, H_i, D_i] to [B, T, H_i / cp_size, D_i]: all tokens in global order, of this rank's heads."""
    split = [x.unflatten(2, (cp.cp_size, -1)) for x in xs]  # [B, T_local, cp_size, h_i, D_i]
    packed = torch.cat([x.flatten(3) for x in split], -1).permute(2, 1, 0, 3)  # [cp_size, T_local, B, F]
    counts = _counts(cp)
    received = _all_to_all(packed.flatten(0, 1), [cp.num_tokens] * cp.cp_size, counts, cp, place)
    ordered = cp.layout.unshard(received.split(counts), 0).transpose(0, 1)  # [B, T, F]
    shapes = [x.shape[3:] for x in split]
    parts = ordered.split([shape.numel() for shape in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _to_tokens(xs: Sequence[Tensor], cp: Context, place: str) -> list[Tensor]:
    """The inverse of :func:`_to_heads`: [B, T, h_i, D_i], of one dtype, to [B, T_local, cp_size * h_i, D_i]."""
    packed = torch.cat([x.flatten(2) for x in xs], -1).transpose(0, 1)  # [T, B, F]
    rows = torch.cat([cp.layout.shard(packed, rank, 0) for rank in range(cp.cp_size)])
    received = _all_to_all(rows, _counts(cp), [cp.num_tokens] * cp.cp_size, cp, place)
    received = received.unflatten(0, (cp.cp_size, -1)).permute(2, 1, 0, 3)  # [B, T_local, cp_size, F]
    shapes = [x.shape[2:] for x in xs]
    parts = received.split([shape.numel() for shape in shapes], -1)
    return [part.unflatten(-1, shape).flatten(2, 3) for part, shape in zip(parts, shapes, strict=True)]


def _counts(cp: Context) -> list[int]:
    """Tokens of each rank."""
    return [cp.layout.num_tokens(rank) for rank in range(cp.cp_size)]


def _all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], cp: Context, place: str) -> Tensor:
    """:func:`lasp.comm.all_to_all`; a single rank keeps what it has."""
    return rows if cp.cp_size == 1 else comm.all_to_all(rows, send, receive, cp.group, place).wait()

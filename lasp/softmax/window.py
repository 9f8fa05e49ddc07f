"""Softmax attention with a window: every segment fetches the halo of tokens that its first queries still read.

With ``window=W`` a token reads at most W - 1 older ones, so each fragment fetches the W - 1 tokens before it
(:mod:`lasp.halo`): one all-to-all per direction of at most ``F * (W - 1)`` tokens received, F fragments, whatever the
length of the sequence; none where the layout cuts no document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.context.context import Context
from lasp.halo import HaloExchange, HaloReturn, halo_plan
from lasp.kernels.softmax import Piece, softmax_backward, softmax_forward


class WindowAttention(torch.autograd.Function):
    """Keys of this rank, with the window - 1 tokens before each of its segments put in front of the segment."""

    @staticmethod
    def forward(ctx, q, k, v, cp, window, scale):
        plan = cp.plan(("window", window), lambda: _WindowPlan.build(cp, window))
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
class _WindowPlan:
    """Host plan of :class:`WindowAttention`.

    Attributes:
        sizes: how the keys are made up: own tokens, halo, own tokens, ..., halo, own tokens.
        pieces: this rank's segments, with the places of their halo and their own tokens in the keys.
    """

    sizes: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def build(cls, cp: Context, window: int) -> _WindowPlan:
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

"""Halos: the few tokens before each segment, fetched from the ranks that own them, and the short convolution on them.

Cutting a document moves the tokens that a local operator looks back at to other ranks. The *halo* of a segment is the
``width`` tokens before it in its document, fewer where the document begins: on the example of :mod:`lasp.layout` with
two contiguous ranks and width 3, rank 1 owns tokens 6..11, its segment continues document 1 (tokens 5..11), and its
halo is token 5, the only one before it. A halo wider than a fragment comes from as many fragments as that takes. All
of a rank's halos come in one all-to-all, and one more brings their gradients back to the owners, which add them.

The convolution is causal and depthwise, ``y_t = act(bias + sum_w weight[:, -1 - w] x_{t - w})``, the operator before
q, k and v in Mamba-2, Gated DeltaNet and their relatives. Its halo is W - 1 tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.checks import check_not_empty, check_tensors, context_of
from lasp.context import CPContext
from lasp.kernels.state import state_dtype
from lasp.layout import SequenceLayout

ACTIVATIONS = (None, "silu")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cp: CPContext | None = None,
) -> Tensor:
    """Causal depthwise convolution over documents that may continue on other ranks.

    Sums run in fp32 (fp64 for fp64 ``x``). With ``cp``, one all-to-all runs per direction, of W - 1 tokens per
    fragment whatever the length; none when cp_size is 1 or the layout cuts no document.

    Args:
        x: [B, T_local, D], this rank's tokens in local order.
        weight: [D, W]; ``weight[:, -1]`` multiplies the current token. The same on all ranks.
        bias: [D] or None. The same on all ranks.
        activation: None or ``"silu"``.
        cp: the batch's context; None is one device with one document per row.

    Returns:
        [B, T_local, D] in x's dtype. Gradients have their inputs' dtypes; those of ``weight`` and ``bias`` are this
        rank's share: their sum over the cp ranks is the gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or the context; unknown activation.
    """
    _check_convolution(x, weight, bias, activation)
    cp = context_of(cp, x.shape[1])
    cp.check_tokens("x", x)
    return _ShortConvolution.apply(x, weight, bias, activation, cp)


class _ShortConvolution(torch.autograd.Function):
    """Every segment stands behind ``pad`` = W - 1 rows of its own, which hold its halo, or zeros before a document.

    ``padded`` [B, pad + P, D] therefore has each tap as one shifted view, for all segments at once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, activation, cp):
        plan = halo_plan(cp, weight.shape[1] - 1)
        ctx.place = comm.place("convolution")
        exchange = HaloExchange((x,), plan, cp.group, f"{ctx.place}, forward")
        ctx.cp, ctx.plan, ctx.activation, ctx.has_bias = cp, plan, activation, bias is not None
        padded = _padded(x, exchange, plan, cp)
        ctx.save_for_backward(x, weight, bias, exchange.wait())
        y = _taps(padded, weight, bias, state_dtype(x.dtype))[:, _token_rows(cp, plan.width, x.device)]
        return (y if activation is None else torch.nn.functional.silu(y)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, halo = ctx.saved_tensors
        cp, plan, pad = ctx.cp, ctx.plan, ctx.plan.width
        dtype, rows = state_dtype(x.dtype), _token_rows(cp, pad, x.device)
        padded = _padded(x, halo, plan, cp)
        dz = dy.new_zeros(padded.shape, dtype=dtype)  # gradient of the sums, zero at rows that are no token
        dy = dy.to(dtype)
        if ctx.activation is not None:
            dy = torch.ops.aten.silu_backward(dy, _taps(padded, weight, bias, dtype)[:, rows])
        dz[:, pad:][:, rows] = dy
        taps = weight.to(dtype).unbind(1)
        dpadded = dz * taps[-1]
        for w in range(1, pad + 1):
            dpadded[:, :-w].addcmul_(dz[:, w:], taps[-1 - w])
        slots = _halo_slots(plan, cp)
        dhalo = torch.cat([dpadded[:, :0], *(dpadded[:, a:b] for a, b in slots)], 1)
        back = HaloReturn(dhalo, plan, cp.group, f"{ctx.place}, backward")
        dweight = torch.zeros_like(weight, dtype=dtype)
        for w in range(pad + 1):  # in flight: the return of the halo's gradient
            dweight[:, -1 - w] = (dz[:, pad:] * padded[:, pad - w : padded.shape[1] - w]).sum((0, 1))
        dbias = dz.sum((0, 1)).to(bias.dtype) if ctx.has_bias else None
        dx = dpadded[:, pad:][:, rows]
        back.add_to((dx,))
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, None, None


def _padded(x: Tensor, halo: HaloExchange | Tensor, plan: HaloPlan, cp: CPContext) -> Tensor:
    """x with ``plan.width`` rows before each segment: [B, T_local + segments * width, D]."""
    padded = x.new_zeros(x.shape[0], x.shape[1] + len(cp.segments) * plan.width, x.shape[2])
    padded[:, plan.width :][:, _token_rows(cp, plan.width, x.device)] = x
    halo = halo.wait() if isinstance(halo, HaloExchange) else halo  # the copy above ran while it was in flight
    lengths = [b - a for a, b in _halo_slots(plan, cp)]
    for (a, b), part in zip(_halo_slots(plan, cp), halo.split(lengths, 1), strict=True):
        padded[:, a:b] = part
    return padded


def _taps(padded: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums at every row of ``padded`` after the first W - 1, in ``dtype``: [B, P, D]."""
    pad, taps = weight.shape[1] - 1, weight.to(dtype).unbind(1)
    z = padded[:, pad:].to(dtype) * taps[-1]
    for w in range(1, pad + 1):
        z.addcmul_(padded[:, pad - w : padded.shape[1] - w], taps[-1 - w])
    return z if bias is None else z.add_(bias)


def _token_rows(cp: CPContext, pad: int, device: torch.device) -> slice | Tensor:
    """Rows of the local tokens in a padded buffer, counted after the first ``pad``: a slice, or int64 [T_local]."""
    if pad == 0 or len(cp.segments) == 1:
        return slice(0, cp.num_tokens)

    def make() -> Tensor:
        lengths = torch.tensor([len(s) for s in cp.segments], pin_memory=device.type == "cuda")
        lengths = lengths.to(device, non_blocking=True)
        skipped = torch.arange(len(cp.segments), device=device) * pad
        skipped = skipped.repeat_interleave(lengths, output_size=cp.num_tokens)
        return skipped + torch.arange(cp.num_tokens, device=device)

    return cp.remember(("token_rows", pad, device), make)


def _halo_slots(plan: HaloPlan, cp: CPContext) -> list[tuple[int, int]]:
    """Row range of each halo in a padded buffer."""
    starts = [(s.start + i * plan.width, n) for i, (s, n) in enumerate(zip(cp.segments, plan.lengths, strict=True))]
    return [(start + plan.width - n, start + plan.width) for start, n in starts if n]


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


def halo_plan(cp: CPContext, width: int) -> HaloPlan:
    """The plan of this rank, made once per context and width."""
    return cp.remember(("halo", width), lambda: HaloPlan.build(cp.layout, cp.cp_rank, width))


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


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")
    check_tensors(optional=("bias",), x=x, weight=weight, bias=bias)
    if x.dim() != 3:
        raise ValueError(
            f"x must have shape [B, T_local, D], got {tuple(x.shape)}. Flatten heads into D before the convolution."
        )
    check_not_empty(x=x)
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight must have shape [D, W] with D = {x.shape[2]} channels as in x {tuple(x.shape)} and W >= 1 taps, "
            f"got {tuple(weight.shape)}. A Conv1d weight [D, 1, W] needs squeeze(1)."
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(
            f"bias must have shape [D] with D = {x.shape[2]} as in x {tuple(x.shape)}, got {tuple(bias.shape)}."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} must be on the device of x, {x.device}, got {tensor.device}. Move it with .to(x.device)."
            )

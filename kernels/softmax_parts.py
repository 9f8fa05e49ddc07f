"""Softmax attention whose keys come one part after another: what each part adds, forward and backward.

``o`` and ``lse``, in fp32 (fp64 for fp64 inputs), are those of the keys that a query has read so far. When it reads
more keys, the two results merge by lse; :mod:`lasp.kernels.softmax` has the formulas. The backward of a part takes the
o and lse of *all* keys and gives the part's share of the gradient, so the shares add up in any order.

The pieces here are rectangles: every query of a piece reads every key of it. Pieces may share queries and keys, and
need not cover all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lasp.kernels.softmax import Piece, merge, softmax_backward, softmax_forward


def add_keys(
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> None:
    """Let queries read keys that they have not read before. ``o`` and ``lse`` change in place.

    Args:
        o: [B, Tq, H, Dv] in fp32 (fp64): the result of the keys so far.
        lse: [B, H, Tq] in fp32 (fp64), of the keys so far; finite where a piece has queries.
        q, k, v, scale, impl: see :func:`~lasp.kernels.softmax.softmax_forward`.
        pieces: ``(q_start, q_stop, k_start, k_stop)``; all of the queries read all of the keys.
    """
    for piece in pieces:
        rows, columns, whole = _ranges(piece)
        options = {"causal": False, "scale": scale, "impl": impl, "out_dtype": o.dtype}
        o_part, lse_part = softmax_forward(q[:, rows], k[:, columns], v[:, columns], whole, **options)
        o_rows = o[:, rows].transpose(1, 2)  # a view [B, H, n, Dv]
        merged, lse[:, :, rows] = merge(o_rows, lse[:, :, rows], o_part.transpose(1, 2), lse_part)
        o_rows.copy_(merged)


def add_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> None:
    """Add the pieces' shares of the gradient to ``dq``, ``dk`` and ``dv``.

    Args:
        dq, dk, dv: the sums, shaped like q, k and v, in fp32 (fp64).
        do, o: [B, Tq, H, Dv] in q's dtype: the gradient of the result of all keys, and that result.
        lse: [B, H, Tq] of all keys.
        q, k, v, pieces, scale, impl: see :func:`add_keys`.
    """
    for piece in pieces:
        rows, columns, whole = _ranges(piece)
        options = {"causal": False, "scale": scale, "impl": impl, "out_dtype": dq.dtype}
        args = (do[:, rows], q[:, rows], k[:, columns], v[:, columns], o[:, rows], lse[:, :, rows], whole)
        dq_part, dk_part, dv_part = softmax_backward(*args, **options)
        dq[:, rows] += dq_part
        dk[:, columns] += dk_part
        dv[:, columns] += dv_part


def _ranges(piece: Piece) -> tuple[slice, slice, list[Piece]]:
    """The piece's queries, its keys, and the piece that covers just these."""
    q_start, q_stop, k_start, k_stop = piece
    return slice(q_start, q_stop), slice(k_start, k_stop), [(0, q_stop - q_start, 0, k_stop - k_start)]

"""Scores inside a chunk when every key channel decays at its own rate, and their adjoint.

    A_ij = sum_c q_i[c] k_j[c] exp(G_i[c] - G_j[c]),  j <= i,  G the inclusive cumulative log-decay of the chunk.

No factor of the row times a factor of the column gives this factor with both finite, so the chunk is halved again and
again. For i in the second half and j in the first, with r the last token of the first half,

    exp(G_i - G_j) = exp(G_i - G_r) * exp(G_r - G_j),  both exponents <= 0,

so each halving costs one matrix product. Blocks of ``BASE`` tokens are computed row by row. No exponent is ever
positive, so nothing overflows at any decay. This is the secondary chunking of GLA (arXiv 2312.06635, section 4.3),
repeated down to ``BASE``.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 8


def scores(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """The lower-triangular scores A [..., C, C] of q, k [..., C, K]; ``log_decay`` is G, float64 [..., C, K]."""
    out = q.new_zeros(*q.shape[:-1], q.shape[-2])
    for half, second, first in _halves(q.shape[-2]):
        decay_q, decay_k = _half_decays(log_decay, half, q.dtype)
        block = (_blocks(q, half)[..., half:, :] * decay_q) @ (_blocks(k, half)[..., :half, :] * decay_k).transpose(
            -1, -2
        )
        _diagonal(out, half)[..., second, first] = block
    base = min(BASE, q.shape[-2])
    q, k, log_decay = (x.unflatten(-2, (-1, base)) for x in (q, k, log_decay))
    diagonal = _diagonal(out, base // 2, base)
    for i in range(base):
        weighted = k[..., : i + 1, :] * _row_decay(log_decay, i, q.dtype)
        diagonal[..., i, : i + 1] = (weighted @ q[..., i, :, None]).squeeze(-1)
    return out


def scores_and_grads(q: Tensor, k: Tensor, log_decay: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores A, and the gradients of q and k for a lower-triangular gradient ``grad`` of A [..., C, C]."""
    size = q.shape[-2]
    out, dq, dk = q.new_zeros(*q.shape[:-1], size), torch.zeros_like(q), torch.zeros_like(k)
    for half, second, first in _halves(size):
        decay_q, decay_k = _half_decays(log_decay, half, q.dtype)
        rows, columns = _blocks(q, half)[..., half:, :] * decay_q, _blocks(k, half)[..., :half, :] * decay_k
        upstream = _diagonal(grad, half)[..., second, first]
        _diagonal(out, half)[..., second, first] = rows @ columns.transpose(-1, -2)
        _blocks(dq, half)[..., half:, :] += (upstream @ columns) * decay_q
        _blocks(dk, half)[..., :half, :] += (upstream.transpose(-1, -2) @ rows) * decay_k
    base = min(BASE, size)
    q, k, log_decay = (x.unflatten(-2, (-1, base)) for x in (q, k, log_decay))
    dq_base, dk_base = dq.unflatten(-2, (-1, base)), dk.unflatten(-2, (-1, base))
    diagonal, grad = _diagonal(out, base // 2, base), _diagonal(grad, base // 2, base)
    for i in range(base):
        decay = _row_decay(log_decay, i, q.dtype)  # [..., blocks, i + 1, K]
        weighted, row = k[..., : i + 1, :] * decay, q[..., i, :]
        upstream = grad[..., i, : i + 1]
        diagonal[..., i, : i + 1] = (weighted @ row.unsqueeze(-1)).squeeze(-1)
        dq_base[..., i, :] += (upstream.unsqueeze(-2) @ weighted).squeeze(-2)
        dk_base[..., : i + 1, :] += upstream.unsqueeze(-1) * (row.unsqueeze(-2) * decay)
    return out, dq, dk


def _halves(size: int):
    """Half sizes from C / 2 down to BASE, each with the slices of its rows (second half) and columns (first half)."""
    half = size // 2
    while half >= BASE:
        yield half, slice(half, None), slice(None, half)
        half //= 2


def _blocks(x: Tensor, half: int) -> Tensor:
    """[..., C, D] as blocks [..., C / (2 half), 2 half, D]."""
    return x.unflatten(-2, (-1, 2 * half))


def _diagonal(x: Tensor, half: int, block: int | None = None) -> Tensor:
    """A view of the diagonal blocks of [..., C, C]: [..., blocks, block, block]."""
    block = 2 * half if block is None else block
    grid = x.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # [..., blocks, block, blocks, block]
    return grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _half_decays(log_decay: Tensor, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(G_i - G_r) for the second half and exp(G_r - G_j) for the first, each [..., blocks, half, K]."""
    blocks = _blocks(log_decay, half)
    middle = blocks[..., half - 1 : half, :]
    second = (blocks[..., half:, :] - middle).to(dtype).exp()
    return second, (middle - blocks[..., :half, :]).to(dtype).exp()


def _row_decay(log_decay: Tensor, i: int, dtype: torch.dtype) -> Tensor:
    """exp(G_i - G_j) for j <= i inside each base block, [..., blocks, i + 1, K]."""
    return (log_decay[..., i : i + 1, :] - log_decay[..., : i + 1, :]).to(dtype).exp()

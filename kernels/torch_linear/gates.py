"""Decays inside one tile: factors within its chunks, and states that run through them.

Decays are exponentials of differences of prefix sums, so the prefix sums are float64. Every exponent that is used is
<= 0. Tensors inside a tile are [n, B, H, C, D]: n chunks of C tokens.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.segments import Tile

_LOWEST_LOG_DECAY = -1000.0  # its exp is 0 in every dtype, and it keeps -inf (a full reset) out of differences
_BLOCK = 16  # tokens of a chunk whose decays among themselves are exponentiated one by one


class Gates:
    """The decays of one tile; each factor is made once, when it is first needed.

    Args:
        g: log-decay: None, [Hg] (fixed), [B, T, Hg] (per token) or [B, T, Hg, K] (per channel).
        tile: which tokens.
        num_heads: H.
        dtype: of the factors.

    Attributes:
        log_decay: G, the inclusive cumulative log-decay of each chunk, float64 [n', b, H, C, a]; None without a gate.
            n' is n or 1, b is B or 1, a is K or 1: 1 where all chunks, rows or channels decay alike.
    """

    def __init__(self, g: Tensor | None, tile: Tile, num_heads: int, dtype: torch.dtype):
        self.tile, self.dtype = tile, dtype
        self.log_decay = None if g is None else self._cumulative(g, num_heads)

    def _cumulative(self, g: Tensor, num_heads: int) -> Tensor:
        shape = self.tile.shape
        if g.dim() == 1:
            g = g.double().clamp(min=_LOWEST_LOG_DECAY).repeat_interleave(num_heads // g.shape[0])
            return shape.counts[:, None, None, :, None] * g.view(-1, 1, 1)
        g = g if g.dim() == 4 else g.unsqueeze(-1)
        g = g[:, self.tile.start : self.tile.stop].double().clamp(min=_LOWEST_LOG_DECAY)
        if shape.gather is not None:
            g = g.index_select(1, shape.gather).masked_fill(shape.padding, 0.0)
        g = g.unflatten(1, (shape.num_chunks, -1)).permute(1, 0, 3, 2, 4)
        groups = num_heads // g.shape[2]
        return (g if groups == 1 else g.repeat_interleave(groups, 2)).cumsum(-2)

    @property
    def per_channel(self) -> bool:
        """Whether every key channel has a decay of its own."""
        return self.log_decay is not None and self.log_decay.shape[-1] > 1

    @property
    def totals(self) -> Tensor:
        """Log-decay over each whole chunk, float64 [n, b, H, a]."""
        return self.log_decay[..., -1, :].expand(self.tile.shape.num_chunks, -1, -1, -1)

    @cached_property
    def _through(self) -> Tensor:
        """Decay over each whole chunk, [n, b, H, a, 1]."""
        return decay(self.totals, self.dtype).unsqueeze(-1)

    @cached_property
    def _begin(self) -> Tensor:
        return decay(self.log_decay, self.dtype)

    @cached_property
    def _end(self) -> Tensor:
        return decay(self.log_decay[..., -1:, :] - self.log_decay, self.dtype)

    def _between(self) -> Tensor:
        """exp(G_i - G_j) for j <= i, else 0: [n', b, H, C, C].

        Products cost less than exponentials. For j before i's block, with r the first token of that block, the factor
        is exp(G_i - G_r) exp(G_r - G_j), both exponents <= 0. Only pairs within a block have an exponential each.
        """
        size = min(_BLOCK, self.log_decay.shape[-2])
        rows, columns = self.log_decay.unflatten(-2, (-1, size)), self.log_decay.transpose(-1, -2).unsqueeze(-3)
        first = rows[..., :1, :]
        out = (decay(rows - first, self.dtype) * decay(first - columns, self.dtype)).flatten(-3, -2)
        blocks = out.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2)
        blocks.movedim(-1, -3).copy_(decay(rows - rows.transpose(-1, -2), self.dtype))
        return out.tril_()

    def from_begin(self, x: Tensor) -> Tensor:
        """``x`` decayed from the beginning of its chunk to its token."""
        return x if self.log_decay is None else x * self._begin

    def to_end(self, x: Tensor) -> Tensor:
        """``x`` decayed from its token to the end of its chunk."""
        return x if self.log_decay is None else x * self._end

    def mask(self, *scores: Tensor) -> None:
        """Multiply ``scores`` [..., C, C] in place by exp(G_i - G_j), by 0 where j > i. Only for a = 1."""
        between = None if self.log_decay is None else self._between()
        for x in scores:
            x.tril_() if between is None else x.mul_(between)

    def add_from_begin(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x + from_begin(a @ b)`` in place, for x [..., C, D] without gaps."""
        return add_product(x, a, b) if self.log_decay is None else x.addcmul_(a @ b, self._begin)

    def add_to_end(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x + to_end(a @ b)`` in place, for x [..., C, D] without gaps."""
        return add_product(x, a, b) if self.log_decay is None else x.addcmul_(a @ b, self._end)

    def run(self, states: Tensor) -> None:
        """Add to each state what the earlier ones carry into it, in place, for states [n + 1, B, H, K, V].

        Before, position p + 1 holds what chunk p adds, and position 0 what earlier tiles carry in. Nothing crosses a
        border of segments.
        """
        rows, joined = states.unbind(0), (self.tile.shape.enters, *self.tile.shape.joined)
        through = None if self.log_decay is None else self._through.unbind(0)
        for p, continues in enumerate(joined):
            if continues:
                self._add_decayed(rows[p + 1], rows[p], through, p)

    def run_back(self, grads: Tensor) -> None:
        """The same for gradients of states, from the back: before, position p holds what chunk p adds, n the carry."""
        rows, joined = grads.unbind(0), (*self.tile.shape.joined, self.tile.shape.leaves)
        through = None if self.log_decay is None else self._through.unbind(0)
        for p in reversed(range(len(joined))):
            if joined[p]:
                self._add_decayed(rows[p], rows[p + 1], through, p)

    def _add_decayed(self, to: Tensor, state: Tensor, through: tuple[Tensor, ...] | None, chunk: int) -> None:
        if through is None:
            to.add_(state)
        else:
            to.addcmul_(state, through[chunk])


def decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of float64 ``log_decay`` in ``dtype``; 1 where it is positive, which nothing uses.

    It is 0 where exp would be a subnormal number. Those are never computed: they take processors ten times as long.
    """
    tiny = torch.finfo(dtype).tiny
    exp = log_decay.to(dtype, copy=True).clamp_(math.log(2 * tiny), 0.0).exp_()
    return torch.nn.functional.threshold_(exp, 3 * tiny, 0.0)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in place, for x [..., C, D] without gaps."""
    x.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x

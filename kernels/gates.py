"""Decays inside one tile: factors within its chunks and the movement of states between them.

Prefix sums of log-decays are kept in float64, because their differences are what is exponentiated; every exponent
that is used is <= 0. Tensors inside a tile are [B, H, n, C, D]: n chunks of C tokens.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.segments import Route, Tile

_LOWEST_LOG_DECAY = -1000.0  # exp of it is 0 in every dtype; keeps -inf (a full reset) out of differences


class Gates:
    """The decays of one tile; each factor is made once, when it is first needed.

    Args:
        g: log-decay: None, [Hg] (fixed), [B, T, Hg] (per token) or [B, T, Hg, K] (per channel).
        tile: which tokens.
        num_heads: H.
        dtype: of the factors.

    Attributes:
        log_decay: G, inclusive cumulative log-decay of each chunk, float64 [b, H, n', C, a] with b in (1, B), n' in
            (1, n) and a in (1, K); None without a gate.
    """

    def __init__(self, g: Tensor | None, tile: Tile, num_heads: int, dtype: torch.dtype):
        self.tile, self.dtype = tile, dtype
        self.log_decay = None if g is None else self._cumulative(g, num_heads)

    def _cumulative(self, g: Tensor, num_heads: int) -> Tensor:
        shape = self.tile.shape
        if g.dim() == 1:
            g = g.double().clamp(min=_LOWEST_LOG_DECAY).repeat_interleave(num_heads // g.shape[0])
            return shape.counts[None, None, :, :, None] * g.view(1, -1, 1, 1, 1)
        g = g if g.dim() == 4 else g.unsqueeze(-1)
        g = g[:, self.tile.start : self.tile.stop].double().clamp(min=_LOWEST_LOG_DECAY)
        if shape.gather is not None:
            g = g.index_select(1, shape.gather).masked_fill(shape.padding, 0.0)
        g = g.unflatten(1, (shape.num_chunks, -1)).permute(0, 3, 1, 2, 4)
        groups = num_heads // g.shape[1]
        return (g if groups == 1 else g.repeat_interleave(groups, 1)).cumsum(-2)

    @property
    def per_channel(self) -> bool:
        """Whether every key channel has a decay of its own."""
        return self.log_decay is not None and self.log_decay.shape[-1] > 1

    @property
    def totals(self) -> Tensor:
        """Log-decay over each whole chunk, float64 [b, H, n, a]."""
        return self.log_decay[..., -1, :].expand(-1, -1, self.tile.shape.num_chunks, -1)

    @cached_property
    def _spans(self) -> Tensor:
        """Decay between any two positions of the tile, later * (n + 1) + earlier: [b, H, (n + 1)^2, a]."""
        at = torch.nn.functional.pad(self.totals.cumsum(-2), (0, 0, 1, 0))
        spans = (at.unsqueeze(3) - at.unsqueeze(2)).clamp_(max=0.0)  # the other way around: any finite value
        return self._exp(spans).flatten(2, 3)

    @cached_property
    def _begin(self) -> Tensor:
        return self.log_decay.to(self.dtype).exp()

    @cached_property
    def _end(self) -> Tensor:
        return self._exp(self.log_decay[..., -1:, :] - self.log_decay)

    @cached_property
    def _between(self) -> Tensor:
        """exp(G_i - G_j) for j <= i, else 0: [b, H, n', C, C]."""
        return self._exp(self.log_decay - self.log_decay.transpose(-1, -2)).tril_()

    def _exp(self, difference: Tensor) -> Tensor:
        """exp of a difference of prefix sums, in the dtype of the states; overwrites its argument."""
        return difference.to(self.dtype).exp_()

    def from_begin(self, x: Tensor) -> Tensor:
        """``x`` decayed from the beginning of its chunk to its token."""
        return x if self.log_decay is None else x * self._begin

    def to_end(self, x: Tensor) -> Tensor:
        """``x`` decayed from its token to the end of its chunk."""
        return x if self.log_decay is None else x * self._end

    def mask(self, scores: Tensor) -> Tensor:
        """``scores`` [..., C, C] times exp(G_i - G_j) for j <= i, zero above the diagonal, in place (a = 1 only)."""
        return scores.tril_() if self.log_decay is None else scores.mul_(self._between)

    def add_from_begin(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x + from_begin(a @ b)`` in place, for x [..., C, D] without gaps."""
        return add_product(x, a, b) if self.log_decay is None else x.addcmul_(a @ b, self._begin)

    def add_to_end(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x + to_end(a @ b)`` in place, for x [..., C, D] without gaps."""
        return add_product(x, a, b) if self.log_decay is None else x.addcmul_(a @ b, self._end)

    def add_through(self, chunk: int, states: Tensor, carried: Tensor) -> None:
        """Add to chunk 0's or chunk -1's of states [B, H, n, K, V] what is left of ``carried`` after that chunk."""
        state, last = states.select(2, chunk), self.tile.shape.num_chunks
        if self.log_decay is None:
            state.add_(carried)
        else:
            decay = self._spans.select(2, last + 1 if chunk == 0 else last * (last + 2) - 1)
            state.addcmul_(carried, decay.unsqueeze(-1))

    def move(self, route: Route, states: Tensor) -> Tensor:
        """States [B, H, R, K, V] at the route's reads from its sources' [B, H, S, K, V], each decayed on its way."""
        weights = route.reached.to(self.dtype)
        if self.log_decay is not None:
            decays = self._spans.index_select(2, route.pairs)
            if decays.shape[-1] > 1:
                decays = decays.unflatten(2, weights.shape) * weights.unsqueeze(-1)
                return torch.einsum("bhrsk,bhskv->bhrkv", decays.expand(states.shape[0], -1, -1, -1, -1), states)
            weights = decays.view(*decays.shape[:2], *weights.shape) * weights
        return (weights @ states.flatten(-2)).unflatten(-1, states.shape[-2:])


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in place, for x [..., C, D] without gaps."""
    x.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x

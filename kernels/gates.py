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

    @cached_property
    def positions(self) -> Tensor | None:
        """X: cumulative log-decay from the tile's start to each position, float64 [b, H, n + 1, a]."""
        if self.log_decay is None:
            return None
        totals = self.log_decay[..., -1, :].expand(-1, -1, self.tile.shape.num_chunks, -1)
        return torch.nn.functional.pad(totals.cumsum(-2), (0, 0, 1, 0))

    @cached_property
    def _begin(self) -> Tensor:
        return self.exp(self.log_decay)

    @cached_property
    def _end(self) -> Tensor:
        return self.exp(self.log_decay[..., -1:, :] - self.log_decay)

    @cached_property
    def _between(self) -> Tensor:
        """exp(G_i - G_j) for j <= i, else 0: [b, H, n', C, C]."""
        return self.exp(self.log_decay - self.log_decay.transpose(-1, -2)).tril_()

    def exp(self, difference: Tensor) -> Tensor:
        """exp of a difference of prefix sums, taken in float64, in the dtype of the states."""
        return difference.to(self.dtype).exp()

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

    def through(self, chunk: int, state: Tensor) -> Tensor:
        """``state`` [B, H, K, V] decayed over the whole of the first (0) or the last (-1) chunk."""
        return state if self.log_decay is None else self.exp(self.log_decay[:, :, chunk, -1]).unsqueeze(-1) * state

    def move(self, route: Route, states: Tensor, *, reverse: bool = False) -> Tensor:
        """States [B, H, R, K, V] at the route's reads from its sources' [B, H, S, K, V], each decayed on its way."""
        reached = route.reached.to(self.dtype)
        if self.log_decay is None:
            return (reached @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        reads, origins = self.positions.index_select(2, route.reads), self.positions.index_select(2, route.sources)
        distance = reads.unsqueeze(3) - origins.unsqueeze(2)  # [b, H, R, S, a]
        distance = (-distance if reverse else distance).clamp_(max=0.0)  # unreached pairs: any finite value
        weights = self.exp(distance) * reached.unsqueeze(-1)
        if weights.shape[-1] == 1:
            return (weights.squeeze(-1) @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        return torch.einsum("bhrsk,bhskv->bhrkv", weights.expand(states.shape[0], -1, -1, -1, -1), states)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in place, for x [..., C, D] without gaps."""
    x.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return x

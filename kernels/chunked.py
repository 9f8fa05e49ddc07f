"""Linear attention in plain PyTorch, chunk by chunk, in stages: the path for any device.

Per head, with ``G`` the cumulative log-decay of a chunk and ``S_p`` the state at its beginning,

    o_i = scale * sum_{j <= i} (q_i . k_j exp(G_i - G_j)) v_j  +  scale * (q_i exp(G_i)) S_p       within + across
    S   = exp(G_last) S_p + sum_j (k_j exp(G_last - G_j)) v_j^T

(the chunkwise form of GLA, arXiv 2312.06635, section 4.2). Everything is linear in the states that enter, so the stages
of LASP-2 (arXiv 2502.07563, algorithm 2) are: ``state_maps`` reads keys and values only, so the exchange can start;
``local`` computes the whole output as if every entry state were zero while it flies; ``finish`` adds what the entry
states contribute, where there are any. The backward mirrors it with state gradients and is written by hand: states
are rebuilt from one saved state per tile, so memory stays O(T (K + V)). With nothing to wait for,
``state_maps(local=True)`` does the first two stages in one pass over the tiles.

Tensors inside a tile are [B, H, n, C, D]: n chunks of C tokens. Lists of states that leave this file are
[segments, B, H, K, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels import diagonal
from lasp.kernels.gates import Gates, add_product
from lasp.kernels.segments import SegmentTable, Tile
from lasp.kernels.state import StateMap, in_ieee, state_dtype, suffix_sum

# Elements of one [B, H, n, C, D] temporary: a few of them should fit a CPU's cache, a GPU wants large launches.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_DEVICE = 1 << 24
_TILE_CHUNKS = (4, 64)  # at least, at most


class _Chunked:
    """What forward and backward share: the inputs, the tiles, and the states that enter and run through them.

    Attributes:
        saved: what the forward keeps for the backward:
            carries: state carried into each tile when every entry state is zero, [tiles, B, H, K, V];
            borders: cumulative log-decay at each border of chunks, float64 [b, H, N + 1, a]; None without gates.
    """

    saved: tuple[Tensor, Tensor | None]

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        table: SegmentTable,
        causal: bool,
        scale: float,
    ):
        self.q, self.k, self.v, self.g = q, k, v, g
        self.table, self.causal, self.scale = table, causal, scale
        self.dtype = state_dtype(q.dtype)
        self.batch, self.num_heads = q.shape[0], num_heads(q, k, v, g)
        self.key_dim, self.value_dim = q.shape[-1], v.shape[-1]
        widest = max(self.key_dim, self.value_dim, table.chunk_size)
        budget = _TILE_ELEMENTS.get(q.device.type, _TILE_ELEMENTS_DEVICE)
        chunks = budget // (self.batch * self.num_heads * table.chunk_size * widest)
        least, most = _TILE_CHUNKS
        self.tiling = table.tiling(max(least, min(most, chunks, table.num_chunks // 4)))
        self.tiles = self.tiling.tiles

    def gates(self, tile: Tile) -> Gates:
        """The decays of a tile."""
        return Gates(self.g, tile, self.num_heads, self.dtype)

    def load(self, x: Tensor, tile: Tile, scale: float = 1.0) -> Tensor:
        """The tile's tokens of ``x`` [B, T, Hx, D] as [B, H, n, C, D] times ``scale``, zero where a chunk is short."""
        x = x[:, tile.start : tile.stop]
        if tile.shape.gather is not None:
            x = x.index_select(1, tile.shape.gather).masked_fill_(tile.shape.padding, 0.0)
        x = x.view(x.shape[0], tile.shape.num_chunks, -1, *x.shape[2:]).permute(0, 3, 1, 2, 4)  # [B, Hx, n, C, D]
        if x.shape[1] < self.num_heads:
            x = x.repeat_interleave(self.num_heads // x.shape[1], 1)
        out = x.new_empty(x.shape, dtype=self.dtype)
        return out.copy_(x) if scale == 1.0 else torch.mul(x.to(self.dtype), scale, out=out)

    def store(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool = False) -> None:
        """Write [B, H, n, C, D] to the tile's tokens of ``out`` [B, T, Hx, D], summing heads that share one."""
        groups = self.num_heads // out.shape[2]
        if groups > 1:
            x = x.unflatten(1, (-1, groups)).sum(2)
        x = x.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if tile.shape.scatter is not None:
            x = x.index_select(1, tile.shape.scatter)
        target = out[:, tile.start : tile.stop]
        target.add_(x) if add else target.copy_(x)

    def decays(self, stops: Tensor, starts: Tensor) -> Tensor:
        """Log-decays between borders of chunks, [len(stops), b, H, a]; only where there are gates."""
        borders = self.saved[1]
        return (borders.index_select(2, stops) - borders.index_select(2, starts)).permute(2, 0, 1, 3).to(self.dtype)

    @cached_property
    def _before(self) -> Tensor:
        """Decay from the begin of the segment that runs into each tile to that tile, [tiles, b, H, a, 1]."""
        return self.decays(self.tiling.starts, self.tiling.begins).exp_().unsqueeze(-1)

    @cached_property
    def _after(self) -> Tensor:
        """Decay from each tile to the end of the segment that runs out of it, [tiles, b, H, a, 1]."""
        return self.decays(self.tiling.ends, self.tiling.stops).exp_().unsqueeze(-1)

    def entered(self, i: int, entry: Tensor) -> Tensor:
        """What the entry state of the segment that runs into tile i left of itself, [B, H, K, V]."""
        state = entry[self.tiles[i].first]
        return state if self.g is None else self._before[i] * state

    def carry(self, i: int, entry: Tensor | None) -> Tensor:
        """The state carried into tile i."""
        carried = self.saved[0][i]
        return carried if entry is None or not self.tiles[i].shape.enters else carried + self.entered(i, entry)

    def added_states(self, i: int, gates: Gates, k_end: Tensor, v: Tensor, carried: Tensor) -> Tensor:
        """What each chunk of tile i adds to the state after it [B, H, n, K, V], with what is carried into the tile."""
        added = k_end.transpose(-1, -2) @ v
        if self.tiles[i].shape.enters:
            gates.add_through(0, added, carried)
        return added

    def states_in(self, i: int, gates: Gates, added: Tensor, carried: Tensor) -> Tensor:
        """The state before each chunk of tile i when every entry state is zero, [B, H, n, K, V]."""
        shape = self.tiles[i].shape
        states = gates.move(shape.route("in"), added)
        if shape.enters:
            states[:, :, 0] = carried
        return states

    def entries_in(self, i: int, gates: Gates, entry: Tensor) -> Tensor:
        """What entry states add to the state before each chunk of tile i; not causal: the state of its document."""
        tile = self.tiles[i]
        if not self.causal:
            return _by_chunk(entry, tile)
        sources = [self.entered(i, entry).unsqueeze(2)] if tile.shape.enters else []
        sources.append(entry[slice(*tile.begun)].permute(1, 2, 0, 3, 4))
        return gates.move(tile.shape.route("in", entries=True), torch.cat(sources, 2))

    def touched(self, segments: Sequence[bool] | None) -> list[int]:
        """The tiles that hold a chunk of a marked segment; None marks all."""
        if segments is None:
            return list(range(len(self.tiles)))
        return [i for i, tile in enumerate(self.tiles) if any(segments[tile.first : tile.last + 1])]


class Forward(_Chunked):
    """The forward in stages: :meth:`state_maps`, then :meth:`local`, then :meth:`finish`, once each.

    Args:
        q, k, v: [B, T, Hx, K], [B, T, Hx, K], [B, T, Hx, V]; every Hx divides H.
        g: log-decay <= 0: None, [Hx], [B, T, Hx] or [B, T, Hx, K].
        table: chunks of the T local tokens.
        causal: False reads the state of the whole document (then ``g`` is None).
        scale: factor of the output.
    """

    @in_ieee
    def state_maps(self, *, local: bool = False) -> StateMap:
        """The map of every segment, stacked: state [segments, B, H, K, V], log_decay [segments, b, H, a].

        ``local``: do the work of :meth:`local` in the same pass, for when no exchange is to be overlapped.
        """
        shape = (self.batch, self.num_heads, self.key_dim, self.value_dim)
        carried = self.q.new_zeros(shape, dtype=self.dtype)
        carries = self.q.new_empty((len(self.tiles), *shape), dtype=self.dtype)
        if local:
            self._make_output()
        states, totals = [], []
        for i, tile in enumerate(self.tiles):
            gates = self.gates(tile)
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            carries[i] = carried
            added = self.added_states(i, gates, gates.to_end(k), v, carried)
            if self.g is not None:
                totals.append(gates.totals)
            if local and self.causal:
                self._output(i, gates, k, v, added, carried)
            exits = gates.move(tile.shape.route("exit"), added)
            carried = exits[:, :, -1]
            states.append(exits[:, :, : tile.ended[1] - tile.ended[0]])
        borders = torch.nn.functional.pad(torch.cat(totals, 2).cumsum(2), (0, 0, 1, 0)) if totals else None
        self.saved = carries, borders
        state = torch.cat(states, 2).permute(2, 0, 1, 3, 4)
        return StateMap(state, None if borders is None else self.decays(self.table.ends, self.table.begins))

    @in_ieee
    def local(self) -> None:
        """The output that needs no entry state: within chunks, and across those of one segment."""
        self._make_output()
        if not self.causal:
            return
        for i, tile in enumerate(self.tiles):
            gates, carried = self.gates(tile), self.saved[0][i]
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            self._output(i, gates, k, v, self.added_states(i, gates, gates.to_end(k), v, carried), carried)

    def _make_output(self) -> None:
        make = self.q.new_empty if self.causal else self.q.new_zeros
        self.o = make((self.batch, self.q.shape[1], self.num_heads, self.value_dim), dtype=self.dtype)

    def _output(self, i: int, gates: Gates, k: Tensor, v: Tensor, added: Tensor, carried: Tensor) -> None:
        q = self.load(self.q, self.tiles[i], self.scale)
        if gates.per_channel:
            scores = diagonal.scores(q, k, gates.log_decay)
        else:
            scores = gates.mask(q @ k.transpose(-1, -2))
        o = add_product(scores @ v, gates.from_begin(q), self.states_in(i, gates, added, carried))
        self.store(self.o, self.tiles[i], o)

    @in_ieee
    def finish(self, entry: Tensor | None, entered: Sequence[bool] | None = None) -> Tensor:
        """The output [B, T, H, V] in v's dtype.

        Args:
            entry: state that enters each segment [segments, B, H, K, V], None when all are zero; not causal: the
                state of each segment's whole document.
            entered: which of them may differ from zero; None: any.
        """
        for i in self.touched(entered) if entry is not None else ():
            tile = self.tiles[i]
            gates = self.gates(tile)
            q = self.load(self.q, tile, self.scale)
            self.store(self.o, tile, gates.from_begin(q) @ self.entries_in(i, gates, entry), add=True)
        return self.o.to(self.v.dtype)


class Backward(_Chunked):
    """The backward in stages, in the order of :class:`Forward`'s.

    Args:
        q, k, v, g, table, causal, scale: as given to the forward.
        saved: attribute of the forward.
        entry: as given to :meth:`Forward.finish`.
        exits: state after each segment [segments, B, H, K, V].
        do: gradient of the output [B, T, H, V].
        needs_dg: whether the gradient of ``g`` is asked for.
    """

    def __init__(self, q, k, v, g, table, causal, scale, *, saved, entry, exits, do, needs_dg):
        super().__init__(q, k, v, g, table, causal, scale)
        self.saved, self.entry, self.exits, self.do = saved, entry, exits, do
        self.needs_dg = needs_dg and g is not None

    @in_ieee
    def state_maps(self, *, local: bool = False) -> Tensor:
        """What this rank's outputs add to the gradient of each segment's entry state, [segments, B, H, K, V].

        ``local``: do the work of :meth:`local` in the same pass, for when no exchange is to be overlapped.
        """
        carried = self.exits.new_zeros(self.exits.shape[1:])
        self.d_carries = [carried] * len(self.tiles)  # carried into each tile from later ones, [B, H, K, V]
        if local:
            self._make_grads()
        grads = []
        for i, tile in reversed(list(enumerate(self.tiles))):
            gates = self.gates(tile)
            q, do = self.load(self.q, tile), self.load(self.do, tile, self.scale)
            self.d_carries[i] = carried
            added = self._added_grads(i, gates, q, do)
            begins = gates.move(tile.shape.route("begin", reverse=True), added)
            carried = begins[:, :, -1]
            grads.append(begins[:, :, : tile.begun[1] - tile.begun[0]])
            if local:
                self._local_grads(i, gates, q, do, added)
        return torch.cat(grads[::-1], 2).permute(2, 0, 1, 3, 4)

    @in_ieee
    def local(self) -> None:
        """The gradients that need no exit gradient: all of dq, and what k, v and g get inside their own segment."""
        self._make_grads()
        for i, tile in enumerate(self.tiles):
            gates = self.gates(tile)
            q, do = self.load(self.q, tile), self.load(self.do, tile, self.scale)
            self._local_grads(i, gates, q, do, self._added_grads(i, gates, q, do))

    def _added_grads(self, i: int, gates: Gates, q: Tensor, do: Tensor) -> Tensor:
        """What each chunk adds to the gradient of the state before it [B, H, n, K, V], with what is carried in."""
        added = gates.from_begin(q).transpose(-1, -2) @ do
        if self.tiles[i].shape.leaves:
            gates.add_through(-1, added, self.d_carries[i])
        return added

    def _make_grads(self) -> None:
        make = self.exits.new_empty if self.causal else self.exits.new_zeros
        self.dq, self.dk, self.dv = (make(x.shape) for x in (self.q, self.k, self.v))
        if self.needs_dg:
            heads = self.g.shape[0] if self.g.dim() == 1 else self.g.shape[2]
            channels = self.key_dim if self.g.dim() == 4 else 1
            self.dg = make((*self.q.shape[:2], heads, channels))

    def _local_grads(self, i: int, gates: Gates, q: Tensor, do: Tensor, added: Tensor) -> None:
        """One tile of :meth:`local`; ``do`` comes scaled, ``added`` is that of :meth:`_added_grads`."""
        tile = self.tiles[i]
        if not self.causal:
            return self.store(self.dq, tile, do @ self.entries_in(i, gates, self.entry).transpose(-1, -2))
        k, v = self.load(self.k, tile), self.load(self.v, tile)
        dq, dk, dv = self._within(gates, q, k, v, do)
        k_end = gates.to_end(k)
        carried = self.saved[0][i]
        states = self.states_in(i, gates, self.added_states(i, gates, k_end, v, carried), carried)
        if self.entry is not None:
            states += self.entries_in(i, gates, self.entry)
        grads = gates.move(tile.shape.route("out", reverse=True), added)
        if tile.shape.leaves:
            grads[:, :, -1] = self.d_carries[i]
        self.store(self.dq, tile, gates.add_from_begin(dq, do, states.transpose(-1, -2)))
        self.store(self.dk, tile, gates.add_to_end(dk, v, grads.transpose(-1, -2)))
        self.store(self.dv, tile, add_product(dv, k_end, grads))
        if self.needs_dg:
            self.store(self.dg, tile, self._gate_grad(i, q.mul_(dq).addcmul_(k, dk, value=-1), self.d_carries[i], None))

    def _within(self, gates: Gates, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through the scores within each chunk."""
        d_scores = do @ v.transpose(-1, -2)
        if gates.per_channel:
            scores, dq, dk = diagonal.scores_and_grads(q, k, gates.log_decay, d_scores.tril_())
        else:
            scores, d_scores = gates.mask(q @ k.transpose(-1, -2)), gates.mask(d_scores)
            dq, dk = d_scores @ k, d_scores.transpose(-1, -2) @ q
        return dq, dk, scores.transpose(-1, -2) @ do

    @in_ieee
    def finish(
        self, d_exit: Tensor | None, reached: Sequence[bool] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and g, each in its input's shape and dtype; None for ``g`` where not asked for.

        Args:
            d_exit: gradient of the state after each segment [segments, B, H, K, V], None when all are zero; not
                causal: the gradient of each segment's document state.
            reached: which of them may differ from zero; None: any.
        """
        for i in self.touched(reached) if d_exit is not None else ():
            tile = self.tiles[i]
            gates = self.gates(tile)
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            arrived = self._arrived(i, d_exit) if tile.shape.leaves else None
            grads = self._exits_out(i, gates, d_exit, arrived)
            dk = gates.to_end(v @ grads.transpose(-1, -2))
            self.store(self.dk, tile, dk, add=True)
            self.store(self.dv, tile, gates.to_end(k) @ grads, add=True)
            if self.needs_dg:
                self.store(self.dg, tile, self._gate_grad(i, (k * dk).neg_(), arrived, d_exit), add=True)
        grads = [dx.to(x.dtype) for x, dx in ((self.q, self.dq), (self.k, self.dk), (self.v, self.dv))]
        return *grads, self._reduced_gate() if self.needs_dg else None

    def _arrived(self, i: int, d_exit: Tensor) -> Tensor:
        """What is left at tile i's end of the exit gradient of the segment that runs out of it, [B, H, K, V]."""
        grad = d_exit[self.tiles[i].last]
        return grad if self.g is None else self._after[i] * grad

    def _exits_out(self, i: int, gates: Gates, d_exit: Tensor, arrived: Tensor | None) -> Tensor:
        """What exit gradients add to the gradient of the state after each chunk of tile i, [B, H, n, K, V]."""
        tile = self.tiles[i]
        if not self.causal:
            return _by_chunk(d_exit, tile)
        sources = [] if arrived is None else [arrived.unsqueeze(2)]
        sources.append(d_exit[slice(*tile.ended)].permute(1, 2, 0, 3, 4))
        return gates.move(tile.shape.route("out", entries=True, reverse=True), torch.cat(sources, 2))

    def _gate_grad(self, i: int, gate: Tensor, d_carried: Tensor | None, d_exit: Tensor | None) -> Tensor:
        """dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + <S, dS> at the segment's end or the tile's, whichever is first.

        ``gate`` holds the summands [B, H, n, C, K]; the identity is that of GLA (arXiv 2312.06635, appendix C).
        """
        tile = self.tiles[i]
        gate = gate if self.g.dim() == 4 else gate.sum(-1, keepdim=True)
        later = (tile.shape.later.to(gate.dtype) @ gate.sum(-2)) if tile.shape.num_chunks > 1 else 0.0  # [B, H, n, a]
        anchors = gate.new_zeros(*gate.shape[:2], tile.ended[1] - tile.ended[0] + 1, gate.shape[-1])
        if d_exit is not None:
            ended = slice(*tile.ended)
            anchors[:, :, :-1] = _inner(self.exits[ended], d_exit[ended], gate.shape[-1]).permute(1, 2, 0, 3)
        if tile.shape.leaves:
            anchors[:, :, -1] = _inner(self.carry(i + 1, self.entry), d_carried, gate.shape[-1])
        later = later + anchors.index_select(2, tile.shape.anchors)
        return suffix_sum(gate, -2) + later.unsqueeze(-2)

    def _reduced_gate(self) -> Tensor:
        """The gate's gradient in the shape and dtype of ``g``."""
        if self.g.dim() == 1:
            return self.dg.sum((0, 1, 3)).to(self.g.dtype)
        return (self.dg if self.g.dim() == 4 else self.dg.squeeze(-1)).to(self.g.dtype)


def num_heads(*tensors: Tensor | None) -> int:
    """H: the largest head count among q, k, v, g, beta."""
    return max(x.shape[0] if x.dim() == 1 else x.shape[2] for x in tensors if x is not None)


def _by_chunk(states: Tensor, tile: Tile) -> Tensor:
    """The row of [segments, B, H, K, V] that belongs to each chunk's segment, [B, H, n, K, V]."""
    return states[tile.first :].index_select(0, tile.shape.segments).permute(1, 2, 0, 3, 4)


def _inner(state: Tensor, grad: Tensor, channels: int) -> Tensor:
    """<S, dS> of states [..., K, V], per channel [..., K] or in all [..., 1]."""
    inner = (state * grad).sum(-1)
    return inner if channels > 1 else inner.sum(-1, keepdim=True)

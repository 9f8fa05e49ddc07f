"""Linear attention in plain PyTorch, chunk by chunk, in stages: the path for any device.

Per head, with ``G`` the cumulative log-decay of a chunk and ``S_p`` the state at its beginning,

    o_i = scale * sum_{j <= i} (q_i . k_j exp(G_i - G_j)) v_j  +  scale * (q_i exp(G_i)) S_p       within + across
    S   = exp(G_last) S_p + sum_j (k_j exp(G_last - G_j)) v_j^T

(the chunkwise form of GLA, arXiv 2312.06635, section 4.2). The stages follow LASP-2 (arXiv 2502.07563, algorithm 2):
``state_maps`` reads keys and values only, so the exchange can start; ``local`` does the work within chunks while it
flies; ``finish`` adds what the entry states contribute. The backward mirrors it with state gradients and is written
by hand: states are rebuilt from one saved state per tile, so memory stays O(T (K + V)).

Gates: prefix sums of log-decays are kept in float64, because their differences are what is exponentiated; every
exponent is <= 0. Tensors inside a tile are [B, H, n, C, D]: n chunks of C tokens. Lists of states that leave this file
are [segments, B, H, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels import diagonal
from lasp.kernels.segments import Route, SegmentTable, Tile
from lasp.kernels.state import StateMap, in_ieee, state_dtype, suffix_sum

# Elements of one [B, H, n, C, D] temporary: a few of them should fit a CPU's cache, a GPU wants large launches.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_DEVICE = 1 << 24
_LOWEST_LOG_DECAY = -1000.0  # exp of it is 0 in every dtype; keeps -inf (a full reset) out of differences


class _Chunked:
    """What forward and backward share: the inputs, the tiles, gates and the movement of states inside a tile."""

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
        self.tiles = table.tiles(max(4, min(64, chunks)))

    def load(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's tokens of ``x`` [B, T, Hx, D] as [B, H, n, C, D], zero where a chunk is short."""
        x = x[:, tile.start : tile.stop].to(self.dtype)
        if tile.shape.gather is not None:
            x = x.index_select(1, tile.shape.gather).masked_fill(tile.shape.padding, 0.0)
        x = x.unflatten(1, (tile.shape.num_chunks, -1)).permute(0, 3, 1, 2, 4)  # [B, Hx, n, C, D]
        groups = self.num_heads // x.shape[1]
        return x.contiguous() if groups == 1 else x.repeat_interleave(groups, 1)

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

    def log_decay(self, tile: Tile) -> Tensor | None:
        """G: inclusive cumulative log-decay of each chunk, float64 [b, H, n', C, a] with b in (1, B), n' in (1, n)."""
        if self.g is None:
            return None
        if self.g.dim() == 1:
            g = self.g.double().clamp(min=_LOWEST_LOG_DECAY)
            g = g.repeat_interleave(self.num_heads // g.shape[0])
            return tile.shape.counts[None, None, :, :, None] * g.view(1, -1, 1, 1, 1)
        g = self.g if self.g.dim() == 4 else self.g.unsqueeze(-1)
        g = g[:, tile.start : tile.stop].double().clamp(min=_LOWEST_LOG_DECAY)
        if tile.shape.gather is not None:
            g = g.index_select(1, tile.shape.gather).masked_fill(tile.shape.padding, 0.0)
        g = g.unflatten(1, (tile.shape.num_chunks, -1)).permute(0, 3, 1, 2, 4)
        groups = self.num_heads // g.shape[1]
        return (g if groups == 1 else g.repeat_interleave(groups, 1)).cumsum(-2)

    def positions(self, tile: Tile, log_decay: Tensor | None) -> Tensor | None:
        """X: cumulative log-decay from the tile's start to each position, float64 [b, H, n + 1, a]."""
        if log_decay is None:
            return None
        totals = log_decay[..., -1, :].expand(-1, -1, tile.shape.num_chunks, -1)
        return torch.nn.functional.pad(totals.cumsum(-2), (0, 0, 1, 0))

    def decay(self, difference: Tensor) -> Tensor:
        """exp of a difference of prefix sums, taken in float64, in the dtype of the states."""
        return difference.to(self.dtype).exp()

    def move(self, route: Route, positions: Tensor | None, sources: list[Tensor], reverse: bool = False) -> Tensor:
        """States [B, H, R, K, V] at the route's reads from sources [B, H, s, K, V], each decayed on its way."""
        states = torch.cat(sources, 2) if len(sources) > 1 else sources[0]
        reached = route.reached.to(self.dtype)
        if positions is None:
            return (reached @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        reads, origins = positions.index_select(2, route.reads), positions.index_select(2, route.sources)
        distance = reads.unsqueeze(3) - origins.unsqueeze(2)  # [b, H, R, S, a]
        distance = (-distance if reverse else distance).clamp(max=0.0)  # unreached pairs: any finite value
        weights = self.decay(distance) * reached.unsqueeze(-1)
        if weights.shape[-1] == 1:
            return (weights.squeeze(-1) @ states.flatten(-2)).unflatten(-1, states.shape[-2:])
        return torch.einsum("bhrsk,bhskv->bhrkv", weights.expand(self.batch, -1, -1, -1, -1), states)

    def carry(self, i: int, entry: Tensor | None) -> Tensor:
        """The state carried into tile i, with what the entry state of the segment that began earlier left of itself."""
        tile = self.tiles[i]
        if entry is None or not tile.shape.enters:
            return self.carries[i]
        entered = entry[tile.first]
        if self.before is not None:
            entered = self.decay(self.before[i]).unsqueeze(-1) * entered
        return self.carries[i] + entered

    def states_in(self, i: int, k: Tensor, v: Tensor, log_decay: Tensor | None, entry: Tensor | None) -> Tensor:
        """The state before each chunk of tile i [B, H, n, K, V]; not causal: the state of its whole document."""
        tile = self.tiles[i]
        if not self.causal:
            return entry[tile.first :].index_select(0, tile.shape.segments).permute(1, 2, 0, 3, 4)
        sources = [self.carry(i, entry).unsqueeze(2)] if tile.shape.enters else []
        if entry is not None:
            sources.append(entry[slice(*tile.begun)].permute(1, 2, 0, 3, 4))
        sources.append(self.added_states(k, v, log_decay))
        route = tile.shape.route("in", entries=entry is not None)
        return self.move(route, self.positions(tile, log_decay), sources)

    def added_states(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """What each chunk adds to the state after it: sum_j (k_j exp(G_last - G_j)) v_j^T, [B, H, n, K, V]."""
        return self.to_chunk_end(k, log_decay).transpose(-1, -2) @ v

    def to_chunk_end(self, x: Tensor, log_decay: Tensor | None) -> Tensor:
        """``x`` decayed from its token to the end of its chunk."""
        return x if log_decay is None else x * self.decay(log_decay[..., -1:, :] - log_decay)

    def from_chunk_begin(self, x: Tensor, log_decay: Tensor | None) -> Tensor:
        """``x`` decayed from the beginning of its chunk to its token."""
        return x if log_decay is None else x * self.decay(log_decay)

    def mask_scores(self, x: Tensor, log_decay: Tensor | None) -> Tensor:
        """``x`` [..., C, C] times exp(G_i - G_j) for j <= i, zero above the diagonal (identity and scalar decay)."""
        if log_decay is None:
            return x.tril_()
        difference = log_decay - log_decay.transpose(-1, -2)  # [b, H, n', C, C]
        return x.mul_(self.decay(difference.clamp_(max=0.0)).tril_())

    def per_channel(self, log_decay: Tensor | None) -> bool:
        """Whether every key channel has a decay of its own."""
        return log_decay is not None and log_decay.shape[-1] > 1


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
    def state_maps(self) -> StateMap:
        """The map of every segment, stacked: state [segments, B, H, K, V], log_decay [segments, b, H, a]."""
        shape = (self.batch, self.num_heads, self.key_dim, self.value_dim)
        carried = self.q.new_zeros(shape, dtype=self.dtype)
        before: Tensor | None = None  # log-decay from the running segment's begin to the tile, float64 [b, H, a]
        self.carries = self.q.new_empty((len(self.tiles), *shape), dtype=self.dtype)  # from zero entry states
        befores = []
        states, decays = [], []
        for i, tile in enumerate(self.tiles):
            log_decay = self.log_decay(tile)
            positions = self.positions(tile, log_decay)
            self.carries[i] = carried
            if positions is not None:
                before = torch.zeros_like(positions[:, :, 0]) if before is None else before
                befores.append(before)
            added = self.added_states(self.load(self.k, tile), self.load(self.v, tile), log_decay)
            route = tile.shape.route("exit", entries=False)
            sources = [carried.unsqueeze(2), added] if tile.shape.enters else [added]
            exits = self.move(route, positions, sources)
            carried = exits[:, :, -1]
            num_ended = tile.ended[1] - tile.ended[0]
            states.append(exits[:, :, :num_ended])
            if positions is not None:
                lengths = self.run_decays(tile, positions, before)
                decays.append(lengths[:, :, :num_ended])
                before = lengths[:, :, -1]
        self.before = torch.stack(befores) if befores else None
        state = torch.cat(states, 2).permute(2, 0, 1, 3, 4)
        decay = None if not decays else torch.cat(decays, 2).permute(2, 0, 1, 3).to(self.dtype)
        return StateMap(state, decay)

    def run_decays(self, tile: Tile, positions: Tensor, before: Tensor) -> Tensor:
        """Log-decay from each exit read's segment begin to the read, float64 [b, H, R, a]."""
        exits = tile.shape.route("exit", entries=False).reads
        begins = tile.shape.route("begin", entries=False).reads
        num_begun = tile.begun[1] - tile.begun[0]
        origin = positions.index_select(2, begins)[:, :, :num_begun]
        if tile.shape.enters:  # the first read's segment began earlier
            origin = torch.cat([-before.unsqueeze(2), origin], 2)
        return positions.index_select(2, exits) - origin

    @in_ieee
    def local(self) -> None:
        """The work within chunks, which needs no entry state."""
        make = self.q.new_empty if self.causal else self.q.new_zeros
        self.o = make((self.batch, self.q.shape[1], self.num_heads, self.value_dim), dtype=self.dtype)
        if not self.causal:
            return
        for tile in self.tiles:
            log_decay = self.log_decay(tile)
            q, k, v = self.load(self.q, tile), self.load(self.k, tile), self.load(self.v, tile)
            if self.per_channel(log_decay):
                scores = diagonal.scores(q, k, log_decay)
            else:
                scores = self.mask_scores(q @ k.transpose(-1, -2), log_decay)
            self.store(self.o, tile, (scores @ v).mul_(self.scale))

    @in_ieee
    def finish(self, entry: Tensor | None) -> Tensor:
        """The output [B, T, H, V] in v's dtype.

        Args:
            entry: state that enters each segment [segments, B, H, K, V], None when all are zero; not causal: the
                state of each segment's whole document.
        """
        for i, tile in enumerate(self.tiles):
            log_decay = self.log_decay(tile)
            q, k, v = self.load(self.q, tile), self.load(self.k, tile), self.load(self.v, tile)
            states = self.states_in(i, k, v, log_decay, entry)
            across = (self.from_chunk_begin(q, log_decay) @ states).mul_(self.scale)
            self.store(self.o, tile, across, add=True)
        return self.o.to(self.v.dtype)


class Backward(_Chunked):
    """The backward in stages, in the order of :class:`Forward`'s.

    Args:
        q, k, v, g, table, causal, scale: as given to the forward.
        carries, before: the forward's states carried into its tiles, and their decays (attributes of it).
        entry: as given to :meth:`Forward.finish`.
        exits: state after each segment [segments, B, H, K, V].
        do: gradient of the output [B, T, H, V].
    """

    def __init__(self, q, k, v, g, table, causal, scale, *, carries, before, entry, exits, do):
        super().__init__(q, k, v, g, table, causal, scale)
        self.carries, self.before, self.entry, self.exits, self.do = carries, before, entry, exits, do

    @in_ieee
    def state_maps(self) -> Tensor:
        """What this rank's outputs add to the gradient of each segment's entry state, [segments, B, H, K, V]."""
        carried = self.exits.new_zeros(self.exits.shape[1:])
        after: Tensor | None = None  # log-decay from the tile's end to the running segment's end, float64 [b, H, a]
        self.d_carries: list[Tensor] = []  # gradient carried into each tile from later ones, [B, H, K, V]
        self.after: list[Tensor | None] = []
        grads = []
        for tile in reversed(self.tiles):
            log_decay = self.log_decay(tile)
            positions = self.positions(tile, log_decay)
            self.d_carries.append(carried)
            self.after.append(after)
            added = self.added_grads(self.load(self.q, tile), self.load(self.do, tile), log_decay)
            route = tile.shape.route("begin", entries=False, reverse=True)
            sources = [carried.unsqueeze(2), added] if tile.shape.leaves else [added]
            begins = self.move(route, positions, sources, reverse=True)
            carried = begins[:, :, -1]
            grads.append(begins[:, :, : tile.begun[1] - tile.begun[0]])
            if positions is not None:
                first_exit = tile.shape.route("exit", entries=False).reads[:1]
                reach = positions.index_select(2, first_exit).squeeze(2)
                ends_here = tile.ended[1] > tile.ended[0]
                after = reach if ends_here or after is None else reach + after
        self.d_carries.reverse()
        self.after.reverse()
        return torch.cat(grads[::-1], 2).permute(2, 0, 1, 3, 4)

    def added_grads(self, q: Tensor, do: Tensor, log_decay: Tensor | None) -> Tensor:
        """What each chunk adds to the gradient of the state before it: scale * sum_i (q_i exp(G_i)) do_i^T."""
        return (self.from_chunk_begin(q, log_decay).transpose(-1, -2) @ do).mul_(self.scale)

    @in_ieee
    def local(self) -> None:
        """The gradient of q, and what k and v get from their own chunk: no exit gradient is needed."""
        batch, length = self.q.shape[:2]
        make = self.exits.new_empty if self.causal else self.exits.new_zeros
        self.dq = make((batch, length, self.num_heads, self.key_dim))
        self.dk = make((batch, length, self.num_heads, self.key_dim))
        self.dv = make((batch, length, self.num_heads, self.value_dim))
        for i, tile in enumerate(self.tiles):
            log_decay = self.log_decay(tile)
            k, v, do = self.load(self.k, tile), self.load(self.v, tile), self.load(self.do, tile)
            states = self.states_in(i, k, v, log_decay, self.entry)
            dq = self.from_chunk_begin(do @ states.transpose(-1, -2), log_decay).mul_(self.scale)
            if self.causal:
                dq_within, dk, dv = self.within(tile, self.load(self.q, tile), k, v, do, log_decay)
                dq += dq_within
                self.store(self.dk, tile, dk)
                self.store(self.dv, tile, dv)
            self.store(self.dq, tile, dq)

    def within(self, tile, q, k, v, do, log_decay) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through the scores within each chunk."""
        d_scores = (do @ v.transpose(-1, -2)).mul_(self.scale)
        if self.per_channel(log_decay):
            scores, dq, dk = diagonal.scores_and_grads(q, k, log_decay, d_scores.tril_())
        else:
            scores = self.mask_scores(q @ k.transpose(-1, -2), log_decay)
            d_scores = self.mask_scores(d_scores, log_decay)
            dq, dk = d_scores @ k, d_scores.transpose(-1, -2) @ q
        return dq, dk, (scores.transpose(-1, -2) @ do).mul_(self.scale)

    @in_ieee
    def finish(self, d_exit: Tensor | None, *, needs_dg: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and g, each in its input's shape and dtype.

        Args:
            d_exit: gradient of the state after each segment [segments, B, H, K, V], None when all are zero; not
                causal: the gradient of each segment's document state.
            needs_dg: whether to compute the gradient of ``g`` (else None is returned for it).
        """
        needs_dg = needs_dg and self.g is not None
        if needs_dg:
            channels = self.key_dim if self.g.dim() == 4 else 1
            self.dg = self.exits.new_zeros(*self.q.shape[:2], self.num_heads, channels)
        for i, tile in enumerate(self.tiles):
            log_decay = self.log_decay(tile)
            positions = self.positions(tile, log_decay)
            q, k, v = self.load(self.q, tile), self.load(self.k, tile), self.load(self.v, tile)
            carried = self.d_carry(i, d_exit)
            grads = self.grads_out(tile, q, positions, log_decay, carried, d_exit)
            self.store(self.dk, tile, self.to_chunk_end(v @ grads.transpose(-1, -2), log_decay), add=True)
            self.store(self.dv, tile, self.to_chunk_end(k, log_decay) @ grads, add=True)
            if needs_dg:
                gate = q * self.load(self.dq, tile) - k * self.load(self.dk, tile)
                gate = gate if channels > 1 else gate.sum(-1, keepdim=True)
                self.store(self.dg, tile, self.gate_grad(i, gate, carried, d_exit))
        grads = [_like(x, dx) for x, dx in ((self.q, self.dq), (self.k, self.dk), (self.v, self.dv))]
        return *grads, self.reduce_gate() if needs_dg else None

    def d_carry(self, i: int, d_exit: Tensor | None) -> Tensor:
        """The gradient of the state at tile i's end, with what the exit gradient of a later segment end left."""
        tile, carried, after = self.tiles[i], self.d_carries[i], self.after[i]
        if d_exit is None or not tile.shape.leaves:
            return carried
        arrived = d_exit[tile.last]
        return carried + (arrived if after is None else self.decay(after).unsqueeze(-1) * arrived)

    def grads_out(self, tile, q, positions, log_decay, carried, d_exit) -> Tensor:
        """The gradient of the state after each chunk [B, H, n, K, V]; not causal: of its whole document's state."""
        if not self.causal:
            return d_exit[tile.first :].index_select(0, tile.shape.segments).permute(1, 2, 0, 3, 4)
        sources = [carried.unsqueeze(2)] if tile.shape.leaves else []
        if d_exit is not None:
            sources.append(d_exit[slice(*tile.ended)].permute(1, 2, 0, 3, 4))
        added = self.added_grads(q, self.load(self.do, tile), log_decay)
        route = tile.shape.route("out", entries=d_exit is not None, reverse=True)
        return self.move(route, positions, [*sources, added], reverse=True)

    def gate_grad(self, i: int, gate: Tensor, d_carried: Tensor, d_exit: Tensor | None) -> Tensor:
        """dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + <S, dS> at the segment's end or the tile's, whichever is first.

        ``gate`` holds the summands [B, H, n, C, a]; the identity is that of GLA (arXiv 2312.06635, appendix C).
        """
        tile = self.tiles[i]
        ended = slice(*tile.ended)
        anchors = gate.new_zeros(*gate.shape[:2], tile.ended[1] - tile.ended[0] + 1, gate.shape[-1])
        if d_exit is not None:
            anchors[:, :, :-1] = _inner(self.exits[ended], d_exit[ended], gate.shape[-1]).permute(1, 2, 0, 3)
        if tile.shape.leaves:
            state = self.carry(i + 1, self.entry)
            anchors[:, :, -1] = _inner(state, d_carried, gate.shape[-1])
        later = tile.shape.later.to(gate.dtype) @ gate.sum(-2)  # [B, H, n, a]
        later = later + anchors.index_select(2, tile.shape.anchors)
        return suffix_sum(gate, -2) + later.unsqueeze(-2)

    def reduce_gate(self) -> Tensor:
        """The gate's gradient in the shape and dtype of ``g``."""
        if self.g.dim() == 1:
            return self.dg.sum((0, 1, 3)).unflatten(0, (self.g.shape[0], -1)).sum(1).to(self.g.dtype)
        return _like(self.g, self.dg if self.g.dim() == 4 else self.dg.squeeze(-1))


def num_heads(*tensors: Tensor | None) -> int:
    """H: the largest head count among q, k, v, g, beta."""
    return max(x.shape[0] if x.dim() == 1 else x.shape[2] for x in tensors if x is not None)


def _like(x: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with all H heads [B, T, H, ...], summed over the heads that share one of ``x``, in x's dtype."""
    groups = grad.shape[2] // x.shape[2]
    return (grad if groups == 1 else grad.unflatten(2, (-1, groups)).sum(3)).to(x.dtype)


def _inner(state: Tensor, grad: Tensor, channels: int) -> Tensor:
    """<S, dS> of states [..., K, V], per channel [..., K] or in all [..., 1]."""
    inner = (state * grad).sum(-1)
    return inner if channels > 1 else inner.sum(-1, keepdim=True)

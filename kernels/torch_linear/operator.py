"""Linear attention in plain PyTorch, chunk by chunk, in stages: the path for any device.

Per head, with ``G`` the cumulative log-decay of a chunk and ``S_p`` the state at its beginning,

    o_i = scale * sum_{j <= i} (q_i . k_j exp(G_i - G_j)) v_j  +  scale * (q_i exp(G_i)) S_p       within + across
    S   = exp(G_last) S_p + sum_j (k_j exp(G_last - G_j)) v_j^T

(the chunkwise form of GLA, arXiv 2312.06635, section 4.2). Everything is linear in the states that enter, so the stages
of LASP-2 (arXiv 2502.07563, algorithm 2) are: ``state_maps`` reads keys and values only, so the exchange can start;
``local`` computes the whole output as if every entry state were zero while it flies; ``finish`` adds what the entry
states contribute, where there are any. The backward mirrors it with state gradients and is written by hand: states
are rebuilt from one saved state per tile, so memory stays O(T (K + V)). With nothing to wait for, ``state_maps`` does
the first two stages in one pass over the tiles. The stages are those of :mod:`lasp.kernels.operator`.

Tensors inside a tile are [n, B, H, C, D]: n chunks of C tokens. States inside a tile are [n + 1, B, H, K, V], one per
position between chunks; those that leave this file are [segments, B, H, K, V].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.operator import Gradients, begun, entry_grads, left
from lasp.kernels.segments import SegmentTable, Tile, default_chunk_size
from lasp.kernels.state import StateMap, in_ieee, state_dtype, suffix_sum
from lasp.kernels.torch_linear import diagonal
from lasp.kernels.torch_linear.gates import Gates, add_product, decay

# Elements of one [n, B, H, C, D] temporary: a few of them should fit a CPU's cache, a GPU wants large launches.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_DEVICE = 1 << 24
_TILE_CHUNKS = (4, 64)  # at least, at most


def tokens_per_state(
    tokens: int, segments: int, batch: int, heads: int, key_dim: int, value_dim: int, device_type: str
) -> int:
    """Tokens of a tile, at whose begin a forward keeps one state for its backward.

    Args:
        tokens, segments: T of one row, and the segments of about equal length that they are cut into.
        batch, heads, key_dim, value_dim: B, H, K and V.
        device_type: ``cpu``, ``cuda`` and so on.
    """
    chunk_size = default_chunk_size(tokens, segments)
    chunks = segments * -(-tokens // (segments * chunk_size))
    return chunk_size * _tile_chunks(batch * heads, max(key_dim, value_dim), chunk_size, chunks, device_type)


def _tile_chunks(rows: int, widest: int, chunk_size: int, num_chunks: int, device_type: str) -> int:
    """Chunks per tile, for ``rows`` = B * H and the larger of K and V."""
    budget = _TILE_ELEMENTS.get(device_type, _TILE_ELEMENTS_DEVICE)
    chunks = budget // (rows * chunk_size * max(widest, chunk_size))
    least, most = _TILE_CHUNKS
    return max(least, min(most, chunks, num_chunks // 4))


class _Chunked:
    """What forward and backward share: the inputs, the tiles, and the states that enter and run through them.

    Attributes:
        saved: what the forward keeps for the backward:
            carries: state carried into each tile when every entry state is zero, [tiles, B, H, K, V];
            borders: cumulative log-decay at each border of chunks, float64 [N + 1, b, H, a]; None without gates.
        kept_gates: decays of tiles, shared by all stages of forward and backward.
    """

    saved: tuple[Tensor, Tensor | None]
    kept_gates: dict[int, Gates]

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: None,
        table: SegmentTable,
        num_heads: int,
        causal: bool,
        scale: float,
    ):
        assert beta is None, "the delta rule has dense transitions"
        self.k, self.v, self.g = k, v, g
        self.table, self.causal, self.scale = table, causal, scale
        self.dtype = state_dtype(k.dtype)
        self.batch, self.num_heads = k.shape[0], num_heads
        self.key_dim, self.value_dim = k.shape[-1], v.shape[-1]
        rows, widest = self.batch * self.num_heads, max(self.key_dim, self.value_dim)
        self.tiles = table.tiles(_tile_chunks(rows, widest, table.chunk_size, table.num_chunks, k.device.type))

    def gates(self, i: int) -> Gates:
        """The decays of tile i, kept from stage to stage where they are small against its tokens."""
        gates = self.kept_gates.get(i)
        if gates is None:
            gates = Gates(self.g, self.tiles[i], self.num_heads, self.dtype)
            if not gates.per_channel:
                self.kept_gates[i] = gates
        return gates

    def load(self, x: Tensor, tile: Tile, scale: float = 1.0) -> Tensor:
        """The tile's tokens of ``x`` [B, T, Hx, D] as [n, B, H, C, D] times ``scale``, zero where a chunk is short."""
        x = x[:, tile.start : tile.stop]
        if tile.shape.gather is not None:
            x = x.index_select(1, tile.shape.gather).masked_fill_(tile.shape.padding, 0.0)
        x = x.view(x.shape[0], tile.shape.num_chunks, -1, *x.shape[2:]).permute(1, 0, 3, 2, 4)  # [n, B, Hx, C, D]
        if x.shape[2] < self.num_heads:
            x = x.repeat_interleave(self.num_heads // x.shape[2], 2)
        out = x.new_empty(x.shape, dtype=self.dtype)
        return out.copy_(x) if scale == 1.0 else torch.mul(x.to(self.dtype), scale, out=out)

    def store(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool = False) -> None:
        """Write [n, B, H, C, D] to the tile's tokens of ``out`` [B, T, Hx, D], summing heads that share one."""
        groups = self.num_heads // out.shape[2]
        if groups > 1:
            x = x.unflatten(2, (-1, groups)).sum(3)
        x = x.permute(1, 0, 3, 2, 4)  # [B, n, C, Hx, D]
        target = out[:, tile.start : tile.stop]
        if tile.shape.scatter is None:
            target = target.unflatten(1, x.shape[1:3])
        else:
            x = x.flatten(1, 2).index_select(1, tile.shape.scatter)
        target.add_(x) if add else target.copy_(x)

    @cached_property
    def _before(self) -> Tensor:
        """Decay from the begin of each chunk's segment to that chunk, [N, b, H, a, 1]."""
        borders = self.saved[1]
        return decay(borders[:-1] - borders[self.table.borders.chunk_begins], self.dtype).unsqueeze(-1)

    @cached_property
    def _after(self) -> Tensor:
        """Decay from each chunk to the end of its segment, [N, b, H, a, 1]."""
        borders = self.saved[1]
        return decay(borders[self.table.borders.chunk_ends] - borders[1:], self.dtype).unsqueeze(-1)

    def carry(self, i: int, entry: Tensor | None) -> Tensor:
        """The state carried into tile i, [B, H, K, V]."""
        carried, tile = self.saved[0][i], self.tiles[i]
        if entry is None or not tile.shape.enters:
            return carried
        state = entry[tile.first]
        return carried + (state if self.g is None else self._before[tile.chunks.start] * state)

    def states(self, i: int, gates: Gates, k_end: Tensor, v: Tensor, carried: Tensor) -> Tensor:
        """The states at the positions of tile i when every entry state is zero; at borders those that leave."""
        states = _added(k_end, v, slice(1, None))
        states[0] = carried
        gates.run(states)
        return states

    def entries_in(self, i: int, entry: Tensor) -> Tensor:
        """What entry states add to the state before each chunk of tile i; not causal: the state of its document."""
        tile = self.tiles[i]
        entries = entry[tile.first :].index_select(0, tile.shape.segments)
        return entries if self.g is None else entries.mul_(self._before[tile.chunks])

    def touched(self, segments: Sequence[bool] | None) -> list[int]:
        """The tiles that hold a chunk of a marked segment; None marks all."""
        if segments is None:
            return list(range(len(self.tiles)))
        return [i for i, tile in enumerate(self.tiles) if any(segments[tile.first : tile.last + 1])]


class Forward(_Chunked):
    """The forward in the stages of :class:`lasp.kernels.operator.ForwardStages`."""

    def __init__(self, k, v, g, beta, table, num_heads, causal, scale):
        super().__init__(k, v, g, beta, table, num_heads, causal, scale)
        self.kept_gates = {}

    @in_ieee
    def state_maps(self, initial: Tensor | None = None, *, q: Tensor | None = None) -> StateMap:
        """The map of every segment, log_decay [segments, b, H, a]; with ``q`` the work of :meth:`local` in one pass."""
        shape = (self.batch, self.num_heads, self.key_dim, self.value_dim)
        carried = self.k.new_zeros(shape, dtype=self.dtype)
        carries = self.k.new_empty((len(self.tiles), *shape), dtype=self.dtype)
        if q is not None:
            self._make_output(q)
        exits, totals = [], []
        for i, tile in enumerate(self.tiles):
            gates = self.gates(i)
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            carries[i] = carried
            states = self.states(i, gates, gates.to_end(k), v, carried)
            exits.append(states.index_select(0, tile.shape.ends))
            carried = states[-1].clone()
            if self.g is not None:
                totals.append(gates.totals)
            if q is not None and self.causal:
                self._output(i, gates, k, v, states)
        borders = torch.nn.functional.pad(torch.cat(totals).cumsum(0), (0, 0, 0, 0, 0, 0, 1, 0)) if totals else None
        self.saved = carries, borders
        log_decay = None
        if borders is not None:
            log_decay = (borders[self.table.borders.ends] - borders[self.table.borders.begins]).to(self.dtype)
        self._maps, self._begins = StateMap(torch.cat(exits), log_decay), initial is not None
        return begun(self._maps, initial)

    @in_ieee
    def local(self, q: Tensor, entered: Sequence[bool] | None) -> None:
        """The output as of zero entry states: within chunks, and across those of one segment, entered or not."""
        self._make_output(q)
        if not self.causal:
            return
        for i, tile in enumerate(self.tiles):
            gates = self.gates(i)
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            self._output(i, gates, k, v, self.states(i, gates, gates.to_end(k), v, self.saved[0][i]))

    def _make_output(self, q: Tensor) -> None:
        self.q = q
        make = self.q.new_empty if self.causal else self.q.new_zeros
        self.o = make((self.batch, self.q.shape[1], self.num_heads, self.value_dim), dtype=self.dtype)

    def _output(self, i: int, gates: Gates, k: Tensor, v: Tensor, states: Tensor) -> None:
        q = self.load(self.q, self.tiles[i], self.scale)
        if gates.per_channel:
            scores = diagonal.scores(q, k, gates.log_decay)
        else:
            scores = q @ k.transpose(-1, -2)
            gates.mask(scores)
        states = _without_borders(states, self.tiles[i])[:-1]
        self.store(self.o, self.tiles[i], add_product(scores @ v, gates.from_begin(q), states))

    @in_ieee
    def finish(self, entry: Tensor | None, entered: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """The output, with what the entry states add, and the exit states."""
        if self._begins:
            entered = None  # what is not entered begins a document
        for i in self.touched(entered) if entry is not None else ():
            tile = self.tiles[i]
            gates = self.gates(i)
            q = self.load(self.q, tile, self.scale)
            self.store(self.o, tile, gates.from_begin(q) @ self.entries_in(i, entry), add=True)
        return self.o.to(self.v.dtype), left(self._maps, entry, self.causal)


class Backward(_Chunked):
    """The backward in the stages of :class:`lasp.kernels.operator.BackwardStages`; ``kept_gates`` may be empty."""

    def __init__(
        self,
        *inputs,
        q: Tensor,
        do: Tensor,
        saved: Sequence[Tensor | None],
        kept_gates: dict[int, Gates],
        entry: Tensor | None,
        exits: StateMap,
        needs_dg: bool,
        needs_d_entry: bool,
    ):
        super().__init__(*inputs)
        self.q, self.do, self.saved, self.kept_gates = q, do, saved, kept_gates
        self.entry, self.exits, self._exit_maps = entry, exits.state, exits
        self.needs_dg, self.needs_d_entry = needs_dg and self.g is not None, needs_d_entry

    @in_ieee
    def state_maps(self, *, local: bool = False) -> Tensor:
        """What this rank's outputs add to the gradient of each segment's entry state, [segments, B, H, K, V].

        ``local``: do the work of :meth:`local` in the same pass, for when no exchange is to be overlapped.
        """
        carried = self.exits.new_zeros(self.exits.shape[1:])
        self.d_carries = [carried] * len(self.tiles)  # carried into each tile from later ones, [B, H, K, V]
        if local:
            self._make_grads()
        entries = []
        for i, tile in reversed(list(enumerate(self.tiles))):
            gates = self.gates(i)
            q, do = self.load(self.q, tile), self.load(self.do, tile, self.scale)
            self.d_carries[i] = carried
            grads = self._state_grads(i, gates, q, do)
            entries.append(grads.index_select(0, tile.shape.begins))
            carried = grads[0].clone()
            if local:
                self._local_grads(i, gates, q, do, grads)
        self._entry_grads = torch.cat(entries[::-1])
        return self._entry_grads

    @in_ieee
    def local(self) -> None:
        """The gradients that need no exit gradient: all of dq, and what k, v and g get inside their own segment."""
        self._make_grads()
        for i, tile in enumerate(self.tiles):
            gates = self.gates(i)
            q, do = self.load(self.q, tile), self.load(self.do, tile, self.scale)
            self._local_grads(i, gates, q, do, self._state_grads(i, gates, q, do))

    def _state_grads(self, i: int, gates: Gates, q: Tensor, do: Tensor) -> Tensor:
        """Gradients of the states at the positions of tile i; at borders those of entry states. ``do`` is scaled."""
        grads = _added(gates.from_begin(q), do, slice(None, -1))
        grads[-1] = self.d_carries[i]
        gates.run_back(grads)
        return grads

    def _make_grads(self) -> None:
        make = self.exits.new_empty if self.causal else self.exits.new_zeros
        self.dq, self.dk, self.dv = (make(x.shape) for x in (self.q, self.k, self.v))
        if self.needs_dg:
            heads = self.g.shape[0] if self.g.dim() == 1 else self.g.shape[2]
            channels = self.key_dim if self.g.dim() == 4 else 1
            self.dg = make((*self.q.shape[:2], heads, channels))

    def _local_grads(self, i: int, gates: Gates, q: Tensor, do: Tensor, grads: Tensor) -> None:
        """One tile of :meth:`local`; ``do`` comes scaled, ``grads`` from :meth:`_state_grads`."""
        tile = self.tiles[i]
        if not self.causal:
            return self.store(self.dq, tile, do @ self.entries_in(i, self.entry).transpose(-1, -2))
        k, v = self.load(self.k, tile), self.load(self.v, tile)
        dq, dk, dv = self._within(gates, q, k, v, do)
        k_end = gates.to_end(k)
        grads = _without_borders(grads, tile)[1:]
        self.store(self.dk, tile, gates.add_to_end(dk, v, grads.transpose(-1, -2)))
        self.store(self.dv, tile, add_product(dv, k_end, grads))
        del dv
        states = _without_borders(self.states(i, gates, k_end, v, self.saved[0][i]), tile)[:-1]
        if self.entry is not None:
            states += self.entries_in(i, self.entry)
        self.store(self.dq, tile, gates.add_from_begin(dq, do, states.transpose(-1, -2)))
        if self.needs_dg:
            self.store(self.dg, tile, self._gate_grad(i, q.mul_(dq).addcmul_(k, dk, value=-1), self.d_carries[i], None))

    def _within(self, gates: Gates, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through the scores within each chunk."""
        d_scores = do @ v.transpose(-1, -2)
        if gates.per_channel:
            scores, dq, dk = diagonal.scores_and_grads(q, k, gates.log_decay, d_scores.tril_())
            return dq, dk, scores.transpose(-1, -2) @ do
        scores = q @ k.transpose(-1, -2)
        gates.mask(scores, d_scores)
        dv = scores.transpose(-1, -2) @ do
        del scores
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, dv

    @in_ieee
    def finish(self, d_exit: Tensor | None, reached: Sequence[bool] | None = None) -> Gradients:
        """The gradients, with what those of exit states add."""
        for i in self.touched(reached) if d_exit is not None else ():
            tile = self.tiles[i]
            gates = self.gates(i)
            k, v = self.load(self.k, tile), self.load(self.v, tile)
            grads = self._exits_out(i, d_exit)
            dk = gates.to_end(v @ grads.transpose(-1, -2))
            self.store(self.dk, tile, dk, add=True)
            self.store(self.dv, tile, gates.to_end(k) @ grads, add=True)
            if self.needs_dg:
                arrived = self._arrived(i, d_exit) if tile.shape.leaves else None
                self.store(self.dg, tile, self._gate_grad(i, (k * dk).neg_(), arrived, d_exit), add=True)
        grads = [dx.to(x.dtype) for x, dx in ((self.q, self.dq), (self.k, self.dk), (self.v, self.dv))]
        dg = self._reduced_gate() if self.needs_dg else None
        d_entry = entry_grads(self._entry_grads, self._exit_maps, d_exit) if self.needs_d_entry else None
        return Gradients(*grads, dg, None, d_entry)

    def _arrived(self, i: int, d_exit: Tensor) -> Tensor:
        """What is left at tile i's end of the exit gradient of the segment that runs out of it, [B, H, K, V]."""
        tile = self.tiles[i]
        grad = d_exit[tile.last]
        return grad if self.g is None else self._after[tile.chunks.stop - 1] * grad

    def _exits_out(self, i: int, d_exit: Tensor) -> Tensor:
        """What exit gradients add to the gradient of the state after each chunk of tile i, [n, B, H, K, V]."""
        tile = self.tiles[i]
        grads = d_exit[tile.first :].index_select(0, tile.shape.segments)
        return grads if self.g is None else grads.mul_(self._after[tile.chunks])

    def _gate_grad(self, i: int, gate: Tensor, d_carried: Tensor | None, d_exit: Tensor | None) -> Tensor:
        """dg_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + <S, dS> at the segment's end or the tile's, whichever is first.

        ``gate`` holds the summands [n, B, H, C, K]; the identity is that of GLA (arXiv 2312.06635, appendix C).
        """
        tile = self.tiles[i]
        gate = gate if self.g.dim() == 4 else gate.sum(-1, keepdim=True)
        later = (tile.shape.later.to(gate.dtype) @ gate.sum(-2).flatten(1)).view(*gate.shape[:3], -1)  # [n, B, H, a]
        anchors = gate.new_zeros(tile.ended[1] - tile.ended[0] + 1, *gate.shape[1:3], gate.shape[-1])
        if d_exit is not None:
            ended = slice(*tile.ended)
            anchors[:-1] = _inner(self.exits[ended], d_exit[ended], gate.shape[-1])
        if tile.shape.leaves:
            anchors[-1] = _inner(self.carry(i + 1, self.entry), d_carried, gate.shape[-1])
        later += anchors.index_select(0, tile.shape.anchors)
        return suffix_sum(gate, -2) + later.unsqueeze(-2)

    def _reduced_gate(self) -> Tensor:
        """The gate's gradient in the shape and dtype of ``g``."""
        if self.g.dim() == 1:
            return self.dg.sum((0, 1, 3)).to(self.g.dtype)
        return (self.dg if self.g.dim() == 4 else self.dg.squeeze(-1)).to(self.g.dtype)


def _added(a: Tensor, b: Tensor, where: slice) -> Tensor:
    """``a^T b`` of each chunk, [n, B, H, K, V], in the rows ``where`` of a tensor for the n + 1 positions of a tile."""
    out = a.new_empty(a.shape[0] + 1, *a.shape[1:3], a.shape[-1], b.shape[-1])
    torch.bmm(a.flatten(0, 2).transpose(-1, -2), b.flatten(0, 2), out=out[where].flatten(0, 2))
    return out


def _without_borders(states: Tensor, tile: Tile) -> Tensor:
    """``states`` with those at borders of segments set to zero, in place: nothing runs through them."""
    return states.index_fill_(0, tile.shape.borders, 0.0) if tile.shape.borders.numel() else states


def _inner(state: Tensor, grad: Tensor, channels: int) -> Tensor:
    """<S, dS> of states [..., K, V], per channel [..., K] or in all [..., 1]."""
    inner = (state * grad).sum(-1)
    return inner if channels > 1 else inner.sum(-1, keepdim=True)

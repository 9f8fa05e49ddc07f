"""Linear attention in Triton kernels, in stages: allocation and launches.

Two levels of tokens (TFLA, arXiv 2503.14376): a program walks through the chunks of one *superchunk* with the state in
registers, and only one fp32 state per superchunk ever reaches memory. The stages are

    forward     state_maps   decays; what each superchunk adds (reads k, v); scan over the superchunks of each segment
                local        o of the segments that no state enters, as of documents that begin here
                finish       o of the rest: the kernel adds entry states where it loads its own, at no cost in traffic
    backward    state_maps   decays; what each superchunk adds to the state's gradient (reads q, do); scan, reversed
                local        dq, which needs no exit gradient, so the exchange flies meanwhile
                finish       dv, dk; dg

and the backward keeps, beside the inputs, the state carried into each superchunk. Nothing waits for the device.
Inputs are bf16, fp16 or fp32; states, decays and accumulators are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lasp.kernels.operator import Gradients, begun, entry_grads, left
from lasp.kernels.operator import num_heads as heads_of
from lasp.kernels.segments import SegmentTable
from lasp.kernels.state import StateMap
from lasp.kernels.triton_linear import tiles as triton_tiles
from lasp.kernels.triton_linear.decays import Decay
from lasp.kernels.triton_linear.gate_grads import gate_grads
from lasp.kernels.triton_linear.gates import CHUNK_SAFE, channel_gates, sum_gates, token_gates
from lasp.kernels.triton_linear.output import mix, mix_grads
from lasp.kernels.triton_linear.states import local_states, scan_states
from lasp.kernels.triton_linear.superchunks import superchunks
from lasp.kernels.triton_linear.tiles import Tile, power_of_two
from lasp.kernels.triton_linear.tuning import tune_once

_LN2 = 0.6931471805599453
_LEAST_SCALE = 1e-30  # gradients of states are divided by the scale
_MOST_RUNS = 4  # of segments that no state enters: more launches would cost more than they hide
# log2 of the largest decay of a chunk that one reference point serves: its factors stay finite, and in fp32 accurate
_CHUNK_DECAY = {torch.bfloat16: 160.0, torch.float16: 20.0, torch.float32: 24.0}


class _Lightning:
    """What forward and backward share: inputs, tables, decays, launches.

    Attributes:
        dtype: of states: fp32.
        num_heads: H.
        saved: what the forward keeps for the backward: the state carried into each superchunk when every entry state is
            zero, fp32 [B * H, N, K, V]; nothing if not causal.
        kept_gates: None: decays are made again, which costs less than to keep them.
    """

    saved: tuple[Tensor, ...]
    kept_gates: None = None

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
        check(k, v)
        if 0.0 < abs(scale) < _LEAST_SCALE:
            raise ValueError(
                f"impl='triton' takes a scale of 0 or of {_LEAST_SCALE} and more in size, got {scale}. Scale q, or use "
                "impl='torch'."
            )
        self.k, self.v = k.contiguous(), v.contiguous()
        self.g, self.causal, self.scale, self.dtype = g, causal, scale, torch.float32
        self.batch, self.length, _, self.key_dim = k.shape
        self.value_dim, self.num_heads = v.shape[-1], num_heads
        self.decay = Decay.of(g)
        self.gate_heads = 1 if g is None else heads_of(g)
        self.exact = k.dtype == torch.float32
        self.rows = self.batch * self.num_heads
        self.plan = self._plan()
        self.pieces = superchunks(table, self.plan.superchunk)
        self.coarse = self.fine = self.flags = self.before = self.after = self.total = None
        if self.decay.per_token:
            self._prepare_gates(g.contiguous())
        elif self.decay == Decay.FIXED:
            self.g = g.contiguous()

    def _arch(self) -> int:
        """Compute capability, as 90; 0 without a GPU: the interpreter."""
        if not self.k.is_cuda:
            return 0
        major, minor = torch.cuda.get_device_capability(self.k.device)
        return 10 * major + minor

    def _plan(self) -> triton_tiles.Plan:
        call = self._arch(), self.k.dtype, self.key_dim, self.value_dim, self.decay, self.rows * self.length
        if self.k.is_cuda and triton_tiles.autotuned():
            tune_once(triton_tiles.entry(*call), self.k.device, (Forward, Backward))
        return triton_tiles.plan(*call)

    def _launch(self, kernel, programs: int, **arguments) -> None:
        """Run ``programs`` programs of a kernel; ``arguments`` are the kernel's, by name, and launch options."""
        with torch.cuda.device_of(self.k):
            kernel[(programs,)](**arguments)

    def _prepare_gates(self, g: Tensor) -> None:
        heads, count, chunk = self.gate_heads, self.pieces.count, self.plan.chunk
        make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=g.device)  # noqa: E731
        programs = self.batch * heads * count
        channels = self.key_dim if self.decay == Decay.CHANNEL else 1
        self.total = make(self.batch, heads, count, channels)
        self.illegal = torch.empty((self.batch, heads, count), dtype=torch.int32, device=g.device)
        if self.decay == Decay.TOKEN:
            self.fine = make(self.batch, heads, self.length)
            self.coarse = make(self.batch, heads, self.length) if self.exact else None
            self._launch(
                token_gates, programs, p_g=g, p_coarse=self.coarse, p_fine=self.fine, p_total=self.total,
                p_illegal=self.illegal, p_pieces=self.pieces.pieces, T=self.length, N=count,
                HG=heads, C=chunk, R=16, EXACT=self.exact, num_warps=4,
            )  # fmt: skip
        else:
            self.fine = make(*g.shape)
            self.flags = torch.empty((self.batch, heads, count), dtype=torch.int32, device=g.device)
            block = power_of_two(channels)
            self._launch(
                channel_gates, programs, p_g=g, p_fine=self.fine, p_total=self.total, p_flags=self.flags,
                p_illegal=self.illegal, p_pieces=self.pieces.pieces, T=self.length, N=count,
                limit=_CHUNK_DECAY[self.k.dtype], HG=heads, K=channels, BK=block, C=chunk,
                num_warps=max(4, block // 16),
            )  # fmt: skip
        segments = self.pieces.num_segments
        self.before, self.after = make(*self.total.shape), make(*self.total.shape)
        self.whole = make(segments, self.batch, heads, channels)
        block = power_of_two(channels, 1)
        self._launch(
            sum_gates, segments * self.batch * heads, p_total=self.total, p_before=self.before, p_after=self.after,
            p_whole=self.whole, p_segments=self.pieces.segments, N=count, S=segments, BHG=self.batch * heads,
            A=channels, BA=block, R=max(16, 1024 // block) if block > 1 else 128, num_warps=4,
        )  # fmt: skip

    def _variants(self) -> tuple[tuple[int, bool], ...]:
        """(C, SAFE) of the launches that share the superchunks of decaying channels; one launch for all else."""
        plain = (self.plan.chunk, False)
        return (plain, (CHUNK_SAFE, True)) if self.decay == Decay.CHANNEL and self.causal else (plain,)

    def _states(self, x: Tensor, z: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """States carried into each superchunk [B * H, N, K, V], and out of each segment [S, B, H, K, V]."""
        n, segments, (dk, dv) = self.pieces.count, self.pieces.num_segments, (self.key_dim, self.value_dim)
        states = torch.empty((self.rows, n, dk, dv), dtype=torch.float32, device=x.device)
        exits = torch.empty((segments, self.batch, self.num_heads, dk, dv), dtype=torch.float32, device=x.device)
        tile, block_k, block_v = self.plan.tiles["states"], power_of_two(dk), power_of_two(dv)
        heads = {"H": self.num_heads, "HG": self.gate_heads, "K": dk, "V": dv}
        for chunk, safe in self._variants():
            self._launch(
                local_states, n * self.rows * triton.cdiv(dv, tile.block), p_x=x, p_z=z, p_states=states,
                p_g=self.g, p_coarse=self.coarse, p_fine=self.fine, p_flags=self.flags, p_pieces=self.pieces.pieces,
                scale=self.scale, T=self.length, N=n, BH=self.rows, **heads, HX=x.shape[2], HZ=z.shape[2],
                BK=block_k, BV=tile.block, C=chunk, DECAY=int(self.decay), EXACT=self.exact, SAFE=safe, REV=reverse,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        rows = max(1, 1024 // block_v)
        self._launch(
            scan_states, segments * self.rows * triton.cdiv(dk, rows), p_states=states, p_exits=exits, p_g=self.g,
            p_total=self.total, p_pieces=self.pieces.pieces, p_segments=self.pieces.segments,
            N=n, S=segments, BH=self.rows,
            **heads, BK=rows, BV=block_v, DECAY=int(self.decay), REV=reverse, num_warps=4,
        )  # fmt: skip
        return states, exits

    def _mix(self, name: str, x, y, z, states, entry, out, *, pieces=None, other=None, rows=None) -> None:
        """o or dq of the superchunks ``pieces``, by default all: see :mod:`lasp.kernels.triton_linear.output`."""
        first, last = (0, self.pieces.count) if pieces is None else pieces
        tile: Tile = self.plan.tiles[name]
        dx, dz = x.shape[-1], z.shape[-1]
        for chunk, safe in self._variants():
            self._launch(
                mix, (last - first) * self.rows * triton.cdiv(dz, tile.block), p_x=x, p_y=y, p_z=z, p_out=out,
                p_states=states, p_entry=entry, p_other=other, p_rows=rows, p_g=self.g, p_coarse=self.coarse,
                p_fine=self.fine, p_flags=self.flags, p_entry_decay=self.before, p_pieces=self.pieces.pieces,
                scale=self.scale, T=self.length, N=self.pieces.count, BH=self.rows, first=first, count=last - first,
                H=self.num_heads, HX=x.shape[2], HY=y.shape[2], HZ=z.shape[2], HG=self.gate_heads,
                DX=dx, DZ=dz, BX=power_of_two(dx), BZ=tile.block, C=chunk, DECAY=int(self.decay), EXACT=self.exact,
                SAFE=safe, CAUSAL=self.causal, ENTERED=entry is not None, ROWS=rows is not None,
                HO=1 if other is None else other.shape[2], SWAP=name == "dq",
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


class Forward(_Lightning):
    """The forward in the stages of :class:`lasp.kernels.operator.ForwardStages`."""

    def __init__(self, k, v, g, beta, table, num_heads, causal, scale):
        super().__init__(k, v, g, beta, table, num_heads, causal, scale)
        shape = (self.batch, self.length, self.num_heads, self.value_dim)
        self.o = torch.empty(shape, dtype=v.dtype, device=v.device)
        if self.decay.per_token and k.is_cuda:
            torch._assert_async((self.illegal == 0).all(), "g must be a log-decay <= 0")
        self.done: list[tuple[int, int]] = []  # ranges of superchunks whose output local() has made

    def state_maps(self, initial: Tensor | None = None, *, q: Tensor | None = None) -> StateMap:
        """The map of every segment, log_decay [segments, b, H, a]; fp32. ``q`` is kept: one kernel does the rest."""
        if q is not None:
            self.q = q.contiguous()
        states, exits = self._states(self.k, self.v, reverse=False)
        self.saved = (states,) if self.causal else ()
        self._maps, self._initial = StateMap(exits, self._log_decay()), _contiguous(initial)
        return begun(self._maps, initial)

    def _log_decay(self) -> Tensor | None:
        groups = self.num_heads // self.gate_heads
        if self.decay == Decay.NONE:
            return None
        if self.decay == Decay.FIXED:
            total = self.pieces.lengths[:, None] * self.g.double().clamp(min=-100.0)
            return total.float().repeat_interleave(groups, 1)[:, None, :, None]
        total = self.whole * _LN2
        return total if groups == 1 else total.repeat_interleave(groups, 2)

    def local(self, q: Tensor, entered: Sequence[bool] | None) -> None:
        """The output of segments that no state enters but an initial one; nothing where ``entered`` is None."""
        self.q = q.contiguous()
        if not self.causal or entered is None:
            return
        first = self.pieces.first
        starts = [i for i, e in enumerate(entered) if not e and (i == 0 or entered[i - 1])]
        stops = [i + 1 for i, e in enumerate(entered) if not e and (i + 1 == len(entered) or entered[i + 1])]
        if len(starts) <= _MOST_RUNS:
            self.done = [(first[i], first[j]) for i, j in zip(starts, stops, strict=True)]
        for pieces in self.done:
            self._output(self._initial, pieces)

    def finish(self, entry: Tensor | None, entered: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """The output of the other segments, and the exit states."""
        entry, at = _contiguous(entry), 0
        for start, stop in [*self.done, (self.pieces.count, self.pieces.count)]:
            if at < start:
                self._output(entry, (at, start))
            at = stop
        return self.o, left(self._maps, entry, self.causal)

    def _output(self, entry: Tensor | None, pieces: tuple[int, int]) -> None:
        states = self.saved[0] if self.causal else None
        self._mix("o", self.q, self.k, self.v, states, entry, self.o, pieces=pieces)


class Backward(_Lightning):
    """The backward in the stages of :class:`lasp.kernels.operator.BackwardStages`."""

    def __init__(
        self,
        *inputs,
        q: Tensor,
        do: Tensor,
        saved: Sequence[Tensor | None],
        kept_gates: None,
        entry: Tensor | None,
        exits: StateMap,
        needs_dg: bool,
        needs_d_entry: bool,
    ):
        super().__init__(*inputs)
        self.q, self.do, self.saved = q.contiguous(), do.contiguous(), tuple(saved)
        self.entry, self.exits, self._exit_maps = _contiguous(entry), _contiguous(exits.state), exits
        self.needs_dg, self.needs_d_entry = needs_dg and self.g is not None, needs_d_entry
        self.dq = self.products = None

    def state_maps(self, *, local: bool = False) -> Tensor:
        """What this rank's outputs add to the gradient of each segment's entry state, [segments, B, H, K, V].

        ``local``: do the work of :meth:`local` as well.
        """
        self.grads, self._entry_grads = self._states(self.q, self.do, reverse=True)
        if local:
            self.local()
        return self._entry_grads

    def local(self) -> None:
        """dq, and for the gate's gradient the products q * dq."""
        self.dq = self._grad_like(self.q)
        other = None
        if self.needs_dg:
            self.products, other = self._make_products(), self.q
        states = self.saved[0] if self.causal else None
        self._mix("dq", self.do, self.v, self.k, states, self.entry, self.dq, other=other, rows=self.products)

    def _make_products(self) -> Tensor:
        """Room for what dg sums; :func:`lasp.kernels.triton_linear.output.keep_products` writes it for dq and dk."""
        if self.decay == Decay.CHANNEL:
            return self.k.new_empty((self.batch, self.length, self.num_heads, self.key_dim), dtype=torch.float32)
        self._dq_slots = triton.cdiv(self.key_dim, self.plan.tiles["dq"].block)
        slots = self._dq_slots + triton.cdiv(self.key_dim, self.plan.tiles["dk"].block)
        return self.k.new_empty((slots, self.rows, self.length), dtype=torch.float32)

    def finish(self, d_exit: Tensor | None, reached: Sequence[bool] | None = None) -> Gradients:
        """The gradients; all exit gradients are read, whatever ``reached`` says."""
        d_exit = _contiguous(d_exit)
        grads = self.grads if self.causal else None
        dk, dv = self._grad_like(self.k), self._grad_like(self.v)
        rows = None
        if self.needs_dg:
            rows = self.products if self.decay == Decay.CHANNEL else self.products[self._dq_slots :]
        self._mix_grads(grads, d_exit, dv, dk, rows)
        dg = self._gate_grad(d_exit) if self.needs_dg else None
        d_entry = entry_grads(self._entry_grads, self._exit_maps, d_exit) if self.needs_d_entry else None
        return Gradients(_reduced(self.dq, self.q), _reduced(dk, self.k), _reduced(dv, self.v), dg, None, d_entry)

    def _mix_grads(self, grads, d_exit, dv, dk, rows) -> None:
        """dv and dk: see :mod:`lasp.kernels.triton_linear.output`."""
        tile_v, tile_k = self.plan.tiles["dv"], self.plan.tiles["dk"]
        blocks = triton.cdiv(self.value_dim, tile_v.block) + triton.cdiv(self.key_dim, tile_k.block)
        for chunk, safe in self._variants():
            self._launch(
                mix_grads, self.pieces.count * self.rows * blocks, p_q=self.q, p_k=self.k, p_v=self.v, p_do=self.do,
                p_dv=dv, p_dk=dk, p_grads=grads, p_d_exit=d_exit, p_rows=rows, p_g=self.g, p_coarse=self.coarse,
                p_fine=self.fine, p_flags=self.flags, p_exit_decay=self.after, p_pieces=self.pieces.pieces,
                scale=self.scale or _LEAST_SCALE,  # divides gradients of states
                T=self.length, N=self.pieces.count, BH=self.rows,
                H=self.num_heads, HQ=self.q.shape[2], HK=self.k.shape[2], HV=self.v.shape[2], HG=self.gate_heads,
                K=self.key_dim, V=self.value_dim, PK=power_of_two(self.key_dim), PV=power_of_two(self.value_dim),
                BV=tile_v.block, BK=tile_k.block, C=chunk, DECAY=int(self.decay), EXACT=self.exact, SAFE=safe,
                CAUSAL=self.causal, LEFT=d_exit is not None, ROWS=rows is not None,
                num_warps=tile_v.warps, num_stages=tile_v.stages,
            )  # fmt: skip

    def _gate_grad(self, d_exit: Tensor | None) -> Tensor:
        dg = self.products  # of channels: each program replaces what it has read
        if self.decay != Decay.CHANNEL:
            dg = self.k.new_empty((self.batch, self.length, self.num_heads, 1), dtype=torch.float32)
        block = min(32, power_of_two(self.key_dim))
        blocks = triton.cdiv(self.key_dim, block) if self.decay == Decay.CHANNEL else 1
        self._launch(
            gate_grads, self.pieces.count * self.rows * blocks, p_rows=self.products, p_dg=dg,
            p_states=self.saved[0], p_grads=self.grads, p_entry=self.entry, p_exits=self.exits, p_d_exit=d_exit,
            p_g=self.g, p_before=self.before, p_after=self.after, p_pieces=self.pieces.pieces,
            T=self.length, N=self.pieces.count, BH=self.rows, slots=self.products.shape[0],
            H=self.num_heads, HG=self.gate_heads, K=self.key_dim, V=self.value_dim, BK=block,
            BV=min(64, power_of_two(self.value_dim)), C=self.plan.chunk, DECAY=int(self.decay),
            ENTERED=self.entry is not None, LEFT=d_exit is not None, num_warps=4,
        )  # fmt: skip
        if self.decay == Decay.FIXED:
            return dg.sum((0, 1, 3)).view(self.gate_heads, -1).sum(1).to(self.g.dtype)
        return _reduced(dg if self.decay == Decay.CHANNEL else dg.squeeze(-1), self.g)

    def _grad_like(self, x: Tensor) -> Tensor:
        """Room for the gradient of ``x`` with H heads; in fp32 where heads that share one are still to be summed."""
        shape = (self.batch, self.length, self.num_heads, x.shape[-1])
        return torch.empty(shape, dtype=x.dtype if x.shape[2] == self.num_heads else torch.float32, device=x.device)


def _reduced(grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` [B, T, H, ...] in the shape and dtype of ``x`` [B, T, Hx, ...]."""
    if grad.shape[2] != x.shape[2]:
        grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    return grad.to(x.dtype)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def unserved(dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """What the kernels would take instead of such inputs; empty where they serve."""
    if dtype not in _CHUNK_DECAY:
        return f"q, k, v in bfloat16, float16 or float32, got {dtype}"
    for name, size in (("K", key_dim), ("V", value_dim)):
        if not 1 <= size <= 256:
            return f"head dims up to 256, got {name} = {size}"
    return ""


def check(k: Tensor, v: Tensor) -> None:
    """Raise a ValueError for dtypes and head dims that the kernels do not serve."""
    why = unserved(k.dtype, k.shape[-1], v.shape[-1])
    if why:
        raise ValueError(f"impl='triton' takes {why}. Change that, or use impl='torch'.")

"""What others do with a linear-attention layer on a cut sequence, for a comparison side by side: no decay, causal.

``o_t = scale * sum over s <= t of (q_t . k_s) v_s``, on shards of equal length in contiguous order, every rank one. The
two here do not use that a state of constant size says all about earlier tokens; :func:`methods` has those that do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import CPContext, comm, linear_attention
from lasp.exchange import AUTO, EXCHANGES


@dataclass(frozen=True)
class Method:
    """One way to compute a layer.

    Attributes:
        label: one line that says what it does.
        exchange: of :func:`lasp.linear_attention`, which computes it; None: ``run`` does.
        run: ``run(q, k, v, cp) -> o``, each [B, T_local, H, D].
    """

    label: str
    exchange: str | None = None
    run: Callable[[Tensor, Tensor, Tensor, CPContext], Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
        """The layer's output for this rank's tokens."""
        return linear_attention(q, k, v, cp=cp)[0] if self.run is None else self.run(q, k, v, cp)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
    """Ring Attention (arXiv 2310.01889) on linear attention by the left product, as LASP-2 (arXiv 2502.07563) compares.

    Every key-value block goes round the ring; each rank computes ``(q k^T * mask) v`` with each block that it may see.
    """
    return _RingAttention.apply(q, k, v, cp.group, q.shape[-1] ** -0.5)


def ulysses(q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
    """Ulysses (arXiv 2309.14509): an all-to-all gives each rank some heads of the whole sequence; another undoes it.

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    if q.shape[2] % cp.cp_size:
        raise ValueError(
            f"ulysses gives every rank equally many heads: {q.shape[2]} heads, {cp.cp_size} ranks. Use a multiple of "
            f"{cp.cp_size} heads, or an exchange of states, which serves any number: all_gather, hierarchical."
        )
    q, k, v = (_Swap.apply(x, cp.group, cp.cp_size, True) for x in (q, k, v))
    return _Swap.apply(linear_attention(q, k, v)[0], cp.group, cp.cp_size, False)


_PAPERS = {
    "LASP-1": Method("the state goes from rank to rank, one after the other (arXiv 2404.02882)", "ring"),
    "LASP-2": Method("one all-gather of the states of all ranks (arXiv 2502.07563)", "all_gather"),
    "ZeCO": Method("the chain of LASP-1, the state in slices one behind the other (arXiv 2507.01004)", "all_scan"),
}
_OTHERS = {
    "auto": Method("the exchange that the cost model predicts to be fastest on the measured fabric", AUTO),
    "Ring Attention": Method("keys and values go round the ring, (q k^T * mask) v per block", run=ring_attention),
    "Ulysses": Method("all-to-all to heads of the whole sequence, and back", run=ulysses),
}


def methods() -> dict[str, Method]:
    """All methods: papers by their names, the other exchanges of the table by theirs, ``auto``, and other schemes."""
    published = {method.exchange for method in _PAPERS.values()}
    own = {e.name: Method(e.steps, e.name) for e in EXCHANGES.values() if e.name not in published}
    return _PAPERS | own | _OTHERS


class _Swap(torch.autograd.Function):
    """[B, T, H, D] of some tokens and all heads <-> of all tokens and some heads; the gradient goes the other way."""

    @staticmethod
    def forward(ctx, x, group, size, to_heads):
        ctx.options = group, size, not to_heads
        return _to_heads(x, group, size) if to_heads else _to_tokens(x, group, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        group, size, to_heads = ctx.options
        return _to_heads(dx, group, size) if to_heads else _to_tokens(dx, group, size), None, None, None


def _to_heads(x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    b, t, h, d = x.shape
    rows = x.view(b, t, size, h // size, d).permute(2, 0, 1, 3, 4).reshape(size * b * t, h // size, d)
    got = comm.all_to_all(rows, [b * t] * size, [b * t] * size, group, "ulysses").wait()
    return got.view(size, b, t, h // size, d).transpose(0, 1).reshape(b, size * t, h // size, d)


def _to_tokens(x: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    b, total, h, d = x.shape
    t = total // size
    rows = x.view(b, size, t, h, d).transpose(0, 1).reshape(size * b * t, h, d)
    got = comm.all_to_all(rows, [b * t] * size, [b * t] * size, group, "ulysses").wait()
    return got.view(size, b, t, h, d).permute(1, 2, 0, 3, 4).reshape(b, t, size * h, d)


class _Ring:
    """Blocks that go round: what this rank holds at step s began on rank ``cp_rank - s``."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._messages = comm.Messages(group, "ring attention")

    def pass_on(self, block: Tensor) -> tuple[Tensor, list]:
        """Begin to send ``block`` to the next rank and to receive the last one's, which is there after :meth:`wait`."""
        block, got = block.contiguous(), torch.empty_like(block)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return got, self._messages.post([(after, block)], [(before, got)])

    def wait(self, works: list) -> None:
        self._messages.wait(works)

    def close(self) -> None:
        self._messages.close()


class _RingAttention(torch.autograd.Function):
    """The left product, block by block; k, v and their gradients travel."""

    @staticmethod
    def forward(ctx, q, k, v, group, scale):
        ctx.save_for_backward(q, k, v)
        ctx.options = group, scale
        q, block = _by_head(q) * scale, torch.stack([_by_head(k), _by_head(v)])
        o, ring = torch.zeros_like(block[1]), _Ring(group)
        for step in range(ring.size):
            if step < ring.size - 1:
                coming, works = ring.pass_on(block)
            if step <= ring.rank:  # later blocks are masked
                for head in range(q.shape[1]):
                    scores = _masked(q[:, head] @ block[0][:, head].transpose(-1, -2), step == 0)
                    o[:, head] += scores @ block[1][:, head]
            if step < ring.size - 1:
                ring.wait(works)
                block = coming
        ring.close()
        return o.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v = (_by_head(x) for x in ctx.saved_tensors)
        group, scale = ctx.options
        do, dq, ring = _by_head(do) * scale, torch.zeros_like(q), _Ring(group)
        block, grads = torch.stack([k, v]), torch.zeros(2, *k.shape, dtype=k.dtype, device=k.device)
        for step in range(ring.size):
            if step < ring.size - 1:
                coming, works = ring.pass_on(block)
            if step <= ring.rank:
                for head in range(q.shape[1]):
                    k_, v_ = block[0][:, head], block[1][:, head]
                    d_scores = _masked(do[:, head] @ v_.transpose(-1, -2), step == 0)
                    scores = _masked(q[:, head] @ k_.transpose(-1, -2), step == 0)
                    dq[:, head] += d_scores @ k_
                    grads[0][:, head] += d_scores.transpose(-1, -2) @ q[:, head]
                    grads[1][:, head] += scores.transpose(-1, -2) @ do[:, head]
            if ring.size > 1:  # a block's gradients follow it, and go home with the last step
                grads, arriving = ring.pass_on(grads)
                ring.wait(arriving)
            if step < ring.size - 1:
                ring.wait(works)
                block = coming
        ring.close()
        return *(x.transpose(1, 2) for x in (dq, *grads)), None, None


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _masked(scores: Tensor, own: bool) -> Tensor:
    return scores.tril() if own else scores

"""An operator of the delta rule made of the reference, segment by segment: what a dense operator shall be, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels.operator import Gradients, begun, entry_grads, left
from lasp.kernels.reference import recurrence
from lasp.kernels.state import StateMap


class _Stages:
    def __init__(self, k, v, g, beta, table, num_heads, causal, scale):
        assert causal
        self.k, self.v, self.g, self.beta, self.scale = k, v, g, beta, scale
        self.bounds = table.bounds
        self.shape = (k.shape[0], num_heads, k.shape[-1], v.shape[-1])
        self.dtype = k.dtype

    def run(self, x: dict[str, Tensor | None], entry: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the exit states of all segments; ``x``: q, k, v, g, beta."""
        outputs, exits = [], []
        for (start, stop), state in zip(self.bounds, entry, strict=True):
            cut = {n: t if t is None or t.dim() == 1 else t[:, start:stop] for n, t in x.items()}
            o, left_behind = recurrence(**cut, scale=self.scale, initial_state=state)
            outputs.append(o)
            exits.append(left_behind)
        return torch.cat(outputs, 1), torch.stack(exits)

    def maps(self) -> StateMap:
        """The map of every segment: what it makes of zero, and of the identity where no value is added."""
        x = {"q": self.k, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta}
        state = self.run(x, self.k.new_zeros(len(self.bounds), *self.shape))[1]
        batch, heads, key_dim, _ = self.shape
        eye = torch.eye(key_dim, dtype=self.dtype).expand(len(self.bounds), batch, heads, key_dim, key_dim)
        matrix = self.run(x | {"v": torch.zeros_like(self.k)}, eye)[1]
        return StateMap(state, matrix=matrix)


class Forward(_Stages):
    saved, kept_gates = (), None

    def state_maps(self, initial=None, *, q=None):
        self.own, self.q = self.maps(), q
        return begun(self.own, initial)

    def local(self, q, entered):
        self.q = q

    def finish(self, entry, entered=None):
        start = torch.zeros_like(self.own.state) if entry is None else entry
        o, _ = self.run({"q": self.q, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta}, start)
        return o, left(self.own, entry, True)


class Backward(_Stages):
    def __init__(self, *inputs, q, do, saved, kept_gates, entry, exits, needs_dg, needs_d_entry):
        super().__init__(*inputs)
        assert not saved and kept_gates is None and exits.matrix is not None
        self.exits, self.do, self.needs_d_entry = exits, do, needs_d_entry
        x = {"q": q, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta}
        self.x = {n: None if t is None else t.detach().requires_grad_() for n, t in x.items()}
        self.entry = (torch.zeros_like(exits.state) if entry is None else entry).detach().requires_grad_()
        with torch.enable_grad():
            self.o, self.after = self.run(self.x, self.entry)
        error = (self.after - exits.state).abs().max() if entry is not None else self.after.new_zeros(())
        assert error < 1e-12, f"the exit states are not those of the forward: {error}"

    def state_maps(self, *, local=False):
        (self.grads,) = torch.autograd.grad(self.o, self.entry, self.do, retain_graph=True)
        return self.grads

    def local(self):
        pass

    def finish(self, d_exit, reached=None):
        d_after = torch.zeros_like(self.after) if d_exit is None else d_exit
        leaves = {n: t for n, t in self.x.items() if t is not None}
        found = torch.autograd.grad((self.o, self.after), list(leaves.values()), (self.do, d_after))
        d = dict(zip(leaves, found, strict=True))
        d_entry = entry_grads(self.grads, self.exits, d_exit) if self.needs_d_entry else None
        return Gradients(*(d.get(n) for n in ("q", "k", "v", "g", "beta")), d_entry)

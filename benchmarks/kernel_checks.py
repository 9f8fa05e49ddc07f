"""One step of an implementation for ``benchmarks/kernels.py``: its inputs, and whether its results are right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_baselines import SOFTMAX, Implementation, describe
from torch import Tensor

from lasp import linear_attention, softmax_attention
from lasp.models.gates import fixed_log_decay


@dataclass(frozen=True)
class Inputs:
    """q, k, v, do [1, T, H, D] and g of one step."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    do: Tensor

    @staticmethod
    def draw(gate: str, heads: int, dim: int, length: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random tensors; decays are the slopes of Lightning Attention, or those of GLA: logsigmoid(randn) / 16."""
        shape, at = (1, length, heads, dim), {"device": device}
        q, k, v, do = (torch.randn(shape, dtype=dtype, **at) for _ in range(4))
        g = None
        if gate == "fixed":
            g = fixed_log_decay("alibi", heads, device, torch.float32)
        elif gate in ("token", "channel"):
            g = torch.nn.functional.logsigmoid(torch.randn(shape if gate == "channel" else shape[:3], **at)).div_(16)
        return Inputs(q, k, v, g, do).prepared()

    def prepared(self) -> Inputs:
        """The same with gradients asked for."""
        for x in self.leaves().values():
            x.requires_grad_()
        return self

    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated: q, k, v, and g where it belongs to a token."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        return found if self.g is None or self.g.dim() == 1 else found | {"g": self.g}

    def part(self, start: int, stop: int) -> Inputs:
        """The same values of the tokens [start, stop), in float64."""
        cut = [None if x is None else x.detach() for x in (self.q, self.k, self.v, self.g, self.do)]
        return Inputs(*(x if x is None else (x if x.dim() == 1 else x[:, start:stop]).double() for x in cut)).prepared()

    def forward(self, run: Implementation, gate: str) -> Tensor:
        """o."""
        return run(gate, self.q, self.k, self.v, self.g)

    def step(self, run: Implementation, gate: str) -> tuple[Tensor, ...]:
        """o and the gradients of the leaves, in their order."""
        o = self.forward(run, gate)
        return o, *torch.autograd.grad(o, list(self.leaves().values()), self.do)


@dataclass
class Check:
    """What one short step showed.

    Attributes:
        errors: relative L2 error of o, dq, dk, dv, dg against float64; of those that could be computed.
        wrong_forward, wrong_backward: why the forward, the backward must not be timed, or None.
        step_seconds: of a second forward + backward.
    """

    errors: dict[str, float]
    wrong_forward: str | None = None
    wrong_backward: str | None = None
    step_seconds: float = 0.0


def exact(gate: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The reference for float64 inputs: lasp's PyTorch path, for softmax its blockwise softmax attention."""
    return softmax_attention(q, k, v) if gate == SOFTMAX else linear_attention(q, k, v, g, impl="torch")[0]


def check(run: Implementation, gate: str, inputs: Inputs, wait: Callable[[], None]) -> Check:
    """Compare one step of ``run`` with :func:`exact` on the same values; ``wait`` waits for the device."""
    wide = inputs.part(0, inputs.q.shape[1])
    names = ["o", *("d" + name for name in wide.leaves())]
    want = dict(zip(names, wide.step(exact, gate), strict=True))
    found = Check({})
    o = inputs.forward(run, gate)
    found.errors["o"] = error(o, want["o"])
    found.wrong_forward = wrong(found.errors, inputs.q.dtype)
    if found.wrong_forward:
        return found
    try:
        grads = torch.autograd.grad(o, list(inputs.leaves().values()), inputs.do)
    except Exception as fault:
        found.wrong_backward = describe(fault)
        return found
    found.errors |= {name: error(x, want[name]) for name, x in zip(names[1:], grads, strict=True)}
    found.wrong_backward = wrong(found.errors, inputs.q.dtype)
    wait()
    began = time.perf_counter()
    inputs.step(run, gate)
    wait()
    found.step_seconds = time.perf_counter() - began
    return found


def errors_at_length(gate: str, inputs: Inputs, o: Tensor, grads: tuple[Tensor, ...], tail: int) -> dict[str, float]:
    """Relative L2 errors at the cell's own length, where offsets are large; nothing for softmax.

    o everywhere, the reference going from slice to slice with its state; of ``grads`` (dq, dk, dv, ... or none) dk and
    dv of the last ``tail`` tokens, which depend on those alone.
    """
    if gate == SOFTMAX:
        return {}
    length, wide, state = o.shape[1], max(tail, (1 << 27) // o[0, 0].numel()), None  # a slice: 1 GiB in float64
    off, size = o.new_zeros((), dtype=torch.float64), o.new_zeros((), dtype=torch.float64)
    for start in range(0, length, wide):
        x = inputs.part(start, start + wide)
        with torch.no_grad():
            known = {"initial_state": state, "output_final_state": True, "impl": "torch"}
            want, state = linear_attention(x.q, x.k, x.v, x.g, **known)
            off += (o[:, start : start + wide].double() - want).square().sum()
            size += want.square().sum()
    found = {"o": (off / size).sqrt().item()}
    if grads:
        _, _, dk, dv, *_ = inputs.part(length - tail, length).step(exact, gate)
        found |= {"dk": error(grads[1][:, -tail:], dk), "dv": error(grads[2][:, -tail:], dv)}
    return found


def error(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return ((found.double() - want).norm() / want.norm()).item()


def wrong(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Which result is wrong rather than rounded: off by several times what its dtype explains."""
    limit = 0.05 if dtype.itemsize < 4 else 1e-3
    for name, off in errors.items():
        most = 4 * limit if name == "dg" else limit  # dg sums terms that cancel
        if not off <= most:  # NaN is wrong
            return f"{name} is wrong: relative L2 error {off:.2g} against float64"
    return None

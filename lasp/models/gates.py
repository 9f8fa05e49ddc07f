"""Log-decays of linear attention: gates, which make one from each token, and slopes, which are fixed per head.

Both are tables, ``GATES`` and ``SLOPES``: an entry is all that the configuration, the model, the memory model and the
plug-ins know of a decay. A gate reads a projection of the token, which the layer or its host makes: one number for each
log-decay. So the layer, Megatron's fused projection and the planner need not ask a gate how wide it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DecayGate(nn.Module):
    """Log-decay from the projected token: z + c, made <= 0 by :meth:`log_decay`, which each gate defines.

    The projection runs in the model's dtype, everything here in fp32 (fp64 for fp64).

    Args:
        heads: heads that this instance computes, h.
        channels: log-decays per head, K; None: one per head, without a dimension of its own.
        proj: makes z from the token; None where a host makes it.
        device, dtype: of the parameters.

    Attributes:
        per_head: names of the parameters whose first dimension runs over the heads, so that tensor parallelism cuts
            it. All others are replicated.
    """

    per_head: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, heads: int, channels: int | None, proj: nn.Module | None = None, *, device=None, dtype=None):
        super().__init__()
        self.heads, self.channels = heads, channels
        self.bias = nn.Parameter(torch.empty(heads * (channels or 1), device=device, dtype=dtype))
        self.proj = proj

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """c = 0."""
        nn.init.zeros_(self.bias)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, T, h * K], projected, to g [B, T, h, K]; without channels [B, T, h] to [B, T, h]."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        g = self.log_decay((z.to(dtype) + self.bias.to(dtype)).unflatten(-1, (self.heads, -1)))
        return g.squeeze(-1) if self.channels is None else g

    def log_decay(self, z: Tensor) -> Tensor:
        """z [B, T, h, K or 1], with the bias, to g <= 0 of the same shape and dtype."""
        raise NotImplementedError


class LogSigmoidGate(DecayGate):
    """g = logsigmoid(z + c) / gate_tau (GLA, arXiv 2312.06635)."""

    def __init__(self, *args, gate_tau: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate_tau = gate_tau

    def log_decay(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z) / self.gate_tau


class MambaGate(DecayGate):
    """g = -exp(A_log) softplus(z + c), A_log per head (Mamba-2, arXiv 2405.21060)."""

    per_head = ("bias", "A_log")

    def __init__(self, *args, device=None, dtype=None):
        super().__init__(*args, device=device, dtype=dtype)
        self.A_log = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """exp(A_log) uniform in [1, 16], softplus(c) log-uniform in [1e-3, 0.1] (arXiv 2405.21060)."""
        if self.bias.is_meta:
            return
        device = "cpu" if generator is None else generator.device
        with torch.no_grad():
            step = torch.rand(self.bias.shape, generator=generator, device=device, dtype=torch.float32)
            step = torch.exp(step * math.log(100) + math.log(1e-3))
            self.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            rate = torch.rand(self.A_log.shape, generator=generator, device=device, dtype=torch.float32)
            self.A_log.copy_(torch.log(1 + 15 * rate))

    def log_decay(self, z: Tensor) -> Tensor:
        return -self.A_log.to(z.dtype).exp()[:, None] * F.softplus(z)


@dataclass(frozen=True)
class Gate:
    """An entry of ``GATES``: one way to make a log-decay from each token.

    Attributes:
        module: a :class:`DecayGate`, called with its arguments and with ``options`` by name.
        formula: g, for the documentation; ``z`` is the projected token with the bias.
        kept: by device type, ``cpu`` and ``cuda``: how many fp32 tensors of the shape of g the backward pass keeps, g
            itself among them. Count the inputs and results that the operations of ``log_decay`` save.
        options: fields of MixerConfig that this gate reads, each with the value that None stands for.
    """

    module: Callable[..., DecayGate]
    formula: str
    kept: Mapping[str, int]
    options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


GATES: dict[str, Gate] = {
    "logsigmoid": Gate(  # logsigmoid keeps z, on a CPU a buffer too
        LogSigmoidGate,
        "logsigmoid(z) / gate_tau",
        kept={"cpu": 3, "cuda": 2},
        options={"gate_tau": 16.0},
    ),
    "mamba": Gate(  # softplus keeps z, the product keeps its result
        MambaGate,
        "-exp(A_log) softplus(z), A_log per head",
        kept={"cpu": 3, "cuda": 3},
    ),
}

# g of the head h of H, all heads at once: h is a tensor [H] of their numbers from 0
SLOPES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "alibi": lambda h, heads: -torch.exp2(-8 * (h + 1) / heads),
    "retnet": lambda h, heads: torch.log1p(-torch.exp2(-5 - h)),
}


def fixed_log_decay(slopes: str, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """g [H] of every head: the entry ``slopes`` of ``SLOPES``."""
    return SLOPES[slopes](torch.arange(heads, device=device, dtype=dtype), heads)

"""Feature maps: what linear attention applies to q and k in place of the exponential of softmax.

A map phi turns ``exp(q . k)`` into ``phi(q) . phi(k)``, which a recurrent state can carry. All take and return
[..., H, K]-shaped heads; the widening maps return [..., H, feature width].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def feature_width(name: str, key_dim: int, feature_dim: int | None = None) -> int:
    """Width of a head after the map ``name``: the K of the recurrent state."""
    second_order = key_dim * (key_dim + 1) // 2
    widths = {"taylor2": 1 + key_dim + second_order, "rebased": second_order, "hadamard": feature_dim or key_dim}
    return widths.get(name, key_dim)


def feature_map(name: str, key_dim: int, feature_dim: int | None = None, device=None, dtype=None) -> nn.Module:
    """The map ``name`` of :class:`~lasp.models.config.MixerConfig` for heads of width ``key_dim``."""
    if name == "hadamard":
        return Hadamard(key_dim, feature_dim or key_dim, device, dtype)
    if name == "rebased":
        return Rebased(key_dim, device, dtype)
    return {"identity": nn.Identity, "silu": nn.SiLU, "relu": nn.ReLU, "elu1": Elu1, "taylor2": Taylor2}[name]()


class Elu1(nn.Module):
    """phi(x) = elu(x) + 1 > 0 (arXiv 2006.16236)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class Taylor2(nn.Module):
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K): the Taylor expansion of exp (arXiv 2402.18668)."""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        first = x * width**-0.25
        return torch.cat([torch.ones_like(x[..., :1]), first, _second_order(x) * width**-0.5], -1)


class Rebased(nn.Module):
    """phi(q) . phi(k) = (q' . k')^2 with x' = gamma LayerNorm(x) + beta (arXiv 2402.10644)."""

    def __init__(self, key_dim: int, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(key_dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(key_dim, device=device, dtype=dtype))

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """gamma = 1, beta = 0."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], self.gamma.to(x.dtype), self.beta.to(x.dtype))
        return _second_order(x) * math.sqrt(2)


class Hadamard(nn.Module):
    """phi(x) = (W1 x) * (W2 x), the same matrices for all heads."""

    def __init__(self, key_dim: int, feature_dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, feature_dim, key_dim, device=device, dtype=dtype))

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, variance 1 / K."""
        init_normal(self.weight, self.weight.shape[-1] ** -0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[0]) * F.linear(x, self.weight[1])


def init_normal(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with normal values drawn in fp32 on the generator's device: equal numbers for every dtype and device."""
    if parameter.is_meta:
        return
    device = "cpu" if generator is None else generator.device
    with torch.no_grad():
        values = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        parameter.copy_(values * std)


def _second_order(x: Tensor) -> Tensor:
    """All products x_i x_j with i <= j, the squares over sqrt(2): y . y' = (x . x')^2 / 2."""
    parts = []
    for i in range(x.shape[-1]):
        here = x[..., i : i + 1]
        parts += [here * here * math.sqrt(0.5), here * x[..., i + 1 :]]
    return torch.cat(parts, -1)

"""Feature maps: what linear attention applies to q and k in place of the exponential of softmax.

A map phi turns ``exp(q . k)`` into ``phi(q) . phi(k)``, which a recurrent state can carry. All take and return
[..., H, K]-shaped heads; the widening maps return [..., H, feature width]. An entry of the table ``FEATURES`` is all
that the configuration, the model and the memory model know of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def __init__(self, key_dim: int, *, device=None, dtype=None):
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

    def __init__(self, key_dim: int, feature_dim: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, feature_dim, key_dim, device=device, dtype=dtype))

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, variance 1 / K."""
        init_normal(self.weight, self.weight.shape[-1] ** -0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[0]) * F.linear(x, self.weight[1])


@dataclass(frozen=True)
class FeatureMap:
    """An entry of ``FEATURES``: one map on the heads of q and k, apart for each.

    Attributes:
        make: ``make(key_dim, width, device=, dtype=)``: the module that maps [..., key_dim] to [..., width].
        formula: phi(x), for the documentation; K is key_dim.
        width: the width after the map, from key_dim; None: ``feature_dim`` sets it, key_dim where that is None.
        non_negative: whether phi(q) . phi(k) >= 0 always, which the sum normaliser needs.
        keeps_keys, keeps_features, keeps_scalars: what the backward pass keeps beside the result, in tensors [..., H,
            key_dim], [..., H, width] and [..., H] of the input's dtype, of one of q and k. Count the inputs and results
            that the operations of the map save.
    """

    make: Callable[..., nn.Module]
    formula: str
    width: Callable[[int], int] | None = lambda key_dim: key_dim
    non_negative: bool = False
    keeps_keys: int = 0
    keeps_features: int = 0
    keeps_scalars: int = 0

    def kept(self, key_dim: int, width: int) -> int:
        """Numbers per head and token, of one of q and k, that the backward pass keeps beside the result."""
        return self.keeps_keys * key_dim + self.keeps_features * width + self.keeps_scalars


def _without_parameters(module: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda key_dim, width, **place: module()


FEATURES: dict[str, FeatureMap] = {
    "identity": FeatureMap(_without_parameters(nn.Identity), "x"),
    "silu": FeatureMap(_without_parameters(nn.SiLU), "silu(x)", keeps_keys=1),
    "relu": FeatureMap(_without_parameters(nn.ReLU), "max(x, 0)", non_negative=True),  # keeps its result alone
    "elu1": FeatureMap(_without_parameters(Elu1), "elu(x) + 1", non_negative=True, keeps_keys=1),
    "hadamard": FeatureMap(Hadamard, "W1 x * W2 x", width=None, keeps_keys=1, keeps_features=2),
    "taylor2": FeatureMap(
        _without_parameters(Taylor2),
        "1, x and all products x_i x_j, scaled: phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(K)",
        width=lambda key_dim: 1 + key_dim + key_dim * (key_dim + 1) // 2,
        non_negative=True,
        keeps_keys=1,
    ),
    "rebased": FeatureMap(
        lambda key_dim, width, **place: Rebased(key_dim, **place),
        "all products of x' = gamma LayerNorm(x) + beta: phi(q) . phi(k) = (q' . k')^2",
        width=lambda key_dim: key_dim * (key_dim + 1) // 2,
        non_negative=True,
        keeps_keys=2,
        keeps_scalars=2,
    ),
}


def feature_width(name: str, key_dim: int, feature_dim: int | None = None) -> int:
    """Width of a head after the map ``name``: the K of the recurrent state."""
    width = FEATURES[name].width
    return feature_dim or key_dim if width is None else width(key_dim)


def feature_map(name: str, key_dim: int, feature_dim: int | None = None, device=None, dtype=None) -> nn.Module:
    """The map ``name`` of :class:`~lasp.models.config.MixerConfig` for heads of width ``key_dim``."""
    width = feature_width(name, key_dim, feature_dim)
    return FEATURES[name].make(key_dim, width, device=device, dtype=dtype)


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

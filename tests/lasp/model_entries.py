"""A gate and a feature map of the tests' own, to be entered into their tables."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn

from lasp.models.features import FEATURES, FeatureMap
from lasp.models.gates import GATES, DecayGate, Gate


class Quadratic(DecayGate):
    """g = -exp(rate) z^2, with a rate per head."""

    per_head = ("bias", "rate")

    def __init__(self, *args, device=None, dtype=None):
        super().__init__(*args, device=device, dtype=dtype)
        self.rate = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))

    def init_parameters(self, generator=None):
        super().init_parameters(generator)
        nn.init.constant_(self.rate, -1.0)

    def log_decay(self, z):
        return -self.rate.to(z.dtype).exp()[:, None] * z.square()


class Halves(nn.Module):
    """phi(x) = ((w x)^2, max(w x, 0)), twice as wide as x."""

    def __init__(self, key_dim, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(key_dim, device=device, dtype=dtype))

    def init_parameters(self, generator=None):
        nn.init.ones_(self.weight)

    def forward(self, x):
        y = x * self.weight
        return torch.cat([y.square(), y.relu()], -1)


QUADRATIC = Gate(Quadratic, "-exp(rate) z^2", kept={"cpu": 3, "cuda": 3})  # z, its square, g
HALVES = FeatureMap(
    lambda key_dim, width, **place: Halves(key_dim, **place),
    "(w x)^2 and max(w x, 0)",
    width=lambda key_dim: 2 * key_dim,
    non_negative=True,
    keeps_keys=3,  # x, w x, max(w x, 0)
)


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """``quadratic`` and ``halves`` in their tables, and nowhere else."""
    with mock.patch.dict(GATES, quadratic=QUADRATIC), mock.patch.dict(FEATURES, halves=HALVES):
        yield

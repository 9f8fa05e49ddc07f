"""The kinds of decay that the Triton kernels know. The host hands a kernel the number of a kind as DECAY.

The kernels compare it with the constants of the same names in :mod:`lasp.kernels.triton_linear.gates`, which take
their numbers from here. This file needs no Triton, so that a machine without it can read the table of tiles.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor


class Decay(IntEnum):
    """How finely a gate g tells tokens and channels apart."""

    NONE = 0  # g is None
    FIXED = 1  # [HG]: each head decays alike at all tokens
    TOKEN = 2  # [B, T, HG]: all key channels of a token decay alike
    CHANNEL = 3  # [B, T, HG, K]

    @classmethod
    def of(cls, g: Tensor | None) -> Decay:
        """The kind of a gate."""
        return cls.NONE if g is None else {1: cls.FIXED, 3: cls.TOKEN, 4: cls.CHANNEL}[g.dim()]

    @property
    def per_token(self) -> bool:
        """Whether g differs from token to token."""
        return self in (Decay.TOKEN, Decay.CHANNEL)

    def gate_shape(self, batch: int, length: int, heads: int, key_dim: int) -> tuple[int, ...] | None:
        """The shape of g, None where there is none."""
        shapes = (None, (heads,), (batch, length, heads), (batch, length, heads, key_dim))
        return shapes[self]

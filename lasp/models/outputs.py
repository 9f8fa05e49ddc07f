"""What becomes of a linear layer's output before its last projection: the tables of norms and of gates.

``none`` stands in both tables, with None for an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class OutNorm:
    """An entry of ``OUT_NORMS``: one RMSNorm.

    Attributes:
        spans_heads: takes the mean over all heads, so that one rank must have them all; else each head has its own.
        affine: has a weight.
    """

    spans_heads: bool
    affine: bool


@dataclass(frozen=True)
class OutGate:
    """An entry of ``OUT_GATES``: the output is multiplied by ``activation`` of a projection of the token.

    Attributes:
        activation: of the projection, element by element.
        kept: how many tensors of the projection's shape and dtype the backward pass keeps: inputs and results that
            the activation and the product save, the other factor apart.
    """

    activation: Callable[[Tensor], Tensor]
    kept: int


OUT_NORMS: dict[str, OutNorm | None] = {
    "none": None,
    "head_rms": OutNorm(spans_heads=False, affine=True),
    "full_rms": OutNorm(spans_heads=True, affine=True),
    "srms": OutNorm(spans_heads=True, affine=False),
}

OUT_GATES: dict[str, OutGate | None] = {
    "none": None,
    "silu": OutGate(F.silu, kept=2),
    "sigmoid": OutGate(torch.sigmoid, kept=1),
}

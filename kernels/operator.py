"""What every operator of linear attention shares."""

from __future__ import annotations

from torch import Tensor


def num_heads(*tensors: Tensor | None) -> int:
    """H: the largest head count among q, k, v, g, beta."""
    return max(x.shape[0] if x.dim() == 1 else x.shape[2] for x in tensors if x is not None)

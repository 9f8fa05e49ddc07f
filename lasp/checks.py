"""What every operator refuses of its arguments, before anything is sent."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Iterable
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def not_one_of(names: Iterable[str], value: object) -> str:
    """The rule that a name breaks which is none of ``names``, with the one that it looks like."""
    known = tuple(names)
    close = difflib.get_close_matches(str(value), known, n=1)
    return f"must be one of {known}, got {value!r}." + "".join(f" Did you mean {name!r}?" for name in close)


def check_tensors(*, optional: Container[str] = (), **arguments: Tensor | None) -> None:
    """Refuse what is no tensor of one of :data:`DTYPES`; those named in ``optional`` may be None."""
    for name, x in arguments.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            got = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name} must be a tensor of a floating dtype, got {got}. Pass float64, float32, bfloat16 or float16."
            )


def check_not_empty(**arguments: Tensor) -> None:
    """Refuse a tensor without elements."""
    for name, x in arguments.items():
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {tuple(x.shape)}. Leave the call out.")


def check_scale(scale: float | None, default: str, *, positive: bool = False) -> None:
    """Refuse a factor of the scores that is no finite number, or with ``positive`` one that is not above 0."""
    if scale is None:
        return
    number = isinstance(scale, Real) and not isinstance(scale, bool) and math.isfinite(scale)
    if not number or (positive and scale <= 0):
        rule = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"scale must be {rule} or None, got {scale!r}. Leave it None for {default}.")

"""bf16 in Triton's interpreter, which multiplies the bits of bf16 operands as integers and cuts off what casts lose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np


@contextlib.contextmanager
def bf16_rounds_as_on_a_gpu() -> Iterator[None]:
    """Products of bf16 values in fp32, and casts from fp32 to the nearest bf16 value, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, convert = builder.create_dot, interpreter._convert_float

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def nearest(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # finite values

    def product(self, a, b, d, *options):
        return dot(self, widened(a), widened(b), d, *options)

    with mock.patch.object(builder, "create_dot", product), mock.patch.object(interpreter, "_convert_float", nearest):
        yield

"""Which operator computes a linear layer: the one that is asked for, or the fastest that serves."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from lasp.kernels.operator import Operator
from lasp.kernels.torch_linear import operator as torch_operator

IMPLS = ("auto", "torch", "triton", "reference")


def operator_of(impl: str) -> Operator:
    """The stages of an operator, ``torch`` or ``triton``.

    Triton is imported where it is used.

    Raises:
        ValueError: it is not installed.
    """
    if impl == "torch":
        return torch_operator
    if not has_triton():
        raise ValueError("impl='triton' needs the package triton, which is not installed: pip install 'lasp[triton]'.")
    from lasp.kernels.triton_linear import operator as triton_operator

    return triton_operator


def choose_impl(q: Tensor, v: Tensor) -> str:
    """What ``auto`` stands for: the Triton kernels wherever they serve."""
    why = "the kernels are for CUDA devices"
    if q.is_cuda:
        why = why_not_triton(q.device, q.dtype, q.shape[-1], v.shape[-1])
    _announce("torch" if why else "triton", q.device.type, why)
    return "torch" if why else "triton"


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """Why the Triton kernels do not serve on this CUDA device; empty where they do."""
    if not has_triton():
        return "the package triton is not installed"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no compute capability 8.0"
    why = operator_of("triton").unserved(dtype, key_dim, value_dim)
    return f"the kernels take {why}" if why else ""


def check_triton(q: Tensor, v: Tensor) -> None:
    """Refuse tensors that the Triton kernels do not serve.

    Raises:
        ValueError: not on a CUDA device, outside of the interpreter; a dtype or head dim that they do not take.
    """
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl='triton' needs tensors on a CUDA device, got q on {q.device}. Use impl='torch' there.")
    operator_of("triton").check(q, v)


@functools.cache
def _announce(impl: str, device: str, why: str) -> None:
    """Say once per process and reason what ``auto`` chose."""
    message = "linear_attention: impl='auto' chose %r on %s%s"
    logging.getLogger("lasp").info(message, impl, device, f": {why}" if why else "")

"""Megatron-Core 0.16 on CPU and gloo, for tests only.

Megatron asks for CUDA by name in places where any device would do. While :func:`megatron_on_cpu` is entered:

- devices named "cuda" are the CPU, ``Tensor.cuda()`` does nothing, nothing is pinned, there is nothing to synchronise;
- the CUDA random generator is the CPU's, so dropout is not what it would be;
- a CPU tensor says that it is a CUDA tensor where the optimizers ask for ``Tensor.type()``;
- ``Tensor.float()`` leaves fp64 alone, so that a model can run in fp64 from end to end;
- a checkpoint's writers report through a queue of this process: Megatron's needs a server process per rank, which the
  daemons of a test pool may not start; they log no memory, which would need psutil.

What it cannot show: streams, overlap, CUDA graphs, TransformerEngine, fp8.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import warnings
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _on_cpu(value):
    names_cuda = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return CPU if names_cuda else value


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: _on_cpu(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if func is torch.Tensor.cuda or (func is torch.Tensor.float and args[0].dtype == torch.float64):
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(a) for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextlib.contextmanager
def megatron_on_cpu():
    """Megatron's modules find a "CUDA" device; see the top of this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.tensor_parallel import random

        import lasp.parallel.megatron.engine  # noqa: F401  torch.compile must not meet what is put in below

    nothing = lambda *args, **kwargs: None  # noqa: E731
    state = lambda *args, **kwargs: torch.get_rng_state()  # noqa: E731
    set_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: E731
    patches = [
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", nothing),
        (torch.cuda, "set_device", nothing),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", state),
        (torch.cuda, "set_rng_state", set_state),
        (random, "_get_cuda_rng_state", state),
        (random, "_set_cuda_rng_state", set_state),
        (filesystem_async, "_process_memory", lambda: 0),
        (filesystem_async, "_get_write_results_queue", queue.Queue),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.dict(multiprocessing.current_process()._config, daemon=False))
        stack.enter_context(_CudaIsCpu())
        yield

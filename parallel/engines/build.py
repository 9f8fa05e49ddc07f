"""The engine that a run names."""

from __future__ import annotations

import torch
from torch import nn

from lasp.parallel.engines.base import ModuleEngine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh


def build_engine(
    name: str,
    model: nn.Module,
    mesh: Mesh,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    *,
    offload_activations: bool = False,
) -> ModuleEngine:
    """The engine called ``name``: ``ddp``, ``fsdp2``, or ``zero0`` to ``zero3``.

    Args:
        offload_activations: keep what a forward saves for its backward in host memory; see
            :mod:`lasp.parallel.engines.offload`.

    Raises:
        ValueError: there is no such engine, or it cannot train in ``dtype`` or on this mesh.
    """
    engine = _build(name, model, mesh, settings, dtype)
    if offload_activations:
        engine.offload_activations()
    return engine


def _build(name: str, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype) -> ModuleEngine:
    if name == "ddp":
        from lasp.parallel.engines.ddp import DataParallelEngine

        return DataParallelEngine(model, mesh, settings, dtype)
    if name == "fsdp2":
        from lasp.parallel.engines.fsdp import ShardedEngine

        return ShardedEngine(model, mesh, settings, dtype)
    if name in ("zero0", "zero1", "zero2", "zero3"):
        from lasp.parallel.engines.zero import ZeroEngine

        return ZeroEngine(model, mesh, settings, dtype, int(name[-1]))
    raise ValueError(f"engine must be 'ddp', 'fsdp2', or 'zero0' to 'zero3', got {name!r}. Choose one of them.")

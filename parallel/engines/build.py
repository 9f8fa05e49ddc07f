"""The engine that a run names."""

from __future__ import annotations

import torch
from torch import nn

from lasp.parallel.engines.base import ModuleEngine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.engines.table import native_engine
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
    """The engine called ``name``, of :data:`lasp.parallel.engines.table.ENGINES`.

    Args:
        offload_activations: keep what a forward saves for its backward in host memory; see
            :mod:`lasp.parallel.engines.offload`.

    Raises:
        ValueError: there is no such engine, or it cannot train in ``dtype`` or on this mesh.
    """
    kind = native_engine(name)
    engine = kind.build(kind, model, mesh, settings, dtype)
    if offload_activations:
        engine.offload_activations()
    return engine

"""What a run computes with: the native model in one of our engines, or the same model on megatron-core."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch

from lasp.launch.config.schema import RunConfig
from lasp.launch.run.preflight import check_model
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.engines.base import Engine
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh


@contextlib.contextmanager
def backend_mesh(config: RunConfig, device: torch.device, timeout: timedelta) -> Iterator[Mesh]:
    """The grid of the job, with the process groups of its backend.

    Raises:
        ValueError: the grid does not fit the ranks; megatron-core or its devices are not there.
    """
    if config.backend == "native":
        yield Mesh.build(config.cp_size, config.dp_size, device=device, timeout=timeout)
        return
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise ValueError("backend=megatron needs megatron-core: pip install 'lasp[megatron]', or use backend=native.")
    _check_device(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists what is not installed, on every rank
        from lasp.parallel.megatron.mesh import megatron_mesh

    sizes = (config.tp_size, config.pp_size, config.cp_size, config.dp_size)
    virtual_stages, seed = config.megatron.virtual_stages, config.seed
    with megatron_mesh(*sizes, virtual_stages=virtual_stages, device=device, timeout=timeout, seed=seed) as mesh:
        yield mesh


def _check_device(device: torch.device) -> None:
    """Megatron-Core puts its tensors on CUDA devices, whatever the run says.

    Raises:
        ValueError: there is none, or the run wants another device.
    """
    try:
        found = torch.empty(0, device="cuda").device.type
    except (RuntimeError, AssertionError) as error:  # torch's own words for "none here" differ by build
        raise ValueError(
            "backend=megatron needs a CUDA device per rank, and this process finds none "
            f"({str(error).splitlines()[0].rstrip('.')}). Run it on GPUs, or use backend=native."
        ) from error
    if device.type != found:
        raise ValueError(
            f"backend=megatron computes on {found}, and this run has device={device.type}. Set device={found} and "
            "start no more ranks than devices, or use backend=native."
        )


def make_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The model with the same initial values on every rank and at every number of ranks, in its engine.

    Raises:
        ValueError: ranks have built different models.
    """
    model = LinearLlama(config.model, generator=torch.Generator().manual_seed(config.seed))
    check_model(model, mesh)
    settings = OptimizerSettings(steps=config.steps, **config.optimizer.model_dump())
    if config.backend == "native":
        model = model.to(mesh.device)
        offload = config.offload_activations
        return build_engine(config.engine, model, mesh, settings, config.torch_dtype, offload_activations=offload)
    from lasp.parallel.megatron.engine import MegatronEngine

    return MegatronEngine(model, mesh, settings, config.torch_dtype, **config.megatron.model_dump())

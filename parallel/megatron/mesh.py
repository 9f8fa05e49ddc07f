"""Megatron's process groups as the Mesh that data, logs and checkpoints of a run look at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from lasp.parallel.mesh import Mesh


@contextlib.contextmanager
def megatron_mesh(
    tp_size: int,
    pp_size: int,
    cp_size: int,
    dp_size: int | None,
    *,
    virtual_stages: int | None,
    device: torch.device,
    timeout: timedelta,
    seed: int,
) -> Iterator[Mesh]:
    """Megatron's groups over all ranks of the job while the block runs, in its order: tp, cp, dp, pp.

    Args:
        tp_size, pp_size, cp_size, dp_size: the grid; dp_size None: from the number of ranks.
        virtual_stages: model chunks per pipeline stage, None: one.
        device: this rank's.
        timeout: how long a rank waits for another one; whole minutes in Megatron's groups.
        seed: of Megatron's random generators.

    Raises:
        ValueError: the grid does not have as many places as there are ranks.
    """
    alone = not dist.is_initialized()
    if alone:  # Megatron asks for groups of one rank too
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    world = dist.get_world_size()
    one = tp_size * pp_size * cp_size
    if world % one or (dp_size is not None and dp_size * one != world):
        raise ValueError(
            f"tp_size * pp_size * cp_size * dp_size = {tp_size} * {pp_size} * {cp_size} * {dp_size or 'any'} must be "
            f"the number of ranks, {world}. Start a multiple of {one} ranks or change the sizes."
        )
    try:
        parallel_state.initialize_model_parallel(
            tp_size,
            pp_size,
            virtual_stages,
            context_parallel_size=cp_size,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31)
        yield current_mesh(device)
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()


def current_mesh(device: torch.device) -> Mesh:
    """The Mesh of the groups that Megatron has."""
    groups = [parallel_state.get_data_parallel_group(), parallel_state.get_context_parallel_group()]
    dp_group, cp_group = (group if group.size() > 1 else None for group in groups)
    return Mesh(
        *(group.size() for group in groups),
        *(group.rank() for group in groups),
        ranks=tuple(range(dist.get_world_size())),
        world_group=dist.group.WORLD,
        dp_group=dp_group,
        cp_group=cp_group,
        device=device,
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )

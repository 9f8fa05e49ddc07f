"""The parameters of a checkpoint in one process, also where Megatron left them in shards."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lasp.config import ModelConfig
from lasp.parallel.checkpoint import SHARDS, Checkpoint
from lasp.parallel.files import reading
from lasp.parallel.gpt_weights import to_native


def model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of a checkpoint by its native name, in the master's dtype, whichever backend wrote it."""
    if "model" in checkpoint.tensors:
        return checkpoint.tensors["model"]
    with reading(checkpoint.path):
        whole = _read_shards(checkpoint.path / SHARDS)
    return to_native(whole, ModelConfig.from_dict(checkpoint.state["model"]))


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The parameters of a distributed checkpoint, whole, by global name; the fp32 master copy where there is one."""
    master = "optimizer.state.param."  # of the distributed optimizer
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: value for key, value in known.items() if isinstance(value, TensorStorageMetadata)}
    masters = {key.removeprefix(master) for key in tensors if key.startswith(master)}
    wanted = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in tensors.items()
        if key.startswith(master) or not (key.startswith("optimizer.") or key in masters)
    }
    dcp.load(wanted, storage_reader=FileSystemReader(folder), no_dist=True)
    return {key.removeprefix(master): value for key, value in wanted.items()}

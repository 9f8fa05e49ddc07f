"""The parameters of a checkpoint in one process, also where Megatron left them in shards."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from lasp.models.config import ModelConfig
from lasp.parallel.checkpoints.checkpoint import MODEL, SHARDS, Checkpoint
from lasp.parallel.checkpoints.tensor_files import TensorInfo, read_whole
from lasp.parallel.file_errors import reading
from lasp.parallel.gpt.weights import to_native

MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")  # of the distributed and of the plain optimizer


def model_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of a checkpoint by its native name, in the master's dtype, whichever backend wrote it."""
    if checkpoint.shapes():
        with reading(checkpoint.path):
            return read_whole(checkpoint.tensors, f"{MODEL}.")
    with reading(checkpoint.path):
        whole = _read_shards(checkpoint.path / SHARDS)
    return to_native(whole, ModelConfig.from_dict(checkpoint.state["model"]))


def parameter_index(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Shape and dtype of every parameter of a checkpoint by its native name."""
    if shapes := checkpoint.shapes():
        return {name: checkpoint.index[f"{MODEL}.{name}"] for name in shapes}
    return {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in model_tensors(checkpoint).items()}


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The parameters of a distributed checkpoint, whole, by global name; the fp32 master copy where there is one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: value for key, value in known.items() if isinstance(value, TensorStorageMetadata)}
    names = {key: key for key in tensors if not key.startswith("optimizer.")}  # global name -> key
    names |= {key.removeprefix(prefix): key for prefix in MASTERS for key in tensors if key.startswith(prefix)}
    wanted = {
        key: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype) for key in sorted(names.values())
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return {name: wanted[key] for name, key in names.items()}

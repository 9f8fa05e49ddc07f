"""Tensors of a job on disk: every rank writes and reads its part, in files that hold bytes and no code.

torch.distributed.checkpoint plans who writes which piece and who needs which one; the pieces lie in safetensors files,
one per rank, whose headers say where in its tensor a piece belongs. So a job of another shape, or another engine, reads
just what it needs. A tensor is whole (any rank may bring it; one writes it) or a DTensor (every rank writes its share).
torch.distributed.checkpoint is imported by the first call: with DTensor it takes half as long as all of torch, and most
processes that know of checkpoints read and write none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write ``tensors`` by name into the new ``folder``. All ranks of ``group`` call it, each with what it holds.

    Args:
        group: gloo, or the backend of the tensors' devices. None: this process alone.

    Raises:
        OSError: the disk refuses it; on every rank.
    """
    import torch.distributed.checkpoint as dcp

    with _one_cause(), _quiet():
        dcp.save(
            dict(tensors),
            storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True),
            planner=dcp.DefaultSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from ``folder``, on any device. All ranks of ``group`` call it; their names may differ.

    Raises:
        OSError: a file cannot be read; on every rank.
    """
    import torch.distributed.checkpoint as dcp

    with _one_cause(), _quiet():
        dcp.load(
            dict(tensors),
            storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
            planner=dcp.DefaultLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


def read_whole(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, whole, on the CPU of this process; names without it."""
    wanted = {
        name: torch.empty(info.shape, dtype=info.dtype)
        for name, info in tensor_index(folder).items()
        if name.startswith(prefix)
    }
    read_tensors(folder, wanted)
    return {name.removeprefix(prefix): x for name, x in wanted.items()}


def tensor_index(folder: Path) -> dict[str, TensorInfo]:
    """What ``folder`` holds, by name; nothing where there is no such folder."""
    if not folder.is_dir():
        return {}
    import torch.distributed.checkpoint as dcp

    known = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: TensorInfo(tuple(info.size), info.properties.dtype) for name, info in sorted(known.items())}


@contextmanager
def _one_cause() -> Iterator[None]:
    """The first failure of any rank, in place of a list of tracebacks."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror} (rank {rank})", cause.filename) from error
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield

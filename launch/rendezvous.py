"""How a process finds the others of its job: the environment of torchrun, and a process group of our own
making.

The group is made from a store whose keys carry the restart attempt. A restarted job would otherwise meet
the addresses that the dead ranks of its last attempt left in the same store, and fail to connect to them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Job:
    """One process's place in a job, as torchrun describes it in the environment.

    Attributes:
        agent_store: whether the launcher hosts the store; otherwise rank 0 does.
        attempt: restarts before this one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    attempt: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Job | None:
        """The job that started this process; None where none did.

        Raises:
            ValueError: the environment names a job and leaves out a part of it.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        world_size = int(environment["WORLD_SIZE"])
        if world_size > 1 and "MASTER_PORT" not in environment:
            raise ValueError(
                "RANK and WORLD_SIZE are set but MASTER_PORT is not. Start with torchrun, or unset both to run alone."
            )
        return cls(
            rank=int(environment["RANK"]),
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 0)),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def choose_device(device: str, job: Job) -> torch.device:
    """``cpu``, ``cuda``, or ``auto``: CUDA where every local rank gets a device of its own.

    Raises:
        ValueError: ``cuda`` with fewer devices than local ranks.
    """
    devices = torch.cuda.device_count()
    if device == "cuda" and devices < job.local_world_size:
        raise ValueError(
            f"device=cuda needs one device per local rank: {job.local_world_size} ranks, {devices} device(s). "
            "Start fewer ranks or use device=cpu."
        )
    if device == "cpu" or devices < job.local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", job.local_rank)


@contextlib.contextmanager
def process_group(job: Job, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """The default process group of the job while the block runs. A job of one rank gets none."""
    if job.world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    is_host = job.rank == 0 and not job.agent_store
    store = dist.TCPStore(job.address, job.port, job.world_size, is_host, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"lasp/attempt{job.attempt}", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timeout,
    )
    yield  # after a failure the process ends; tearing the group down could wait for ranks that are gone
    dist.destroy_process_group()

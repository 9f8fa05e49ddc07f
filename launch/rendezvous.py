"""How a process finds the others of its job: the environment of torchrun, and a process group of our own making.

The group is made from a store whose keys carry the restart attempt. A restarted job would otherwise meet
the addresses that the dead ranks of its last attempt left in the same store, and fail to connect to them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lasp import comm

STORE = "LASP_STORE"  # HOST:PORT of a store that outlives every attempt, from lasp.launch.torchrun


@dataclass(frozen=True)
class Job:
    """One process's place in a job, as torchrun describes it in the environment.

    Attributes:
        agent_store: whether the launcher hosts the store; otherwise rank 0 does.
        attempt: restarts before this one, as this node counts them.
        meeting: names this attempt to all ranks, and no other one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    attempt: int = 0
    meeting: str = "attempt0"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Job | None:
        """The job that started this process; None where none did.

        Raises:
            ValueError: the environment names a job and leaves out a part of it.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None

        def number(name: str, default: int) -> int:
            text = environment.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(
                    f"{name} must be a whole number in the environment of a job, got {text!r}. Start with torchrun, or "
                    "unset RANK and WORLD_SIZE to run alone."
                )
            return int(text)

        rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
        if world_size > 1 and "MASTER_PORT" not in environment:
            raise ValueError(
                "RANK and WORLD_SIZE are set but MASTER_PORT is not. Start with torchrun, or unset both to run alone."
            )
        port = number("MASTER_PORT", 0)
        if port > 65535:
            raise ValueError(f"MASTER_PORT must be below 65536, got {port}. Choose a port that is free.")
        address, attempt = environment.get("MASTER_ADDR", "127.0.0.1"), number("TORCHELASTIC_RESTART_COUNT", 0)
        agent_store, meeting = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True", f"attempt{attempt}"
        if STORE in environment:  # torchrun then chooses a new port for each attempt, and nodes may count differently
            agent_store, meeting = True, f"{address}:{port}"
            address, _, store_port = environment[STORE].rpartition(":")
            if not address or not store_port.isdecimal():
                raise ValueError(
                    f"{STORE} must be HOST:PORT of the job's store, got {environment[STORE]!r}. lasp train with "
                    "launcher=torchrun sets it; unset it otherwise."
                )
            port = int(store_port)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=number("LOCAL_RANK", rank),
            local_world_size=number("LOCAL_WORLD_SIZE", world_size),
            address=address,
            port=port,
            agent_store=agent_store,
            attempt=attempt,
            meeting=meeting,
        )

    def store(self, timeout: timedelta) -> dist.TCPStore | None:
        """Keys and values that all ranks see; the launcher's outlives a restart. None for a process that runs alone.

        Raises:
            CommError: its address cannot be used, or nobody serves it within ``timeout``.
        """
        if self.world_size == 1 and not self.agent_store:
            return None
        is_host = self.rank == 0 and not self.agent_store
        if not is_host:
            self._await_store(timeout)
        try:
            return dist.TCPStore(
                self.address, self.port, self.world_size, is_host, timeout=timeout, wait_for_workers=False
            )
        except dist.DistError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise comm.CommError(
                f"rank {self.rank} of {self.world_size} cannot {'open' if is_host else 'use'} the job's store at "
                f"{self.address}:{self.port}: {reason}. Choose another MASTER_PORT, on every rank."
            ) from error

    def _await_store(self, timeout: timedelta) -> None:
        """Return when somebody listens at the store's address. A store's own client logs a page when nobody does."""
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                return socket.create_connection((self.address, self.port), timeout=left).close()
            except OSError as error:
                if time.monotonic() >= deadline:
                    host = "the launcher" if self.agent_store else "rank 0"
                    raise comm.CommError(
                        f"rank {self.rank} of {self.world_size} cannot reach the job's store at {self.address}:"
                        f"{self.port}, which {host} opens, within timeout_s = {timeout.total_seconds():g} s "
                        f"({error.strerror or error}). Start {host} with the same MASTER_ADDR and MASTER_PORT, or "
                        "raise timeout_s."
                    ) from error
            time.sleep(0.1)


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
def process_group(job: Job, device: torch.device, timeout: timedelta) -> Iterator[dist.TCPStore | None]:
    """The default process group of the job while the block runs; a job of one rank gets none. Gives the job's store.

    Raises:
        CommError: not all ranks of the job came within ``timeout``; a collective in the block failed.
    """
    store = job.store(timeout)
    if job.world_size == 1:
        yield store
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = dist.PrefixStore(f"lasp/{job.meeting}", store)
    try:
        _await_ranks(job, shared, timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=shared,
            rank=job.rank,
            world_size=job.world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise comm.CommError(
            f"rank {job.rank} of {job.world_size} lost the others while they met at {job.address}:{job.port} "
            f"(timeout_s = {timeout.total_seconds():g} s): {error}. Look at the first error of the other ranks."
        ) from error
    with comm.explained("collective", None, timed=False):  # those that torch issues itself, for sharded parameters
        yield store  # after a failure the process ends; tearing the group down could wait for ranks that are gone
    dist.destroy_process_group()


def _await_ranks(job: Job, store: dist.Store, timeout: timedelta) -> None:
    """Return when all ranks of the job have come.

    A process group waits for them as well, but when it gives up it cannot say for whom.
    """
    here = [f"here/{rank}" for rank in range(job.world_size)]
    store.set(here[job.rank], "")
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(here):
        if time.monotonic() >= deadline:
            missing = [rank for rank, key in enumerate(here) if not store.check([key])]
            raise comm.CommError(
                f"rank {job.rank} of {job.world_size} waited at {job.address}:{job.port} for timeout_s = "
                f"{timeout.total_seconds():g} s, and rank(s) {missing} did not come. Start them with the same "
                "MASTER_ADDR, MASTER_PORT and WORLD_SIZE, look at their first error, or raise timeout_s."
            )
        time.sleep(0.05)

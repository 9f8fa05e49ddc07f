"""How a process finds the others of its job: the environment of torchrun, and a process group of our own making.

The group is made from a store whose keys carry the restart attempt. A restarted job would otherwise meet
the addresses that the dead ranks of its last attempt left in the same store, and fail to connect to them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from lasp import comm
from lasp.parallel.watch.watchdog import Watchdog

ERROR = "lasp/error/{rank}"  # key of a rank's report of its end
LOOPBACK = "127.0.0.1"
_SERVE_TIMEOUT = timedelta(seconds=60)
_FOREIGN_S = 30.0  # a store answers at once, however busy; who does not is none
_WATCH_TIMEOUT = timedelta(seconds=10)
_NCCL_MARGIN = timedelta(seconds=60)

STORE = "LASP_STORE"  # HOST:PORT of a store that outlives every attempt, from lasp.launch.launchers.torchrun


@dataclass(frozen=True)
class Job:
    """One process's place in a job, as torchrun describes it in the environment.

    Attributes:
        agent_store: whether the launcher hosts the store; otherwise rank 0 does.
        attempt: restarts before this one, as this node counts them.
        meeting: names this attempt to all ranks, and no other one.
        quiet: whether the launcher collects the errors of its ranks and shows the one that matters.
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
    quiet: bool = False

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
            quiet=environment.get("LASP_LAUNCHER") == "local",
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
        return self._open(is_host, timeout)

    def watch_store(self) -> dist.TCPStore:
        """A second connection, for the watchdog: the first one is busy while it waits for a key."""
        return self._open(False, _WATCH_TIMEOUT)

    @property
    def store_host(self) -> str:
        """Who serves the store."""
        return "the launcher" if self.agent_store else "rank 0"

    def _open(self, is_host: bool, timeout: timedelta) -> dist.TCPStore:
        try:
            return _within(
                _FOREIGN_S + timeout.total_seconds() * is_host,
                lambda: dist.TCPStore(
                    self.address, self.port, self.world_size, is_host, timeout=timeout, wait_for_workers=False
                ),
            )
        except TimeoutError:
            raise comm.CommError(
                f"rank {self.rank} of {self.world_size} cannot use the job's store: who listens at {self.address}:"
                f"{self.port} has not answered for {_FOREIGN_S:g} s and is no store. Choose another MASTER_PORT, on "
                "every rank."
            ) from None
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
                    raise comm.CommError(
                        f"rank {self.rank} of {self.world_size} cannot reach the job's store at {self.address}:"
                        f"{self.port}, which {self.store_host} opens, within timeout_s = "
                        f"{timeout.total_seconds():g} s ({error.strerror or error}). Start {self.store_host} with the "
                        "same MASTER_ADDR and MASTER_PORT, or raise timeout_s."
                    ) from error
            time.sleep(0.1)


T = TypeVar("T")


def _within(seconds: float, make: Callable[[], T]) -> T:
    """What ``make`` returns or raises. A store's client waits for ever for the first word of what is no store.

    Raises:
        TimeoutError: it has not returned within ``seconds``.
    """
    outcome: list[tuple[T | None, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((make(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def open_store(bind: str = LOOPBACK, address: str | None = None) -> dist.TCPStore:
    """The store of a job, for a launcher to hold: on one address of this machine; torch's own listens on all networks.

    Args:
        address: by which others reach it; None: ``bind``.

    Raises:
        OSError: ``bind`` is no address of this machine.
    """
    with socket.socket() as listener:
        listener.bind((bind, 0))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        options = {"is_master": True, "wait_for_workers": False, "timeout": _SERVE_TIMEOUT}
        return dist.TCPStore(address or bind, port, master_listen_fd=listener.detach(), **options)


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
    """The default process group of the job, watched, while the block runs; a job of one rank has none.

    Gives the job's store. A collective that takes longer than ``timeout`` ends the job with a sentence that says whom
    it waits for, on every rank: as a CommError, or where the host does not wait, by the end of the process.

    Raises:
        CommError: not all ranks of the job came within ``timeout``; a collective in the block failed.
    """
    store = job.store(timeout)
    if job.world_size == 1:
        yield store
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = _own_keys(store, job.meeting)
    try:
        _await_ranks(job, shared, timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=shared,
            rank=job.rank,
            world_size=job.world_size,
            timeout=group_timeout(device, timeout),
        )
        watch = job.watch_store()
    except dist.DistError as error:
        raise comm.CommError(
            f"rank {job.rank} of {job.world_size} lost the others while they met at {job.address}:{job.port} "
            f"(timeout_s = {timeout.total_seconds():g} s): {error}. Look at the first error of the other ranks."
        ) from error
    watched = Watchdog(
        watch_keys(watch, job.meeting),
        job.rank,
        job.world_size,
        timeout.total_seconds(),
        range(job.rank - job.local_rank, job.rank - job.local_rank + job.local_world_size),
        lambda verdict: _end(job, watch, verdict),
        store_host=job.store_host,
    )
    with watched, comm.explained("collective", None, timed=False):  # those that torch issues itself
        yield store  # after a failure the process ends; tearing the group down could wait for ranks that are gone
    dist.destroy_process_group()


def group_timeout(device: torch.device, timeout: timedelta) -> timedelta:
    """The timeout to give to a process group: NCCL ends a process without a word, so the watchdog is to come first."""
    return timeout + _NCCL_MARGIN if device.type == "cuda" else timeout


def report_error(store: dist.Store, job: Job, message: str, details: str, *, expected: bool) -> None:
    """Leave an error where the launcher looks for it, with the time: the earliest is the cause.

    Args:
        message: for the user. details: a traceback, or nothing.
        expected: whether the message is the whole story.
    """
    report = {"rank": job.rank, "time": time.time(), "expected": expected, "message": message, "traceback": details}
    store.set(ERROR.format(rank=job.rank), json.dumps(report))


def _end(job: Job, store: dist.Store, verdict: str) -> None:
    """End this process with the verdict, while its main thread waits."""
    try:
        if job.quiet:
            report_error(store, job, verdict, "", expected=True)
        else:
            print(f"error: {verdict}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _own_keys(store: dist.Store, meeting: str) -> dist.Store:
    """Keys that a restarted job does not find."""
    return dist.PrefixStore(f"lasp/{meeting}", store)


def watch_keys(store: dist.Store, meeting: str = Job.meeting) -> dist.Store:
    """What the watchdogs of an attempt write down; see :func:`lasp.parallel.watch.watchdog.verdict`."""
    return dist.PrefixStore("watch", _own_keys(store, meeting))


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

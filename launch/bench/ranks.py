"""Ranks that answer: a driver asks them to run a function of one rank, and gets every rank's result.

    with local_ranks(4) as ranks:                        processes of this machine
    with virtual_ranks(cluster, ranks_per_host=2) as ranks:   processes on the hosts of a virtual cluster
    with joined_ranks(job) as ranks:                     the ranks of a job that torchrun started, this one being one
        times = ranks.ask("lasp.launch.bench.exchange:measure", exchange="ring")

A function gets a :class:`~lasp.parallel.mesh.Mesh` of one cp_group over all ranks, and plain values. Processes are
asked through their standard input and answer on their standard output, so that a question does not travel over the
links that are measured, and stay for many questions: starting Python costs seconds. In a job every rank runs the
driver and asks itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

from lasp.launch.bench.virtual_cluster import INTERRUPTED, VirtualCluster
from lasp.launch.launchers.local import rank_environment
from lasp.launch.launchers.process_tree import ending_with_parent
from lasp.launch.run.failures import RankFailure
from lasp.launch.run.rendezvous import Job, choose_device, open_store, process_group
from lasp.launch.run.signals import blocked, interrupting
from lasp.parallel.mesh import Mesh
from lasp.parallel.user_errors import kind_of, told

MAX_PROCESSES = 16
_START_S = 180.0  # sixteen processes on two cores
_EXACT_MEMORY = {  # of glibc: no reserve beyond 64 KiB, no heap per thread; no huge pages
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "THP_MEM_ALLOC_ENABLE": "0",
}
_TIMEOUT_S = "LASP_BENCH_TIMEOUT_S"
_DEVICE = "LASP_BENCH_DEVICE"


class Ranks(ABC):
    """Ranks 0 to ``size - 1`` of a job.

    Attributes:
        nodes: node id per rank.
        where: what they run on, in words.
        device: ``cpu`` or ``cuda``.
        one_machine: whether all run on one, whatever their nodes are.
        is_first: whether this process writes files and prints.
    """

    nodes: tuple[int, ...]
    where: str
    device: str
    one_machine: bool
    is_first: bool = True

    @property
    def size(self) -> int:
        """How many."""
        return len(self.nodes)

    @abstractmethod
    def ask(self, work: str, **arguments: Any) -> list[Any]:
        """``work`` (``module:function``) on every rank, as ``function(mesh, **arguments)``: results in rank order.

        Raises:
            ValueError: what the function raised. RankFailure: a rank ended, or did not answer in time.
        """


class JoinedRanks(Ranks):
    """The ranks of the job that this process belongs to. Every one of them runs the driver."""

    def __init__(self, mesh: Mesh):
        self._mesh, self.is_first = mesh, mesh.is_first
        hosts = mesh.gather(socket.gethostname())
        order = list(dict.fromkeys(hosts))
        self.nodes = tuple(order.index(host) for host in hosts)
        self.device, self.one_machine = mesh.device.type, len(order) == 1
        self.where = f"{mesh.world_size} rank(s) on {len(order)} host(s), {self.device}"

    def ask(self, work: str, **arguments: Any) -> list[Any]:
        """See :meth:`Ranks.ask`. A rank's own error ends that rank; the others name it when they have waited."""
        return self._mesh.gather(_call(work, self._mesh, arguments))


class ProcessRanks(Ranks):
    """Processes that this one has started, one per rank. Use :func:`local_ranks` or :func:`virtual_ranks`."""

    def __init__(self, commands: Sequence[list[str]], environments: Sequence[dict[str, str]], timeout_s: float):
        self._timeout_s = timeout_s
        self._processes: list[subprocess.Popen] = []
        try:
            for command, environment in zip(commands, environments, strict=True):
                with blocked() as before:  # a signal between start and append would leave a process behind
                    self._processes.append(_start(command, environment, before))
            self._answers(max(_START_S, timeout_s), "start")
        except BaseException:
            self.close()
            raise

    def ask(self, work: str, **arguments: Any) -> list[Any]:
        """See :meth:`Ranks.ask`. After an error the ranks are ended."""
        question = (json.dumps({"work": work, "arguments": arguments}) + "\n").encode()
        try:
            for process in self._processes:
                with contextlib.suppress(BrokenPipeError):  # it has ended: its answer says so
                    process.stdin.write(question)
                    process.stdin.flush()
            return self._answers(self._timeout_s, work.partition(":")[2])
        except BaseException:
            self.close()
            raise

    def _answers(self, timeout_s: float, what: str) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, dict[str, Any]] = {}
        partial = dict.fromkeys(range(len(self._processes)), b"")
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    silent = [rank for rank in partial if rank not in answers]
                    failed = [answer for answer in answers.values() if "error" in answer]
                    if failed:
                        break
                    raise RankFailure(f"{what}: rank(s) {silent} gave no answer within {timeout_s:g} s.")
                for key, _ in ready:
                    got = os.read(key.fd, 2**16)
                    partial[key.data] += got
                    if not got:
                        code = self._processes[key.data].wait()
                        answers[key.data] = {"error": f"rank {key.data} ended with exit code {code} in {what}."}
                    elif got.endswith(b"\n"):
                        answers[key.data] = json.loads(partial[key.data])
                    if key.data in answers:
                        selector.unregister(key.fileobj)
                        if "error" in answers[key.data]:  # the others have a moment to say more
                            deadline = min(deadline, time.monotonic() + 5.0)
        failed = [answer for answer in answers.values() if "error" in answer]
        if failed:
            _raise_earliest(failed)
        return [answers[rank]["value"] for rank in range(len(self._processes))]

    def close(self) -> None:
        """End the ranks."""
        with blocked():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
                process.stdin.close()
                process.stdout.close()
            self._processes = []


def _start(command: list[str], environment: dict[str, str], mask: set) -> subprocess.Popen:
    """A rank that ends with this process; ``mask``: the signals it blocks."""
    end_with_parent = ending_with_parent()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if end_with_parent is not None:
            end_with_parent()

    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which ends them
        preexec_fn=prepare,  # noqa: PLW1509  all it does is two system calls
    )


@contextlib.contextmanager
def local_ranks(
    size: int, *, device: str = "auto", timeout_s: float = 300.0, exact_memory: bool = False
) -> Iterator[ProcessRanks]:
    """``size`` ranks on this machine, of one thread each unless OMP_NUM_THREADS says more.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, as a run has it.
        timeout_s: how long an answer may take.
        exact_memory: what is freed returns to the system at once, so that what is resident is what is in use. Slower.

    Raises:
        ValueError: too many; too few devices.
    """
    _check_count(size)
    chosen = choose_device(device, Job(local_world_size=size)).type
    store = open_store()  # lives as long as the ranks
    own = {_TIMEOUT_S: str(timeout_s), _DEVICE: device, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    own |= _EXACT_MEMORY if exact_memory else {}
    environments = [{**os.environ, **rank_environment(rank, size, store.port), **own} for rank in range(size)]
    with (
        interrupting(INTERRUPTED),
        contextlib.closing(ProcessRanks([_COMMAND] * size, environments, timeout_s)) as ranks,
    ):
        ranks.nodes, ranks.device, ranks.one_machine = (0,) * size, chosen, True
        ranks.where = f"{size} rank(s) of one machine, {chosen}"
        yield ranks


@contextlib.contextmanager
def virtual_ranks(cluster: VirtualCluster, ranks_per_host: int, *, timeout_s: float = 300.0) -> Iterator[ProcessRanks]:
    """``ranks_per_host`` ranks on every host of a virtual cluster, one thread each.

    Raises:
        ValueError: more than 16 processes.
    """
    nodes = tuple(host for host in range(len(cluster.names)) for _ in range(ranks_per_host))
    _check_count(len(nodes))
    environments = [
        {
            **os.environ,
            **rank_environment(rank, len(nodes), 0),
            **cluster.environment(host),
            "LOCAL_RANK": str(rank % ranks_per_host),
            "LOCAL_WORLD_SIZE": str(ranks_per_host),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "LASP_LAUNCHER": "bench",
            "OMP_NUM_THREADS": "1",
            _TIMEOUT_S: str(timeout_s),
            _DEVICE: "cpu",
        }
        for rank, host in enumerate(nodes)
    ]
    commands = [cluster.command(host, _COMMAND) for host in nodes]
    with interrupting(INTERRUPTED), contextlib.closing(ProcessRanks(commands, environments, timeout_s)) as ranks:
        ranks.nodes, ranks.device, ranks.one_machine = nodes, "cpu", True
        ranks.where = f"virtual cluster: {len(cluster.names)} host(s) x {ranks_per_host} rank(s), TCP, tc tbf"
        yield ranks


@contextlib.contextmanager
def joined_ranks(job: Job, *, device: str = "auto", timeout_s: float = 300.0) -> Iterator[JoinedRanks]:
    """The ranks of a job that others have started; this process is one of them."""
    chosen = choose_device(device, job)
    with process_group(job, chosen, timedelta(seconds=timeout_s)):
        yield JoinedRanks(Mesh.build(job.world_size, device=chosen))


def found_ranks(size: int, *, device: str = "auto", timeout_s: float = 300.0):
    """The ranks of the job that started this process; where none did, ``size`` of this machine. A context manager."""
    job = Job.from_environment()
    if job is not None:
        return joined_ranks(job, device=device, timeout_s=timeout_s)
    return local_ranks(size, device=device, timeout_s=timeout_s)


_COMMAND = [sys.executable, "-m", "lasp.launch.bench.ranks"]


def _check_count(size: int) -> None:
    if not 1 <= size <= MAX_PROCESSES:
        raise ValueError(
            f"1 to {MAX_PROCESSES} ranks can be started on one machine, got {size}. Choose fewer hosts or ranks, or "
            "start more machines with torchrun."
        )


def _call(work: str, mesh: Mesh, arguments: dict[str, Any]) -> Any:
    return pkgutil.resolve_name(work)(mesh, **arguments)


def _failed(error: BaseException) -> dict[str, str]:
    """The part of a rank's answer that says what went wrong."""
    text = told(error) if kind_of(error) else f"a rank failed: {told(error)}"
    return {"error": text, "kind": (kind_of(error) or type(error)).__name__}


def _raise_earliest(failed: Sequence[dict[str, Any]]) -> None:
    """The cause is the answer that was given first.

    Raises:
        ValueError: as the rank raised it. RankFailure: any other end of a rank.
    """
    first = min(failed, key=lambda answer: answer.get("time", float("inf")))
    if first.get("kind") == "ValueError":
        raise ValueError(first["error"])
    raise RankFailure(first["error"], first.get("traceback", ""))


def _serve() -> None:
    """A rank: join the others, answer until there are no more questions."""
    replies = os.fdopen(os.dup(1), "w")  # what libraries print must not be taken for an answer
    os.dup2(2, 1)

    def reply(**answer: Any) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    try:
        job, device = Job.from_environment(), os.environ[_DEVICE]
        if device == "cpu":
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with joined_ranks(job, device=device, timeout_s=float(os.environ[_TIMEOUT_S])) as ranks:
            reply(value=None)
            for line in sys.stdin:
                question = json.loads(line)
                reply(value=_call(question["work"], ranks._mesh, question["arguments"]))
    except BaseException as error:
        reply(**_failed(error), time=time.time(), traceback=traceback.format_exc())
    finally:
        os._exit(0)  # an orderly end could wait for ranks that are gone


if __name__ == "__main__":
    _serve()

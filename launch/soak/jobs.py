"""Jobs for :mod:`lasp.launch.soak`: real ones, whose nodes are simulated on this machine and may be killed."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from lasp.launch.config.schema import RunConfig
from lasp.launch.launchers.process_tree import children, descendants, kill_tree
from lasp.launch.launchers.torchrun import job_shape, node_command
from lasp.launch.run.rendezvous import LOOPBACK, open_store

_SOON = {"last_call_timeout": 3, "keep_alive_interval": 1, "keep_alive_max_attempt": 5}  # a lost node is missed in 5 s
_START_S = 90.0  # for a node of a cluster to come up


class RunningJob(ABC):
    """A running job whose processes can be killed."""

    @abstractmethod
    def nodes(self) -> list[list[int]]:
        """The ranks of each node, by process number; an empty list for a node that is gone."""

    @abstractmethod
    def kill_node(self, node: int) -> None:
        """Take a node away, with all that runs on it."""

    @abstractmethod
    def start_node(self, node: int) -> None:
        """Bring a node back."""

    @property
    def takes_back(self) -> bool:
        """Whether a node that comes back is used at once; otherwise at the next restart."""
        return True

    @abstractmethod
    def exit_codes(self) -> list[int | None]:
        """Of the processes that stand for the job; None while they run."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


class TorchrunJob(RunningJob):
    """One agent of torch.distributed.run per node, all on this machine."""

    def __init__(self, config: RunConfig, arguments: Sequence[str], log: Path):
        self._store = open_store()  # the agents meet here, since the node that holds it must not be lost
        endpoint = f"{LOOPBACK}:{self._store.port}"
        self._command = node_command(config, arguments, endpoint=endpoint, is_host=False, rendezvous=_SOON)
        self._log = log.open("w")
        self._agents: list[subprocess.Popen] = [self._start() for _ in range(job_shape(config).max_nodes)]

    def nodes(self) -> list[list[int]]:
        """See :meth:`RunningJob.nodes`."""
        return [children(agent.pid) if agent.poll() is None else [] for agent in self._agents]

    def kill_node(self, node: int) -> None:
        """See :meth:`RunningJob.kill_node`."""
        kill_tree(self._agents[node].pid)
        self._agents[node].wait()

    def start_node(self, node: int) -> None:
        """See :meth:`RunningJob.start_node`."""
        self._agents[node] = self._start()

    def exit_codes(self) -> list[int | None]:
        """See :meth:`RunningJob.exit_codes`."""
        return [agent.poll() for agent in self._agents]

    def close(self) -> None:
        """See :meth:`RunningJob.close`."""
        for agent in self._agents:
            if agent.poll() is None:
                kill_tree(agent.pid)
            agent.wait()
        self._log.close()

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, **self._command.environment}
        return subprocess.Popen(
            self._command.arguments, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )


class RayJob(RunningJob):
    """``lasp train launcher=ray`` on a cluster of a head without ranks and ``nodes`` nodes, all on this machine."""

    def __init__(self, arguments: Sequence[str], nodes: int, ranks_per_node: int, log: Path):
        self._log, self._ranks = log.open("w"), ranks_per_node
        self._folder = tempfile.TemporaryDirectory(
            prefix="lr-", dir="/tmp", ignore_cleanup_errors=True
        )  # short: sockets
        token = Path(self._folder.name, "token")  # the nodes of a cluster share one
        token.write_text(secrets.token_hex(32))
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment = {**os.environ, **own}
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            self._address = f"{LOOPBACK}:{free.getsockname()[1]}"
        port, folder = self._address.rpartition(":")[2], self._folder.name
        self._nodes: list[subprocess.Popen] = []
        try:
            options = (f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}")
            self._head = self._start_ray("--head", *options)
            for node in range(nodes):
                self._nodes.append(self._head)
                self.start_node(node)
            train = [sys.executable, "-m", "lasp.launch.cli", "train", *arguments, f"ray.address={self._address}"]
            self._driver = self._start(train)
        except BaseException:
            self.close()
            raise

    @property
    def takes_back(self) -> bool:
        """See :meth:`RunningJob.takes_back`."""
        return False

    def nodes(self) -> list[list[int]]:
        """See :meth:`RunningJob.nodes`; a rank is a process that a worker of the node has started."""
        return [[pid for pid in descendants(node.pid) if _is_rank(pid)] for node in self._nodes]

    def kill_node(self, node: int) -> None:
        """See :meth:`RunningJob.kill_node`."""
        kill_tree(self._nodes[node].pid)
        self._nodes[node].wait()

    def start_node(self, node: int) -> None:
        """See :meth:`RunningJob.start_node`."""
        self._nodes[node] = self._start_ray(f"--address={self._address}", f"--num-cpus={self._ranks}")

    def exit_codes(self) -> list[int | None]:
        """See :meth:`RunningJob.exit_codes`."""
        return [self._driver.poll()]

    def close(self) -> None:
        """See :meth:`RunningJob.close`."""
        for process in (getattr(self, "_driver", None), *self._nodes, getattr(self, "_head", None)):
            if process is not None and process.poll() is None:
                kill_tree(process.pid)
                process.wait()
        self._folder.cleanup()
        self._log.close()

    def _start_ray(self, *options: str) -> subprocess.Popen:
        """A node, when it is up.

        Raises:
            RuntimeError: it does not come up.
        """
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={LOOPBACK}"]
        began = self._log.tell()
        node = self._start([*command, "--object-store-memory=100000000", "--disable-usage-stats", *options])
        deadline = time.monotonic() + _START_S
        while True:
            said = Path(self._log.name).read_bytes()[began:]
            if b"Ray runtime started" in said:
                return node
            if node.poll() is not None or time.monotonic() > deadline:
                kill_tree(node.pid)
                raise RuntimeError(f"a node of the Ray cluster did not start: {said.decode(errors='replace')[-500:]}")
            time.sleep(0.2)

    def _start(self, command: Sequence[str]) -> subprocess.Popen:
        self._log.seek(0, os.SEEK_END)
        options = {"stdout": self._log, "stderr": subprocess.STDOUT, "env": self._environment}
        return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, **options)


def _is_rank(pid: int) -> bool:
    try:
        return "lasp.launch.launchers.local" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False

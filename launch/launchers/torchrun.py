"""``launcher=torchrun``: one agent of torch.distributed.run per node, which starts the ranks and restarts them.

    lasp train CONFIG launcher=torchrun                             this machine
    lasp train CONFIG launcher=torchrun torchrun.nodes=2 torchrun.endpoint=node1:29400      the same, on each node
    lasp train CONFIG launcher=torchrun ... --print                 every node's command
    lasp train CONFIG launcher=torchrun ... --slurm > job.sbatch    a Slurm script

What this file adds to torchrun: the store at which the agents meet is the ranks' store too, so that it outlives every
attempt (torchrun's own would be lost, or differ between nodes, when a node goes); on one machine it listens on the
loopback address only; a signal asks the ranks to save, and a job that saved has not failed.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lasp.launch.config.schema import RunConfig
from lasp.launch.config.sections import TorchrunConfig
from lasp.launch.launchers.process_tree import children, ending_with_parent, kill_tree, send
from lasp.launch.run.failures import Interrupted, RankFailure
from lasp.launch.run.rendezvous import LOOPBACK, STORE, open_store
from lasp.launch.run.report import read_metrics
from lasp.launch.run.signals import SignalCount
from lasp.parallel.checkpoints import checkpoint as checkpoints

MODULE = "lasp.launch.cli"
_POLL_S = 0.1


@dataclass(frozen=True)
class JobShape:
    """Nodes and ranks of a job."""

    min_nodes: int
    max_nodes: int
    ranks_per_node: int

    @property
    def nodes(self) -> str:
        """As torchrun takes them."""
        return str(self.max_nodes) if self.min_nodes == self.max_nodes else f"{self.min_nodes}:{self.max_nodes}"


@dataclass(frozen=True)
class NodeCommand:
    """What one node runs: arguments, and what they need in the environment beside what is there."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        return shlex.join(["env", *(f"{key}={value}" for key, value in self.environment.items()), *self.arguments])


def job_shape(config: RunConfig) -> JobShape:
    """Nodes and ranks that ``config`` asks for.

    Raises:
        ValueError: at some number of nodes the sizes do not fit the ranks.
    """
    low, high = config.torchrun.node_range
    grid = config.ranks_per_sequence
    sizes = f"tp_size * pp_size * cp_size = {config.tp_size} * {config.pp_size} * {config.cp_size} = {grid}"
    if config.dp_size is not None and low != high:
        raise ValueError(
            f"dp_size = {config.dp_size} fixes the number of ranks, and torchrun.nodes = {low}:{high} lets it change. "
            "Leave dp_size out, or set one number of nodes."
        )
    ranks = config.torchrun.ranks_per_node
    if ranks is None:
        total = config.num_ranks
        if total % low:
            raise ValueError(
                f"{total} ranks (dp_size = {config.dp_size or 1} times {sizes}) cannot be spread evenly over "
                f"torchrun.nodes = {low}. Set torchrun.ranks_per_node, or sizes that make a multiple of {low} ranks."
            )
        ranks = total // low
    for nodes in range(low, high + 1):
        total = nodes * ranks
        if total % grid or (config.dp_size is not None and total != grid * config.dp_size):
            raise ValueError(
                f"{nodes} node(s) with torchrun.ranks_per_node = {ranks} are {total} ranks, which must be dp_size = "
                f"{config.dp_size or 'any number'} times {sizes}. Change torchrun.nodes, torchrun.ranks_per_node or "
                "the sizes."
            )
        if config.data.batch_size % (total // grid):
            raise ValueError(
                f"data.batch_size = {config.data.batch_size} sequences per step must be a multiple of dp_size, which "
                f"is {total // grid} with {nodes} node(s). Set data.batch_size to a multiple of {total // grid}."
            )
    return JobShape(low, high, ranks)


def node_command(
    config: RunConfig,
    arguments: Sequence[str],
    *,
    endpoint: str,
    is_host: bool | None,
    rendezvous: Mapping[str, Any] | None = None,
    work: str = "train",
) -> NodeCommand:
    """What one node of the job runs.

    Args:
        arguments: of ``lasp train``: CONFIG and overrides.
        endpoint: HOST:PORT of the store at which the nodes meet.
        is_host: whether torchrun opens it on this node; None: it compares host names and addresses.
        rendezvous: further options of torchrun's ``--rdzv-conf``.
        work: the command of ``lasp`` that each rank runs; one other than training is not tried again.
    """
    shape, options = job_shape(config), config.torchrun
    seconds = math.ceil(config.timeout_s)
    conf = {"join_timeout": seconds, "read_timeout": seconds, **(rendezvous or {})}
    if is_host is not None:
        conf = {"is_host": int(is_host), **conf}
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", shape.nodes, "--nproc-per-node", str(shape.ranks_per_node)]
    command += [
        "--max-restarts",
        str(options.max_restarts if work == "train" else 0),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        endpoint,
    ]
    command += [
        "--rdzv-id",
        job_id(options.job_id, config.run_dir),
        "--rdzv-conf",
        ",".join(f"{key}={value}" for key, value in conf.items()),
    ]
    if options.local_addr is not None or _is_loopback(endpoint):
        command += ["--local-addr", options.local_addr or "127.0.0.1"]
    environment = _environment(endpoint, shape.ranks_per_node, options.interface, config.timeout_s)
    return NodeCommand((*command, "-m", MODULE, work, *arguments), environment)


def job_id(asked: str | None, run_dir: Path) -> str:
    """A name that all nodes agree on: the one that the configuration asks for, Slurm's, or one made of ``run_dir``."""
    made = f"lasp-{hashlib.sha256(os.path.abspath(run_dir).encode()).hexdigest()[:8]}"
    return asked or os.environ.get("SLURM_JOB_ID") or made


def _environment(endpoint: str, ranks_per_node: int, interface: str | None, timeout_s: float) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {
        STORE: endpoint,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the agents' other store is bound to one node and one attempt
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(30, math.ceil(timeout_s))),  # to save after a SIGTERM
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks_per_node))),
    }
    if interface is not None:
        values |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    elif _is_loopback(endpoint):
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        values["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", loopback)
    return values


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0]
    return host == "localhost" or host.startswith("127.")


def all_commands(config: RunConfig, arguments: Sequence[str]) -> list[NodeCommand]:
    """The command of every node, the first of which hosts the endpoint.

    Raises:
        ValueError: the options do not fit, or belong to one node only.
    """
    options = config.torchrun
    for key in ("local_addr", "is_host"):
        if getattr(options, key) is not None and job_shape(config).max_nodes > 1:
            raise ValueError(
                f"torchrun.{key} = {getattr(options, key)} belongs to one node, and --print is for every node. Leave "
                "it out, and add it to the commands that need it."
            )
    endpoint = _checked_endpoint(options) or "127.0.0.1:29400"
    return [
        node_command(config, arguments, endpoint=endpoint, is_host=node == 0)
        for node in range(job_shape(config).max_nodes)
    ]


def sbatch_script(config: RunConfig, arguments: Sequence[str]) -> str:
    """A Slurm script that runs the job, saves before its end, and requeues itself where it did not finish.

    Raises:
        ValueError: the options do not fit, or are Slurm's to know.
    """
    for key in ("endpoint", "is_host", "local_addr", "job_id"):
        if (value := getattr(config.torchrun, key)) is not None:
            raise ValueError(
                f"torchrun.{key} = {value} has no effect with --slurm: the script asks Slurm. Leave it out."
            )
    shape = job_shape(config)
    own = ("torchrun.nodes=", "torchrun.ranks_per_node=")
    kept = [argument for argument in arguments if not argument.startswith(own)]
    command = [sys.executable, "-m", MODULE, "train", *kept, f"torchrun.ranks_per_node={shape.ranks_per_node}"]
    values = {
        "made_by": shlex.join(["lasp", "train", *arguments, "--slurm"]),
        "name": "".join(c if c.isalnum() or c in "-_." else "-" for c in config.run_dir.name) or "lasp",
        "nodes": shape.nodes.replace(":", "-"),
        "ranks_per_node": str(shape.ranks_per_node),
        "command": shlex.join(command),
    }
    text = (resources.files("lasp.launch.launchers") / "templates" / "train.sbatch").read_text()
    if config.device == "cpu":
        text = "".join(line for line in text.splitlines(keepends=True) if "--gpus-per-node" not in line)
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    return text


def run_node(config: RunConfig, arguments: Sequence[str], work: str = "train") -> None:
    """Run this node's part of the job; returns when the job is done, or has saved after a signal.

    The first SIGINT or SIGTERM asks the ranks to save at their next step and end, the second kills them.

    Raises:
        ValueError: the options do not fit.
        RankFailure: the job failed. Interrupted: a signal came before the ranks could save.
    """
    job_shape(config)
    asked = _checked_endpoint(config.torchrun)
    store = open_store() if asked is None else None  # this machine alone meets there
    endpoint = asked or f"{LOOPBACK}:{store.port}"
    is_host = False if asked is None else config.torchrun.is_host
    command = node_command(config, arguments, endpoint=endpoint, is_host=is_host, work=work)
    print(f"+ {command}", flush=True)
    agent = _Agent(command)
    code = agent.wait()
    del store
    if code == 0 or (agent.signals.count and has_saved(config.run_dir)):
        return
    if agent.signals.count:
        raise Interrupted
    if not agent.started_ranks:
        name = job_id(config.torchrun.job_id, config.run_dir)
        raise RankFailure(
            f"the nodes of the job did not meet at {endpoint} within timeout_s = {config.timeout_s:g} s; torchrun's "
            f"reason is above. Start the same command on torchrun.nodes = {config.torchrun.nodes} nodes, with the same "
            f"endpoint and job_id ({name}), let the first node's firewall accept its port, and set "
            "torchrun.is_host=true there and false elsewhere."
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"gave up with exit code {code}"
    times = f"more than torchrun.max_restarts = {config.torchrun.max_restarts} times" if work == "train" else "once"
    raise RankFailure(
        f"torchrun's agent on {socket.gethostname()} {how}: a rank failed {times}, or the endpoint's node is gone. The "
        "first error above is the cause."
    )


def _checked_endpoint(options: TorchrunConfig) -> str | None:
    """The endpoint, None for this machine alone.

    Raises:
        ValueError: several nodes without one, or options that need one.
    """
    if options.endpoint is None and options.node_range[1] > 1:
        raise ValueError(
            f"torchrun.endpoint is required with torchrun.nodes = {options.nodes}: the nodes meet there. Set it to "
            "HOST:PORT of the first node, like node1:29400."
        )
    for key in ("is_host", "local_addr"):
        if options.endpoint is None and getattr(options, key) is not None:
            raise ValueError(
                f"torchrun.{key} = {getattr(options, key)} has no effect without torchrun.endpoint: one machine meets "
                "on its loopback address. Set torchrun.endpoint=HOST:PORT, or leave it out."
            )
    return options.endpoint


def has_saved(run_dir: Path) -> bool:
    """Whether the newest checkpoint holds every step that was reported."""
    saved = checkpoints.list_checkpoints(run_dir / "checkpoints")
    records = read_metrics(run_dir)
    return bool(saved) and checkpoints.step_of(saved[-1]) >= max((record["step"] for record in records), default=0)


class _Agent:
    """torchrun's process on this node, and what signals this one gets for it."""

    def __init__(self, command: NodeCommand):
        self.signals, self.started_ranks = SignalCount(), False
        environment = {**os.environ, **command.environment}
        # A session of its own: a terminal's Ctrl-C reaches this process, which passes it on in its own way.
        self.process = subprocess.Popen(
            command.arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ending_with_parent(),  # noqa: PLW1509  all it does is one system call
        )

    def wait(self) -> int:
        """Its exit code. It has ended, and all that it started, however this returns."""
        with self.signals:
            try:
                self._attend()
            finally:
                if self.process.poll() is None:
                    kill_tree(self.process.pid)
                    self.process.wait()
        return self.process.returncode

    def _attend(self) -> None:
        """Return when the process has ended; signals are passed on to its ranks."""
        asked: set[int] | None = None
        killed = False
        while self.process.poll() is None:
            ranks = set(children(self.process.pid))
            self.started_ranks = self.started_ranks or bool(ranks)
            if self.signals.count > 1 and not killed:
                killed = True
                kill_tree(self.process.pid)
            elif self.signals.count and asked is None:
                # The ranks save and succeed, then so does the agent, without a limit on the time it takes.
                asked = ranks
                for pid in ranks or {self.process.pid}:
                    send(pid, signal.SIGTERM)
            elif asked and ranks - asked:  # one failed, and the agent has started them again
                asked = set()
                send(self.process.pid, signal.SIGTERM)
            time.sleep(_POLL_S)

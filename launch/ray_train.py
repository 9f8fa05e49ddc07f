"""Ranks on a Ray cluster: Ray Train starts them, this process shows the run and starts them again after a loss.

    lasp train CONFIG launcher=ray                         a Ray of its own, on this machine
    lasp train CONFIG launcher=ray ray.address=auto        the cluster that this machine is part of

Each attempt is one fit of Ray Train. Before it the launcher looks at what the living nodes have free and names the
node of every worker, so that cp groups stay on a node; at its start the workers tell their nodes and the ranks follow
from those. After a loss it looks again: the group comes back on the same nodes, or smaller where dp_size is null and
a node is gone, and goes on from its last checkpoint. The job's store is here and outlives every attempt. This is the
only file that imports ray. docs/ray.md says what listens where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from lasp.launch import local
from lasp.launch.local import Interrupted, RankFailure
from lasp.launch.placement import crossing_groups, largest_world, place_ranks
from lasp.launch.ray_worker import ENDED, FATAL, PLACE, RUN, STOP, WORK, tend_rank
from lasp.launch.rendezvous import Job
from lasp.launch.report import Screen, show, watch
from lasp.launch.schema import RunConfig

_SETTLE_S = 15.0  # for what a lost group held to be free again, before fewer ranks are started
_GROUP_START_S = 30.0  # for chosen nodes to give the workers room; a node may have died unnoticed
_CONNECT_S = 10.0
_STORE_TIMEOUT = timedelta(seconds=60)
_ENDED = re.compile(ENDED.replace("{rank}", r"(\d+)").replace("{code}", r"(-?\d+)"))
_LOOPBACK, _ALL = "127.0.0.1", "0.0.0.0"


def run_ray(config: RunConfig) -> None:
    """Train ``config`` on Ray; returns when all ranks have succeeded. Ctrl-C or SIGTERM: they save at their next step.

    Raises:
        ValueError: Ray or its cluster is not there, or has no room for the ranks within ``ray.wait_s``.
        RankFailure: a rank failed in a way that no restart cures, or more often than ``ray.max_failures``.
        Interrupted: a signal came before every rank could save.
    """
    if Job.from_environment() is not None:
        raise ValueError(
            "launcher=ray starts the ranks itself, but RANK and WORLD_SIZE are in the environment: something else has "
            "started this process as a rank. Start one process without them, or use launcher=torchrun."
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError("launcher=ray needs Ray: pip install 'lasp[ray]', or use launcher=local.")
    with _connected(config), _Signals() as signals:
        _Driver(config, _Cluster(config), signals).run()


@contextlib.contextmanager
def _connected(config: RunConfig) -> Iterator[None]:
    """This process is a driver of the cluster while the block runs; without an address the cluster ends with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths mean on a rank what they mean here
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(min(_GROUP_START_S, config.ray.wait_s))
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = config.ray.address
    try:
        if address is None:
            ray.init(
                "local", num_cpus=_local_cpus(config), object_store_memory=100 * 2**20, include_dashboard=False, **quiet
            )
        else:
            if address != "auto":
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"ray.address={address or 'null'}: no Ray cluster can be used from here: {reason}. Run the command on a "
            "machine of the cluster (`ray start --address=HEAD:6379` makes it one), or leave ray.address out."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _local_cpus(config: RunConfig) -> int:
    """What a Ray of our own may hand out: the cores, or more where more ranks are asked for, as any local run can."""
    ranks = config.ray.num_workers or config.ranks_per_sequence * (config.dp_size or 1)
    return max(os.cpu_count() or 1, ranks * config.ray.cpus_per_worker)


class _Cluster:
    """The nodes of the cluster and the slots that they have for ranks of this run."""

    def __init__(self, config: RunConfig):
        import ray

        self._ray = ray
        self.own_address = ray.util.get_node_ip_address()
        gpus = config.ray.gpus_per_worker
        if gpus is None:
            found = any(node["Resources"].get("GPU", 0) >= 1 for node in self._living())
            gpus = int(config.device == "cuda" or (config.device == "auto" and found))
        self.per_rank = {"CPU": config.ray.cpus_per_worker} | ({"GPU": gpus} if gpus else {})

    def _living(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def addresses(self) -> dict[str, str]:
        """The address of every living node, by node id."""
        return {node["NodeID"]: node["NodeManagerAddress"] for node in self._living()}

    def slots(self, *, free: bool) -> dict[str, int]:
        """Ranks that fit on each living node: ``free`` now, or if nothing else ran there."""
        from ray._private.state import available_resources_per_node  # what is free, Ray says in public only in sum

        found = available_resources_per_node() if free else {}
        slots = {}
        for node in self._living():
            resources = found.get(node["NodeID"], {}) if free else node["Resources"]
            slots[node["NodeID"]] = int(min(resources.get(name, 0) // need for name, need in self.per_rank.items()))
        return slots


class _Driver:
    """The run, attempt after attempt."""

    def __init__(self, config: RunConfig, cluster: _Cluster, signals: _Signals):
        self._config, self._cluster, self._signals = config, cluster, signals
        self._screen = Screen(config)
        self._unit = config.ranks_per_sequence
        self._group_size = config.tp_size * config.cp_size
        self._own_machine = set(cluster.addresses().values()) == {cluster.own_address}
        bind = config.ray.bind or (_LOOPBACK if self._own_machine else cluster.own_address)
        self._store_address = cluster.own_address if bind == _ALL else bind
        self._store = open_store(bind, self._store_address)
        task = {"config": config.portable(), "work": WORK, "arguments": {}}
        self._store.set(local._TASK, json.dumps(task))
        watch(self._store)

    def run(self) -> None:
        """Attempts until one succeeds, or none can."""
        self._say_what_listens()
        attempt = failures = 0
        waiting_since, limit = time.monotonic(), self._config.ray.max_failures
        try:
            while True:
                places = self._await_places(waiting_since, first=attempt == 0)
                error = self._fit(places, attempt)
                if error is None:
                    return
                self._refuse_to_go_on()
                cause = self._cause(error, len(places))
                attempt += 1
                if cause is None:  # the group did not come up: the time for that is limited, not the number
                    self._retry_start(error, waiting_since)
                    continue
                waiting_since, failures = time.monotonic(), failures + 1
                if 0 <= limit < failures:
                    raise RankFailure(
                        f"{cause} That is failure {failures}, and ray.max_failures = {limit}. Run again: it goes on "
                        "from what is saved.",
                        cause.details,
                    )
                of = "" if limit < 0 else f" of at most {limit}"
                self._screen.warn(f"{cause} Restart {failures}{of}, from the last checkpoint.")
        finally:
            self._screen.end()

    def _retry_start(self, error: Exception, since: float) -> None:
        """Warn of a group that did not come up, or raise if no later one can, or not in time."""
        wait_s, failure = self._config.ray.wait_s, getattr(error, "controller_failure", error)
        reason = f"Ray could not start the ranks: {_first_line(failure)}"
        if not type(failure).__name__.startswith("WorkerGroupStartup"):
            raise RankFailure(f"{reason} (--debug shows all of it).", str(error))
        if time.monotonic() - since > wait_s:
            raise RankFailure(f"{reason} That took longer than ray.wait_s = {wait_s:g} s.", str(error))
        self._screen.warn(f"{reason} Trying again.")

    def _say_what_listens(self) -> None:
        import ray

        self._screen.say(
            f"Ray at {ray.get_runtime_context().gcs_address}, the job's store at {self._store_address}:"
            f"{self._store.port}. Ray listens on every network interface of its machines and runs code for whoever "
            "reaches it: let a firewall pass the machines of the cluster only (docs/ray.md)."
        )

    def _await_places(self, since: float, first: bool) -> list[str]:
        """A node for every rank: of all that are wanted, or of fewer when these do not come and dp_size is null.

        Raises:
            ValueError: the wait since ``since`` has an end.
        """
        config, begun, told = self._config, time.monotonic(), False
        while True:
            self._refuse_to_go_on()
            free, whole = self._cluster.slots(free=True), self._cluster.slots(free=False)
            possible = largest_world(sum(whole.values()), self._unit, config.data.batch_size)
            fixed = self._unit * config.dp_size if config.dp_size else config.ray.num_workers if first else None
            wanted = fixed or max(self._unit, min(possible, config.ray.num_workers or possible))
            now = time.monotonic()
            if fixed is None and now - begun > min(_SETTLE_S, config.ray.wait_s / 2):
                wanted = largest_world(sum(free.values()), self._unit, config.data.batch_size) or self._unit
                wanted = min(wanted, config.ray.num_workers or wanted)
            if sum(free.values()) >= wanted:
                return place_ranks(free, wanted, self._group_size)
            if now - since > config.ray.wait_s:
                raise ValueError(self._missing(wanted, free, whole))
            if not told and now - begun > 2:
                told = True
                self._screen.say(f"waiting for room for {wanted} rank(s), at most ray.wait_s = {config.ray.wait_s:g} s")
            time.sleep(0.25)

    def _missing(self, wanted: int, free: dict[str, int], whole: dict[str, int]) -> str:
        need = " and ".join(f"{amount * wanted} {name}" for name, amount in self._cluster.per_rank.items())
        nodes = ", ".join(
            f"{free[node]} of {whole[node]} on {_short(node)} ({address})"
            for node, address in self._cluster.addresses().items()
            if node in free
        )
        return (
            f"{wanted} rank(s) need {need}, and after ray.wait_s = {self._config.ray.wait_s:g} s the cluster has room "
            f"for {sum(free.values())}: {nodes or 'it has no nodes'}. Add nodes, end other jobs, ask for fewer ranks "
            "or ray.cpus_per_worker, or raise ray.wait_s."
        )

    def _fit(self, places: list[str], attempt: int) -> Exception | None:
        """One attempt, shown while it runs; what Ray Train raised.

        Raises:
            RankFailure: with an error that no restart cures. Interrupted: a second signal came.
        """
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        environment = local._environment(0, len(places), self._store.port) | {
            RUN: self._config.portable()["run_dir"],
            "MASTER_ADDR": self._store_address,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._config.ray.cpus_per_worker)),
        }
        del environment["GLOO_SOCKET_IFNAME"]  # differs by node
        loopback = self._store_address == _LOOPBACK
        for key in (PLACE, local._ERROR):
            for rank in range(len(places)):
                self._store.delete_key(key.format(rank=rank))
        outcome: list[Exception | None] = []

        def fit(folder: str) -> None:
            try:
                DataParallelTrainer(
                    tend_rank,
                    train_loop_config={},
                    backend_config=_backend(self._group_size, environment, loopback),
                    scaling_config=ScalingConfig(
                        num_workers=len(places),
                        use_gpu="GPU" in self._cluster.per_rank,
                        resources_per_worker=dict(self._cluster.per_rank),
                        label_selector=[{"ray.io/node-id": node} for node in places],
                    ),
                    run_config=RayRunConfig(
                        name=f"attempt{attempt}",
                        storage_path=folder,  # Ray's notes on its own state; checkpoints are ours, in run_dir
                        failure_config=FailureConfig(0, controller_failure_limit=0, max_preemption_failures=0),
                    ),
                ).fit()
                outcome.append(None)
            except Exception as error:
                outcome.append(error.with_traceback(None))  # its frames would keep Ray's actors

        with tempfile.TemporaryDirectory(prefix="lasp-ray-", ignore_cleanup_errors=True) as folder:
            thread = threading.Thread(target=fit, args=(folder,), daemon=True)
            thread.start()
            self._watch(thread, len(places))
        return outcome[0]

    def _watch(self, thread: threading.Thread, world_size: int) -> None:
        """Show what the ranks say until the thread ends; pass a wish to stop on to them."""
        places_told = False
        while True:
            running = thread.is_alive()  # asked first: what was said before the end is shown after it
            show(self._store, self._screen)
            if self._store.check([FATAL]):
                fatal = json.loads(self._store.get(FATAL))
                raise RankFailure(fatal["message"], fatal["traceback"])
            if not running:
                return
            if self._signals.count == 1 and not self._store.check([STOP]):
                self._store.set(STOP, "")
            if self._signals.count > 1:
                raise Interrupted(_INTERRUPTED)
            if not places_told and len(places := self._places(world_size)) == world_size:
                self._tell_places([places[rank]["node"] for rank in range(world_size)])
                places_told = True
            time.sleep(0.1)

    def _refuse_to_go_on(self) -> None:
        if self._signals.count:
            raise Interrupted(_INTERRUPTED)

    def _places(self, world_size: int) -> dict[int, dict[str, Any]]:
        """What the ranks that have come so far said of themselves: worker, node, host and pid."""
        keys = {rank: PLACE.format(rank=rank) for rank in range(world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _tell_places(self, nodes: list[str]) -> None:
        addresses = self._cluster.addresses()
        by_node = defaultdict(list)
        for rank, node in enumerate(nodes):
            by_node[node].append(rank)
        told = [
            f"{_ranges(ranks)} on {_short(node)} ({addresses.get(node, 'gone')})" for node, ranks in by_node.items()
        ]
        self._screen.say(f"ranks {'; '.join(told)}")
        crossing = crossing_groups(nodes, self._group_size)
        if crossing and self._group_size > 1:
            sizes = ", ".join(f"{slots} on {_short(node)}" for node, slots in self._cluster.slots(free=False).items())
            self._screen.warn(
                f"group(s) {_ranges(crossing)} of tp_size x cp_size = {self._group_size} ranks do not fit on one node "
                f"(rank slots: {sizes}): their traffic crosses the network."
            )

    def _cause(self, error: Exception, world_size: int) -> RankFailure | None:
        """Why an attempt ended; None where it never began."""
        from ray.train import WorkerGroupError

        if not isinstance(error, WorkerGroupError):
            return None
        places, alive = self._places(world_size), self._cluster.addresses()
        gone = sorted({place["node"] for place in places.values()} - set(alive))
        if gone:
            ranks = [rank for rank, place in places.items() if place["node"] in gone]
            return RankFailure(f"node {' and '.join(map(_short, gone))} was lost, with rank(s) {_ranges(ranks)}.")
        rank_of = {place["worker"]: rank for rank, place in places.items()}
        codes, lost, last_words = [0] * world_size, [], {}
        for worker, failure in error.worker_failures.items():
            if found := _ENDED.search(str(failure)):
                codes[int(found[1])] = int(found[2])
                last_words[int(found[1])] = str(failure)[found.end() :].strip()
            else:
                lost.append(worker)
        if lost:
            names = [f"rank {rank_of[worker]}" if worker in rank_of else f"worker {worker}" for worker in lost]
            return RankFailure(f"the Ray worker of {' and '.join(names)} died.", str(error))
        reported = any(self._store.check([local._ERROR.format(rank=rank)]) for rank in range(world_size))
        if not reported and min(codes) >= 0:
            rank = min(last_words)
            return RankFailure(
                f"rank {rank} ended with exit code {codes[rank]}, saying: {last_words[rank]}", str(error)
            )
        return local._explain(codes, self._store)


_INTERRUPTED = "interrupted; not every rank could save its place. Run again: it goes on from what is saved."


class _Signals:
    """Counts SIGINT and SIGTERM while the block runs."""

    def __init__(self) -> None:
        self.count, self._previous = 0, {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, *_: Any) -> None:
        self.count += 1


def _backend(group_size: int, environment: dict[str, str], loopback: bool) -> Any:
    """What Ray Train runs on its workers before the training function: the ranks, from where the workers are.

    No process group is made here; the ranks make it. Ray pickles these definitions, so they import what they use.
    """
    from ray.train.backend import Backend, BackendConfig

    def seat() -> Any:
        import ray

        from lasp.launch.placement import Seat

        context = ray.get_runtime_context()
        devices = [int(number) for number in context.get_accelerator_ids().get("GPU", []) if str(number).isdecimal()]
        return Seat(context.get_node_id(), ray.util.get_node_ip_address(), min(devices, default=0))

    class Ranks(Backend):
        share_cuda_visible_devices = True  # a rank sees the GPUs of its node's ranks and takes that of its LOCAL_RANK

        def on_start(self, worker_group, backend_config):
            import ray

            from lasp.launch.placement import rank_environments
            from lasp.launch.ray_worker import NODE, WORKER, set_environment

            seats = worker_group.execute(seat)
            started = []
            for worker, own in enumerate(rank_environments(seats, group_size)):
                values = {**environment, **own, WORKER: str(worker), NODE: seats[worker].node}
                address = "127.0.0.1" if loopback else seats[worker].address
                started.append(worker_group.execute_single_async(worker, set_environment, values, address))
            ray.get(started)

    class RanksConfig(BackendConfig):
        @property
        def backend_cls(self):
            return Ranks

    return RanksConfig()


def open_store(bind: str, address: str) -> TCPStore:
    """The job's store, on one address of this machine; torch's own would listen on all of them."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((bind, 0))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"ray.bind={bind} must be an address of this machine, and it cannot be listened on: {error.strerror}. "
            "Leave it out or see `ip addr`."
        ) from error
    listener.listen(socket.SOMAXCONN)
    port = listener.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_STORE_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def _short(node: str) -> str:
    return f"node {node[:8]}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _ranges(numbers: list[int]) -> str:
    """0-3, 6 for 0, 1, 2, 3, 6."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)

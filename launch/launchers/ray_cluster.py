"""Ranks on a Ray cluster: the one file that imports ray.

    lasp train CONFIG launcher=ray                         a Ray of its own, on this machine
    lasp train CONFIG launcher=ray ray.address=auto        the cluster that this machine is part of

Each attempt of :mod:`lasp.launch.launchers.ray_driver` is one fit of Ray Train, on nodes that the driver chose. Ray
Train makes no process group and keeps no checkpoint of ours: it reserves, starts, watches and ends the workers.
docs/ray.md says what listens where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from lasp.launch.config.schema import RunConfig
from lasp.launch.config.sections import RayConfig
from lasp.launch.launchers.ray_driver import Driver, Loss, NotStarted
from lasp.launch.launchers.ray_worker import tend_rank
from lasp.launch.run.rendezvous import Job
from lasp.launch.run.signals import SignalCount

_GROUP_START_S = 30.0  # for chosen nodes to give the workers room; a node may have died unnoticed
_CONNECT_S = 10.0


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
    with _connected(config.ray, config.num_ranks), SignalCount() as signals:
        Driver(config, _Cluster(config.ray, config.device), signals).run()


@contextlib.contextmanager
def _connected(options: RayConfig, num_ranks: int) -> Iterator[None]:
    """This process is a driver of the cluster while the block runs; without an address the cluster ends with it.

    Args:
        num_ranks: that the sizes of the run ask for.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths mean on a rank what they mean here
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(min(_GROUP_START_S, options.wait_s))
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = options.address
    try:
        if address is None:
            cpus = _local_cpus(options, num_ranks)
            ray.init("local", num_cpus=cpus, object_store_memory=100 * 2**20, include_dashboard=False, **quiet)
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


def _local_cpus(options: RayConfig, num_ranks: int) -> int:
    """What a Ray of our own may hand out: the cores, or more where more ranks are asked for, as any local run can."""
    return max(os.cpu_count() or 1, (options.num_workers or num_ranks) * options.cpus_per_worker)


class _Cluster:
    """The nodes of the cluster and the slots that they have for ranks of this run."""

    def __init__(self, options: RayConfig, device: str):
        import ray

        self._ray = ray
        self.own_address = ray.util.get_node_ip_address()
        self.head_address = ray.get_runtime_context().gcs_address
        gpus = options.gpus_per_worker
        if gpus is None:
            found = any(node["Resources"].get("GPU", 0) >= 1 for node in self._living())
            gpus = int(device == "cuda" or (device == "auto" and found))
        self.per_rank = {"CPU": options.cpus_per_worker} | ({"GPU": gpus} if gpus else {})

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

    def fit(
        self, places: Sequence[str], attempt: int, group_size: int, environment: dict[str, str], loopback: bool
    ) -> None:
        """One attempt: a worker per rank, on the nodes ``places``, each tending its rank to the end.

        Raises:
            Loss: workers or their ranks failed. NotStarted: the group did not come up.
        """
        from ray.train import ControllerError, FailureConfig, ScalingConfig, WorkerGroupError
        from ray.train import RunConfig as FitConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        scaling = ScalingConfig(
            num_workers=len(places),
            use_gpu="GPU" in self.per_rank,
            resources_per_worker=dict(self.per_rank),
            label_selector=[{"ray.io/node-id": node} for node in places],
        )
        once = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
        backend = _backend(group_size, environment, loopback)
        with tempfile.TemporaryDirectory(prefix="lasp-ray-", ignore_cleanup_errors=True) as folder:
            run = FitConfig(name=f"attempt{attempt}", storage_path=folder, failure_config=once)  # of Ray's own notes
            trainer = DataParallelTrainer(
                tend_rank, train_loop_config={}, backend_config=backend, scaling_config=scaling, run_config=run
            )
            try:
                trainer.fit()
            except WorkerGroupError as error:
                raise Loss({worker: str(failure) for worker, failure in error.worker_failures.items()}) from None
            except ControllerError as error:
                failure = error.controller_failure
                raise NotStarted(failure, type(failure).__name__.startswith("WorkerGroupStartup")) from None


def _backend(group_size: int, environment: dict[str, str], loopback: bool) -> Any:
    """What Ray Train runs on its workers before the training function: the ranks, from where the workers are.

    No process group is made here; the ranks make it. Ray pickles these definitions, so they import what they use.
    """
    from ray.train.backend import Backend, BackendConfig

    def seat() -> Any:
        import ray

        from lasp.launch.launchers.placement import Seat

        context = ray.get_runtime_context()
        devices = [int(number) for number in context.get_accelerator_ids().get("GPU", []) if str(number).isdecimal()]
        return Seat(context.get_node_id(), ray.util.get_node_ip_address(), min(devices, default=0))

    class Ranks(Backend):
        share_cuda_visible_devices = True  # a rank sees the GPUs of its node's ranks and takes that of its LOCAL_RANK

        def on_start(self, worker_group, backend_config):
            import ray

            from lasp.launch.launchers.placement import rank_environments
            from lasp.launch.launchers.ray_worker import NODE, WORKER, set_environment

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

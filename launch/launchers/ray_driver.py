"""A run on a Ray cluster, attempt after attempt: where the ranks go, what is shown, when to go on and when to end.

Before an attempt the driver looks at what the living nodes have free and names the node of every worker, so that cp
groups stay on a node; at its start the workers tell their nodes and the ranks follow from those. After a loss it looks
again: the group comes back on the same nodes, or smaller where dp_size is null and a node is gone, and goes on from its
last checkpoint. The job's store is in this process and outlives every attempt.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.distributed import TCPStore

from lasp.comm.hangs import ranges
from lasp.launch.config.schema import RunConfig
from lasp.launch.launchers.local import TASK, explain_failure, rank_environment
from lasp.launch.launchers.placement import crossing_groups, largest_world, place_ranks
from lasp.launch.launchers.ray_worker import END, ENDED, FATAL, PLACE, RUN, STOP, WORK
from lasp.launch.run.failures import Interrupted, RankFailure
from lasp.launch.run.rendezvous import ERROR, LOOPBACK, open_store
from lasp.launch.run.report import Screen, show, watch
from lasp.launch.run.signals import SignalCount

_END_S = 60.0  # for an attempt whose ranks end themselves
_SETTLE_S = 15.0  # for what a lost group held to be free again, before fewer ranks are started
_ENDED = re.compile(ENDED.replace("{rank}", r"(\d+)").replace("{code}", r"(-?\d+)"))
_ALL = "0.0.0.0"


class Loss(Exception):
    """Workers failed. ``failures``: what is known, by the worker's number; for a rank that ended, as ``ENDED``."""

    def __init__(self, failures: Mapping[int, str]):
        super().__init__("\n".join(failures.values()))
        self.failures = failures


class NotStarted(Exception):
    """A group did not come up. ``may_pass``: a later attempt may succeed."""

    def __init__(self, failure: Exception, may_pass: bool):
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        super().__init__(f"Ray could not start the ranks: {(lines or [type(failure).__name__])[0].rstrip('.')}")
        self.details, self.may_pass = str(failure), may_pass


class Cluster(Protocol):
    """What the driver asks of Ray: see :mod:`lasp.launch.launchers.ray_cluster`."""

    own_address: str
    head_address: str
    per_rank: Mapping[str, int]

    def addresses(self) -> dict[str, str]: ...

    def slots(self, *, free: bool) -> dict[str, int]: ...

    def fit(
        self, places: Sequence[str], attempt: int, group_size: int, environment: dict[str, str], loopback: bool
    ) -> None: ...


class Driver:
    """The run, attempt after attempt."""

    def __init__(self, config: RunConfig, cluster: Cluster, signals: SignalCount):
        self._config, self._cluster, self._signals = config, cluster, signals
        self._screen = Screen(config.steps, config.log.every_s)
        self._unit = config.ranks_per_sequence
        self._group_size = config.tp_size * config.cp_size
        own_machine = set(cluster.addresses().values()) == {cluster.own_address}
        bind = config.ray.bind or (LOOPBACK if own_machine else cluster.own_address)
        if bind.startswith("127.") and not own_machine:
            raise ValueError(
                f"ray.bind={bind} must be an address that the cluster's other machines reach, like "
                f"{cluster.own_address}. Set it to that, or leave it out."
            )
        self._store_address = cluster.own_address if bind == _ALL else bind
        self._store = _open_store(bind, self._store_address)
        task = {"config": config.portable(), "work": WORK, "arguments": {}}
        self._store.set(TASK, json.dumps(task))
        watch(self._store)

    def run(self) -> None:
        """Attempts until one succeeds, or none can."""
        self._say_what_listens()
        attempt = failures = 0
        waiting_since, limit = time.monotonic(), self._config.ray.max_failures
        try:
            while True:
                places = self._await_places(waiting_since, first=failures == 0)
                error = self._fit(places, attempt)
                if error is None:
                    return
                self._refuse_to_go_on()
                attempt += 1
                if isinstance(error, NotStarted):  # the time for that is limited, not the number
                    self._retry_start(error, waiting_since)
                    continue
                if not isinstance(error, Loss):
                    raise error
                cause = self._cause(error, len(places), attempt - 1)
                waiting_since, failures = time.monotonic(), failures + 1
                if 0 <= limit < failures:
                    raise RankFailure(
                        f"{cause} That is failure {failures}, and ray.max_failures = {limit}. Run again: it goes on "
                        "from what is saved.",
                        cause.details,
                    )
                of = "" if limit < 0 else f" of at most {limit}"
                gap = "\n" if "\n" in str(cause) else " "
                self._screen.warn(f"{cause}{gap}Restart {failures}{of}, from the last checkpoint.")
        finally:
            self._screen.end()

    def _retry_start(self, error: NotStarted, since: float) -> None:
        """Warn of a group that did not come up, or raise if no later one can, or not in time."""
        wait_s = self._config.ray.wait_s
        if not error.may_pass:
            raise RankFailure(f"{error} (--debug shows all of it).", error.details)
        if time.monotonic() - since > wait_s:
            raise RankFailure(f"{error}. That took longer than ray.wait_s = {wait_s:g} s.", error.details)
        self._screen.warn(f"{error}. Trying again.")

    def _say_what_listens(self) -> None:
        self._screen.say(
            f"Ray at {self._cluster.head_address}, the job's store at {self._store_address}:"
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
        """One attempt, shown while it runs; what ended it, if not success.

        Raises:
            RankFailure: with an error that no restart cures. Interrupted: a second signal came.
        """
        environment = rank_environment(0, len(places), self._store.port) | {
            RUN: self._config.portable()["run_dir"],
            "MASTER_ADDR": self._store_address,
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._config.ray.cpus_per_worker)),
        }
        del environment["GLOO_SOCKET_IFNAME"]  # differs by node
        loopback = self._store_address == LOOPBACK
        for key in (PLACE, ERROR):
            for rank in range(len(places)):
                self._store.delete_key(key.format(rank=rank))
        outcome: list[Exception] = []

        def fit() -> None:
            try:
                self._cluster.fit(places, attempt, self._group_size, environment, loopback)
            except Exception as error:
                outcome.append(error.with_traceback(None))  # its frames would keep what the attempt held

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        self._watch(thread, len(places))
        return outcome[0] if outcome else None

    def _watch(self, thread: threading.Thread, world_size: int) -> None:
        """Show what the ranks say until the thread ends; pass a wish to stop on to them."""
        places_told = False
        while True:
            running = thread.is_alive()  # asked first: what was said before the end is shown after it
            show(self._store, self._screen)
            if self._store.check([FATAL]):
                fatal = json.loads(self._store.get(FATAL))
                self._end(thread)
                raise RankFailure(fatal["message"], fatal["traceback"])
            if not running:
                return
            if self._signals.count == 1 and not self._store.check([STOP]):
                self._store.set(STOP, "")
            if self._signals.count > 1:
                self._end(thread)
                raise Interrupted
            if not places_told and len(places := self._places(world_size)) == world_size:
                self._tell_places([places[rank]["node"] for rank in range(world_size)])
                places_told = True
            time.sleep(0.1)

    def _end(self, thread: threading.Thread) -> None:
        """Have every rank end now, and wait for the attempt: Ray may crash if it is left while a thread waits in it."""
        self._store.set(END, "")
        thread.join(_END_S)

    def _refuse_to_go_on(self) -> None:
        if self._signals.count:
            raise Interrupted

    def _places(self, world_size: int) -> dict[int, dict[str, Any]]:
        """What the ranks that have come so far said of themselves: worker, node, host and pid."""
        keys = {rank: PLACE.format(rank=rank) for rank in range(world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _tell_places(self, nodes: list[str]) -> None:
        addresses = self._cluster.addresses()
        by_node = defaultdict(list)
        for rank, node in enumerate(nodes):
            by_node[node].append(rank)
        told = [f"{ranges(ranks)} on {_short(node)} ({addresses.get(node, 'gone')})" for node, ranks in by_node.items()]
        self._screen.say(f"ranks {'; '.join(told)}")
        crossing = crossing_groups(nodes, self._group_size)
        if crossing and self._group_size > 1:
            sizes = ", ".join(f"{slots} on {_short(node)}" for node, slots in self._cluster.slots(free=False).items())
            self._screen.warn(
                f"group(s) {ranges(crossing)} of tp_size x cp_size = {self._group_size} ranks do not fit on one node "
                f"(rank slots: {sizes}): their traffic crosses the network."
            )

    def _cause(self, loss: Loss, world_size: int, attempt: int) -> RankFailure:
        """Why an attempt ended: a lost node, a dead worker, or what the ranks have reported."""
        places, alive = self._places(world_size), self._cluster.addresses()
        gone = sorted({place["node"] for place in places.values()} - set(alive))
        if gone:
            ranks = [rank for rank, place in places.items() if place["node"] in gone]
            return RankFailure(f"node {' and '.join(map(_short, gone))} was lost, with rank(s) {ranges(ranks)}.")
        rank_of = {place["worker"]: rank for rank, place in places.items()}
        codes, lost, last_words = [0] * world_size, [], {}
        for worker, failure in loss.failures.items():
            if found := _ENDED.search(failure):
                codes[int(found[1])] = int(found[2])
                last_words[int(found[1])] = failure[found.end() :].strip()
            else:
                lost.append(worker)
        if lost:
            ranks = [rank_of[worker] for worker in lost if worker in rank_of]
            nodes = sorted({_short(places[rank]["node"]) for rank in ranks})
            who = f"rank(s) {ranges(ranks)} on {' and '.join(nodes)}" if ranks else "a rank"
            return RankFailure(f"the Ray worker of {who} died.", str(loss))
        reported = any(self._store.check([ERROR.format(rank=rank)]) for rank in range(world_size))
        if not reported and min(codes) >= 0:
            rank = min(last_words)
            return RankFailure(f"rank {rank} ended with exit code {codes[rank]}, saying: {last_words[rank]}", str(loss))
        return explain_failure(codes, self._store, f"attempt{attempt}")


def _open_store(bind: str, address: str) -> TCPStore:
    try:
        return open_store(bind, address)
    except OSError as error:
        raise ValueError(
            f"ray.bind={bind} must be an address of this machine, and it cannot be listened on: {error.strerror}. "
            "Leave it out or see `ip addr`."
        ) from error


def _short(node: str) -> str:
    return f"node {node[:8]}"

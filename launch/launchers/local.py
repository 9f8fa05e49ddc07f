"""Ranks on this machine: start them, show the one error that matters, leave nobody behind.

    lasp train CONFIG --cp 4      starts four times      python -m lasp.launch.launchers.local

Each child finds the environment that torchrun would give it, so it cannot tell the difference. The launcher
hosts the store on the loopback address: it outlives every rank, which lets the others say who died. The
store hands out the task, and a child that fails leaves its error there with the time: the earliest is the
cause and is shown, the rest are its victims. A child whose launcher is gone ends itself.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial

from torch.distributed import TCPStore

from lasp.comm import CommError
from lasp.launch.config.schema import RunConfig
from lasp.launch.run.failures import Interrupted, RankFailure
from lasp.launch.run.rendezvous import ERROR, Job, open_store, report_error, watch_keys
from lasp.launch.run.signals import SignalCount, blocked
from lasp.parallel.user_errors import kind_of, told
from lasp.parallel.watch.watchdog import last_entered, verdict

TRAIN = "lasp.launch.train:train"
TASK = "lasp/task"  # key of the store
PARENT = "LASP_PARENT"  # in a rank's environment: who started it, which may be gone before the rank can look
_STORE_TIMEOUT = timedelta(seconds=60)
_GRACE_S = 8.0  # for the other ranks to end by themselves after one has failed


def run_local(config: RunConfig, num_ranks: int, work: str = TRAIN, **arguments: str) -> None:
    """Run ``work(config, **arguments)`` on ``num_ranks`` processes of this machine; returns when all have succeeded.

    ``work`` is ``module:function``. Ctrl-C or SIGTERM asks the ranks to save at their next step and end; a second one
    kills them.

    Raises:
        RankFailure: a rank failed; the others have been ended. Interrupted: a signal came before they could save.
    """
    store = open_store()
    store.set(TASK, json.dumps({"config": config.plain(), "work": work, "arguments": arguments}))
    command = [sys.executable, "-m", "lasp.launch.launchers.local"]
    ranks: list[subprocess.Popen] = []
    try:
        with SignalCount(partial(_pass_on, ranks)) as signals:
            for rank in range(num_ranks):
                environment = {**os.environ, **rank_environment(rank, num_ranks, store.port), PARENT: str(os.getpid())}
                with blocked([signal.SIGINT]):  # a terminal sends it to all; the launcher passes it on
                    ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
            codes = _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if any(codes) and signals.count:
        raise Interrupted
    if any(codes):
        raise explain_failure(codes, store)


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set, and what keeps a laptop's run on the laptop."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loopback = "lo" if sys.platform.startswith("linux") else "lo0"
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LASP_LAUNCHER": "local",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks))),
        # large buffers: huge pages, and no return to the system after each use; else a CPU run is a third page faults
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20)),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(2**30)),
    }


def _wait(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes when all have ended; after a failure the others have a moment, None if one still runs then."""
    deadline = float("inf")
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        if deadline == float("inf") and any(process.poll() for process in ranks):
            deadline = time.monotonic() + _GRACE_S
        time.sleep(0.05)
    return [process.poll() for process in ranks]


def explain_failure(codes: list[int | None], store: TCPStore, meeting: str = Job.meeting) -> RankFailure:
    """The cause: a rank that was killed, else the earliest error that a rank reported.

    An abort is not a cause: a collective aborts when another rank goes away.
    """
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    killed = [(rank, -code) for rank, code in failed if code < 0 and code != -signal.SIGABRT]
    if killed:
        rank, number = killed[0]
        hint = " (out of memory, perhaps)" if number == signal.SIGKILL else ""
        found = verdict(watch_keys(store, meeting))  # what it had entered, who waits for it
        return RankFailure(
            f"rank {rank} was killed by {signal.Signals(number).name}{hint}; the other ranks were ended."
            + (f"\n{found}" if found else "")
        )
    keys = [ERROR.format(rank=rank) for rank in range(len(codes))]
    reports = [json.loads(store.get(key)) for key in keys if store.check([key])]
    if not reports:
        rank, code = failed[0]
        last = last_entered(watch_keys(store, meeting), rank)
        where = f" The last it entered was {last}." if last else ""
        return RankFailure(f"rank {rank} ended with exit code {code} and left no report; see its output above.{where}")
    cause = min(reports, key=lambda report: report["time"])
    if cause["expected"]:
        return RankFailure(cause["message"], cause["traceback"])
    return RankFailure(f"rank {cause['rank']} failed: {cause['message']}\n{cause['traceback']}")


def _pass_on(ranks: list[subprocess.Popen], count: int) -> None:
    """The first signal reaches the ranks as SIGTERM: they save; the second one kills them."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if count == 1 else signal.SIGKILL)


def _end_with_launcher(launcher: int) -> None:
    """End this process when the launcher is gone, even in the middle of a collective."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _child() -> None:
    _end_with_launcher(int(os.environ.get(PARENT, os.getppid())))
    job = Job.from_environment()
    try:
        store = job.store(_STORE_TIMEOUT)
    except CommError as error:  # the launcher is gone already
        sys.exit(f"error: {error}")
    try:
        task = json.loads(store.get(TASK))
        work = pkgutil.resolve_name(task["work"])
        work(RunConfig.model_validate(task["config"]), **task["arguments"])
    except BaseException as error:
        try:
            report_error(store, job, told(error), traceback.format_exc(), expected=kind_of(error) is not None)
            sys.stdout.flush()
        finally:
            os._exit(1)  # an orderly end could wait for ranks that are gone


if __name__ == "__main__":
    _child()

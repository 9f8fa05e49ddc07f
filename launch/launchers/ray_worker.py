"""What happens on a Ray worker: the rank is a process of its own, which the worker starts and watches.

    driver  ->  Ray Train  ->  Ray worker: tend_rank  ->  python -m lasp.launch.launchers.local: train_rank  ->  train

Ray calls a training function in a thread of a process that it made. A rank needs its own: signals reach it, the
numbers of threads and the memory allocator are set before torch is loaded, and a collective that aborts does not
take the worker along, which still has to say how its rank ended. Importing this file loads neither Ray nor torch.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lasp.launch.launchers.interfaces import interface_of

if TYPE_CHECKING:
    from torch.distributed import Store

    from lasp.launch.config.schema import RunConfig

WORK = "lasp.launch.launchers.ray_worker:train_rank"
PLACE, FATAL = "lasp/place/{rank}", "lasp/fatal"  # keys of the job's store: what ranks say
STOP, END = "lasp/stop", "lasp/end"  # what they are told: to save and stop, to end at once
WORKER, NODE = "LASP_RAY_WORKER", "LASP_RAY_NODE"  # in a rank's environment: its worker's number for Ray, its node
RUN = "LASP_RUN_DIR"  # there too: what tells the ranks of two runs on one machine apart, from outside
ENDED = "rank {rank} ended with exit code {code}"  # what Ray passes on to the driver
_STORE_TIMEOUT = timedelta(seconds=60)
_POLL_S = 0.25
_TAIL = 20  # lines of a rank's last words


def set_environment(values: Mapping[str, str], address: str) -> None:
    """The environment of the rank that this worker will start; traffic takes the interface of ``address``."""
    os.environ.update(values)
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def tend_rank(_: Any = None) -> None:
    """Run this worker's rank to its end. What it writes to stderr goes to Ray's log of the worker.

    Raises:
        RuntimeError: it failed. The text says how, in the form of ``ENDED``, and repeats its last words.
    """
    command = [sys.executable, "-m", "lasp.launch.launchers.local"]
    last_words = collections.deque(maxlen=_TAIL)
    environment = {**os.environ, "LASP_PARENT": str(os.getpid())}  # see lasp.launch.launchers.local, which loads torch
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as rank:
        for line in rank.stderr:
            sys.stderr.write(line)
            last_words.append(line)
        code = rank.wait()
    if code:
        raise RuntimeError(f"{ENDED.format(rank=os.environ['RANK'], code=code)}\n{''.join(last_words)}")


def train_rank(config: RunConfig) -> None:
    """Train, in the rank's process; the launcher learns of it through the job's store."""
    from lasp.launch.run.rendezvous import Job
    from lasp.launch.train import train
    from lasp.parallel.user_errors import sentence

    job = Job.from_environment()
    store = job.store(_STORE_TIMEOUT)
    host = socket.gethostname()
    place = {"worker": int(os.environ[WORKER]), "node": os.environ[NODE], "host": host, "pid": os.getpid()}
    store.set(PLACE.format(rank=job.rank), json.dumps(place))
    threading.Thread(target=_obey, args=(store, job.rank), daemon=True).start()
    try:
        train(config)
    except (ValueError, FloatingPointError) as error:  # every restart would end here again
        store.set(FATAL, json.dumps({"message": sentence(error), "traceback": traceback.format_exc()}))
        raise


def _obey(store: Store, rank: int) -> None:
    """Do as the launcher says. To stop, a signal to the first rank is enough: its training loop tells the others."""
    stopping = False
    while not store.check([END]):
        if rank == 0 and not stopping and store.check([STOP]):
            stopping = True
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_POLL_S if rank == 0 else 4 * _POLL_S)
    os._exit(1)

"""What a run finds in its directory: results that it continues stay, all others are moved aside.

run_dir/config.yaml, checkpoints/, metrics.jsonl, tensorboard/      of the run that is going on
run_dir/.lock                                                       held by it, so that there is one
run_dir/previous-N/                                                 what it did not continue
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import yaml
from torch.distributed import Store

from lasp.launch.config.schema import RunConfig
from lasp.launch.run.report import METRICS
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.file_errors import writing
from lasp.parallel.mesh import Mesh

_RESULTS = ("checkpoints", METRICS, "tensorboard")
_CLAIMED = "lasp/claimed"  # in the job's store: an attempt of this job has made the directory its own
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of a file system without locks


@contextlib.contextmanager
def locked(run_dir: Path, mesh: Mesh, patience_s: float = 0.0) -> Iterator[None]:
    """No second run in the directory while the block runs. The system unlocks it however this process ends.

    Args:
        patience_s: how long to wait for another run to end; a restarted job's last attempt may still be ending.

    Raises:
        ValueError: another run is in it; on every rank.
    """
    with contextlib.ExitStack() as held:
        mesh.on_first(lambda: _lock(run_dir, held, time.monotonic() + patience_s))
        yield


def _lock(run_dir: Path, held: contextlib.ExitStack, deadline: float) -> None:
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((run_dir / ".lock").open("a+"))
        try:
            _flock(file, deadline)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run_dir {run_dir} must hold one run at a time, but {file.read().strip() or 'another process'} trains "
                "in it. Wait for its end or choose another run_dir=."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _flock(file: IO[str], deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def resume_from(asked: bool | str, run_dir: Path, store: Store | None) -> bool | str:
    """``checkpoint.resume``; for a restarted job true as soon as it has checkpoints of its own, wherever it began.

    Args:
        asked: what the configuration says.
        store: of the job, where it has one.
    """
    if store is not None and store.check([_CLAIMED]) and checkpoints.list_checkpoints(run_dir / "checkpoints"):
        return True
    return asked


def claim(config: RunConfig, continued: checkpoints.Checkpoint | None, store: Store | None) -> list[str]:
    """Make the directory this run's: call it when nothing can refuse the run any more.

    Args:
        continued: the checkpoint that the run goes on from. One of another directory starts over here, like
            none with ``checkpoint.resume=false``: older results are moved aside. With one of this directory
            only the checkpoints of later steps are, so that the newest is always the continued one.
        store: of the job, where it has one: later attempts read there that the directory is theirs.

    Returns:
        what the user should know.
    """
    run_dir = config.run_dir
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        own = run_dir / "checkpoints"
        notes = []
        if continued is not None and continued.path.parent.resolve() == own.resolve():
            later = [path for path in checkpoints.list_checkpoints(own) if checkpoints.step_of(path) > continued.step]
            if later:
                aside = _new_folder(run_dir)
                (aside / "checkpoints").mkdir()
                for path in later:
                    path.rename(aside / "checkpoints" / path.name)
                if (run_dir / METRICS).is_file():
                    shutil.copy(run_dir / METRICS, aside)
                names = ", ".join(path.name for path in later)
                notes.append(f"this run goes on from step {continued.step}; moved {names} of later steps to {aside}.")
        elif continued is not None or config.checkpoint.resume is False:
            old = [run_dir / name for name in _RESULTS if (run_dir / name).exists()]
            if old:
                aside = _new_folder(run_dir)
                for path in old:
                    path.rename(aside / path.name)
                notes.append(f"moved the older results of {run_dir} to {aside}.")
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config.portable(), sort_keys=False))
    checkpoints.check_directory(own)
    if store is not None:
        store.set(_CLAIMED, "")
    return notes


def _new_folder(run_dir: Path) -> Path:
    """The next ``previous-N``."""
    taken = [int(path.name[9:]) for path in run_dir.glob("previous-*") if path.name[9:].isdigit()]
    folder = run_dir / f"previous-{1 + max(taken, default=0)}"
    folder.mkdir()
    return folder

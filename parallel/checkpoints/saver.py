"""Checkpoints written while training goes on: copied to host memory at a step, on disk some steps later.

    step 100: copy states to the host -> training goes on
                                      -> all ranks write their tensors, then hash them -> the first rank names the whole

What the ranks say to one another meanwhile goes over a process group of its own: on the training's, messages of both
would meet. Until the last rename the directory has a name that no reader looks at; see
:mod:`lasp.parallel.checkpoints.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp import comm
from lasp.parallel.checkpoints.checkpoint import (
    FORMAT,
    MANIFEST,
    RANDOM,
    STATE,
    TEMPORARY,
    TENSORS,
    VERSION,
    fingerprint,
    list_checkpoints,
    step_of,
)
from lasp.parallel.checkpoints.tensor_files import write_tensors
from lasp.parallel.file_errors import writing
from lasp.parallel.mesh import Mesh


class Saver:
    """Writes the checkpoints of one run. All ranks of the mesh make one, and call its methods at the same steps.

    Leave it as a context: a save in flight is finished, unless the ranks have lost one another.

    Args:
        directory: of all checkpoints, on a file system that all ranks see.
        mesh: the job.
        keep: checkpoints to keep; None: all.
        background: return from :meth:`save` as soon as states are copied to host memory.
        group: a gloo group of the mesh's ranks, for background saves. None: they have one rank, or save in the
            foreground.
    """

    def __init__(
        self,
        directory: Path,
        mesh: Mesh,
        *,
        keep: int | None = None,
        background: bool = False,
        group: dist.ProcessGroup | None = None,
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None to keep all, got {keep}. Raise it.")
        self._directory, self._mesh, self._keep = directory, mesh, keep
        self._background = background and (group is not None or mesh.world_size == 1)
        self._writers = mesh  # who writes: the same ranks, over the group that they write over
        if self._background and group is not None:
            self._writers = dataclasses.replace(mesh, world_group=group, device=torch.device("cpu"))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and not issubclass(kind, comm.CommError):
            self._thread.join()  # the run ends with its own error

    @functools.cached_property
    def _stager(self) -> Any:
        """Copies states to host memory."""
        from torch.distributed.checkpoint.staging import BlockingAsyncStager  # late: see tensor_files

        return BlockingAsyncStager(cache_staged_state_dict=self._mesh.device.type == "cuda")  # pinned, and kept

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank; :meth:`wait` says why."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            OSError, RuntimeError: the last save failed; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @comm.scope("save")
    def save(
        self,
        step: int,
        collect: Callable[[Path], Mapping[str, Tensor]],
        state: Mapping[str, Any],
        extras: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Begin the checkpoint ``step-NNNNNNNN``, and then delete older ones.

        Args:
            collect: this rank's tensors by name, as :meth:`lasp.parallel.engines.base.Engine.save` gives them; it may
                write files into the folder that it is given.
            state: what JSON can hold; ``step`` is added.
            extras: further files by name.

        Returns:
            the checkpoint's directory. In the background it is there after the next :meth:`wait`.

        Raises:
            ValueError: a rank does not see the directory; on every rank.
            OSError, RuntimeError: this save failed, or the one before it; on every rank.
        """
        self.wait()
        staged = Path(self._mesh.on_first(lambda: str(_stage(self._directory, step))))
        self._check_shared(staged)
        tensors = dict(collect(staged))
        if self._mesh.is_first:
            tensors.setdefault(RANDOM, torch.get_rng_state())
        content = (tensors, {**state, "step": step}, dict(extras or {}))
        if self._background:
            content = (self._stager.stage(tensors), *content[1:])
            self._thread = threading.Thread(target=self._write_aside, args=(staged, *content), daemon=True)
            self._thread.start()
        else:
            self._write(staged, *content)
        return self._directory / f"step-{step:08d}"

    def _check_shared(self, staged: Path) -> None:
        blind = [rank for rank, seen in enumerate(self._mesh.gather(staged.is_dir())) if not seen]
        if blind:
            self._mesh.on_first(lambda: shutil.rmtree(staged, ignore_errors=True))
            raise ValueError(
                f"checkpoints are written and read by all ranks, and rank(s) {blind} do not see {staged}. Put run_dir "
                "on a file system that all nodes share."
            )

    def _write_aside(self, *content: Any) -> None:
        try:
            with comm.scope("save in the background"):
                self._write(*content)
        except BaseException as error:
            self._error = error

    def _write(self, staged: Path, tensors: dict[str, Tensor], state: dict, extras: dict[str, bytes]) -> None:
        """Runs on all ranks; a failure of one is everybody's."""
        writers = self._writers
        final = staged.parent / f"step-{state['step']:08d}"
        try:
            with writing(final):
                write_tensors(staged / TENSORS, tensors, writers.world_group)
                share = writers.on_first(lambda: _list_files(staged))[writers.rank :: writers.world_size]
                hashes = _together(writers.gather(_hash(staged, share)))
                writers.on_first(lambda: str(_commit(staged, final, state, extras, hashes, self._keep)))
        except BaseException:
            if writers.is_first:
                shutil.rmtree(staged, ignore_errors=True)
            raise


def _stage(directory: Path, step: int) -> Path:
    """A new directory to write a checkpoint in, under a name that no reader looks at; what a crash left is removed."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = directory / f"{TEMPORARY}step-{step:08d}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
    return temporary


def _list_files(staged: Path) -> list[str]:
    """Every file written so far, tensor files first: these are in the order of the ranks, so each hashes its own."""
    names = [path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (not name.startswith(f"{TENSORS}/"), name))


def _hash(staged: Path, names: list[str]) -> dict[str, Any] | OSError:
    try:
        return {name: fingerprint(staged / name) for name in names}
    except OSError as error:
        return error


def _together(parts: list[dict[str, Any] | OSError]) -> dict[str, Any]:
    """What all ranks hashed; the first failure of any."""
    hashes: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, OSError):
            raise part
        hashes |= part
    return hashes


def _commit(
    staged: Path, final: Path, state: dict, extras: dict[str, bytes], hashes: dict[str, Any], keep: int | None
) -> Path:
    """Name a written directory ``final``, then delete all but the newest ``keep`` up to its step."""
    small = {STATE: json.dumps(state, indent=1, sort_keys=True).encode(), **extras}
    for name, content in small.items():
        (staged / name).write_bytes(content)
    files = {**hashes, **{name: fingerprint(staged / name) for name in small}}
    manifest = {"format": FORMAT, "version": VERSION, "step": state["step"], "files": files}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*staged.rglob("*"), staged]:
        _flush_to_disk(path)
    replaced = _move_aside(final) if final.exists() else None
    os.rename(staged, final)
    _flush_to_disk(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    if keep is not None:  # those of later steps are left alone
        for old in [path for path in list_checkpoints(final.parent) if step_of(path) <= state["step"]][:-keep]:
            shutil.rmtree(_move_aside(old), ignore_errors=True)
    return final


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(path: Path) -> Path:
    """Take a checkpoint's name away before it is deleted: one half deleted must not look damaged."""
    nameless = path.with_name(f"{TEMPORARY}old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, nameless)
    return nameless

"""Checkpoints that are whole or absent: written aside, hashed, named last; read when every byte is right.

    run_dir/checkpoints/step-00000200/
        model.safetensors        every parameter by name, in the master's dtype
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, and the random state
        shards/                  in place of the tensors above: a distributed checkpoint of backend=megatron
        state.json               step, data position in global tokens, tokenizer, configurations of model and run, ...
        manifest.json            size and sha256 of each file above, written last

A save goes to a temporary directory beside its place, is flushed to the disk, and is renamed; a crash at
any moment leaves the older checkpoints untouched and at most a directory whose name no reader looks at.
Nothing depends on the number of ranks. Tensors are safetensors and all else is JSON: reading a checkpoint
runs no code of its author. Shards are Megatron's format, whose index is a pickle: read those of people you trust.
The manifest finds damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lasp.parallel.files import reading, writing

FORMAT, VERSION = "lasp-checkpoint", 1
MANIFEST, STATE, SHARDS = "manifest.json", "state.json", "shards"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"
_STATE = {"step": int, "data_position": int, "model": dict, "config": dict, "tokenizer": str}  # what a run reads of it
_MOMENTS, _RANDOM = ("exp_avg", "exp_avg_sq"), "random_state"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: where it was read.
        state: the JSON part.
        tensors: groups of tensors by file stem: ``model``, ``optimizer``; no ``model`` where it is in shards.
        extras: other files by name, as bytes.
    """

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    extras: dict[str, bytes]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int | None = None,
    extras: Mapping[str, bytes] | None = None,
    staged: Path | None = None,
) -> Path:
    """Write ``directory/step-NNNNNNNN`` atomically, then delete all but the newest ``keep`` up to this step.

    Args:
        tensors: groups; each becomes ``GROUP.safetensors``.
        state: what JSON can hold; ``step`` is added.
        keep: checkpoints to keep, this one included; those of later steps are left alone. None: all.
        extras: further files by name.
        staged: a directory of :func:`stage` that already holds a part of the checkpoint.

    Returns:
        the checkpoint's directory.

    Raises:
        OSError: the disk refuses it; the message says where and why.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, or None to keep all, got {keep}. Raise it.")
    with writing(directory / f"step-{step:08d}"):
        final = _write(directory, step, tensors, state, extras or {}, staged)
        if keep is not None:
            for old in [path for path in list_checkpoints(directory) if step_of(path) <= step][:-keep]:
                shutil.rmtree(_move_aside(old), ignore_errors=True)
    return final


def _write(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extras: Mapping[str, bytes],
    staged: Path | None,
) -> Path:
    temporary = stage(directory, step) if staged is None else staged
    try:
        for group, members in tensors.items():
            # Views of one flat buffer share its storage, which the format does not hold: one copy per group.
            copies = {name: x.detach().cpu().clone() for name, x in members.items()}
            save_file(copies, temporary / f"{group}.safetensors")
        for name, content in extras.items():
            (temporary / name).write_bytes(content)
        (temporary / STATE).write_text(json.dumps({**state, "step": step}, indent=1, sort_keys=True))
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in paths}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _flush_to_disk(path)
        final = directory / f"step-{step:08d}"
        replaced = _move_aside(final) if final.exists() else None
        os.rename(temporary, final)
        _flush_to_disk(directory)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def stage(directory: Path, step: int) -> Path:
    """A new directory to write a checkpoint in, under a name that no reader looks at; what a crash left is removed."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = directory / f"{_TEMPORARY}step-{step:08d}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
    return temporary


def check_directory(directory: Path) -> None:
    """Make the directory and write into it: a run learns before its first step that it cannot save.

    Raises:
        OSError: the disk refuses it; the message says where and why.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=directory).cleanup()


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, oldest step first, good or damaged."""
    found = [p for p in directory.glob("step-*") if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file's size and hash have been compared with it.

    Raises:
        ValueError: nothing there, something else there, or a damaged file; the message names it.
    """
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist. Checkpoints are in RUN_DIR/checkpoints.")
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} is a file; a checkpoint is a directory with a {MANIFEST}. Name one.")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}. Name a step-NNNNNNNN directory.")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({error})") from error
    if not known or manifest.get("version") != VERSION:
        raise ValueError(
            f"checkpoint {path} has format {manifest['format']!r} version {manifest.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}. Read it with the program that wrote it."
        )
    for name, expected in manifest["files"].items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
            raise _damaged(path, f"{name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise _damaged(path, f"{name} has {size} bytes, its manifest says {expected['size']}")
        if _fingerprint(file) != expected:
            raise _damaged(path, f"{name} does not have its hash in {MANIFEST}")
    return manifest


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {path} is damaged: {what}. Use an earlier one.")


def load(path: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        ValueError: see :func:`verify`.
        OSError: a file cannot be read.
    """
    with reading(path):
        names = verify(path)["files"]
        shards = {name for name in names if name.startswith(f"{SHARDS}/")}
        for name in (
            STATE,
            *(f"{group}.safetensors" for group in ("model", "optimizer") if not shards or group != "model"),
        ):
            if name not in names:
                raise _damaged(path, f"{name} is missing")
        stems = {name: name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")}
        extras = {name: (path / name).read_bytes() for name in names if name not in {*stems, *shards, STATE}}
        try:
            state = json.loads((path / STATE).read_text())
            state["step"] = int(state["step"])
            tensors = {stem: load_file(path / name) for name, stem in stems.items()}
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(path, f"its hashes are right, yet it cannot be read ({error})") from error
    _check_complete(path, state, tensors)
    return Checkpoint(path, state, tensors, extras)


def _check_complete(path: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Whole files may lack a part, if another program wrote them: a run must learn it before it changes anything."""
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            what = f"{key!r} is {type(state[key]).__name__}, not {kind.__name__}," if key in state else f"no {key!r}"
            raise _damaged(path, f"{what} in {STATE}")
    shapes = {f"{kind}.{name}": x.shape for kind in _MOMENTS for name, x in tensors.get("model", {}).items()}
    for name, shape in [*shapes.items(), (_RANDOM, None)]:
        x = tensors["optimizer"].get(name)
        if x is None or (shape is not None and x.shape != shape):
            what = f"no {name}" if x is None else f"{name} is {tuple(x.shape)}, not {tuple(shape)},"
            raise _damaged(path, f"{what} in optimizer.safetensors")


def load_newest(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint of a run; None where there is none yet. Tells ``warn`` of each damaged one.

    Raises:
        ValueError: there are checkpoints and none is good: starting over silently would hide the loss.
    """
    paths = list_checkpoints(directory)
    for path in reversed(paths):
        try:
            return load(path)
        except (ValueError, OSError) as error:
            warn(f"{error} Trying the checkpoint before it.")
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {directory} is good. Start over with checkpoint.resume=false."
        )
    return None


def find(path: Path) -> Path:
    """The checkpoint that a user means: a checkpoint, or the newest of a run directory."""
    if (path / MANIFEST).exists():
        return path
    for directory in (path, path / "checkpoints"):
        if found := list_checkpoints(directory):
            return found[-1]
    return path


def check_same_model(checkpoint: Checkpoint, model_config: Mapping[str, Any], shapes: Mapping[str, tuple]) -> None:
    """Refuse a checkpoint of another model.

    Args:
        model_config: of this run, as plain values.
        shapes: of this run's parameters, by name.

    Raises:
        ValueError: naming the keys of the configuration, or the tensors, that differ.
    """
    theirs = _flatten(checkpoint.state.get("model", {}))
    ours = _flatten(json.loads(json.dumps(model_config)))
    differing = [
        f"{key} is {theirs.get(key, 'absent')!r} in the checkpoint and {ours.get(key, 'absent')!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key, "absent") != ours.get(key, "absent")
    ]
    saved = {name: tuple(x.shape) for name, x in checkpoint.tensors.get("model", {}).items()}
    differing += [
        f"tensor {name} is {saved.get(name, 'absent')} in the checkpoint and {shapes.get(name, 'absent')} here"
        for name in sorted({*saved, *shapes})
        if saved and saved.get(name) != shapes.get(name)  # shards are read, and compared, by the engine
    ]
    if differing:
        shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise ValueError(
            f"checkpoint {checkpoint.path} is of another model: {shown}. Use its configuration, another run_dir, "
            "or checkpoint.resume=false."
        )


def _flatten(values: Mapping[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        flat |= _flatten(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(path: Path) -> Path:
    """Take a checkpoint's name away before it is deleted: one half deleted must not look damaged."""
    nameless = path.with_name(f"{_TEMPORARY}old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, nameless)
    return nameless

"""Checkpoints that are whole or absent: written aside, hashed, named last; read when every byte is right.

    run_dir/checkpoints/step-00000200/
        tensors/          model.NAME, exp_avg.NAME, exp_avg_sq.NAME of every parameter in the master's dtype, and the
                          random state: safetensors files, one per rank that wrote
                          (lasp.parallel.checkpoints.tensor_files)
        shards/           in place of all but the random state: a distributed checkpoint of backend=megatron
        state.json        step, data position in global tokens, tokenizer, configurations of model and run, ...
        manifest.json     size and sha256 of each file above, written last

A save goes to a temporary directory beside its place, is flushed to the disk, and is renamed; a crash at
any moment leaves the older checkpoints untouched and at most a directory whose name no reader looks at.
Nothing depends on the number of ranks or the engine. Tensors are safetensors and all else is JSON: reading a checkpoint
runs no code of its author. Shards are Megatron's format, whose index is a pickle: read those of people you trust.
The manifest finds damage; it is no signature. Who writes, and when: :mod:`lasp.parallel.checkpoints.saver`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lasp.parallel.checkpoints.tensor_files import TensorInfo, tensor_index
from lasp.parallel.file_errors import reading, writing
from lasp.parallel.mesh import Mesh
from lasp.parallel.user_errors import sentence

FORMAT, VERSION = "lasp-checkpoint", 2
MANIFEST, STATE, TENSORS, SHARDS = "manifest.json", "state.json", "tensors", "shards"
MODEL, MOMENTS, RANDOM = "model", ("exp_avg", "exp_avg_sq"), "random_state"  # names of tensors, or how they begin
_STEP_NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"
_STATE = {"step": int, "data_position": int, "model": dict, "config": dict, "tokenizer": str}  # what a run reads of it


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint on disk, without its tensors.

    Attributes:
        path: its directory.
        state: the JSON part.
        index: what is in its tensor files, by name.
        extras: other files by name, as bytes.
    """

    path: Path
    state: dict[str, Any]
    index: dict[str, TensorInfo]
    extras: dict[str, bytes]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]

    @property
    def tensors(self) -> Path:
        """Folder of the tensor files."""
        return self.path / TENSORS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters in the tensor files, by name: none where Megatron has them in shards."""
        prefix = f"{MODEL}."
        return {key.removeprefix(prefix): info.shape for key, info in self.index.items() if key.startswith(prefix)}


def check_directory(directory: Path) -> None:
    """Make the directory and write into it: a run learns before its first step that it cannot save.

    Raises:
        OSError: the disk refuses it; the message says where and why.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=directory).cleanup()


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, oldest step first, good or damaged."""
    found = [p for p in directory.glob("step-*") if _STEP_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whose files are there in the right sizes; :func:`load` compares hashes too.

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
    return manifest


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {path} is damaged: {what}. Use an earlier one.")


def load(path: Path, mesh: Mesh | None = None) -> Checkpoint:
    """Verify every byte of a checkpoint, and read all but its tensors.

    Args:
        mesh: a job whose ranks all call it; each hashes a share of the files. None: this process alone.

    Raises:
        ValueError: see :func:`read_manifest`; on every rank.
        OSError: a file cannot be read; on every rank.
    """
    on_first, gather = (lambda work: work(), lambda x: [x]) if mesh is None else (mesh.on_first, mesh.gather)
    rank, world_size = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
    with reading(path):
        manifest = on_first(lambda: read_manifest(path))
    share = list(manifest["files"].items())[rank::world_size]
    wrong = next((found for found in gather(_first_wrong(path, share)) if found), None)
    if wrong:
        raise _damaged(path, wrong)
    return on_first(lambda: _open(path, manifest))


def _first_wrong(path: Path, files: list[tuple[str, Any]]) -> str | None:
    for name, expected in files:
        try:
            if fingerprint(path / name) != expected:
                return f"{name} does not have its hash in {MANIFEST}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _open(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    with reading(path):
        apart = (f"{TENSORS}/", f"{SHARDS}/", STATE)
        if STATE not in manifest["files"]:
            raise _damaged(path, f"{STATE} is missing")
        extras = {name: (path / name).read_bytes() for name in manifest["files"] if not name.startswith(apart)}
        try:
            state = json.loads((path / STATE).read_text())
            state["step"] = int(state["step"])
            index = tensor_index(path / TENSORS)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(path, f"its hashes are right, yet it cannot be read ({error})") from error
    found = Checkpoint(path, state, index, extras)
    _check_complete(found, has_shards=any(name.startswith(f"{SHARDS}/") for name in manifest["files"]))
    return found


def _check_complete(found: Checkpoint, has_shards: bool) -> None:
    """Whole files may lack a part, if another program wrote them: a run must learn it before it changes anything."""
    for key, kind in _STATE.items():
        if not isinstance(found.state.get(key), kind):
            value = found.state.get(key)
            what = f"{key!r} is {type(value).__name__}, not {kind.__name__}," if key in found.state else f"no {key!r}"
            raise _damaged(found.path, f"{what} in {STATE}")
    shapes = found.shapes()
    wanted = {f"{kind}.{name}": shape for kind in MOMENTS for name, shape in shapes.items()} | {RANDOM: None}
    if not shapes and not has_shards:
        raise _damaged(found.path, f"no parameter in {TENSORS}")
    for name, shape in wanted.items():
        info = found.index.get(name)
        if info is None or (shape is not None and info.shape != shape):
            what = f"no {name}" if info is None else f"{name} is {info.shape}, not {shape},"
            raise _damaged(found.path, f"{what} in {TENSORS}")


def load_newest(directory: Path, warn: Callable[[str], None], mesh: Mesh | None = None) -> Checkpoint | None:
    """The newest good checkpoint of a run; None where there is none yet. Tells ``warn`` of each damaged one.

    Args:
        mesh: as in :func:`load`.

    Raises:
        ValueError: there are checkpoints and none is good: starting over silently would hide the loss.
    """
    paths = list_checkpoints(directory)
    if mesh is not None:
        paths = [Path(path) for path in mesh.on_first(lambda: [str(path) for path in paths])]
    for path in reversed(paths):
        try:
            return load(path, mesh)
        except (ValueError, OSError) as error:
            warn(f"{sentence(error)} Trying the checkpoint before it.")
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
    saved = checkpoint.shapes()
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


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}

"""Checkpoints to and from one safetensors file, in one process.

lasp checkpoint convert runs/quickstart model.safetensors                    everything, optimizer states included
lasp checkpoint convert runs/quickstart model.safetensors --weights-only     parameters, by their names in the model
lasp checkpoint convert model.safetensors runs/next                          begins, or goes on with, a run there

The file's header holds the state of the checkpoint as JSON, so that a file of ours becomes a checkpoint by itself; for
one of another origin the configuration of a run says what the parameters belong to.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lasp.launch.config.schema import RunConfig
from lasp.launch.data.tokenizer import load_tokenizer
from lasp.launch.run.resume import checkpoint_extras, checkpoint_state
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.checkpoint import MODEL, MOMENTS
from lasp.parallel.checkpoints.native_weights import model_tensors
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.checkpoints.tensor_files import read_whole
from lasp.parallel.file_errors import reading, writing
from lasp.parallel.mesh import Mesh

SUFFIX = ".safetensors"
_STATE = "lasp_state"  # in the header of the file


def to_file(source: Path, target: Path, *, weights_only: bool = False) -> int:
    """Write a checkpoint, or the newest of a run directory, into one new file.

    Args:
        weights_only: parameters alone, by their names in the model.

    Returns:
        tensors written.

    Raises:
        ValueError: a damaged checkpoint; a target that exists; optimizer states that are Megatron's.
        OSError: a file cannot be read or written.
    """
    if target.exists():
        raise ValueError(f"{target} exists. Name a new file, or remove it first.")
    saved = checkpoints.load(checkpoints.find(source))
    if not weights_only and not saved.shapes():
        raise ValueError(
            f"checkpoint {saved.path} holds optimizer states of backend=megatron, which no other program reads. "
            "Convert its parameters alone: --weights-only."
        )
    tensors = model_tensors(saved) if weights_only else read_whole(saved.tensors)
    texts = {name: content.decode() for name, content in saved.extras.items()}
    header = {_STATE: json.dumps(saved.state), **texts}
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, partial, header)
            os.rename(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return len(tensors)


def from_file(source: Path, target: Path, config: RunConfig | None = None) -> Path:
    """Write a file of tensors as a checkpoint of the run directory ``target``.

    A file with optimizer states becomes the checkpoint it was made from. One without begins a run: step 0, no
    moments.

    Args:
        config: of the run, for a file without our header; it also replaces the header's.

    Returns:
        the checkpoint's directory.

    Raises:
        ValueError: a file that is no safetensors file, or lacks its state, a parameter or a moment; a run directory
            that has checkpoints.
        OSError: a file cannot be read or written.
    """
    directory = target / "checkpoints"
    if found := checkpoints.list_checkpoints(directory):
        raise ValueError(f"{target} has checkpoints already, up to {found[-1].name}. Name another run directory.")
    tensors, header = _read(source)
    complete = checkpoints.RANDOM in tensors
    state, extras = _state(source, header, config, begins=not complete)
    model = LinearLlama(ModelConfig.from_dict(state["model"]), device="meta")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wanted = {f"{kind}.{name}": shape for kind in (MODEL, *MOMENTS) for name, shape in shapes.items()}
    _check_shapes(source, tensors, wanted | {checkpoints.RANDOM: None} if complete else shapes)
    if not complete:
        tensors = {f"{MODEL}.{name}": x.float() if x.dtype != torch.float64 else x for name, x in tensors.items()}
        for name in shapes:
            tensors |= {f"{kind}.{name}": torch.zeros_like(tensors[f"{MODEL}.{name}"]) for kind in MOMENTS}
    with Saver(directory, Mesh.build()) as saver:
        return saver.save(state["step"], lambda folder: tensors, state, extras)


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with reading(source), safe_open(source, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        if isinstance(error.__cause__, SafetensorError):
            raise ValueError(f"{source} is not a safetensors file: {error.__cause__}. Name one.") from error
        raise


def _state(
    source: Path, header: dict[str, str], config: RunConfig | None, *, begins: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The state of the checkpoint to write, and its further files."""
    if config is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        own = json.loads(header.get(_STATE, "{}"))
        step, position = own.get("step", 0), own.get("data_position", 0)
        state = checkpoint_state(config, tokenizer, step, position) | {"step": step}
        extras = checkpoint_extras(tokenizer)
    elif _STATE in header:
        state = json.loads(header[_STATE])
        extras = {name: text.encode() for name, text in header.items() if name.endswith(".json")}
    else:
        raise ValueError(
            f"{source} does not say which model it is of: it was not made by `lasp checkpoint convert`. "
            "Name the run's configuration: --config CONFIG."
        )
    if begins:
        schedule = {**state["schedule"], "step": 0}
        state |= {"backend": "native", "step": 0, "data_position": 0, "schedule": schedule}
    return state, extras


def _check_shapes(source: Path, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...] | None]) -> None:
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    wrong = [
        f"{name} is {found.get(name, 'absent')}, not {wanted.get(name, 'in the model')}"
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or wanted[name] not in (None, found[name])
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ValueError(f"{source} does not fit the model: {shown}. Use the configuration that it was trained with.")

"""A run goes on from a checkpoint: what a checkpoint holds, which ones a run accepts, how it continues.

The run directory becomes this run's only when its checkpoint has been accepted, so that a refused run changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from lasp import comm
from lasp.launch.config.schema import RunConfig
from lasp.launch.data.tokenizer import Tokenizer, fingerprint
from lasp.launch.run import run_dir
from lasp.models.config import ModelConfig
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.tensor_files import read_tensors
from lasp.parallel.engines.base import Engine
from lasp.parallel.mesh import Mesh

_FREE = ("recompute", "ffn_tile")  # of the model: how it is computed, which may change between two runs of it


@comm.scope("resume")
def resume(
    config: RunConfig, engine: Engine, mesh: Mesh, tokenizer: Tokenizer, store: Store | None
) -> tuple[int, list[str]]:
    """Continue from a checkpoint if there is one. All ranks of the mesh call it.

    Args:
        engine: gets the checkpoint's states.
        store: of the job, where it has one.

    Returns:
        the position in the data, in global tokens, and what the user should know.

    Raises:
        ValueError: the checkpoint is damaged, or of another model, tokenizer or backend; on every rank.
    """
    found, notes = _find(config.checkpoint.resume, config.run_dir, mesh, store)
    notes += mesh.on_first(partial(_accept, found, config, engine, tokenizer, store))
    if found is None:
        return 0, notes
    read = partial(_read_into, found, mesh)
    engine.restore(found.step, read, found.path)
    random_state = {checkpoints.RANDOM: torch.empty_like(torch.get_rng_state())}
    read(random_state)
    torch.set_rng_state(random_state[checkpoints.RANDOM])
    return found.state["data_position"], notes


def _find(
    asked: bool | str, folder: Path, mesh: Mesh, store: Store | None
) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """The checkpoint to go on from, None to begin; and what the user should know of damaged ones.

    Args:
        asked: ``checkpoint.resume``.
        folder: of the run.
    """
    notes: list[str] = []
    wanted = mesh.on_first(lambda: run_dir.resume_from(asked, folder, store))
    if isinstance(wanted, str):
        path = mesh.on_first(lambda: str(checkpoints.find(Path(wanted))))
        return checkpoints.load(Path(path), mesh), notes
    if wanted:
        return checkpoints.load_newest(folder / "checkpoints", notes.append, mesh), notes
    return None, notes


def _accept(
    found: checkpoints.Checkpoint | None,
    config: RunConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    store: Store | None,
) -> list[str]:
    """Make the run directory this run's, if the checkpoint fits the run: what the user should know."""
    if found is None:
        return run_dir.claim(config, None, store)
    check_same_backend(found, config.backend, config.megatron.distributed_optimizer)
    checkpoints.check_same_model(found, architecture(config.model), engine.shapes)
    check_same_tokenizer(found, tokenizer)
    return [*changes(found.state["config"], config.portable()), *run_dir.claim(config, found, store)]


def _read_into(found: checkpoints.Checkpoint, mesh: Mesh, tensors: dict[str, torch.Tensor]) -> None:
    read_tensors(found.tensors, tensors, mesh.world_group)


def check_same_backend(checkpoint: checkpoints.Checkpoint, backend: str, distributed_optimizer: bool) -> None:
    """Refuse a checkpoint whose optimizer states this run cannot read.

    Args:
        distributed_optimizer: of Megatron; it does not matter to the native backend.

    Raises:
        ValueError: naming both backends, or both ways to keep the states.
    """
    theirs = checkpoint.state.get("backend", "native")
    if theirs != backend:
        raise ValueError(
            f"checkpoint {checkpoint.path} was written by backend={theirs}, and this run has backend={backend}: "
            "optimizer states are not exchanged between them. Use the same backend, another run_dir, or "
            "checkpoint.resume=false."
        )
    key = "distributed_optimizer"
    saved = checkpoint.state["config"].get("megatron", {}).get(key, distributed_optimizer)
    if theirs == "megatron" and saved != distributed_optimizer:
        raise ValueError(
            f"checkpoint {checkpoint.path} was written with megatron.{key}={saved}, and this run has "
            f"{distributed_optimizer}: Megatron cannot read the one's states as the other's. "
            f"Set megatron.{key}={saved}."
        )


def check_same_tokenizer(checkpoint: checkpoints.Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse a checkpoint that was trained on the ids of another tokenizer.

    Raises:
        ValueError: naming both tokenizers.
    """
    state, own = checkpoint.state, fingerprint(tokenizer)
    if state.get("tokenizer_sha256", own) != own:
        raise ValueError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {state['tokenizer']!r} "
            f"({state['tokenizer_sha256'][:12]}), but data.tokenizer is {tokenizer.name!r} ({own[:12]}): the same "
            "ids mean other text. Set data.tokenizer to the checkpoint's, or checkpoint.resume=false."
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ from those of the checkpoint and change what is learned from here on."""
    changed = [
        f"{section}.{key}: {theirs.get(key)!r} -> {value!r}"
        for section in ("data", "optimizer")
        for theirs in [old.get(section, {})]
        for key, value in new[section].items()
        if theirs.get(key) != value
    ]
    changed += [
        f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in ("seed", "dtype", "steps") if old.get(key) != new[key]
    ]
    return [f"this run differs from its checkpoint: {', '.join(changed)}"] if changed else []


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The model's configuration without what may change between two runs of it."""
    return {key: value for key, value in dataclasses.asdict(model).items() if key not in _FREE}


def checkpoint_state(config: RunConfig, tokenizer: Tokenizer, step: int, position: int) -> dict[str, Any]:
    """The JSON part of a checkpoint after ``step`` steps and ``position`` global tokens."""
    model = architecture(config.model)
    return {
        "backend": config.backend,
        "data_position": position,
        "seed": config.seed,
        "model": model,
        "model_digest": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": fingerprint(tokenizer),
        "schedule": {"step": step, "steps": config.steps},
        "config": config.portable(),
    }


def checkpoint_extras(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a checkpoint beside its state and tensors."""
    content = tokenizer.to_json()
    return {} if content is None else {"tokenizer.json": content}


def newest_checkpoint(directory: Path) -> str:
    """A sentence that names the newest checkpoint in a run's folder of checkpoints."""
    paths = checkpoints.list_checkpoints(directory)
    return f"The last checkpoint is {paths[-1]}." if paths else "There is no checkpoint of this run yet."

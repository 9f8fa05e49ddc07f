"""One training run, top to bottom: ``train(config)`` on every rank, whoever started it.

lasp train configs/quickstart.yaml                                              starts ranks of its own
torchrun --nproc-per-node 4 -m lasp.launch.cli train configs/quickstart.yaml    joins those that it finds
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from lasp import comm
from lasp.launch.config.schema import RunConfig
from lasp.launch.data.stream import DataPlan, PackedStream, open_source, split_documents
from lasp.launch.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from lasp.launch.run import run_dir
from lasp.launch.run.backends import backend_mesh, make_engine
from lasp.launch.run.exchange_summary import exchange_rows
from lasp.launch.run.generate import load_model, sample_text
from lasp.launch.run.preflight import check_ranks
from lasp.launch.run.rendezvous import Job, choose_device, group_timeout, process_group
from lasp.launch.run.report import METRICS, PLOT, Report, peak_memory_bytes
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.checkpoints.tensor_files import read_tensors
from lasp.parallel.engines.base import Engine
from lasp.parallel.mesh import Mesh

_WRITE_TIMEOUT = timedelta(hours=1)  # of ranks that wait for the disks of others


def train(config: RunConfig) -> None:
    """Train as ``config`` says, on this rank. All ranks of the job call it.

    Raises:
        ValueError: the configuration does not fit the data, the ranks, or the checkpoint; on every rank.
        FloatingPointError: the loss stopped being finite; on every rank.
        OSError: a file cannot be read or written.
    """
    job = Job.from_environment() or Job()
    device = choose_device(config.device, job)
    timeout = timedelta(seconds=config.timeout_s)
    if job.attempt and not job.agent_store and config.checkpoint.resume is not True:
        raise ValueError(
            f"checkpoint.resume={config.checkpoint.resume} in a restarted job needs the launcher's store, to tell the "
            "job's own checkpoints from older ones. Unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or use resume=true."
        )
    patience_s = min(60.0, config.timeout_s / 2) if job.attempt else 0.0
    with process_group(job, device, timeout) as store:
        check_ranks(config, device)
        limit = group_timeout(device, timeout)
        with backend_mesh(config, device, limit) as mesh, run_dir.locked(config.run_dir, mesh, patience_s=patience_s):
            apart = mesh.world_size > 1 and config.checkpoint.background
            writers = dist.new_group(backend="gloo", timeout=max(limit, _WRITE_TIMEOUT)) if apart else None
            _train(config, mesh, store, writers)


def _train(config: RunConfig, mesh: Mesh, store: Store | None = None, writers: dist.ProcessGroup | None = None) -> None:
    torch.manual_seed(config.seed)

    # Data: the first rank prepares it once, all map the same files.
    tokenizer = load_tokenizer(config.data.tokenizer)
    mesh.on_first(lambda: len(open_source(config.data.source, config.run_dir / "data", tokenizer)))
    file = open_source(config.data.source, config.run_dir / "data", tokenizer)
    learn, held_out = split_documents(len(file), config.data.eval_fraction)
    stream = PackedStream(file, learn, config.seed, config.model.vocab_size)
    data = config.data
    plan = DataPlan(data.seq_len, data.batch_size, config.layout, config.exchange_options, data.join_documents)
    plan.micro_steps(mesh)
    plan.check_length(stream)
    eval_batches, unmeasured = [], None
    if len(held_out):
        held_out_stream = PackedStream(file, held_out, None, config.model.vocab_size)
        eval_batches, unmeasured = plan.eval_batches(held_out_stream, config.eval.sequences, mesh)

    engine = make_engine(config, mesh)
    position, notes = _resume(config, engine, mesh, tokenizer, store)

    report = Report(config, engine.step_count, active=mesh.is_first, store=store)
    exchanges = exchange_rows(config, mesh)
    report.table("run", _derived(config, mesh, engine, plan, stream, len(file), len(held_out), exchanges))
    for note in [*notes, *([unmeasured] if unmeasured else [])]:
        report.warn(note)
    if engine.step_count:
        report.say(f"resumed at step {engine.step_count} of {config.steps}")
    if engine.step_count >= config.steps:
        report.say(
            f"{config.run_dir} already holds step {engine.step_count} of {config.steps}. Raise steps=, choose "
            "another run_dir=, or start over with checkpoint.resume=false."
        )

    first_step, saved, started = engine.step_count, None, time.perf_counter()
    directory, settings = config.run_dir / "checkpoints", config.checkpoint
    saver = Saver(directory, mesh, keep=settings.keep, background=settings.background, group=writers)
    extras = checkpoint_extras(tokenizer)
    with report, saver, _StopSignals() as stop:
        while engine.step_count < config.steps:
            step_started = time.perf_counter()
            batches = plan.step_batches(stream, position, mesh)
            try:
                result = engine.step(batches)
            except FloatingPointError as error:
                saver.wait()
                raise FloatingPointError(f"{error} {_last_good(config)}") from None
            position += plan.step_tokens
            seconds = time.perf_counter() - step_started
            step, last = engine.step_count, engine.step_count == config.steps
            record = {
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "labels": result.labels,
                "ranks": mesh.world_size,
                "tokens": position,
                "seconds": seconds,
                "tokens_per_s": plan.step_tokens / seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
            if held_out.size and (last or _due(step, config.eval.every)):
                eval_loss = engine.evaluate(eval_batches)
                record |= {} if eval_loss is None else {"eval_loss": eval_loss}
            report.step(record)
            stopping = mesh.any(stop.requested or saver.failed)
            if last or stopping or _due(step, config.checkpoint.every):
                saved = saver.save(step, engine.save, checkpoint_state(config, tokenizer, step, position), extras)
            if stopping:
                break
        saver.wait()
        elapsed = time.perf_counter() - started
    if stopping_early := engine.step_count < config.steps:
        report.say(f"stopped at step {engine.step_count} of {config.steps}; saved {saved}. Run again to go on.")

    peaks = mesh.gather(peak_memory_bytes())
    report.plot()
    report.table("summary", _summary(config, engine, report, plan, first_step, elapsed, peaks))
    if mesh.is_first and config.log.sample_tokens and saved and not stopping_early:
        prompt = file.document(int((held_out if len(held_out) else learn)[0]), 0).tolist()[:48]
        trained = load_model(saved)[0].to(mesh.device, config.torch_dtype)
        text = sample_text(trained, tokenizer, prompt, config.log.sample_tokens, seed=config.seed)
        report.say(f"\nsample\n{_printable(text)}")


def _printable(text: str) -> str:
    """Text without the control characters that an untrained model writes and a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@comm.scope("resume")
def _resume(
    config: RunConfig, engine: Engine, mesh: Mesh, tokenizer: Tokenizer, store: Store | None
) -> tuple[int, list[str]]:
    """Continue from a checkpoint if there is one: the data position, and what the user should know.

    The run directory becomes this run's only when the checkpoint has been accepted.
    """
    notes: list[str] = []
    resume = mesh.on_first(lambda: run_dir.resume_from(config, store))
    found: checkpoints.Checkpoint | None = None
    if isinstance(resume, str):
        found = checkpoints.load(Path(mesh.on_first(lambda: str(checkpoints.find(Path(resume))))), mesh)
    elif resume:
        found = checkpoints.load_newest(config.run_dir / "checkpoints", notes.append, mesh)

    def accept() -> list[str]:
        if found is None:
            return run_dir.claim(config, None, store)
        check_same_backend(found, config)
        checkpoints.check_same_model(found, _architecture(config), engine.shapes)
        _check_same_tokenizer(found, tokenizer)
        return [*_changes(found.state["config"], config.portable()), *run_dir.claim(config, found, store)]

    notes += mesh.on_first(accept)
    if found is None:
        return 0, notes
    read = lambda tensors: read_tensors(found.tensors, tensors, mesh.world_group)  # noqa: E731
    engine.restore(found.step, read, found.path)
    random_state = {checkpoints.RANDOM: torch.empty_like(torch.get_rng_state())}
    read(random_state)
    torch.set_rng_state(random_state[checkpoints.RANDOM])
    return found.state["data_position"], notes


def check_same_backend(checkpoint: checkpoints.Checkpoint, config: RunConfig) -> None:
    """Refuse a checkpoint whose optimizer states this run cannot read."""
    theirs = checkpoint.state.get("backend", "native")
    if theirs != config.backend:
        raise ValueError(
            f"checkpoint {checkpoint.path} was written by backend={theirs}, and this run has backend={config.backend}: "
            "optimizer states are not exchanged between them. Use the same backend, another run_dir, or "
            "checkpoint.resume=false."
        )
    key, own = "distributed_optimizer", config.megatron.distributed_optimizer
    saved = checkpoint.state["config"].get("megatron", {}).get(key, own)
    if theirs == "megatron" and saved != own:
        raise ValueError(
            f"checkpoint {checkpoint.path} was written with megatron.{key}={saved}, and this run has {own}: Megatron "
            f"cannot read the one's states as the other's. Set megatron.{key}={saved}."
        )


def _check_same_tokenizer(checkpoint: checkpoints.Checkpoint, tokenizer: Tokenizer) -> None:
    state, own = checkpoint.state, fingerprint(tokenizer)
    if state.get("tokenizer_sha256", own) != own:
        raise ValueError(
            f"checkpoint {checkpoint.path} was trained with tokenizer {state['tokenizer']!r} "
            f"({state['tokenizer_sha256'][:12]}), but data.tokenizer is {tokenizer.name!r} ({own[:12]}): the same "
            "ids mean other text. Set data.tokenizer to the checkpoint's, or checkpoint.resume=false."
        )


_FREE = ("recompute", "ffn_tile")  # of the model, how it is computed


def _architecture(config: RunConfig) -> dict[str, Any]:
    """The model's configuration without what may change between two runs of it."""
    return {key: value for key, value in dataclasses.asdict(config.model).items() if key not in _FREE}


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
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


def checkpoint_state(config: RunConfig, tokenizer: Tokenizer, step: int, position: int) -> dict[str, Any]:
    """The JSON part of a checkpoint after ``step`` steps and ``position`` global tokens."""
    model = _architecture(config)
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


def _last_good(config: RunConfig) -> str:
    paths = checkpoints.list_checkpoints(config.run_dir / "checkpoints")
    return f"The last checkpoint is {paths[-1]}." if paths else "There is no checkpoint of this run yet."


def _derived(
    config: RunConfig,
    mesh: Mesh,
    engine: Engine,
    plan: DataPlan,
    stream: PackedStream,
    documents: int,
    held_out: int,
    exchanges: dict[str, str],
) -> dict[str, str]:
    """Every number that follows from the configuration, said once."""
    model = config.model
    return {
        "ranks": f"{_grid(mesh)} = {mesh.world_size}, {mesh.device.type}, {torch.get_num_threads()} thread(s) each",
        "model": f"{engine.num_parameters:,} parameters, layers {model.layer_kinds}, width {model.dim}, "
        f"vocabulary {model.vocab_size}, {config.dtype}",
        "data": f"{documents - held_out:,} documents, {stream.epoch_tokens:,} tokens per epoch; {held_out} held out",
        "sequence": f"{plan.seq_len:,} tokens, about {plan.seq_len // mesh.cp_size:,} per rank, {config.layout}",
        **exchanges,
        "step": f"{plan.batch_size} sequence(s) = {plan.step_tokens:,} tokens, {plan.micro_steps(mesh)} micro "
        "step(s) per rank",
        "run": f"{config.steps} steps = {config.steps * plan.step_tokens:,} tokens = "
        f"{config.steps * plan.step_tokens / stream.epoch_tokens:.3g} epochs, in {config.run_dir}",
    }


def _grid(mesh: Mesh) -> str:
    """The sizes of the mesh: tp and pp where a model is cut."""
    cut = f"pp {mesh.pp_size} x tp {mesh.tp_size} x " if mesh.copies > 1 else ""
    return f"{cut}dp {mesh.dp_size} x cp {mesh.cp_size}"


def _summary(
    config: RunConfig,
    engine: Engine,
    report: Report,
    plan: DataPlan,
    first_step: int,
    elapsed: float,
    peaks: list[int],
) -> dict[str, str]:
    tokens = (engine.step_count - first_step) * plan.step_tokens
    rows = {"steps": f"{engine.step_count} of {config.steps}", "tokens": f"{tokens:,} in {elapsed:.1f} s"}
    if elapsed and tokens:
        rows["throughput"] = f"{tokens / elapsed:,.0f} tokens/s, evaluation and checkpoints included"
    if report.records:
        rows["training loss"] = f"{report.records[0]['loss']:.4f} -> {report.records[-1]['loss']:.4f} nats/token"
    evaluated = [record for record in report.records if "eval_loss" in record]
    if evaluated:
        rows["held-out loss"] = f"{evaluated[-1]['eval_loss']:.4f} nats/token at step {evaluated[-1]['step']}"
    rows["parameters"] = f"{engine.num_parameters:,}"
    rows["peak memory"] = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks) + " MiB (one number per rank)"
    rows["checkpoints"] = str(config.run_dir / "checkpoints")
    rows["metrics, plot"] = f"{config.run_dir / METRICS}, {config.run_dir / PLOT}"
    return rows


class _StopSignals:
    """SIGTERM and SIGINT set a flag while the block runs: the loop stops at the border of a step."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._set) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, *_: object) -> None:
        self.requested = True

"""One training run, top to bottom: ``train(config)`` on every rank, whoever started it.

lasp train configs/quickstart.yaml                                              starts ranks of its own
torchrun --nproc-per-node 4 -m lasp.launch.cli train configs/quickstart.yaml    joins those that it finds
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from lasp.launch.config.schema import RunConfig
from lasp.launch.data.run_data import RunData, open_data
from lasp.launch.data.stream import DataPlan
from lasp.launch.data.tokenizer import Tokenizer, load_tokenizer
from lasp.launch.run import run_dir
from lasp.launch.run.backends import backend_mesh, make_engine
from lasp.launch.run.exchange_summary import exchange_rows
from lasp.launch.run.generate import load_model, sample_text
from lasp.launch.run.preflight import check_ranks
from lasp.launch.run.rendezvous import Job, choose_device, group_timeout, process_group
from lasp.launch.run.report import Report, peak_memory_bytes
from lasp.launch.run.resume import checkpoint_extras, checkpoint_state, newest_checkpoint, resume
from lasp.launch.run.signals import SignalCount
from lasp.launch.run.summary import run_rows, summary_rows
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.engines.base import Engine
from lasp.parallel.mesh import Mesh

_WRITE_TIMEOUT = timedelta(hours=1)  # of ranks that wait for the disks of others
_PROMPT_TOKENS = 48  # of the sample


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
            train_on_mesh(config, mesh, store, writers)


def train_on_mesh(
    config: RunConfig, mesh: Mesh, store: Store | None = None, writers: dist.ProcessGroup | None = None
) -> None:
    """:func:`train`, when the ranks have found one another.

    Args:
        store: of the job, where it has one.
        writers: a gloo group of the mesh's ranks, to write checkpoints over while training goes on.
    """
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = _open_data(config, tokenizer, mesh)
    engine = make_engine(config, mesh)
    position, notes = resume(config, engine, mesh, tokenizer, store)
    report = Report(config.run_dir, config.steps, config.log, engine.step_count, active=mesh.is_first, store=store)
    exchanges = exchange_rows(config, mesh)
    report.table("run", run_rows(config, mesh, engine.num_parameters, data, exchanges))
    for note in [*notes, *([data.unmeasured] if data.unmeasured else [])]:
        report.warn(note)
    _say_where_it_begins(report, engine.step_count, config.steps, config.run_dir)

    directory, settings = config.run_dir / "checkpoints", config.checkpoint
    saver = Saver(directory, mesh, keep=settings.keep, background=settings.background, group=writers)
    extras, saved = checkpoint_extras(tokenizer), None
    first_position, started = position, time.perf_counter()
    with report, saver, SignalCount() as signals:
        while engine.step_count < config.steps:
            try:
                record = _step(engine, data, position, mesh)
            except FloatingPointError as error:
                saver.wait()
                raise FloatingPointError(f"{error} {newest_checkpoint(directory)}") from None
            step, position = record["step"], record["tokens"]
            last = step == config.steps
            if len(data.held_out) and (last or _due(step, config.eval.every)):
                record |= _held_out(engine, data)
            report.step(record)
            stopping = mesh.any(signals.count > 0 or saver.failed)
            if last or stopping or _due(step, settings.every):
                saved = saver.save(step, engine.save, checkpoint_state(config, tokenizer, step, position), extras)
            if stopping:
                break
        saver.wait()
        elapsed_s = time.perf_counter() - started

    complete = engine.step_count >= config.steps
    if not complete:
        report.say(f"stopped at step {engine.step_count} of {config.steps}; saved {saved}. Run again to go on.")
    _summarise(report, engine, mesh, config.run_dir, config.steps, position - first_position, elapsed_s)
    if mesh.is_first and config.log.sample_tokens and saved and complete:
        model = load_model(saved)[0].to(mesh.device, config.torch_dtype)
        prompt, more = data.opening(_PROMPT_TOKENS), config.log.sample_tokens
        report.say(f"\nsample\n{_printable(sample_text(model, tokenizer, prompt, more, seed=config.seed))}")


def _open_data(config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> RunData:
    data = config.data
    return open_data(
        data.source,
        config.run_dir / "data",
        tokenizer,
        DataPlan(data.seq_len, data.batch_size, config.layout, config.exchange_options, data.join_documents),
        mesh,
        eval_fraction=data.eval_fraction,
        eval_sequences=config.eval.sequences,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
    )


def _say_where_it_begins(report: Report, step: int, steps: int, run_dir: Path) -> None:
    if step:
        report.say(f"resumed at step {step} of {steps}")
    if step >= steps:
        report.say(
            f"{run_dir} already holds step {step} of {steps}. Raise steps=, choose another run_dir=, or "
            "start over with checkpoint.resume=false."
        )


def _step(engine: Engine, data: RunData, position: int, mesh: Mesh) -> dict[str, Any]:
    """One optimizer step on the tokens from ``position`` on: its record, as metrics.jsonl has it."""
    started = time.perf_counter()
    result = engine.step(data.step_batches(position, mesh))
    seconds, tokens = time.perf_counter() - started, data.plan.step_tokens
    return {
        "step": engine.step_count,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "labels": result.labels,
        "ranks": mesh.world_size,
        "tokens": position + tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _held_out(engine: Engine, data: RunData) -> dict[str, float]:
    """The held-out loss, for the record; nothing where no held-out sequence has a label."""
    loss = engine.evaluate(data.eval_batches)
    return {} if loss is None else {"eval_loss": loss}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _summarise(
    report: Report, engine: Engine, mesh: Mesh, run_dir: Path, steps: int, tokens: int, elapsed_s: float
) -> None:
    """The plot and the summary, which names the memory of every rank: all of them call it."""
    peaks = mesh.gather(peak_memory_bytes())
    report.plot()
    rows = summary_rows(
        run_dir,
        report.records,
        step=engine.step_count,
        steps=steps,
        tokens=tokens,
        elapsed_s=elapsed_s,
        num_parameters=engine.num_parameters,
        peaks=peaks,
    )
    report.table("summary", rows)


def _printable(text: str) -> str:
    """Text without the control characters that an untrained model writes and a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

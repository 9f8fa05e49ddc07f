"""What a run says of itself at its start and at its end, as tables of named values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lasp.launch.config.schema import RunConfig
from lasp.launch.data.run_data import RunData
from lasp.launch.run.report import METRICS, PLOT
from lasp.parallel.mesh import Mesh


def run_rows(
    config: RunConfig, mesh: Mesh, num_parameters: int, data: RunData, exchanges: dict[str, str]
) -> dict[str, str]:
    """Every number that follows from the configuration, said once.

    Args:
        exchanges: rows of :func:`lasp.launch.run.exchange_summary.exchange_rows`.
    """
    model, plan, epoch_tokens = config.model, data.plan, data.stream.epoch_tokens
    return {
        "ranks": f"{_grid(mesh)} = {mesh.world_size}, {mesh.device.type}, {torch.get_num_threads()} thread(s) each",
        "model": f"{num_parameters:,} parameters, layers {model.layer_kinds}, width {model.dim}, "
        f"vocabulary {model.vocab_size}, {config.dtype}",
        "data": f"{len(data.learned):,} documents, {epoch_tokens:,} tokens per epoch; {len(data.held_out)} held out",
        "sequence": f"{plan.seq_len:,} tokens, about {plan.seq_len // mesh.cp_size:,} per rank, {plan.layout}",
        **exchanges,
        "step": f"{plan.batch_size} sequence(s) = {plan.step_tokens:,} tokens, {plan.micro_steps(mesh)} micro "
        "step(s) per rank",
        "run": f"{config.steps} steps = {config.steps * plan.step_tokens:,} tokens = "
        f"{config.steps * plan.step_tokens / epoch_tokens:.3g} epochs, in {config.run_dir}",
    }


def _grid(mesh: Mesh) -> str:
    """The sizes of the mesh: tp and pp where a model is cut."""
    cut = f"pp {mesh.pp_size} x tp {mesh.tp_size} x " if mesh.copies > 1 else ""
    return f"{cut}dp {mesh.dp_size} x cp {mesh.cp_size}"


def summary_rows(
    run_dir: Path,
    records: Sequence[dict[str, Any]],
    *,
    step: int,
    steps: int,
    tokens: int,
    elapsed_s: float,
    num_parameters: int,
    peaks: Sequence[int],
) -> dict[str, str]:
    """What has come of a run.

    Args:
        records: of the steps, as metrics.jsonl has them; none on a rank that does not report.
        step: that it has come to, of ``steps``.
        tokens: that it has learned from since it was started, in ``elapsed_s`` seconds.
        peaks: bytes that each rank held at most.
    """
    rows = {"steps": f"{step} of {steps}", "tokens": f"{tokens:,} in {elapsed_s:.1f} s"}
    if elapsed_s and tokens:
        rows["throughput"] = f"{tokens / elapsed_s:,.0f} tokens/s, evaluation and checkpoints included"
    if records:
        rows["training loss"] = f"{records[0]['loss']:.4f} -> {records[-1]['loss']:.4f} nats/token"
    evaluated = [record for record in records if "eval_loss" in record]
    if evaluated:
        rows["held-out loss"] = f"{evaluated[-1]['eval_loss']:.4f} nats/token at step {evaluated[-1]['step']}"
    rows["parameters"] = f"{num_parameters:,}"
    rows["peak memory"] = ", ".join(f"{peak / 2**20:,.0f}" for peak in peaks) + " MiB (one number per rank)"
    rows["checkpoints"] = str(run_dir / "checkpoints")
    rows["metrics, plot"] = f"{run_dir / METRICS}, {run_dir / PLOT}"
    return rows

"""What ``lasp plan`` prints: candidates, exchanges, memory term by term, and the YAML of the recommended run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lasp.cost.fabric import Fabric
from lasp.exchange import EXCHANGES, choose, estimate
from lasp.launch.config.schema import checked, load_config
from lasp.launch.config.sizes import parse_bytes, parse_size
from lasp.launch.plan.candidates import Candidate, describe
from lasp.launch.plan.question import PlannedJob, device_of
from lasp.launch.plan.roofline import EFFICIENCY, widest_head
from lasp.launch.plan.search import Plan, make_plan, nothing_fits
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import num_parameters
from lasp.models.presets import MODEL_PRESETS
from lasp.parallel.engines.table import engine_kind

TIGHT = 0.9  # of the memory: the model's error is up to a tenth
WIDEST_KERNEL_HEAD = 256  # of the Triton kernels
_ROWS, _ROWS_TOO_LARGE, _WIDTH = 12, 6, 140


def plan_command(
    model: str,
    seq_len: str | None,
    gpus: int | None,
    fabric: str,
    *,
    batch: int | None,
    gpus_per_node: int,
    memory: str,
    engine: str | None,
    layout: str | None,
    device: str | None,
    tokens_per_s: float | None,
    explain: bool,
    every: bool,
) -> None:
    """Print the plan of a preset or of a run's YAML file.

    Raises:
        ValueError: what cannot be planned, or a job that does not fit, after the tables.
    """
    run = load_config(model) if model.endswith((".yaml", ".yml")) else None
    if run is None and (seq_len is None or gpus is None):
        raise ValueError("--seq-len and --gpus are needed with a preset: only a run's YAML file has its own.")
    wires = Fabric.of(fabric)
    job = PlannedJob(
        model=_planned(run.model if run else _preset(model)),
        seq_len=run.data.seq_len if seq_len is None else parse_size(seq_len, "seq-len"),
        gpus=run.num_ranks if gpus is None else gpus,
        fabric=wires,
        device=device_of(device, wires),
        batch=batch if batch is not None else run.data.batch_size if run else 1,
        gpus_per_node=gpus_per_node,
        memory=parse_bytes(memory, "memory"),
        engine=engine or "auto",
        layout=layout or (run.layout if run else "contiguous"),
        dtype_bytes=run.torch_dtype.itemsize if run else 2,
        tokens_per_s=tokens_per_s,
        offload=run is not None and run.offload_activations,
    )
    plan = make_plan(job)
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    console.print(_heading(model, plan))
    console.print(candidates_table(plan, every))
    shown = plan.best or min(plan.candidates, key=lambda c: c.memory.peak)
    if explain:
        if shown.case is not None:
            console.print(exchange_table(shown, job))
        console.print(memory_table(shown))
    for reason in plan.refused[:3]:
        console.print(f"not considered: {reason}")
    if plan.best is None:
        raise ValueError(nothing_fits(plan))
    console.print(f"recommended: {describe(plan.best)}. {_why(plan)}")
    console.print(recommended_yaml(model, plan, fabric, _own_values(Path(model)) if run else None), markup=False)


def _why(plan: Plan) -> str:
    """Why this exchange, in a sentence."""
    best, job = plan.best, plan.job
    if best.case is None:
        return "One rank per sequence exchanges nothing." if best.cp == 1 else ""
    choice = choose(best.case, job.fabric)
    if choice.exchange == best.exchange:
        return f"Exchange: {choice.reason}"
    return f"Exchange: {best.exchange}, whose forward and backward together expose least."


def _planned(model: ModelConfig) -> ModelConfig:
    """Without recomputation and tiles: the planner decides on them."""
    return dataclasses.replace(model, recompute=False, ffn_tile=None)


def _preset(name: str) -> ModelConfig:
    if name not in MODEL_PRESETS:
        raise ValueError(
            f"unknown model {name!r}: choose a preset, {', '.join(MODEL_PRESETS)}, or name a run's YAML file, like "
            "configs/quickstart.yaml."
        )
    return ModelConfig.preset(name)


def _heading(name: str, plan: Plan) -> str:
    job = plan.job
    peak = job.device.peak(job.dtype_bytes) / 1e12
    speed = (
        f"compute from {job.tokens_per_s:g} tokens/s of one GPU, measured by you"
        if job.tokens_per_s
        else f"compute: roofline, {EFFICIENCY:.2f} of {peak:g} TFLOPS ({job.device.source})"
    )
    lines = [
        "PREDICTION, nothing here was measured.",
        f"model {name} ({num_parameters(job.model) / 1e9:.2f}B parameters), {job.seq_len} tokens x {job.batch} on "
        f"{job.gpus} GPUs, {min(job.gpus, job.gpus_per_node)} per node, {job.memory / 1e9:g} GB each",
        f"fabric {job.fabric.name}: {job.fabric.source}",
        speed,
    ]
    if widest_head(job.model) > WIDEST_KERNEL_HEAD and job.device.name != "cpu":
        lines.append(
            f"CAUTION: heads of {widest_head(job.model)} are wider than the Triton kernels' {WIDEST_KERNEL_HEAD}: "
            "the PyTorch operator runs, slower and with gradients in fp32, which this plan does not know."
        )
    return "\n".join(lines)


def candidates_table(plan: Plan, every: bool = False) -> Table:
    """The fastest that fit, then the leanest that do not; ``every``: all of both."""
    table = Table(title="Candidates (predicted)")
    for name in ("tp", "pp", "cp", "dp", "engine", "exchange", "recompute", "ffn_tile"):
        table.add_column(name)
    for name in ("tokens/s/GPU", "exposed", "GB/GPU"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    fitting = [c for c in plan.candidates if plan.fits(c)]
    too_large = sorted((c for c in plan.candidates if not plan.fits(c)), key=lambda c: c.memory.peak)
    if not every:
        fitting, too_large = fitting[:_ROWS], too_large[:_ROWS_TOO_LARGE]
    for c in (*fitting, *too_large):
        table.add_row(*_row(plan, c), style="bold" if c is plan.best else None)
    left = len(plan.candidates) - len(fitting) - len(too_large)
    table.caption = f"{left} more with --all" if left else None
    return table


def _row(plan: Plan, c: Candidate) -> list[str]:
    largest = max(c.memory.terms, key=lambda term: term.bytes)
    tight = c.memory.peak > TIGHT * plan.job.memory
    why = "yes, tight" if tight else "yes"
    why = why if plan.fits(c) else f"no: {largest.name} {largest.bytes / 1e9:.1f} GB"
    exchange = "/".join(
        x for x in (c.exchange and c.exchange + (f" x{c.slices}" * (c.slices > 1)), c.softmax_exchange) if x
    )
    mesh = [str(n) for n in (c.tp, c.pp, c.cp, c.dp)]
    made = ["yes" if c.recompute else "no", str(c.ffn_tile or "-")]
    share = f"{c.exposed_s * 1e3:.1f} ms ({c.exposed_s / c.step_s:.1%})"
    return [*mesh, c.engine, exchange or "-", *made, f"{c.tokens_per_s:.0f}", share, f"{c.memory.peak / 1e9:.1f}", why]


def exchange_table(c: Candidate, job: PlannedJob) -> Table:
    """All exchanges of one linear layer, forward."""
    table = Table(title=f"One exchange of a linear layer over cp {c.cp}, forward (predicted)")
    for name in ("exchange", "slices", "ms", "messages", "MB sent"):
        table.add_column(name, justify="left" if name == "exchange" else "right")
    for e in (estimate(name, c.case, job.fabric) for name in EXCHANGES):
        cells = (e.exchange, str(e.slices), f"{e.seconds * 1e3:.3f}", str(e.messages), f"{e.bytes_sent / 1e6:.2f}")
        table.add_row(*cells, style="bold" if e.exchange == c.exchange else None)
    return table


def memory_table(c: Candidate) -> Table:
    """Every term of the fullest moment, largest first, and the peaks of the other phases."""
    table = Table(title=f"Memory of one GPU at its fullest: {c.memory.phase} (predicted)")
    table.add_column("GB", justify="right")
    table.add_column("what")
    table.add_column("counted as")
    for term in sorted(c.memory.terms, key=lambda term: -term.bytes):
        table.add_row(f"{term.bytes / 1e9:.3f}", term.name, term.formula)
    table.add_row(f"{c.memory.peak / 1e9:.3f}", "peak", describe(c), style="bold")
    return table


_PLANNED = ("tp_size", "pp_size", "cp_size", "dp_size", "engine", "backend", "exchange", "softmax_exchange", "fabric")


def recommended_yaml(name: str, plan: Plan, fabric: str, own: dict[str, Any] | None = None) -> str:
    """A run's YAML file: the preset's or the given run's, with what the plan has chosen.

    Args:
        name: of the preset, where no run is given.
        own: what the given run's file says.

    Raises:
        ValueError: the schema refuses it: a fault of the planner.
    """
    job, best = plan.job, plan.best
    values = own or {}
    model = values.get("model", name)
    model = {"preset": model} if isinstance(model, str) else dict(model)
    model["recompute"] = best.recompute
    model.pop("ffn_tile", None)
    if best.ffn_tile is not None:
        model["ffn_tile"] = best.ffn_tile
    defaults = {} if own else {"run_dir": f"runs/{name}", "steps": 1000, "dtype": "bfloat16"}
    values = {**defaults, **values, "model": model}
    for key in _PLANNED:
        values.pop(key, None)
    values |= {"cp_size": best.cp, "dp_size": best.dp, "layout": job.layout}
    if not engine_kind(best.engine).native:
        values |= {"backend": best.engine, "tp_size": best.tp, "pp_size": best.pp}
    else:
        values["engine"] = best.engine
    values |= _travel(best, fabric)
    values["data"] = {**values.get("data", {}), "seq_len": job.seq_len, "batch_size": job.batch}
    nodes = -(-job.gpus // job.gpus_per_node)
    if nodes > 1:
        values["launcher"] = "torchrun"
        values["torchrun"] = {"endpoint": "node0:29400", **values.get("torchrun", {}), "nodes": nodes}
    checked(values, "the recommended run")
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return f"# predicted {best.tokens_per_s:.0f} tokens/s per GPU, {best.memory.peak / 1e9:.1f} GB\n{text}"


def _own_values(path: Path) -> dict[str, Any]:
    from lasp.launch.config.yaml_text import parse_yaml

    return parse_yaml(path.read_text(encoding="utf-8"), str(path))


def _travel(best: Candidate, fabric: str) -> dict[str, Any]:
    """The exchanges of the run; the fabric where one needs it for its number of slices."""
    chosen = {"exchange": best.exchange, "softmax_exchange": best.softmax_exchange}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    sliced = best.exchange is not None and EXCHANGES[best.exchange].takes_fabric
    return {**chosen, "fabric": fabric} if sliced else chosen

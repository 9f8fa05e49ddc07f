"""Whole training steps on every rank, as ``lasp train`` makes them, over made-up tokens: their time and their memory.

Memory of a rank on the CPU is what its process allocates for the training: the most it ever had resident (VmHWM), less
the pages of programs and libraries that it has read by then (some 80 MiB more than before the first step) and less
what it held when Python, torch and the process group were there and no model yet; so the process must be a fresh one.
An allocator keeps what is freed and makes this vary by a tenth from run to run, so ranks of this machine run once more,
two steps, with an allocator that returns it at once. On a CUDA device memory is the most that torch had allocated.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lasp.launch.bench.ranks import Ranks, local_ranks
from lasp.launch.config.schema import RunConfig
from lasp.launch.run.backends import make_engine
from lasp.launch.run.report import peak_memory_bytes
from lasp.layout import SequenceLayout
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch


def measure_here(config: RunConfig, *, repeats: int) -> dict[str, Any]:
    """:func:`measure` on ranks of this machine, started for it: one set for the time, one for the memory.

    Raises:
        ValueError: as :func:`measure`; more ranks than can be started.
    """
    options = {"device": config.device, "timeout_s": config.timeout_s}
    with local_ranks(config.num_ranks, **options) as ranks:
        row = {**measure(ranks, config, repeats=repeats), "where": ranks.where}
    with local_ranks(config.num_ranks, **options, exact_memory=True) as ranks:
        again = measure(ranks, config, repeats=1)
    return row | {key: again[key] for key in ("memory_bytes", "memory_bytes_of_each", "baseline_bytes")}


def measure(ranks: Ranks, config: RunConfig, *, repeats: int) -> dict[str, Any]:
    """One row: tokens per second of the job, seconds of a step, memory of the rank that has most, and of each.

    Raises:
        ValueError: the sizes do not fit the ranks. RankFailure: the loss is not finite.
    """
    answers = ranks.ask(f"{__name__}:run", config=config.plain(), repeats=repeats)
    seconds = statistics.median(map(max, zip(*(a["seconds"] for a in answers))))
    tokens = config.data.seq_len * config.data.batch_size
    return {
        "ranks": ranks.size,
        "cp_size": config.cp_size,
        "seq_len": config.data.seq_len,
        "tokens_per_rank": tokens // ranks.size,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "parameters": answers[0]["parameters"],
        "loss": answers[0]["loss"],
        "memory_bytes": max(a["memory_bytes"] for a in answers),
        "memory_bytes_of_each": [a["memory_bytes"] for a in answers],
        "baseline_bytes": max(a["baseline_bytes"] for a in answers),
    }


def run(mesh: Mesh, *, config: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of each step after one that warms up, and this rank's memory."""
    settings = RunConfig.model_validate(config)
    cuda = mesh.device.type == "cuda"
    before = 0 if cuda else resident_bytes("RssAnon")
    grid = Mesh.build(settings.cp_size, settings.dp_size, device=mesh.device) if mesh.world_size > 1 else mesh
    engine = make_engine(settings, grid)
    data = settings.data
    if data.batch_size % grid.dp_size:
        raise ValueError(
            f"data.batch_size = {data.batch_size} must be a multiple of the {grid.dp_size} sequences in flight. Set "
            f"data.batch_size={grid.dp_size}."
        )
    layout = getattr(SequenceLayout, settings.layout)(data.seq_len, grid.cp_size)
    random = torch.Generator().manual_seed(grid.dp_rank)
    times = []
    for _ in range(repeats + 1):
        batches = []
        for _ in range(data.batch_size // grid.dp_size):
            tokens = torch.randint(0, settings.model.vocab_size, (1, data.seq_len), generator=random)
            batches.append(Batch.cut(tokens, layout, grid, options=settings.exchange_options))
        mesh.any(False)
        started = time.perf_counter()
        result = engine.step(batches)
        if cuda:
            torch.cuda.synchronize(mesh.device)
        times.append(time.perf_counter() - started)
    return {
        "seconds": times[1:],
        "loss": result.loss,
        "parameters": engine.num_parameters,
        "memory_bytes": peak_memory_bytes() - (0 if cuda else resident_bytes("RssFile")) - before,
        "baseline_bytes": before,
    }


def resident_bytes(kind: str) -> int:
    """What this process has resident now: ``RssAnon``, its own data, or ``RssFile``, pages of programs and libraries.

    Raises:
        ValueError: the system does not say.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise ValueError("the memory of a CPU rank is read from /proc/self/status, which this system lacks: use Linux.")

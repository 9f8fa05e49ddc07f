"""``lasp doctor``: is this machine, or this job, fit for the run, and how will the run be laid out?

    lasp doctor                                            this machine
    lasp doctor CONFIG --cp 4                              the ranks of CONFIG, on this machine
    lasp doctor CONFIG launcher=torchrun torchrun....      the job's nodes: the same command on each, as for training

Every rank examines its machine; together they measure clocks and groups; the first one draws the report. Whatever is
wrong is a sentence with its remedy, and the exit code is 0 only if there is none.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lasp import comm, operators
from lasp.kernels import softmax
from lasp.launch.config.schema import RunConfig
from lasp.launch.doctor import machine
from lasp.launch.run import preflight
from lasp.launch.run.backends import backend_mesh
from lasp.launch.run.rendezvous import Job, choose_device, process_group
from lasp.layout import SequenceLayout
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama
from lasp.models.sizes import LinearSizes
from lasp.parallel.mesh import Mesh

_SIZES = (4 * 2**10, 256 * 2**10, 16 * 2**20)  # bytes that each rank brings to an all-gather
_GATHERED = 2**30  # at most so many bytes on a rank
_ROUNDS = 5
_MAX_SKEW_S = 1.0  # torchrun takes a node for dead by its own clock
_BAR, _SHOWN_RANKS, _LINE = 64, 32, 200
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass
class Findings:
    """What a rank has to say: titles with rows, name to text, and what is wrong."""

    tables: dict[str, machine.Rows] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine(config: RunConfig | None) -> None:
    """Examine this rank's machine and, with a configuration, the job; the first rank prints the report.

    Raises:
        ValueError: something is wrong; on every rank, after the report.
    """
    job = Job.from_environment() or Job()
    if config is None:
        findings = _machine(None, Job(), 1)
        _end(report([(socket.gethostname(), findings)], Findings()))
        return
    device = choose_device(config.device, job)
    timeout = timedelta(seconds=config.timeout_s)
    with process_group(job, device, timeout):
        everyone, whole = Mesh.build(1, device=device), Findings()
        hosts = everyone.gather(socket.gethostname())
        try:
            preflight.check_ranks(config, device)
            whole.tables["ranks agree on"] = {"configuration, code, run_dir": f"{len(hosts)} rank(s): yes"}
        except ValueError as error:
            whole.problems.append(str(error))
        skews = clock_skews(everyone)
        whole.tables["clocks"] = {f"rank {rank}": f"{skew * 1e3:+.1f} ms" for rank, skew in enumerate(skews)}
        whole.problems += _skew_problems(skews, hosts)
        everything = everyone.gather((hosts[_rank()], _machine(config, job, len({*hosts}))))
        if not whole.problems:  # ranks that differ would make different groups, and wait
            with backend_mesh(config, device, timeout) as mesh:
                seats = everyone.gather((hosts[_rank()], str(device), mesh.dp_rank, mesh.cp_rank))
                whole.tables["all-gather, median of one call"] = bandwidths(mesh)
            whole.tables |= drawing(config.layout, config.data.seq_len, config.cp_size, seats)
            whole.tables["implementations"] = implementations(config.model, config.torch_dtype, device)
        problems = report(list(dict(everything).items()), whole) if everyone.is_first else 0
        problems = everyone.on_first(lambda: problems)
    _end(problems)


def _end(problems: int) -> None:
    if problems:
        raise ValueError(f"doctor: {problems} problem(s), with their remedies in the report above.")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _machine(config: RunConfig | None, job: Job, hosts: int) -> Findings:
    """This rank's machine."""
    found = Findings()
    cuda = torch.cuda.is_available() and (config is None or config.device != "cpu")
    wanted = "cpu" if config is None else config.device
    found.tables["versions"] = machine.versions()
    found.tables["devices"] = machine.devices(wanted, job.local_world_size, found.problems)
    found.tables["network"] = machine.network(hosts, found.problems)
    endpoint = None if config is None or hosts > 1 or job.world_size > 1 else config.torchrun.endpoint
    found.tables["ports"] = machine.ports(endpoint, found.problems)
    found.tables["shared memory"] = machine.shared_memory(job.local_world_size, cuda, found.problems)
    if config is not None:
        found.tables["disk"] = machine.disk(config.run_dir, checkpoint_bytes(config), found.problems)
    found.tables["limits of a process"] = machine.limits(job.world_size, cuda, found.problems)
    return found


def checkpoint_bytes(config: RunConfig) -> int:
    """What the checkpoints that a run keeps take at once: weights and two moments, and one that is being written."""
    model = LinearLlama(config.model, device="meta")
    one = 3 * (8 if config.dtype == "float64" else 4) * sum(p.numel() for p in model.parameters())
    total = config.steps // config.checkpoint.every + 1 if config.checkpoint.every else 1
    return one * (min(config.checkpoint.keep or total, total) + 1)


def clock_skews(everyone: Mesh) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, to about the time of a collective."""
    rounds = []
    for _ in range(_ROUNDS + 1):  # the first one meets the others
        everyone.any(False)
        rounds.append(everyone.gather(_now()))
    return [statistics.median(times[rank] - times[0] for times in rounds[1:]) for rank in range(everyone.world_size)]


def _now() -> float:
    return time.time()


def _skew_problems(skews: list[float], hosts: list[str]) -> list[str]:
    late = {hosts[rank]: skew for rank, skew in enumerate(skews) if abs(skew) > _MAX_SKEW_S}
    return [
        f"the clock of {name} is {skew:+.1f} s off rank 0's ({hosts[0]}), and torchrun takes a node for dead by its "
        "clock. Let NTP (chrony) set the clocks."
        for name, skew in late.items()
    ]


def bandwidths(mesh: Mesh) -> machine.Rows:
    """How fast each group of this rank gathers messages of several sizes."""
    rows = {}
    for name, group in (("world", mesh.world_group), ("cp", mesh.cp_group), ("dp", mesh.dp_group)):
        if group is None:
            continue
        ranks = dist.get_process_group_ranks(group)
        told = []
        for size in dict.fromkeys(min(size, _GATHERED // len(ranks)) for size in _SIZES):
            seconds = _gather_seconds(size, group, mesh.device)
            received = (len(ranks) - 1) * size
            told.append(f"{_bytes(size)}: {seconds * 1e3:.2f} ms, {received / seconds / 1e9:.2f} GB/s")
        rows[f"{name} ({len(ranks)} ranks)"] = "; ".join(told)
    return rows or {"one rank": "nothing to gather"}


def _gather_seconds(size: int, group: dist.ProcessGroup, device: torch.device) -> float:
    x = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        comm.all_gather(x, group).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _bytes(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


def drawing(
    layout_name: str, total: int, cp_size: int, seats: list[tuple[str, str, int, int]]
) -> dict[str, machine.Rows]:
    """Which rank owns which tokens, as a bar of the sequence and as a table.

    Args:
        layout_name: contiguous or zigzag.
        total: tokens of the sequence.
        seats: host, device, dp_rank and cp_rank of every rank.
    """
    layout = getattr(SequenceLayout, layout_name)(total, cp_size)
    width = min(_BAR, total)
    owner = {}
    for cp_rank, fragments in enumerate(layout.fragments):
        for start, stop in fragments:
            owner |= dict.fromkeys(range(math.ceil(start * width / total), math.ceil(stop * width / total)), cp_rank)
    bar = "".join(_DIGITS[owner[column] % len(_DIGITS)] for column in range(width))
    rows = {f"tokens 0 to {total:,}": f"{bar}  {layout_name}, by cp_rank"}
    for rank, (name, device, dp_rank, cp_rank) in enumerate(seats[:_SHOWN_RANKS]):
        own = ", ".join(f"[{start:,}, {stop:,})" for start, stop in layout.fragments[cp_rank])
        rows[f"rank {rank}"] = f"dp {dp_rank} cp {cp_rank}  {name} {device}  {own}"
    if len(seats) > _SHOWN_RANKS:
        rows["..."] = f"and {len(seats) - _SHOWN_RANKS} more ranks"
    crossing = [
        dp_rank
        for dp_rank in sorted({seat[2] for seat in seats})
        if len({name for name, _, own_dp, _ in seats if own_dp == dp_rank}) > 1
    ]
    if crossing:
        rows["across machines"] = f"the sequences of dp rank(s) {', '.join(map(str, crossing))}: states travel there"
    return {"layout": rows}


def implementations(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> machine.Rows:
    """What ``impl="auto"`` takes for the layers of the model on this device, and why."""
    rows = {}
    if "L" in model.layer_kinds:
        sizes = LinearSizes.of(model)
        q, v = (torch.empty(1, 1, 1, n, device=device, dtype=dtype) for n in (sizes.state_dim, sizes.columns))
        chosen = operators.choose_impl(q, v)
        why = "Triton needs a CUDA device" if device.type != "cuda" else "the Triton kernels serve it"
        if device.type == "cuda" and chosen != "triton":
            why = operators.why_not_triton(q.device, q.dtype, q.shape[-1], v.shape[-1])
        rows["linear layers"] = f"{chosen}: {why}"
    if "S" in model.layer_kinds:
        q = torch.empty(1, 1, 1, model.dim // model.heads, device=device, dtype=dtype)
        chosen = softmax._choose("auto", q, q, q, model.window)
        rows["softmax layers"] = (
            f"{chosen}: {device.type}, {str(dtype).removeprefix('torch.')}, window {model.window or 'none'}"
        )
    return rows


def report(machines: list[tuple[str, Findings]], whole: Findings) -> int:
    """Print everything; the number of problems."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=_LINE)

    def show(title: str, rows: dict[str, Any]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, str(value))
        console.print(table)

    for name, found in machines:
        for title, rows in found.tables.items():
            show(f"{title} of {name}", rows)
    for title, rows in whole.tables.items():
        show(title, rows)
    problems = [*whole.problems]
    for name, found in machines:
        problems += [f"{name}: {problem}" for problem in found.problems]
    for problem in problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    if not problems:
        console.print("nothing is wrong", style="green")
    return len(problems)

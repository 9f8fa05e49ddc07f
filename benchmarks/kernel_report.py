"""The report of ``benchmarks/kernels.py``: its cells, what was predicted for them, where it ran, and its tables."""

from __future__ import annotations

import hashlib
import importlib
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from kernel_baselines import GATES, SOFTMAX, describe, implementations

from lasp.kernels.triton_linear import tiles as triton_tiles

ROOT = Path(__file__).parent.parent
SAME = ("device", "driver", "cuda", "torch", "triton", "fla", "source", "dtype", "dry")  # of reports that may be joined
# Predicted before any run: bytes of the pass / (efficiency * 4.3 TB/s of an H200's copy), and 4 us a launch; efficiency
# 85 % in state passes, 80 % in o and dq, 70 % in dk and dv. For fixed decay, H = 16, D = 128, bf16; ms at 16K and 1M.
PREDICTED_LENGTHS = (1 << 14, 1 << 20)
PREDICTED = (
    ("state + scan", 0.05, 2.7),
    ("o", 0.09, 5.1),
    ("dstate + dscan", 0.05, 2.7),
    ("dq", 0.09, 5.1),
    ("dkdv", 0.15, 8.7),
)
FORWARD_PASSES = ("state", "scan", "o")
MAIN = ("triton", "fla_chunk", "sdpa_flash", "torch")


@dataclass(frozen=True)
class Cell:
    """One row of the report. The gate of softmax attention is ``softmax``."""

    implementation: str
    gate: str
    heads: int
    dim: int
    length: int


PREDICTED_CELL = Cell("triton", "fixed", 16, 128, 0)


def order(
    names: Iterable[str], gates: Iterable[str], heads: Iterable[int], dims: Iterable[int], lengths: Iterable[int]
) -> list[Cell]:
    """All cells, the most telling first: H = 16, D = 128 at 16K, 64K, 1M; in both parts ``MAIN`` before the rest."""
    known = implementations()
    ranks = {name: i for i, name in enumerate(known)}
    cells = {
        Cell(name, gate if gate in known[name].gates else SOFTMAX, h, d, t)
        for name in names for gate in gates for h in heads for d in dims for t in lengths
    }  # fmt: skip

    def value(cell: Cell) -> tuple:
        telling = cell.heads == 16 and cell.dim == 128 and cell.length in (1 << 14, 1 << 16, 1 << 20)
        rank, gate = ranks[cell.implementation], (*GATES, SOFTMAX).index(cell.gate)
        shape = cell.heads != 16, cell.heads, cell.dim != 128, cell.dim, cell.length
        return not telling, cell.implementation not in MAIN, *shape, gate, rank

    return sorted(cells, key=value)


def cell_of(row: dict) -> Cell:
    """The cell that a row is about."""
    return Cell(*(row[name] for name in Cell.__dataclass_fields__))


def pass_bytes(gate: str, heads: int, dim: int, length: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that each pass of LASP-2's order (states first, then outputs) must move at least, for B = 1, K = V = dim.

    X, one tensor [T, H, D]: the state pass reads k, v and the output pass q, k, v, writing o: 6X. The backward's state
    pass reads q, do; dq reads do, v, k; dk and dv read q, k, v, do: with what they write, 12X. Each touch of the fp32
    states, one [D, D] per superchunk and head, is counted, two by a scan, and two where the gradient of g reads states
    and their gradients; each pass reads g (fp32) once, and dg is written once.
    """
    decay = GATES.index(gate)
    x = itemsize * length * heads * dim
    states = 4 * heads * dim * dim * math.ceil(length / triton_tiles.superchunk(decay, heads * length))
    g = (0, 4 * heads, 4 * length * heads, 4 * length * heads * dim)[decay]
    summed = 2 * x + states + g
    found = {"state": summed, "scan": 2 * states, "o": 4 * x + states + g}
    found |= {"dstate": summed, "dscan": 2 * states, "dq": 4 * x + states + g, "dkdv": 6 * x + states + g}
    return found | ({"dg": 2 * states + g} if decay > 1 else {})


def minimal_bytes(cell: Cell, itemsize: int) -> tuple[int, int] | None:
    """Of forward, and forward + backward; None for softmax, which is bound by arithmetic."""
    if cell.gate == SOFTMAX:
        return None
    passes = pass_bytes(cell.gate, cell.heads, cell.dim, cell.length, itemsize)
    return sum(passes[name] for name in FORWARD_PASSES), sum(passes.values())


def machine(device: torch.device) -> dict:
    """Where and with what this runs; ``source`` is a digest of the code, for copies without a history."""

    def ask(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        except OSError:  # no such program
            return None
        return done.stdout.strip() or None

    gpu, versions = device.type == "cuda", {}
    for name in ("triton", "fla"):
        try:
            versions[name] = importlib.import_module(name).__version__
        except Exception as fault:
            versions[name] = f"none: {describe(fault)}"
    sources = "kernels/*.py", "kernels/tiles.json", "lasp/*.py", "benchmarks/kernel*.py"
    files = [path for pattern in sources for path in ROOT.glob(pattern)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **versions,
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
        "source": digest.hexdigest()[:12],
    }


def markdown(report: dict) -> str:
    """The report as tables: rows, our passes beside their predictions, and what has no time and why."""
    facts = ("device", "driver", "cuda", "torch", "triton", "fla", "commit", "source", "dtype")
    lines = [
        ", ".join(f"{name} {report[name]}" for name in facts if report[name]) + f"; copy {report['copy']:.3g} B/s."
    ]
    if report["dry"]:
        lines += ["", "**Dry run on a CPU in Triton's interpreter: the times mean nothing.**"]
    lines += [
        "", "| H | D | gate | T | implementation | forward ms | % of roofline | forward + backward ms | % of roofline "
        "| time / ours | host ms | peak MiB | largest error |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    show = lambda x, pattern: "-" if x is None else format(x, pattern)  # noqa: E731
    rows = {cell_of(row): row for row in report["rows"]}
    place = lambda c: (c.heads, c.dim, (*GATES, SOFTMAX).index(c.gate), c.length)  # noqa: E731
    for cell in sorted(rows, key=place):
        row, get = rows[cell], rows[cell].get
        if "forward_ms" not in row:
            continue
        gate, note = "none" if cell.gate == SOFTMAX else cell.gate, f" ({get('note')})" if get("note") else ""
        ours = rows.get(replace(cell, implementation="triton", gate=gate), {}).get("forward_backward_ms")
        both, peak = get("forward_backward_ms"), get("peak_bytes")
        lines.append(
            f"| {cell.heads} | {cell.dim} | {cell.gate} | {cell.length:,} | {cell.implementation}{note} "
            f"| {show(row['forward_ms'], '.3f')} | {show(get('forward_roofline_percent'), '.0f')} "
            f"| {show(both, '.3f')} | {show(get('roofline_percent'), '.0f')} "
            f"| {show(both / ours if both and ours else None, '.2f')} | {show(get('host_ms'), '.3f')} "
            f"| {show(peak / 2**20 if peak is not None else None, ',.0f')} | {max(row['errors'].values()):.1e} |"
        )
    lines += ["", f"Our passes, ms; predicted: {report['predicted']['source']}.", ""]
    groups = ["gates", *(name for name, *_ in PREDICTED), "dgates", "dg"]
    lines += [f"| H | D | gate | T | {' | '.join(groups)} |", "|---" * (4 + len(groups)) + "|"]
    predicted = {name: dict(zip(PREDICTED_LENGTHS, ms, strict=True)) for name, *ms in PREDICTED}
    for cell in sorted((cell for cell in rows if rows[cell].get("passes")), key=place):
        passes = {name: x["ms"] for name, x in rows[cell]["passes"].items()}
        cells = [[passes[name] for name in group.split(" + ") if name in passes] for group in groups]
        start = f"| {cell.heads} | {cell.dim} | {cell.gate} | {cell.length:,}"
        lines.append(f"{start} | {' | '.join(f'{sum(ms):.3f}' if ms else '-' for ms in cells)} |")
        if replace(cell, length=0) == PREDICTED_CELL and cell.length in PREDICTED_LENGTHS:
            ms = [predicted.get(group, {}).get(cell.length) for group in groups]
            lines.append(f"{start}, predicted | {' | '.join(show(x, 'g') for x in ms)} |")
    reasons: dict[str, list[Cell]] = {}
    for cell, row in rows.items():
        if row["status"] != "measured":
            reasons.setdefault(row["reason"], []).append(cell)
    lines += ["", "Without a time:" if reasons else "Every cell has its times.", ""]
    for reason, cells in reasons.items():
        shown = "; ".join(f"{c.implementation} {c.gate} H={c.heads} D={c.dim} T={c.length:,}" for c in cells[:6])
        lines.append(f"- {reason}: {shown}{f'; and {len(cells) - 6} more' if len(cells) > 6 else ''}")
    return "\n".join(lines).rstrip() + "\n"

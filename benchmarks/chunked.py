"""python benchmarks/chunked.py [--gates none,token] [--json benchmarks/results/chunked.json]

Forward + backward of lasp.linear_attention on one process, beside a straightforward chunked implementation that leaves
the backward to autograd: same algebra, all chunks at once, states by a loop over chunks (unbind and stack: no slicing
whose gradient would be quadratic). Times are medians over --seconds per cell, the two taking turns in one process, and
of --processes such medians, since where memory lies differs between processes. Memory is the resident peak above the
inputs, each in a process of its own whose allocator gives freed memory back at once, so that it is the peak of what is
alive. These machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lasp import linear_attention

T = TypeVar("T")
HEADS, DIM, CHUNK = 4, 64, 64
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)


def autograd_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The baseline, for no gate and per-token gates [B, T, H]: tensors [B, T, H, D], T a multiple of the chunk."""
    q, k, v = (x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, n, C, D]
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    if g is None:
        total, scores = None, scores.masked_fill(~lower, 0.0)
    else:
        g = g.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2).cumsum(-1).unsqueeze(-1)  # [B, H, n, C, 1]
        scores = scores * (g - g.transpose(-1, -2)).masked_fill(~lower, -math.inf).exp()
        total = g[..., -1:, :]
        k, q = k * (total - g).exp(), q * g.exp()
    added, state, states = k.transpose(-1, -2) @ v, None, []
    decays = [None] * added.shape[2] if total is None else total.exp().unbind(2)
    for chunk, decay in zip(added.unbind(2), decays, strict=True):
        states.append(torch.zeros_like(chunk) if state is None else state)
        state = chunk if state is None else (state if decay is None else decay * state) + chunk
    o = scores @ v + q @ torch.stack(states, 2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The library's operator."""
    return linear_attention(q, k, v, g)[0]


IMPLEMENTATIONS = {"ours": ours, "autograd": autograd_chunked}
# glibc settings under which the resident peak is what is alive
FREED_AT_ONCE = {
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def draw(gate: str, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, v, g and do."""
    q, k, v = (torch.randn(1, length, HEADS, DIM, requires_grad=True) for _ in range(3))
    g = None
    if gate == "token":
        g = torch.nn.functional.logsigmoid(torch.randn(1, length, HEADS) + 3).requires_grad_()
    return q, k, v, g, torch.randn(1, length, HEADS, DIM)


def step(run: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, do: Tensor) -> float:
    """Seconds of one forward + backward."""
    for x in (q, k, v, g):
        if x is not None:
            x.grad = None
    started = time.perf_counter()
    run(q, k, v, g).backward(do)
    return time.perf_counter() - started


def times(gate: str, length: int, threads: int, seconds: float) -> dict[str, float]:
    """Median seconds of each implementation: they take turns for ``seconds``, at least five times."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    inputs, measured = draw(gate, length), {name: [] for name in IMPLEMENTATIONS}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(measured["ours"]) < 6:
        for name, run in IMPLEMENTATIONS.items():
            measured[name].append(step(run, *inputs))
    return {name: statistics.median(x[1:]) for name, x in measured.items()}  # the first loads code and memory


def peak(name: str, gate: str, length: int, threads: int) -> int:
    """Resident peak above the inputs of one forward + backward, bytes."""
    torch.set_num_threads(threads)
    run = IMPLEMENTATIONS[name]
    step(run, *draw(gate, 2 * CHUNK))  # loads code and starts threads: a constant that is not the operator's memory
    inputs = draw(gate, length)
    Path("/proc/self/clear_refs").write_text("5")  # reset the resident peak
    before = resident("VmRSS")
    step(run, *inputs)
    return resident("VmHWM") - before


def apart(measure: Callable[..., T], *args, **environment: str) -> T:
    """``measure(*args)`` in a process of its own, with variables added to its environment."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, args)
    finally:
        for name in environment:
            os.environ.pop(name)
        os.environ.update(before)


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log time over log length."""
    x, y = [math.log(t) for t in points], [math.log(s) for s in points.values()]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def machine() -> dict[str, str | int]:
    """Where and with what this ran."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    model = names[0] if names else platform.machine()
    return {"cpu": model, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def main() -> None:
    """Measure every cell, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", default="none,token")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {
        **machine(),
        "threads": args.threads,
        "processes": args.processes,
        "heads": HEADS,
        "dim": DIM,
        "rows": [],
        "slopes": {},
    }
    print({key: value for key, value in report.items() if key not in ("rows", "slopes")})
    print(
        f"{'gate':6} {'T':>6} {'ours ms':>9} {'autograd ms':>12} {'speed':>6} "
        f"{'ours MiB':>9} {'autograd MiB':>13} {'memory':>7}"
    )
    for gate in args.gates.split(","):
        points = {}
        for length in LENGTHS:
            row = {"gate": gate, "length": length}
            runs = [apart(times, gate, length, args.threads, args.seconds) for _ in range(args.processes)]
            row |= {f"{name}_s": statistics.median(run[name] for run in runs) for name in IMPLEMENTATIONS}
            for name in IMPLEMENTATIONS:
                row[f"{name}_peak_bytes"] = apart(peak, name, gate, length, args.threads, **FREED_AT_ONCE)
            points[length] = row["ours_s"]
            report["rows"].append(row)
            print(
                f"{gate:6} {length:6} {row['ours_s'] * 1e3:9.1f} {row['autograd_s'] * 1e3:12.1f} "
                f"{row['autograd_s'] / row['ours_s']:5.2f}x {row['ours_peak_bytes'] / 2**20:9.1f} "
                f"{row['autograd_peak_bytes'] / 2**20:13.1f} "
                f"{row['ours_peak_bytes'] / row['autograd_peak_bytes']:6.2f}x"
            )
        report["slopes"][gate] = slope(points)
        print(f"{gate}: log-log slope of ours from {LENGTHS[0]} to {LENGTHS[-1]} tokens: {slope(points):.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""``lasp bench layer``: forward and backward of one linear-attention layer by every method, side by side.

Each method's output and gradients are first compared with :func:`lasp.linear_attention` over an all-gather; a method
that differs is not timed. Then each repeat times, with a barrier before each,

- the layer on the cut sequence;
- the same stages without a message between them: what the layer takes longer is communication that is not hidden;
- the layer on this rank's tokens alone, which needs fewer stages.

All ranks run at once in all three, so that they share the machine alike.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.fabric import Fabric
from lasp.kernels import chunked
from lasp.launch.bench.baselines import METHODS, Method
from lasp.launch.bench.exchange_cell import context_over
from lasp.launch.bench.options import readable
from lasp.launch.bench.ranks import Ranks
from lasp.launch.bench.results import table
from lasp.parallel.mesh import Mesh

TIMES = ("seconds", "silent", "alone")
TOLERANCE = 1e-4  # sums over a whole sequence, in another order, in fp32


def compare(
    ranks: Ranks, names: Sequence[str], *, tokens: int, heads: int, dim: int, repeats: int, fabric: Fabric | None
) -> list[dict[str, Any]]:
    """One row per method: seconds of each repeat, or why it was not run.

    Args:
        tokens: of each rank.
        fabric: for ``auto`` and the slices of others; None: ``auto`` is not run.

    Raises:
        ValueError: a method gives other numbers than ``linear_attention``.
    """
    rows = []
    for name in names:
        method = METHODS[name]
        row = {"method": name, "label": method.label}
        if why := _unserved(name, method, ranks.size, heads, fabric):
            rows.append({**row, "skipped": why})
            continue
        answers = ranks.ask(
            f"{__name__}:measure",
            name=name,
            nodes=list(ranks.nodes),
            fabric=None if fabric is None else asdict(fabric),
            shape=[1, tokens, heads, dim],
            repeats=repeats,
        )
        error = max(a["error"] for a in answers)
        if not error <= TOLERANCE:
            raise ValueError(
                f"{name} differs from linear_attention by {error:.1e} of the largest value, allowed {TOLERANCE:.0e}: "
                "it was not timed. This is a fault of lasp."
            )
        seconds, silent, alone = ([max(t) for t in zip(*(a[key] for a in answers))] for key in TIMES)
        rows.append(
            {
                **row,
                "seconds": statistics.median(seconds),
                "repeats": seconds,
                "silent_s": statistics.median(silent),
                "alone_s": statistics.median(alone),
                "exposed": statistics.median(x / y - 1 for x, y in zip(seconds, silent)),
                "error": error,
            }
        )
    return rows


def _unserved(name: str, method: Method, size: int, heads: int, fabric: Fabric | None) -> str | None:
    if method.exchange == "auto" and fabric is None:
        return "needs a fabric, and one rank has none"
    if name == "Ulysses" and heads % size:
        return f"{size} ranks do not divide {heads} heads"
    return None


def measure(
    mesh: Mesh, *, name: str, nodes: Sequence[int], fabric: dict[str, Any] | None, shape: list[int], repeats: int
) -> dict[str, Any]:
    """Seconds of each repeat with the method and alone, and the error against ``linear_attention``."""
    method, size = METHODS[name], mesh.world_size
    layout = SequenceLayout.contiguous(shape[1] * size, size)
    cp = context_over(mesh, layout, method.exchange or "all_gather", nodes, fabric)
    local = CPContext.local(shape[1])
    random = torch.Generator().manual_seed(mesh.rank)
    q, k, v, do = (torch.randn(shape, generator=random).to(mesh.device) for _ in range(4))

    def step(fn) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        o = fn(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    run = lambda: step(lambda *x: method(*x, cp))  # noqa: E731
    alone = lambda: step(lambda *x: linear_attention(*x, cp=local)[0])  # noqa: E731
    trusted = context_over(mesh, layout, "all_gather", nodes, None)
    expected = step(lambda *x: linear_attention(*x, cp=trusted)[0])
    error = max(_error(a, b) for a, b in zip(run(), expected, strict=True))
    silent = lambda: _stages(q, k, v, do, cp)  # noqa: E731
    works = dict(zip(TIMES, (run, silent, alone), strict=True))
    times: dict[str, list[float]] = {key: [] for key in TIMES}
    for repeat in range(repeats + 1):
        for key, work in works.items():
            mesh.any(False)
            started = time.perf_counter()
            work()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize(mesh.device)
            if repeat:  # the first one warms up
                times[key].append(time.perf_counter() - started)
    mesh.any(False)
    return {**times, "error": error}


def _stages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, cp: CPContext) -> None:
    """What the layer computes, with made-up states in place of those that other ranks send."""
    operator = importlib.import_module("lasp.kernels.lightning") if q.is_cuda else chunked  # triton: on a GPU alone
    table, scale = cp.segment_table(q.device), q.shape[-1] ** -0.5
    later, earlier = cp.cp_rank > 0, cp.cp_rank < cp.cp_size - 1  # something comes from ranks before, and from behind
    forward = operator.Forward(q, k, v, None, table, True, scale)
    maps = forward.state_maps(local=False)
    forward.local([later])
    entry = torch.ones_like(maps.state) if later else None
    forward.finish(entry, [later])
    exits = maps.state if entry is None else maps.state + entry
    known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": entry, "exits": exits, "do": do}
    backward = operator.Backward(q, k, v, None, table, True, scale, needs_dg=False, **known)
    grads = backward.state_maps(local=False)
    backward.local()
    backward.finish(torch.ones_like(grads) if earlier else None, [earlier])


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def markdown(rows: Sequence[dict[str, Any]], *, ranks: int, tokens: int, heads: int, dim: int) -> list[str]:
    """The comparison as a table, the fastest first; then what was not run."""
    run = sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
    shown = [
        (
            row["method"],
            f"{1e3 * row['seconds']:.1f}",
            f"{ranks * tokens / row['seconds']:,.0f}",
            f"{row['seconds'] / run[0]['seconds']:.2f}",
            f"{100 * row['exposed']:+.1f} %",
            f"{100 * (row['seconds'] / row['alone_s'] - 1):+.1f} %",
            f"{row['error']:.0e}",
            row["label"],
        )
        for row in run
    ]
    header = (
        "method",
        "ms",
        "tokens/s",
        "over the best",
        "messages add",
        "over one rank alone",
        "error",
        "what it does",
    )
    return [
        "# A linear-attention layer on a cut sequence, forward + backward",
        "",
        f"{ranks} ranks x {tokens:,} tokens, {heads} heads of {dim}, no decay, fp32; a state of "
        f"{readable(heads * dim * dim * 4)}. Median of the slowest rank. Messages add: over the same stages without "
        f"messages, {1e3 * statistics.median(row['silent_s'] for row in run):.1f} ms. One rank alone: the layer on "
        f"each rank's own tokens, {1e3 * statistics.median(row['alone_s'] for row in run):.1f} ms."
        if run
        else "Nothing was run.",
        "",
        *table(header, shown),
        *[f"\n{row['method']} was not run: {row['skipped']}." for row in rows if "skipped" in row],
    ]


def draw(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Bars: the layer's time, and that of its stages without messages."""
    run = sorted((row for row in rows if "seconds" in row), key=lambda row: -row["seconds"])
    axes = figure.add_subplot(xlabel="ms, forward + backward (line: the stages without messages)")
    axes.barh([row["method"] for row in run], [1e3 * row["seconds"] for row in run])
    for place, row in enumerate(run):
        axes.plot([1e3 * row["silent_s"]] * 2, [place - 0.4, place + 0.4], color="black")
    axes.grid(alpha=0.3, axis="x")

"""``lasp bench layer``: forward and backward of one linear-attention layer by every method, side by side.

Each method's output and gradients are first compared with :func:`lasp.linear_attention` over an all-gather; one that
differs ends the run. Then they take turns, with a barrier before each, and so do

- the same stages without a message between them: what a method takes longer is communication that is not hidden;
- the layer on this rank's tokens alone, which needs fewer stages.

All ranks run at once in all of these, so that they share the machine alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lasp import CPContext, SequenceLayout, linear_attention
from lasp.cost.fabric import Fabric
from lasp.kernels.state import StateMap
from lasp.launch.bench.baselines import Method, methods
from lasp.launch.bench.exchange_cell import context_over
from lasp.launch.bench.ranks import Ranks
from lasp.launch.bench.results import table
from lasp.launch.config.sizes import readable
from lasp.operators import operator_of
from lasp.parallel.mesh import Mesh

SILENT, ALONE = "the stages without messages", "one rank alone"
TOLERANCE = 1e-4  # sums over a whole sequence, in another order, in fp32


def compare(
    ranks: Ranks, names: Sequence[str], *, tokens: int, heads: int, dim: int, repeats: int, fabric: Fabric | None
) -> list[dict[str, Any]]:
    """One row per method: seconds of each repeat, or why it was not run.

    Args:
        tokens: of each rank.
        fabric: for ``auto`` and the slices of others; None: ``auto`` is not run.

    Raises:
        ValueError: there is one rank; a method gives other numbers than ``linear_attention``.
    """
    if ranks.size < 2:
        raise ValueError("methods are compared between ranks, got 1 rank. Start at least two: --ranks 2.")
    skipped = {name: _unserved(name, methods()[name], ranks.size, heads, fabric) for name in names}
    served = [name for name in names if not skipped[name]]
    layer = {
        "names": served,
        "nodes": list(ranks.nodes),
        "fabric": None if fabric is None else asdict(fabric),
        "shape": [1, tokens, heads, dim],
    }
    answers = ranks.ask(f"{__name__}:errors", **layer) if served else []
    found = {name: max(answer[name] for answer in answers) for name in served}
    for name, error in found.items():
        if not error <= TOLERANCE:
            raise ValueError(
                f"{name} differs from linear_attention by {error:.1e} of the largest value, allowed {TOLERANCE:.0e}: "
                "nothing was timed. This is a fault of lasp."
            )
    answers = ranks.ask(f"{__name__}:measure", **layer, repeats=repeats) if served else []
    times = {name: [max(t) for t in zip(*(a[name] for a in answers))] for name in (*served, SILENT, ALONE)}
    rows = []
    for name in names:
        row = {"method": name, "label": methods()[name].label}
        if skipped[name]:
            rows.append({**row, "skipped": skipped[name]})
            continue
        rows.append(
            {
                **row,
                "seconds": statistics.median(times[name]),
                "repeats": times[name],
                "silent_s": statistics.median(times[SILENT]),
                "alone_s": statistics.median(times[ALONE]),
                "exposed": statistics.median(x / y - 1 for x, y in zip(times[name], times[SILENT])),
                "error": found[name],
            }
        )
    return rows


def _unserved(name: str, method: Method, size: int, heads: int, fabric: Fabric | None) -> str | None:
    if method.exchange == "auto" and fabric is None:
        return "it chooses by a fabric, and none was given"
    if name == "Ulysses" and heads % size:
        return f"{size} ranks do not divide {heads} heads"
    return None


def errors(
    mesh: Mesh, *, names: Sequence[str], nodes: Sequence[int], fabric: dict[str, Any] | None, shape: list[int]
) -> dict[str, float]:
    """Per method, the largest error of output and gradients against ``linear_attention`` over an all-gather."""
    layer = _Layer(mesh, nodes, fabric, shape)
    trusted = layer.context("all_gather")
    expected = layer.step(lambda *x: linear_attention(*x, cp=trusted)[0])
    return {name: max(map(_error, layer.by(name)(), expected)) for name in names}


def measure(
    mesh: Mesh,
    *,
    names: Sequence[str],
    nodes: Sequence[int],
    fabric: dict[str, Any] | None,
    shape: list[int],
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of each repeat, per method, of the stages without messages and of one rank alone, in turns."""
    layer = _Layer(mesh, nodes, fabric, shape)
    works = {name: layer.by(name) for name in names}
    works[SILENT] = layer.silent()
    local = CPContext.local(shape[1])
    works[ALONE] = lambda: layer.step(lambda *x: linear_attention(*x, cp=local)[0])
    times: dict[str, list[float]] = {name: [] for name in works}
    shuffled = random.Random(0)  # alike on all ranks: nothing always follows the same method
    for turn in range(repeats + 1):
        for name in shuffled.sample(list(works), len(works)):
            mesh.any(False)
            started = time.perf_counter()
            works[name]()
            if mesh.device.type == "cuda":
                torch.cuda.synchronize(mesh.device)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    mesh.any(False)
    return times


class _Layer:
    """One rank's tokens of a layer, [1, T, H, D] each, and the ways to go through them forward and backward."""

    def __init__(self, mesh: Mesh, nodes: Sequence[int], fabric: dict[str, Any] | None, shape: list[int]):
        self._mesh, self._nodes, self._fabric = mesh, nodes, fabric
        self._layout = SequenceLayout.contiguous(shape[1] * mesh.world_size, mesh.world_size)
        seed = torch.Generator().manual_seed(mesh.rank)
        self._q, self._k, self._v, self._do = (torch.randn(shape, generator=seed).to(mesh.device) for _ in range(4))

    def context(self, exchange: str) -> CPContext:
        """Of the whole sequence."""
        return context_over(self._mesh, self._layout, exchange, self._nodes, self._fabric)

    def step(self, forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """The output of ``forward`` and the gradients of q, k and v."""
        inputs = [x.detach().requires_grad_() for x in (self._q, self._k, self._v)]
        o = forward(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, self._do)]

    def by(self, name: str) -> Callable[[], list[torch.Tensor]]:
        """The step by a method."""
        method = methods()[name]
        cp = self.context(method.exchange or "all_gather")
        return lambda: self.step(lambda *x: method(*x, cp))

    def silent(self) -> Callable[[], None]:
        """What the layer computes, with made-up states in place of those that other ranks send."""
        cp = self.context("all_gather")
        return lambda: _stages(self._q, self._k, self._v, self._do, cp)


def _stages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, cp: CPContext) -> None:
    """Forward and backward of the operator, its stages one after the other."""
    operator = operator_of("triton" if q.is_cuda else "torch")
    inputs = k, v, None, None, cp.segment_table(q.device), q.shape[2], True, q.shape[-1] ** -0.5
    later, earlier = cp.cp_rank > 0, cp.cp_rank < cp.cp_size - 1  # something comes from ranks before, and from behind
    forward = operator.Forward(*inputs)
    maps = forward.state_maps()
    forward.local(q, [later])
    entry = torch.ones_like(maps.state) if later else None
    _, exits = forward.finish(entry, [later])
    known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": entry, "exits": StateMap(exits)}
    backward = operator.Backward(*inputs, q=q, do=do, **known, needs_dg=False, needs_d_entry=False)
    grads = backward.state_maps()
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
        f"messages, {1e3 * run[0]['silent_s']:.1f} ms. One rank alone: the layer on "
        f"each rank's own tokens, {1e3 * run[0]['alone_s']:.1f} ms."
        if run
        else "Nothing was run.",
        "",
        *table(header, shown),
        *[f"\n{row['method']} was not run: {row['skipped']}." for row in rows if "skipped" in row],
    ]


def draw(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Points: the layer's time by each method. Line: that of its stages without messages."""
    run = sorted((row for row in rows if "seconds" in row), key=lambda row: -row["seconds"])
    axes = figure.add_subplot(xlabel="ms, forward + backward (line: the stages without messages)")
    axes.plot([1e3 * row["seconds"] for row in run], [row["method"] for row in run], "o", ms=9)
    if run:
        axes.axvline(1e3 * run[0]["silent_s"], color="black", lw=1)
        if run[0]["seconds"] > 10 * run[-1]["seconds"]:  # slowest and fastest
            axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")

"""``lasp bench exchange``: every exchange over every fabric that one machine can make, beside the model's prediction.

A cell is a cluster shape, a rate of its links and the size of a state. In each cell the links are measured
(:mod:`lasp.launch.bench.fabric`), every exchange is predicted from them (:mod:`lasp.cost`), and those that are
predicted to be quick enough are run: the median over repeats of the slowest rank. The model never sees an exchange's
own time. What is not run is listed with its reason.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lasp.cost.fabric import Fabric
from lasp.exchange import AUTO, choose, estimate, names
from lasp.launch.bench.exchange_cell import TOLERANCE, case_of, difference, time_exchanges
from lasp.launch.bench.fabric import measure_fabric
from lasp.launch.bench.ranks import MAX_PROCESSES, Ranks, virtual_ranks
from lasp.launch.bench.virtual_cluster import VirtualCluster
from lasp.launch.config.sizes import readable, readable_rate

HOSTS, RANKS = (2, 3, 4, 6, 8), (1, 2)
SIZES = (256 << 10, 1 << 20, 2 << 20, 8 << 20)
RATES = (1e8, 4e8, 1e9, 2e9)
MAX_CELLS = 40
_LEAST_REPEATS, _PER_EXCHANGE_S = 3, 2.5  # repeats become fewer where they would take longer
_BUSY_WAIT_S, _TURNS = 60.0, 8  # of an answer: with so many turns of every exchange, each as slow as is allowed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One measurement: ``hosts`` x ``ranks`` with links of ``bits_per_s`` (None: those there are), one state size."""

    hosts: int
    ranks: int
    state_bytes: int
    bits_per_s: float | None

    def __str__(self) -> str:
        rate = "" if self.bits_per_s is None else f" x {readable_rate(self.bits_per_s)}"
        return f"{self.hosts} x {self.ranks}{rate}, {readable(self.state_bytes)}"


@dataclass(frozen=True)
class Settings:
    """How a sweep measures.

    Attributes:
        exchanges: names; those of :data:`lasp.exchange.EXCHANGES` and ``auto``.
        repeats: of each exchange in a cell, at most.
        kind: of transition: identity, scalar, diagonal, dense.
        layout: contiguous or zigzag.
        skip_above_s: exchanges predicted to take longer are listed, not run.
        limit_s: of the whole sweep; cells that it does not reach are listed.
    """

    exchanges: Sequence[str] = field(default_factory=names)
    repeats: int = 25
    kind: str = "diagonal"
    layout: str = "contiguous"
    skip_above_s: float = 5.0
    limit_s: float = 1700.0


def grid(
    hosts: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], rates: Sequence[float], most: int = MAX_CELLS
) -> tuple[list[Cell], int]:
    """Cells of the cross product, grouped by shape; every n-th diagonal of it where it has more than ``most``.

    Returns:
        the cells, and how many were thinned out.

    Raises:
        ValueError: a shape of more than 16 processes.
    """
    if large := [(h, r) for h in hosts for r in ranks if h * r > MAX_PROCESSES]:
        raise ValueError(
            f"{large[0][0]} hosts x {large[0][1]} ranks are {large[0][0] * large[0][1]} processes, and a virtual "
            f"cluster has at most {MAX_PROCESSES}. Choose fewer."
        )
    axes = [list(enumerate(axis)) for axis in (hosts, ranks, sizes, rates)]
    cells = [(sum(i for i, _ in point), Cell(*(value for _, value in point))) for point in itertools.product(*axes)]
    step = next(n for n in itertools.count(1) if sum(place % n == 0 for place, _ in cells) <= most)
    kept = [cell for place, cell in cells if place % step == 0]
    return kept, len(cells) - len(kept)


def virtual_sweep(cells: Sequence[Cell], settings: Settings, say: Say) -> list[dict[str, Any]]:
    """Rows of all cells, each cluster shape's processes started once.

    Raises:
        ValueError: this machine has no virtual cluster; an exchange gives other states than the first one.
    """
    started, rows = time.monotonic(), []
    for (hosts, per_host), group in itertools.groupby(cells, key=lambda cell: (cell.hosts, cell.ranks)):
        own = list(group)
        if time.monotonic() - started > settings.limit_s:
            rows += [_not_reached(cell, settings) for cell in own]
            continue
        timeout_s = _BUSY_WAIT_S + _TURNS * settings.skip_above_s * len(settings.exchanges)
        with (
            VirtualCluster(hosts, own[0].bits_per_s) as cluster,
            virtual_ranks(cluster, per_host, timeout_s=timeout_s) as ranks,
        ):
            for cell in own:
                if time.monotonic() - started > settings.limit_s:
                    rows.append(_not_reached(cell, settings))
                    continue
                cluster.set_rate(cell.bits_per_s)
                rows.append(measure_cell(ranks, cell, settings, say))
    return rows


def sweep_here(ranks: Ranks, sizes: Sequence[int], settings: Settings, say: Say, fabric: Fabric | None) -> list[dict]:
    """Rows of all sizes over the links that these ranks have."""
    nodes = len(set(ranks.nodes))
    cells = [Cell(nodes, ranks.size // nodes, size, None) for size in sizes]
    return [measure_cell(ranks, cell, settings, say, fabric) for cell in cells]


def measure_cell(
    ranks: Ranks, cell: Cell, settings: Settings, say: Say, fabric: Fabric | None = None
) -> dict[str, Any]:
    """One row: the fabric, and per exchange what was predicted and measured, or why it was not.

    Raises:
        ValueError: there is one rank; two exchanges give different entry states.
    """
    if ranks.size < 2:
        raise ValueError("exchanges are measured between ranks, got 1 rank. Start at least two: --ranks 2.")
    case = case_of(ranks.nodes, cell.state_bytes, settings.kind, settings.layout)
    points: dict[str, Any] = {}
    if fabric is None:
        fabric, points = measure_fabric(ranks, str(cell), f"measured before the exchanges of {cell}")
    chosen = choose(case, fabric)
    row = {"cell": asdict(cell), "fabric": asdict(fabric), "points": points, "exchanges": {}, "skipped": {}}
    row["auto"] = {"chose": chosen.exchange, "slices": chosen.slices, "reason": chosen.reason}
    modelled = {name: chosen if name == AUTO else estimate(name, case, fabric) for name in settings.exchanges}
    repeats = {}
    for name, found in modelled.items():
        if found.seconds > settings.skip_above_s:
            row["skipped"][name] = f"predicted {found.seconds:.2g} s > {settings.skip_above_s:g} s"
        else:
            repeats[name] = min(settings.repeats, max(_LEAST_REPEATS, int(_PER_EXCHANGE_S / max(found.seconds, 1e-6))))
    own = {"state_bytes": cell.state_bytes, "kind": settings.kind, "layout": settings.layout, "fabric": fabric}
    measured = time_exchanges(ranks, repeats, **own) if repeats else {}
    for name, (times, samples) in measured.items():
        first = next(iter(measured))
        if (error := difference(samples, measured[first][1])) > TOLERANCE:
            raise ValueError(
                f"{name} gives other entry states than {first} in {cell}: relative difference {error:.1e}, allowed "
                f"{TOLERANCE:.0e}. This is a fault of lasp: nothing was written."
            )
        row["exchanges"][name] = {
            "seconds": statistics.median(times),
            "repeats": times,
            "predicted_s": modelled[name].seconds,
            "slices": modelled[name].slices,
            "difference": error,
        }
    say(_line(cell, row))
    return row


def _not_reached(cell: Cell, settings: Settings) -> dict[str, Any]:
    reason = f"the sweep's {settings.limit_s:g} s were over"
    skipped = dict.fromkeys(settings.exchanges, reason)
    return {"cell": asdict(cell), "fabric": None, "points": {}, "exchanges": {}, "skipped": skipped, "auto": None}


def _line(cell: Cell, row: dict[str, Any]) -> str:
    measured = ", ".join(f"{name} {1e3 * found['seconds']:.1f}" for name, found in row["exchanges"].items())
    skipped = f"; not run: {', '.join(row['skipped'])}" if row["skipped"] else ""
    return f"{cell}: ms: {measured or 'nothing'}{skipped}"


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows say together; a value is None where nothing was measured that it could be made of."""
    errors: dict[str, list[float]] = {}
    ratios, speedups = [], []
    for row in rows:
        measured = {name: found["seconds"] for name, found in row["exchanges"].items()}
        for name, found in row["exchanges"].items():
            if name != AUTO:
                errors.setdefault(name, []).append(abs(found["predicted_s"] / found["seconds"] - 1))
        fixed = {name: seconds for name, seconds in measured.items() if name != AUTO}
        if AUTO in measured and fixed:
            ratios.append(measured[AUTO] / min(fixed.values()))
            if "all_gather" in fixed:
                speedups.append(fixed["all_gather"] / measured[AUTO])
    everything = [error for found in errors.values() for error in found]
    return {
        "cells": len(rows),
        "cells_run": sum(bool(row["exchanges"]) for row in rows),
        "exchanges_skipped": sum(len(row["skipped"]) for row in rows),
        "model_error_median": _median(everything),
        "model_error_median_of": {name: _median(found) for name, found in errors.items()},
        "auto_within_15_percent": _share(ratios, 1.15),
        "auto_over_best_worst": max(ratios, default=None),
        "auto_speedup_over_all_gather_median": _median(speedups),
        "auto_speedup_over_all_gather_best": max(speedups, default=None),
    }


def skipped(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Cell, str, str]]:
    """Cell, exchange and reason of what was not run."""
    for row in rows:
        for name, reason in row["skipped"].items():
            yield Cell(**row["cell"]), name, reason


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _share(ratios: Sequence[float], most: float) -> float | None:
    return sum(ratio <= most for ratio in ratios) / len(ratios) if ratios else None

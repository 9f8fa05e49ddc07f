"""python benchmarks/published.py [--json benchmarks/results/published.json] [--docs docs/prediction.md]

The cost model against the published figures, and what it predicts for exchanges that nobody has published. The few free
parameters are fitted to half of the figures (every second number of GPUs), the error is reported on the other half:

- collectives: latencies of both links, the rate of a GPU's own link and the fixed overhead of an exchange, to the
  figures of 8, 32 and 128 GPUs; the rate of a network interface is its data sheet's, since the figures hardly depend
  on it;
- training steps: local work and gradient reduction from the runs without sequence parallelism at 8 and 128 GPUs, and
  for every method one number, its work beside the exchange, at the same two;
- LASP-2's table 6: local work from the columns of 16 and 64 GPUs. Of its exchange nothing is fitted.

Everything about a number of GPUs that was not fitted is a prediction and is called one. Seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from published_data import COLLECTIVE_MS, TABLE_6, THROUGHPUT, K
from published_report import plot, tables, write_tables

from lasp.cost import Case
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import EXCHANGES, choose, estimate
from lasp.launch.versions import commit

FITTED = {"collective": (8, 32, 128), "throughput": (8, 128), "table_6": (16, 64)}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_NODE, NIC = 8, 50e9  # GPUs of a node; 400 Gbit/s, bytes per second
TOKENS, LAYERS = 32 * K, 24
STATE, TRANSITION = 4 * 256 * 512 * 4, 4 * 256 * 4  # GLA 1.3B: 4 heads, keys of 256, values of 512
LLAMA_LAYERS, LLAMA_STATE = 16, 16 * 128 * 128 * 4  # Linear-Llama3-1B: 16 heads of 128, no decay
WIDE_STATE, WIDE_TRANSITION = 32 * 128 * 128 * 4, 32 * 128 * 4  # d = 4096, 32 heads
OPERATOR_BYTES = TOKENS * (3 * 4 * 256 + 2 * 4 * 512) * 2  # q, k, g read, v read, o written, bf16
MEMORY_RATE = 3.35e12  # bytes per second, H100 SXM


def main() -> None:
    """Fit, compare, predict; write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--docs", type=Path, help="refresh the tables of this file, and the plots in images/ beside it")
    options = parser.parse_args()
    result = reproduce()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.docs:
        write_tables(result, options.docs)
        plot(result, options.docs.parent / "images")
    for name, table in tables(result).items():
        print(f"\n{name}\n{table}")


def reproduce() -> dict:
    """All fits, comparisons and predictions, as plain values."""
    fabric = fit_fabric(NIC)
    local, reduction = fit_without_sp(FITTED["throughput"])
    work = {name: fit_work(name, fabric) for name in METHODS}
    compared = {
        "collective": collective_rows(fabric),
        "throughput": throughput_rows(fabric, work, local, reduction),
        "table_6": table_6_rows(a100(fabric)),
    }
    errors = {
        f"{name}, {half}": _error(row for row in rows if row["use"] == half)
        for name, rows in compared.items()
        for half in ("fitted", "held out")
    }
    errors["throughput, held out, without LASP-1"] = _error(
        row for row in compared["throughput"] if row["use"] == "held out" and row["method"] != "LASP-1"
    )
    plain = table_6_rows(a100(fabric), plain=True)
    errors["table_6, held out, work per own token"] = _error(row for row in plain if row["use"] == "held out")
    other = collective_rows(fit_fabric(NIC, (16, 64, 256)))
    errors["collective, halves swapped"] = _error(row for row in other if row["use"] == "fitted")
    return {
        "label": "published figures beside the cost model; everything else is a prediction",
        "fabric": describe(fabric),
        "a100": describe(a100(fabric)),
        "local_s": local,
        "reduction_s_per_doubling": reduction,
        "work_s_per_exchange": work,
        "errors": errors,
        **compared,
        "predicted_exchange": exchange_rows(fabric),
        "predicted_share": share_rows(fabric, work, local, reduction),
        "sensitivity": sensitivity_rows(fabric, work, local, reduction),
        "commit": commit() or "unknown",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _error(rows: Iterable[dict]) -> dict:
    found = [abs(row["error"]) for row in rows]
    return {"figures": len(found), "median": float(np.median(found)), "largest": max(found)}


# --- fits ---


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], start: Sequence[float]) -> np.ndarray:
    """Positive parameters with the least sum of squared residuals: Levenberg-Marquardt on their logarithms."""
    x, damping = np.log(np.array(start)), 1e-2
    r = residuals(np.exp(x))
    for _ in range(500):
        jacobian = np.stack([(residuals(np.exp(x + step)) - r) / 1e-4 for step in 1e-4 * np.eye(len(x))], axis=1)
        normal = jacobian.T @ jacobian + damping * np.eye(len(x))
        tried = x - np.linalg.solve(normal, jacobian.T @ r)
        better = residuals(np.exp(tried))
        if better @ better < r @ r:
            x, r, damping = tried, better, damping / 3
        else:
            damping *= 4
        if damping > 1e9:
            break
    return np.exp(x)


def fit_fabric(nic: float, gpus: Sequence[int] = FITTED["collective"], *, lockstep: bool = False) -> Fabric:
    """Latencies, the rate within a node and the overhead, to the collectives of these numbers of GPUs."""

    def build(values: np.ndarray) -> Fabric:
        within, between, rate, overhead = map(float, values)
        return Fabric("h100-ib", Link(within, rate), Link(between, nic), PER_NODE, overhead, "fitted")

    def residuals(values: np.ndarray) -> np.ndarray:
        fabric = build(values)
        return np.array([
            math.log(wide(name, n, fabric, lockstep=lockstep) / (ms / 1e3))
            for name, figures in COLLECTIVE_MS.items() for n, ms in figures.items() if n in gpus
        ])  # fmt: skip

    return build(least_squares(residuals, (3e-6, 10e-6, 100e9, 1e-4)))


def fit_without_sp(gpus: Sequence[int]) -> tuple[float, float]:
    """Seconds of a step on one node, and those that each doubling of the nodes adds (a tree reduces the gradients)."""
    figures = THROUGHPUT["no SP"]
    rows = np.array([[1.0, math.log2(n / PER_NODE)] for n in gpus])
    seconds = np.array([TOKENS / figures[n] for n in gpus])
    local, reduction = np.linalg.lstsq(rows, seconds, rcond=None)[0]
    return float(local), float(reduction)


METHODS = {"LASP-1": "ring", "LASP-2": "all_gather", "ZeCO": "all_scan"}


def fit_work(method: str, fabric: Fabric) -> float:
    """Seconds per exchange that the method's runs lose beside the exchange: kernels it adds, launches, waits."""
    figures = THROUGHPUT[method]
    gpus = [n for n in FITTED["throughput"] if n in figures]
    lost = [TOKENS / figures[n] - TOKENS / THROUGHPUT["no SP"][n] for n in gpus]
    return float(
        np.mean([x / (2 * LAYERS) - layer(METHODS[method], n, fabric) for n, x in zip(gpus, lost, strict=True)])
    )


def a100(h100: Fabric) -> Fabric:
    """The fitted fabric with the links of the older machine: NVLink 600 against 900 GB/s, 200 against 400 Gbit/s."""
    within = replace(h100.within, bytes_per_s=h100.within.bytes_per_s * 600 / 900)
    return replace(h100, name="a100-ib", within=within, between=replace(h100.between, bytes_per_s=25e9))


# --- the model of a collective and of a step ---


def nodes(gpus: int) -> tuple[int, ...]:
    """The GPUs of each node."""
    return (PER_NODE,) * (gpus // PER_NODE)


def wide(exchange: str, gpus: int, fabric: Fabric, *, lockstep: bool = False) -> float:
    """Seconds of one exchange with d = 4096, 32 heads; ``lockstep``: a gather's steps cost the slowest latency."""
    seconds = estimate(exchange, Case(nodes(gpus), WIDE_STATE, WIDE_TRANSITION), fabric).seconds
    if lockstep and exchange == "all_gather":
        within, between, borders = fabric.within.latency_s, fabric.between.latency_s, gpus // PER_NODE - 1
        slowest = max(within, between) if borders else within
        seconds += (gpus - 1) * slowest - (gpus - 1 - borders) * within - borders * between
    return seconds


def layer(exchange: str, gpus: int, fabric: Fabric, hidden_s: float = 0.0) -> float:
    """Exposed seconds of one exchange of 1B GLA, mean of forward and backward."""
    case = Case(nodes(gpus), STATE, TRANSITION, value_columns=512)
    if exchange == "auto":
        exchange = choose(case, fabric).exchange
    both = [estimate(exchange, case, fabric, backward=backward).seconds for backward in (False, True)]
    return sum(max(0.0, seconds - hidden_s) for seconds in both) / 2


def step(gpus: int, local: float, reduction: float, per_exchange: float) -> float:
    """Seconds of a step of 1B GLA: local work, gradient reduction, an exchange per layer and direction."""
    return local + reduction * math.log2(gpus / PER_NODE) + 2 * LAYERS * per_exchange


# --- published figures beside the model ---


def _row(figure: float, model: float, fitted: bool, **what) -> dict:
    return {**what, "published": figure, "model": model, "error": model / figure - 1,
            "use": "fitted" if fitted else "held out"}  # fmt: skip


def collective_rows(fabric: Fabric, *, lockstep: bool = False) -> list[dict]:
    """Milliseconds of a collective alone."""
    return [
        _row(ms, 1e3 * wide(name, n, fabric, lockstep=lockstep), n in FITTED["collective"], exchange=name, gpus=n)
        for name, figures in COLLECTIVE_MS.items()
        for n, ms in figures.items()
    ]


def throughput_rows(fabric: Fabric, work: dict[str, float], local: float, reduction: float) -> list[dict]:
    """Tokens per second and GPU of training runs."""
    rows = []
    for method, figures in THROUGHPUT.items():
        for n, figure in figures.items():
            lost = work[method] + layer(METHODS[method], n, fabric) if method in METHODS else 0.0
            model = TOKENS / step(n, local, reduction, lost)
            rows.append(_row(figure, model, n in FITTED["throughput"], method=method, gpus=n))
    return rows


def table_6_rows(fabric: Fabric, *, plain: bool = False) -> list[dict]:
    """Tokens per second of all GPUs. Step = constant + work per token (both fitted) + exchanges (not fitted).

    The tokens are those of the whole sequence, see the document; ``plain``: those of one GPU, as one would expect.
    """
    cells = [(tokens, n, tokens / figure) for tokens, row in TABLE_6.items() for n, figure in row.items()]

    def exchanges(n: int) -> float:
        return 2 * LLAMA_LAYERS * estimate("all_gather", Case(nodes(n), LLAMA_STATE, 0), fabric).seconds

    def worked(tokens: int, n: int) -> float:
        return tokens / n if plain else tokens

    used = [cell for cell in cells if cell[1] in FITTED["table_6"]]
    rows = np.array([[1 / s, worked(tokens, n) / s] for tokens, n, s in used])  # relative residuals
    rest = np.array([1 - exchanges(n) / s for _, n, s in used])
    constant, per_token = map(float, np.linalg.lstsq(rows, rest, rcond=None)[0])
    return [
        _row(tokens / s, tokens / (constant + per_token * worked(tokens, n) + exchanges(n)), n in FITTED["table_6"],
             tokens=tokens, gpus=n)
        for tokens, n, s in cells
    ]  # fmt: skip


# --- predictions ---


def exchange_rows(fabric: Fabric) -> list[dict]:
    """Milliseconds of one exchange alone, d = 4096, 32 heads."""
    rows = []
    for n in GPUS:
        choice = choose(Case(nodes(n), WIDE_STATE, WIDE_TRANSITION), fabric)
        rows.append({"gpus": n, **{e.exchange: 1e3 * e.seconds for e in choice.estimates}, "auto": choice.exchange})
    return rows


def share_rows(fabric: Fabric, work: dict[str, float], local: float, reduction: float) -> list[dict]:
    """Share of the speed without sequence parallelism that a run keeps, 1B GLA, 32K tokens per GPU."""
    hidden = OPERATOR_BYTES / MEMORY_RATE
    settings = {
        "work as ZeCO, nothing hidden": (work["ZeCO"], 0.0),
        "work as ZeCO, operator hides": (work["ZeCO"], hidden),
        "exchange alone": (0.0, 0.0),
    }
    rows = []
    for setting, (extra, covered) in settings.items():
        for n in GPUS:
            base = step(n, local, reduction, 0.0)
            shares = {
                name: base / step(n, local, reduction, extra + layer(name, n, fabric, covered))
                for name in (*EXCHANGES, "auto")
            }
            rows.append({"setting": setting, "gpus": n, **shares})
    return rows


def sensitivity_rows(fabric: Fabric, work: dict[str, float], local: float, reduction: float) -> list[dict]:
    """What the figures leave open. Refitted: an interface's rate, the gather's latencies. Not: dearer messages."""

    def slower(factor: float) -> Fabric:
        within, between = (replace(x, latency_s=factor * x.latency_s) for x in (fabric.within, fabric.between))
        return replace(fabric, within=within, between=between)

    lockstep = "a gather's steps in lockstep (refitted)"
    changes = {f"{r / 1e9:.0f} GB/s per interface (refitted)": fit_fabric(r) for r in (50e9, 20e9, 10e9, 5e9)}
    changes[lockstep] = fit_fabric(NIC, lockstep=True)
    refitted = tuple(changes)
    changes |= {"latencies x 2": slower(2), "latencies x 4": slower(4)}
    free = Link(1e-12, 1e18)
    changes["links that cost nothing"] = replace(fabric, within=free, between=free)
    changes["overhead x 2"] = replace(fabric, overhead_s=2 * fabric.overhead_s)
    rows = []
    for name, changed in changes.items():
        held_out = [row for row in collective_rows(changed, lockstep=name == lockstep) if row["use"] == "held out"]
        row = {"change": name, "held_out_median": _error(held_out)["median"]}
        for n in (256, 1024):
            row[f"ms_{n}"] = 1e3 * choose(Case(nodes(n), WIDE_STATE, WIDE_TRANSITION), changed).seconds
            extra = fit_work("ZeCO", changed) if name in refitted else work["ZeCO"]
            base = step(n, local, reduction, 0.0)
            row[f"share_{n}"] = base / step(n, local, reduction, extra + layer("auto", n, changed))
        rows.append(row)
    return rows


def describe(fabric: Fabric) -> dict:
    """Its parameters in the units of tables."""
    return {
        "within_us": 1e6 * fabric.within.latency_s,
        "within_GB_per_s": fabric.within.bytes_per_s / 1e9,
        "between_us": 1e6 * fabric.between.latency_s,
        "between_GB_per_s": fabric.between.bytes_per_s / 1e9,
        "nics_per_node": fabric.nics_per_node,
        "overhead_us": 1e6 * fabric.overhead_s,
    }


if __name__ == "__main__":
    main()

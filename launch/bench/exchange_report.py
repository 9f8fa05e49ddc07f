"""The report of ``lasp bench exchange``: tables and a plot of what :mod:`lasp.launch.bench.exchange` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lasp.launch.bench.exchange import Cell, Settings, skipped
from lasp.launch.bench.results import table

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "black")


def markdown(rows: Sequence[dict[str, Any]], summary: dict[str, Any], settings: Settings, thinned: int) -> list[str]:
    """Lines: the summary, every cell, and what was not run."""
    names = [name for name in settings.exchanges if any(name in row["exchanges"] for row in rows)]
    cells = []
    for row in rows:
        if not row["exchanges"]:
            continue
        found = [_shown(row["exchanges"].get(name)) for name in names]
        auto = f"{row['auto']['chose']} ({row['auto']['slices']})"
        cells.append([Cell(**row["cell"]), *found, auto])
    lines = [
        "# Exchanges, measured and predicted",
        "",
        f"One forward exchange of one layer, {settings.kind} transition, {settings.layout}: median over at most "
        f"{settings.repeats} repeats of the slowest rank, ms; in brackets the model's prediction from the links "
        "that were measured in the same cell.",
        "",
        *table(("", ""), [(name, _value(value)) for name, value in _facts_of(summary)]),
        "",
        *table(("hosts x ranks x link, state", *names, "auto chose (slices)"), cells),
        "",
    ]
    left = [f"- {cell}: {name}: {reason}" for cell, name, reason in skipped(rows)]
    lines += ["Not run:", "", *left] if left else ["Everything was run."]
    if thinned:
        lines += ["", f"{thinned} further cells of the grid were thinned out beforehand."]
    return lines


def _facts_of(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names in words and values; shares and errors as percentages."""
    percent = lambda key: None if summary[key] is None else f"{100 * summary[key]:.0f} %"  # noqa: E731
    rows = [("cells run", f"{summary['cells_run']} of {summary['cells']}")]
    rows += [("model's median error", percent("model_error_median"))]
    rows += [(f"... of {name}", f"{100 * error:.0f} %") for name, error in summary["model_error_median_of"].items()]
    rows += [
        ("auto within 15 % of the best", percent("auto_within_15_percent")),
        ("auto over the best, worst cell", summary["auto_over_best_worst"]),
        ("all_gather over auto, median", summary["auto_speedup_over_all_gather_median"]),
        ("all_gather over auto, best cell", summary["auto_speedup_over_all_gather_best"]),
    ]
    return rows


def _value(value: Any) -> str:
    return "not measured" if value is None else f"{value:.2f} x" if isinstance(value, float) else str(value)


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{1e3 * found['seconds']:.1f} ({1e3 * found['predicted_s']:.1f})"


def draw(figure: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Left: predicted over measured. Right: every cell's times over its best."""
    left, right = figure.subplots(1, 2)
    colours = dict(zip(names, _COLOURS * (1 + len(names) // len(_COLOURS)), strict=False))
    run = [row for row in rows if row["exchanges"]]
    every = [found["seconds"] for row in run for found in row["exchanges"].values()]
    for name in names:
        points = [
            (row["exchanges"][name]["seconds"], row["exchanges"][name]["predicted_s"])
            for row in run
            if name in row["exchanges"]
        ]
        if points:
            left.plot(*zip(*points), "o", ms=4, alpha=0.7, color=colours[name], label=name)
    if every:
        ends = [min(every), max(every)]
        left.plot(ends, ends, "-", color="grey", lw=1)
        left.fill_between(ends, [0.8 * x for x in ends], [1.2 * x for x in ends], color="grey", alpha=0.2)
    left.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s", title="model (grey: 20 %)")
    left.legend(fontsize=7)
    for name in names:
        points = [
            (i, row["exchanges"][name]["seconds"] / min(f["seconds"] for f in row["exchanges"].values()))
            for i, row in enumerate(run)
            if name in row["exchanges"]
        ]
        if points:
            right.plot(*zip(*points), "o-" if name == "auto" else ".", ms=4, lw=1, color=colours[name], label=name)
    right.set(yscale="log", ylabel="time over the cell's best", title="exchanges")
    right.set_xticks(range(len(run)), [str(Cell(**row["cell"])) for row in run], rotation=90, fontsize=5)
    for axes in (left, right):
        axes.grid(alpha=0.3)

"""``lasp bench scaling``: whole training steps over 1, 2, 4, ... ranks of one sequence, and what a rank needs for them.

Weak: every rank has equally many tokens, so its memory should not change (exchanged states do not grow with the
sequence). Strong: the sequence stays. Each row has processes of its own, since memory is that of a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lasp.launch.bench.results import table
from lasp.launch.bench.steps import measure_here
from lasp.launch.config.schema import RunConfig, checked


@dataclass(frozen=True)
class Point:
    """One row to measure: ``kind`` weak or strong, ranks, tokens of the whole sequence."""

    kind: str
    cp_size: int
    seq_len: int


def points(sizes: Sequence[int], weak: Sequence[int], strong: Sequence[int]) -> list[Point]:
    """Weak: so many tokens of each rank. Strong: so many of the sequence.

    Raises:
        ValueError: a sequence shorter than its ranks.
    """
    found = [Point("weak", size, tokens * size) for tokens in weak for size in sizes]
    found += [Point("strong", size, tokens) for tokens in strong for size in sizes]
    if short := [point for point in found if point.seq_len < point.cp_size]:
        raise ValueError(
            f"a sequence of {short[0].seq_len} tokens cannot be cut over {short[0].cp_size} ranks: each needs at least "
            "one. Use longer sequences or fewer ranks."
        )
    return found


def sweep(
    config: RunConfig, wanted: Sequence[Point], *, repeats: int, limit_s: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows in order; those that ``limit_s`` does not reach say so."""
    started, rows = time.monotonic(), []
    for point in wanted:
        about = {"kind": point.kind, "cp_size": point.cp_size, "seq_len": point.seq_len}
        if time.monotonic() - started > limit_s:
            rows.append({**about, "skipped": f"the {limit_s:g} s were over"})
            continue
        values = config.plain()
        values |= {"cp_size": point.cp_size, "dp_size": 1}
        values["data"] |= {"seq_len": point.seq_len, "batch_size": 1}
        own = checked(values, f"{point.kind} scaling with cp_size={point.cp_size}")
        rows.append({**about, **measure_here(own, repeats=repeats)})
        say(_line(rows[-1]))
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['kind']}: {row['seq_len']:,} tokens over cp {row['cp_size']}: {row['step_s']:.2f} s a step, "
        f"{row['tokens_per_s']:,.0f} tokens/s, {row['memory_bytes'] / 2**20:,.1f} MiB per rank"
    )


def curves(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that belong together: weak ones by tokens per rank, strong ones by the sequence; one rank count each."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if "step_s" in row:
            size = row["seq_len"] // row["cp_size"] if row["kind"] == "weak" else row["seq_len"]
            groups.setdefault((row["kind"], size), []).append(row)
    return list(groups.values())


def spread(curve: Sequence[dict[str, Any]]) -> float:
    """Largest deviation of the memory per rank from that of the first row, relative."""
    first = curve[0]["memory_bytes"]
    return max(abs(row["memory_bytes"] / first - 1) for row in curve)


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table per curve, and how constant the memory of weak scaling is."""
    lines = ["# Scaling of whole training steps", ""]
    for curve in curves(rows):
        first = curve[0]
        weak = first["kind"] == "weak"
        tokens = first["seq_len"] // first["cp_size"] if weak else first["seq_len"]
        title = f"{tokens:,} tokens per rank" if weak else f"a sequence of {tokens:,} tokens"
        lines += [f"{first['kind'].capitalize()}: {title}, {first['parameters']:,} parameters", ""]
        header = ("ranks", "tokens", "step s", "tokens/s", "per rank, over the first", "MiB per rank", "over the first")
        shown = [
            (
                row["cp_size"],
                f"{row['seq_len']:,}",
                f"{row['step_s']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / row['cp_size'] / (first['tokens_per_s'] / first['cp_size']):.2f}",
                f"{row['memory_bytes'] / 2**20:,.1f}",
                f"{100 * (row['memory_bytes'] / first['memory_bytes'] - 1):+.1f} %",
            )
            for row in curve
        ]
        lines += [*table(header, shown), ""]
        if weak and len(curve) > 1:
            lines += [f"Memory per rank stays within {100 * spread(curve):.1f} % of that of the first row.", ""]
    lines += [f"Not run: {row['kind']}, cp {row['cp_size']}: {row['skipped']}." for row in rows if "skipped" in row]
    return lines


def draw(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Throughput and memory over ranks."""
    left, right = figure.subplots(1, 2)
    for curve in curves(rows):
        sizes = [row["cp_size"] for row in curve]
        first = curve[0]
        tokens = first["seq_len"] // first["cp_size"] if first["kind"] == "weak" else first["seq_len"]
        label = f"{first['kind']}, {tokens:,} tokens{' per rank' if first['kind'] == 'weak' else ''}"
        left.plot(sizes, [row["tokens_per_s"] for row in curve], "o-", label=label)
        right.plot(sizes, [row["memory_bytes"] / 2**20 for row in curve], "o-", label=label)
    ticks = sorted({row["cp_size"] for curve in curves(rows) for row in curve})
    left.set(ylabel="tokens/s")
    right.set(ylabel="MiB per rank, over an idle rank")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set(xlabel="ranks", ylim=(0, 1.15 * axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
        if ticks:
            axes.legend(fontsize=7, loc="lower right")

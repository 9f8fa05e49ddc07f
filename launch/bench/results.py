"""What a benchmark leaves: NAME.json, NAME.md and NAME.png, each with where, with what and when it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lasp.launch.bench.ranks import Ranks
from lasp.launch.doctor import machine
from lasp.launch.run.preflight import source_digest
from lasp.launch.versions import commit
from lasp.parallel.file_errors import replace_text, writing


def facts(where: str) -> dict[str, Any]:
    """Hardware, versions, commit and date of what is measured now.

    Args:
        where: what the ranks run on, in words.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ranks": where,
        "hardware": f"{os.cpu_count()} x {machine.processor()}" + (f", {len(gpus)} x {gpus[0]}" if gpus else ""),
        "kernel": platform.release(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lasp": f"{importlib.metadata.version('lasp')}, source {source_digest()}",
        "commit": commit() or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def one_line(found: dict[str, Any]) -> str:
    """The facts as one sentence, for captions."""
    return (
        f"{found['ranks']}; {found['hardware']}, Linux {found['kernel']}, torch {found['torch']}, Python "
        f"{found['python']}, commit {found['commit']}, {found['date']}, load {found['load_average']}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def write_report(
    folder: Path,
    name: str,
    report: dict[str, Any],
    markdown: Sequence[str],
    draw: Callable[[Any], None],
    ranks: Ranks | None = None,
) -> list[Path]:
    """Write the three files; of ranks that all run the driver, the first one does.

    Args:
        report: with the ``facts`` of the measurement.
        markdown: lines.
        draw: fills a matplotlib figure.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if ranks is not None and not ranks.is_first:
        return []
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    replace_text(paths[0], json.dumps(report, indent=1) + "\n")
    replace_text(paths[1], "\n".join([*markdown, "", one_line(report["facts"]) + "."]) + "\n")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.supxlabel(one_line(report["facts"]), fontsize=6)
    with writing(paths[2]):
        figure.savefig(paths[2], dpi=110)
    return paths

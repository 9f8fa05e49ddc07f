"""What a run shows and leaves behind: progress, metrics.jsonl, TensorBoard events, a loss plot, a summary.

Only the first rank reports; on the others every method does nothing: the training loop has no ranks in it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lasp.launch.schema import RunConfig
from lasp.parallel.files import reading, writing

METRICS, PLOT = "metrics.jsonl", "loss.png"


class Report:
    """Collects one record per step. Use it as a context manager around the training loop.

    Args:
        config: the run.
        start_step: steps that a checkpoint brought; later records of an older attempt are dropped.
        active: whether this rank reports.
    """

    def __init__(self, config: RunConfig, start_step: int, active: bool):
        self._config, self._active, self._start_step = config, active, start_step
        self._last_line = 0.0
        self._writer = self._progress = None
        self.records: list[dict[str, Any]] = []
        if not active:
            return
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._path = config.run_dir / METRICS
        self.records = [record for record in read_metrics(config.run_dir) if record["step"] <= start_step]
        with writing(self._path):
            whole = self._path.with_name(f".{METRICS}")
            whole.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            whole.replace(self._path)  # a crash leaves the older records or these

    def __enter__(self) -> Report:
        if not self._active:
            return self
        with writing(self._path):
            self._file = self._path.open("a")
        if self._config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = self._config.run_dir / "tensorboard"
            with writing(events):
                self._writer = SummaryWriter(str(events), purge_step=self._start_step + 1)
        if self._console.is_terminal:
            self._progress = _progress_bar(self._console)
            self._bar = self._progress.add_task("", total=self._config.steps, completed=self._start_step, text="")
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line, above the progress bar."""
        if self._active:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that must not be overlooked."""
        if self._active:
            self._console.print(f"warning: {text}", style="yellow", markup=False)

    def step(self, record: dict[str, Any]) -> None:
        """One finished step: to the file, the events, and the screen."""
        if not self._active:
            return
        self.records.append(record)
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._writer is not None:
            for key, value in record.items():
                if key != "step":
                    self._writer.add_scalar(key, value, record["step"])
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  |g| {record['grad_norm']:.3f}"
        if self._progress is not None:
            self._progress.update(self._bar, completed=record["step"], text=text)
        now = time.monotonic()
        last = record["step"] == self._config.steps
        if self._progress is None and (last or now - self._last_line >= self._config.log.every_s):
            done = [r for r in self.records if r["step"] > self._start_step]
            left = (self._config.steps - record["step"]) * sum(r["seconds"] for r in done) / len(done)
            self.say(f"step {record['step']:>6}/{self._config.steps}  {text}  {left:,.0f} s left")
            self._last_line = now
        if "eval_loss" in record:
            self.say(f"step {record['step']:>6}  held-out loss {record['eval_loss']:.4f}")

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Named values, one per line."""
        if not self._active:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, str(value))
        self._console.print(table)

    def plot(self) -> None:
        """The loss curve as a PNG; a finished run does not fail for want of its picture."""
        if not self._active or not self.records:
            return
        path = self._config.run_dir / PLOT
        try:
            with writing(path):
                plot_losses(self.records, path)
        except OSError as error:
            self.warn(str(error))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far; lines that hold none, as a crash may leave, are left out."""
    path, records = run_dir / METRICS, []
    with reading(path):
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(isinstance(record.get(key), (int, float)) for key in ("step", "loss")):
            records.append(record)
    return records


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss per step and held-out loss where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], lw=1, label="training")
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", ms=4, label="held out")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its CUDA device if it has one, else of the process."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss it is not inherited from the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _progress_bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("training"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )

"""What a run shows and leaves behind: progress, metrics.jsonl, TensorBoard events, a loss plot, a summary.

Only the first rank reports; on the others every method does nothing: the training loop has no ranks in it. It
shows what there is to see on its own terminal, or sends it to a launcher on another machine that shows it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import Store

from lasp.launch.config.sections import LogConfig
from lasp.parallel.file_errors import reading, writing

METRICS, PLOT = "metrics.jsonl", "loss.png"
_WATCHED, _SHOWN = "lasp/watched", "lasp/shown"  # keys of the job's store: a launcher shows the run; its messages
_SEND_EVERY_S = 0.2  # more steps than this no eye sees


class Screen:
    """A run on the terminal: a progress bar, or lines where there is none.

    Args:
        steps: of the whole run.
        every_s: seconds between two lines.
    """

    def __init__(self, steps: int, every_s: float):
        from rich.console import Console

        self._steps, self._every_s = steps, every_s
        self._console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._progress, self._last_line = None, 0.0
        self._shown, self._seconds = 0, 0.0

    def begin(self, start_step: int) -> None:
        """Training starts, or starts again, after ``start_step``."""
        self._shown, self._seconds = 0, 0.0
        if not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = _progress_bar(self._console)
            self._bar = self._progress.add_task("", total=self._steps, text="")
            self._progress.start()
        self._progress.update(self._bar, completed=start_step, text="")

    def end(self) -> None:
        """No more steps follow."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        """One line, above the progress bar."""
        self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that must not be overlooked."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def step(self, record: dict[str, Any]) -> None:
        """One finished step."""
        self._shown, self._seconds = self._shown + 1, self._seconds + record["seconds"]
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  |g| {record['grad_norm']:.3f}"
        if self._progress is not None:
            self._progress.update(self._bar, completed=record["step"], text=text)
        now = time.monotonic()
        last = record["step"] == self._steps
        if self._progress is None and (last or now - self._last_line >= self._every_s):
            left = (self._steps - record["step"]) * self._seconds / self._shown
            self.say(f"step {record['step']:>6}/{self._steps}  {text}  {left:,.0f} s left")
            self._last_line = now
        if "eval_loss" in record:
            self.say(f"step {record['step']:>6}  held-out loss {record['eval_loss']:.4f}")

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Named values, one per line."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, str(value))
        self._console.print(table)


class RemoteScreen:
    """The methods of :class:`Screen`, shown by the launcher: they travel through the job's store.

    Of steps in quick succession one is sent; those with a held-out loss and the last one always are.
    """

    def __init__(self, steps: int, store: Store):
        self._steps, self._store, self._last_step = steps, store, 0.0

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") or not hasattr(Screen, method):
            raise AttributeError(method)
        return lambda *arguments: self._send(method, arguments)

    def step(self, record: dict[str, Any]) -> None:
        """One finished step."""
        now = time.monotonic()
        if "eval_loss" in record or record["step"] == self._steps or now - self._last_step >= _SEND_EVERY_S:
            self._last_step = now
            self._send("step", (record,))

    def _send(self, method: str, arguments: tuple[Any, ...]) -> None:
        self._store.queue_push(_SHOWN, json.dumps([method, *arguments], default=str))


def watch(store: Store) -> None:
    """Have the first rank of the store's job send what it shows to this process: see :func:`show`."""
    store.set(_WATCHED, "")


def show(store: Store, screen: Screen) -> None:
    """Show what has come since the last call."""
    while store.queue_len(_SHOWN):
        method, *arguments = json.loads(store.queue_pop(_SHOWN, block=False))
        getattr(screen, method)(*arguments)


class Report:
    """Collects one record per step. Use it as a context manager around the training loop.

    Args:
        run_dir, steps, log: of the run.
        start_step: steps that a checkpoint brought; later records of an older attempt are dropped.
        active: whether this rank reports.
        store: of the job, where it has one; its launcher may want to show the run.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        log: LogConfig,
        start_step: int,
        *,
        active: bool,
        store: Store | None = None,
    ):
        self._run_dir, self._active, self._start_step = run_dir, active, start_step
        self._tensorboard = log.tensorboard
        self._writer = None
        self.records: list[dict[str, Any]] = []
        if not active:
            return
        remote = store is not None and store.check([_WATCHED])
        self._screen = RemoteScreen(steps, store) if remote else Screen(steps, log.every_s)
        self._path = run_dir / METRICS
        self.records = [record for record in read_metrics(run_dir) if record["step"] <= start_step]
        with writing(self._path):
            whole = self._path.with_name(f".{METRICS}")
            whole.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            whole.replace(self._path)  # a crash leaves the older records or these

    def __enter__(self) -> Report:
        if not self._active:
            return self
        with writing(self._path):
            self._file = self._path.open("a")
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = self._run_dir / "tensorboard"
            with writing(events):
                self._writer = SummaryWriter(str(events), purge_step=self._start_step + 1)
        self._screen.begin(self._start_step)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._screen.end()

    def say(self, text: str) -> None:
        """One line, above the progress bar."""
        if self._active:
            self._screen.say(text)

    def warn(self, text: str) -> None:
        """One line that must not be overlooked."""
        if self._active:
            self._screen.warn(text)

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
        self._screen.step(record)

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Named values, one per line."""
        if self._active:
            self._screen.table(title, rows)

    def plot(self) -> None:
        """The loss curve as a PNG; a finished run does not fail for want of its picture."""
        if not self._active or not self.records:
            return
        path = self._run_dir / PLOT
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

"""python benchmarks/kernels.py [--json benchmarks/results/kernels_h200.json] [--markdown FILE] [--resume] [--dry]

Forward, and forward + backward, of causal linear attention on one GPU in bf16: ours beside flash-linear-attention
(where ``fla`` can be imported), our PyTorch path, and FlashAttention as the softmax yardstick.

- Times are medians of CUDA events over warm steps that rotate among copies of the inputs. The device is kept busy until
  a step is issued, so they are the device's; ``host_ms`` is what issuing a forward + backward took: where it is larger,
  a layer on its own waits for Python.
- ``roofline_percent`` is minimal bytes (:func:`pass_bytes`) / time / the bandwidth of a plain copy measured here.
- ``errors`` are relative L2 against float64 on the same bf16 values, of one step at ``check_length`` tokens with the
  cell's heads and dims. The reference is ``impl="torch"`` in float64; for softmax, lasp's blockwise softmax attention.
  ``errors_at_length`` are those of o, and of dk and dv at the end, at the cell's own length. What is wrong rather than
  rounded is not timed.
- ``passes`` are ours by kernel. What the roofline model predicted before anything ran stands beside them.

Every cell is in the report from the start, with a reason where it has no time. The report is written after each cell;
``--resume`` goes on with the cells that were not reached. ``--dry`` runs everything on a CPU, with tiny sizes, in fp32,
in Triton's interpreter: its times mean nothing.

On a machine with PyTorch and Triton but no network, from the root of a copy that has in build/wheels what another
machine got by ``python -m pip download --no-deps --dest build/wheels fla-core einops setuptools``, one command::

    python -m pip install -q --no-index --find-links build/wheels --no-deps -U --target build/site . fla-core einops &&
    PYTHONPATH=build/site python benchmarks/kernels.py --json benchmarks/results/kernels_h200.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from kernel_baselines import GATES, Implementation, describe, implementations
from kernel_checks import Check, Inputs, check, errors_at_length, wrong
from kernel_report import (
    PREDICTED,
    PREDICTED_LENGTHS,
    SAME,
    Cell,
    cell_of,
    machine,
    markdown,
    minimal_bytes,
    order,
    pass_bytes,
)
from kernel_timing import Stopwatch, pass_times

from lasp.parallel.file_errors import replace_text

LENGTHS, HEADS, DIMS = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20), (16, 64), (64, 128, 256)
DRY_LENGTHS, DRY_HEADS, DRY_DIMS = (64, 128), (2,), (16,)
CHECK_LENGTH = 1 << 12
NOT_REACHED, DEVICE_LOST = "not reached", "device lost"


class Bench:
    """Measures cells on one device.

    Args:
        device: CUDA, or the CPU for a dry run.
        seconds: of timed steps per number, though at least ``least`` steps.
        max_seconds: a cell that is predicted to take longer is skipped.
        retune: whether fla tunes for every cell, rather than once per gate, head count and dims.
    """

    def __init__(self, device: torch.device, seconds: float, max_seconds: float, retune: bool):
        self.device, self.seconds, self.max_seconds, self.retune = device, seconds, max_seconds, retune
        self.gpu = device.type == "cuda"
        self.dtype, self.check_length = (torch.bfloat16, CHECK_LENGTH) if self.gpu else (torch.float32, DRY_LENGTHS[0])
        self.least = 7 if self.gpu else 2
        self.watch, self.known, self.checks = Stopwatch(device), implementations(), {}
        source = torch.ones((1 << 32) if self.gpu else (1 << 20), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times, _ = self.watch.sample(lambda _: target.copy_(source), seconds, self.least)
        self.bandwidth = 2e3 * source.numel() / statistics.median(times)  # bytes per second, read and written

    def measure(self, cell: Cell) -> dict:
        """The row of ``cell``; whatever goes wrong becomes its reason."""
        run = self.known[cell.implementation]
        row = asdict(cell) | {"status": "measured", "reason": None}
        try:
            self._measure(cell, run, row)
        except Exception as fault:
            row |= {"status": "failed", "reason": describe(fault)}
        if row["status"] == "failed" and run.guest:
            row |= {"status": "no baseline", "reason": f"no baseline: {row['reason']}"}
        gc.collect()
        if self.gpu:
            try:
                torch.cuda.empty_cache()
                torch.zeros(1, device=self.device).item()
            except Exception as fault:
                row |= {"status": DEVICE_LOST, "reason": f"{row['reason']}; device lost: {describe(fault)}"}
        return row

    def _measure(self, cell: Cell, run: Implementation, row: dict) -> None:
        obstacle = run.obstacle(self.device)
        if obstacle:
            row |= {"status": "failed", "reason": obstacle}
            return
        lacking = self._lacking(cell)
        if lacking:
            row |= {"status": "skipped", "reason": lacking}
            return
        key = cell.implementation, cell.gate, cell.heads, cell.dim
        if key not in self.checks:
            run.fresh()
            self.checks[key] = self._check(cell, run)
        checked: Check = self.checks[key]
        row |= {"errors": checked.errors, "check_length": self.check_length}
        fault = checked.wrong_forward or checked.wrong_backward
        if fault:
            row |= {"status": "failed", "reason": fault}
        growth = (cell.length / self.check_length) ** run.growth
        expected = 2 * (self.least + 2) * checked.step_seconds * growth
        if expected > self.max_seconds and not fault:
            reason = f"predicted to take {expected:.0f} s, the limit is {self.max_seconds:g} s"
            row |= {"status": "skipped", "reason": reason}
            return
        if not checked.wrong_forward:
            if self.retune:
                run.fresh()
            self._time(cell, run, row, backward=not fault)

    def _check(self, cell: Cell, run: Implementation) -> Check:
        torch.manual_seed(0)
        inputs = Inputs.draw(cell.gate, cell.heads, cell.dim, self.check_length, self.device, self.dtype)
        return check(run, cell.gate, inputs, self.watch.wait)

    def _lacking(self, cell: Cell) -> str | None:
        """Why the inputs, o and the gradients do not fit the device, or None."""
        if not self.gpu:
            return None
        x = self.dtype.itemsize * cell.length * cell.heads * cell.dim
        needed = 8 * x + {"token": 8 * x // (cell.dim * self.dtype.itemsize), "channel": 4 * x}.get(cell.gate, 0)
        has = torch.cuda.get_device_properties(self.device).total_memory
        return f"its tensors take {needed / 2**30:.0f} of {has / 2**30:.0f} GiB" if needed > 0.95 * has else None

    def _copies(self, cell: Cell) -> int:
        """Input sets to rotate among: together several times the L2 cache, where one is not far beyond it."""
        if not self.gpu:
            return 2
        one = 4 * self.dtype.itemsize * cell.length * cell.heads * cell.dim
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return 1 if one > 20 * cache else min(8, 1 + math.ceil(4 * cache / one))

    def _time(self, cell: Cell, run: Implementation, row: dict, backward: bool) -> None:
        torch.manual_seed(0)
        count, gate = self._copies(cell), cell.gate
        sizes = gate, cell.heads, cell.dim, cell.length, self.device, self.dtype
        inputs = [Inputs.draw(*sizes) for _ in range(count)]
        if cell.length > self.check_length:
            o, *grads = inputs[0].step(run, gate) if backward else [inputs[0].forward(run, gate)]
            row["errors_at_length"] = errors_at_length(gate, inputs[0], o, tuple(grads), self.check_length)
            del o, grads
            fault = wrong(row["errors_at_length"], self.dtype)
            if fault:
                row |= {"status": "failed", "reason": f"at {cell.length:,} tokens {fault}"}
                return
        forward, _ = self.watch.sample(lambda i: inputs[i % count].forward(run, gate), self.seconds, self.least)
        row |= {"input_copies": count, "forward_ms": statistics.median(forward), "forward_steps": len(forward)}
        least = minimal_bytes(cell, self.dtype.itemsize)
        per_ms = self.bandwidth / 1e3
        if least:
            row |= {"forward_bytes": least[0], "bytes": least[1], "copy_bytes_per_s": self.bandwidth}
            row["forward_roofline_percent"] = 100 * least[0] / row["forward_ms"] / per_ms
        if not backward:
            return
        both, host = self.watch.sample(lambda i: inputs[i % count].step(run, gate), self.seconds, self.least)
        row |= {"forward_backward_ms": statistics.median(both), "forward_backward_steps": len(both)}
        row |= {"host_ms": statistics.median(host), "note": run.note(), "peak_bytes": self._peak(inputs[0], run, gate)}
        if least:
            row["roofline_percent"] = 100 * least[1] / row["forward_backward_ms"] / per_ms
        if cell.implementation == "triton":
            moved = pass_bytes(gate, cell.heads, cell.dim, cell.length, self.dtype.itemsize)
            row["passes"] = {name: {"ms": ms} for name, ms in pass_times(inputs, self.watch, self.least).items()}
            for name in moved.keys() & row["passes"].keys():
                row["passes"][name] |= {"bytes": moved[name]}
                row["passes"][name]["roofline_percent"] = 100 * moved[name] / row["passes"][name]["ms"] / per_ms

    def _peak(self, inputs: Inputs, run: Implementation, gate: str) -> int | None:
        """Bytes above the inputs that a forward + backward holds at once, o and gradients included; None on a CPU."""
        if not self.gpu:
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        inputs.step(run, gate)
        return torch.cuda.max_memory_allocated() - before


def run_all(
    cells: list[Cell],
    measure: Callable[[Cell], dict],
    store: Callable[[dict], None],
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure ``cells`` in order and store each row, until ``budget`` seconds are over or the device is lost."""
    began = clock()
    for cell in cells:
        if clock() - began >= budget:
            return
        row = measure(cell)
        store(row)
        if row["status"] == DEVICE_LOST:
            return


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parsed and checked."""

    def names(known: Iterable[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"unknown name {name!r}; choose from {', '.join(known)}")
            return text.split(",")

        return parse

    def numbers(text: str) -> list[int]:
        found = [int(x) for x in text.split(",")]
        if min(found) < 1:
            raise argparse.ArgumentTypeError(f"sizes must be positive, got {text}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, known = parser.add_argument, implementations()
    add("--dry", action="store_true", help="on a CPU, in Triton's interpreter, tiny sizes")
    add("--gates", type=names(GATES), default=list(GATES), help="comma-separated; softmax attention has none of them")
    all_names = f"comma-separated, of {', '.join(known)}; dry: not torch_compile unless named, half a minute per cell"
    add("--implementations", type=names(known), help=all_names)
    add("--lengths", type=numbers, help="tokens, comma-separated")
    add("--heads", type=numbers, help="comma-separated")
    add("--dims", type=numbers, help="head dims up to 256, comma-separated")
    add("--seconds", type=float, help="of timed steps per number (default 0.5; dry: 0)")
    add("--max-seconds", type=float, default=30.0, help="skip cells that are predicted to take longer")
    add("--budget-seconds", type=float, default=math.inf, help="start no cell after so long")
    add("--keep-tuning", action="store_true", help="let fla keep the tiles that it tuned at the check's length")
    add("--json", type=Path, help="the report, written after each cell")
    add("--resume", action="store_true", help="keep the rows of --json and measure those that were not reached")
    add("--markdown", type=Path, help="tables of the report, written at the end")
    add("--show", type=Path, metavar="REPORT", help="print the tables of a report and measure nothing")
    args = parser.parse_args(argv)
    args.implementations = args.implementations or [x for x in known if not (args.dry and x == "torch_compile")]
    args.lengths = args.lengths or (DRY_LENGTHS if args.dry else LENGTHS)
    args.heads, args.dims = (
        args.heads or (DRY_HEADS if args.dry else HEADS),
        args.dims or (DRY_DIMS if args.dry else DIMS),
    )
    args.seconds = (0.0 if args.dry else 0.5) if args.seconds is None else args.seconds
    if args.resume and not args.json:
        parser.error("--resume needs --json")
    if not (args.dry or args.show or torch.cuda.is_available()):
        parser.error("needs a CUDA device; --dry runs without one")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure the cells in order, print and write the report."""
    args = arguments(argv)
    if args.show:
        print(markdown(json.loads(args.show.read_text())), end="")
        return
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # tiles that fla tuned for other lengths
    device = torch.device("cpu" if args.dry else "cuda")
    cells = order(args.implementations, args.gates, args.heads, args.dims, args.lengths)
    report = machine(device) | {"dtype": "float32" if args.dry else "bfloat16", "dry": args.dry}
    rows = {}
    if args.resume and args.json.exists():
        before = json.loads(args.json.read_text())
        other = [f"{name} {before[name]} is not {report[name]}" for name in SAME if before[name] != report[name]]
        if other:
            sys.exit(f"--resume: {args.json} is of another machine or code: {'; '.join(other)}")
        rows = {cell_of(row): row for row in before["rows"]}
    rows = {c: rows.get(c, asdict(c) | {"status": NOT_REACHED, "reason": NOT_REACHED}) for c in cells} | rows
    bench = Bench(device, args.seconds, args.max_seconds, not args.keep_tuning)
    source = "roofline model for an H200 before any run; H = 16, D = 128, fixed decay, bf16, ms"
    report |= {"copy": bench.bandwidth, "predicted": {"source": source, "lengths": PREDICTED_LENGTHS, "ms": PREDICTED}}

    def store(row: dict | None) -> None:
        if row:
            rows[cell_of(row)] = row
            text = [f"{row[name]:.3f}" if name in row else "-" for name in ("forward_ms", "forward_backward_ms")]
            print(*(row[name] for name in Cell.__dataclass_fields__), *text, row["reason"] or "", flush=True)
        report["rows"] = list(rows.values())
        if args.json:
            replace_text(args.json, json.dumps(report, indent=1) + "\n")

    if args.dry:
        print("dry run in Triton's interpreter: the times mean nothing")
    print("implementation gate H D T: forward ms, forward + backward ms, or the reason", flush=True)
    store(None)
    run_all([c for c in cells if rows[c]["status"] == NOT_REACHED], bench.measure, store, args.budget_seconds)
    print(markdown(report))
    if args.markdown:
        replace_text(args.markdown, markdown(report))


if __name__ == "__main__":
    main()

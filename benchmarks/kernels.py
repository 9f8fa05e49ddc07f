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
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from kernel_baselines import (
    GATES,
    SOFTMAX,
    Check,
    Implementation,
    Inputs,
    Stopwatch,
    check,
    describe,
    errors_at_length,
    implementations,
    pass_times,
    wrong,
)

from lasp.kernels import triton_tiles

ROOT = Path(__file__).parent.parent
LENGTHS, HEADS, DIMS = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20), (16, 64), (64, 128, 256)
DRY_LENGTHS, DRY_HEADS, DRY_DIMS = (64, 128), (2,), (16,)
CHECK_LENGTH = 1 << 12
SAME = ("device", "driver", "cuda", "torch", "triton", "fla", "source", "dtype", "dry")  # of reports that may be joined
NOT_REACHED, DEVICE_LOST = "not reached", "device lost"
# Predicted before any run: bytes of the pass / (efficiency * 4.3 TB/s of an H200's copy), and 4 us a launch; efficiency
# 85 % in state passes, 80 % in o and dq, 70 % in dk and dv. For fixed decay, H = 16, D = 128, bf16; ms at 16K and 1M.
PREDICTED_LENGTHS = (1 << 14, 1 << 20)
PREDICTED = (
    ("state + scan", 0.05, 2.7),
    ("o", 0.09, 5.1),
    ("dstate + dscan", 0.05, 2.7),
    ("dq", 0.09, 5.1),
    ("dkdv", 0.15, 8.7),
)
FORWARD_PASSES = ("state", "scan", "o")
MAIN = ("triton", "fla_chunk", "sdpa_flash", "torch")


@dataclass(frozen=True)
class Cell:
    """One row of the report. The gate of softmax attention is ``softmax``."""

    implementation: str
    gate: str
    heads: int
    dim: int
    length: int


PREDICTED_CELL = Cell("triton", "fixed", 16, 128, 0)


def order(
    names: Iterable[str], gates: Iterable[str], heads: Iterable[int], dims: Iterable[int], lengths: Iterable[int]
) -> list[Cell]:
    """All cells, the most telling first: H = 16, D = 128 at 16K, 64K, 1M; in both parts ``MAIN`` before the rest."""
    known = implementations()
    ranks = {name: i for i, name in enumerate(known)}
    cells = {
        Cell(name, gate if gate in known[name].gates else SOFTMAX, h, d, t)
        for name in names for gate in gates for h in heads for d in dims for t in lengths
    }  # fmt: skip

    def value(cell: Cell) -> tuple:
        telling = cell.heads == 16 and cell.dim == 128 and cell.length in (1 << 14, 1 << 16, 1 << 20)
        rank, gate = ranks[cell.implementation], (*GATES, SOFTMAX).index(cell.gate)
        shape = cell.heads != 16, cell.heads, cell.dim != 128, cell.dim, cell.length
        return not telling, cell.implementation not in MAIN, *shape, gate, rank

    return sorted(cells, key=value)


def pass_bytes(gate: str, heads: int, dim: int, length: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that each pass of LASP-2's order (states first, then outputs) must move at least, for B = 1, K = V = dim.

    X, one tensor [T, H, D]: the state pass reads k, v and the output pass q, k, v, writing o: 6X. The backward's state
    pass reads q, do; dq reads do, v, k; dk and dv read q, k, v, do: with what they write, 12X. Each touch of the fp32
    states, one [D, D] per superchunk and head, is counted, two by a scan, and two where the gradient of g reads states
    and their gradients; each pass reads g (fp32) once, and dg is written once.
    """
    decay = GATES.index(gate)
    x = itemsize * length * heads * dim
    states = 4 * heads * dim * dim * math.ceil(length / triton_tiles.superchunk(decay, heads * length))
    g = (0, 4 * heads, 4 * length * heads, 4 * length * heads * dim)[decay]
    summed = 2 * x + states + g
    found = {"state": summed, "scan": 2 * states, "o": 4 * x + states + g}
    found |= {"dstate": summed, "dscan": 2 * states, "dq": 4 * x + states + g, "dkdv": 6 * x + states + g}
    return found | ({"dg": 2 * states + g} if decay > 1 else {})


def minimal_bytes(cell: Cell, itemsize: int) -> tuple[int, int] | None:
    """Of forward, and forward + backward; None for softmax, which is bound by arithmetic."""
    if cell.gate == SOFTMAX:
        return None
    passes = pass_bytes(cell.gate, cell.heads, cell.dim, cell.length, itemsize)
    return sum(passes[name] for name in FORWARD_PASSES), sum(passes.values())


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


def machine(device: torch.device) -> dict:
    """Where and with what this runs; ``source`` is a digest of the code, for copies without a history."""

    def ask(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        except OSError:  # no such program
            return None
        return done.stdout.strip() or None

    gpu, versions = device.type == "cuda", {}
    for name in ("triton", "fla"):
        try:
            versions[name] = importlib.import_module(name).__version__
        except Exception as fault:
            versions[name] = f"none: {describe(fault)}"
    files = [path for pattern in ("kernels/*.py", "lasp/*.py", "benchmarks/kernel*.py") for path in ROOT.glob(pattern)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **versions,
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
        "source": digest.hexdigest()[:12],
    }


def cell_of(row: dict) -> Cell:
    """The cell that a row is about."""
    return Cell(*(row[name] for name in Cell.__dataclass_fields__))


def markdown(report: dict) -> str:
    """The report as tables: rows, our passes beside their predictions, and what has no time and why."""
    facts = ("device", "driver", "cuda", "torch", "triton", "fla", "commit", "source", "dtype")
    lines = [
        ", ".join(f"{name} {report[name]}" for name in facts if report[name]) + f"; copy {report['copy']:.3g} B/s."
    ]
    if report["dry"]:
        lines += ["", "**Dry run on a CPU in Triton's interpreter: the times mean nothing.**"]
    lines += [
        "", "| H | D | gate | T | implementation | forward ms | % of roofline | forward + backward ms | % of roofline "
        "| time / ours | host ms | peak MiB | largest error |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    show = lambda x, pattern: "-" if x is None else format(x, pattern)  # noqa: E731
    rows = {cell_of(row): row for row in report["rows"]}
    place = lambda c: (c.heads, c.dim, (*GATES, SOFTMAX).index(c.gate), c.length)  # noqa: E731
    for cell in sorted(rows, key=place):
        row, get = rows[cell], rows[cell].get
        if "forward_ms" not in row:
            continue
        gate, note = "none" if cell.gate == SOFTMAX else cell.gate, f" ({get('note')})" if get("note") else ""
        ours = rows.get(replace(cell, implementation="triton", gate=gate), {}).get("forward_backward_ms")
        both, peak = get("forward_backward_ms"), get("peak_bytes")
        lines.append(
            f"| {cell.heads} | {cell.dim} | {cell.gate} | {cell.length:,} | {cell.implementation}{note} "
            f"| {show(row['forward_ms'], '.3f')} | {show(get('forward_roofline_percent'), '.0f')} "
            f"| {show(both, '.3f')} | {show(get('roofline_percent'), '.0f')} "
            f"| {show(both / ours if both and ours else None, '.2f')} | {show(get('host_ms'), '.3f')} "
            f"| {show(peak / 2**20 if peak is not None else None, ',.0f')} | {max(row['errors'].values()):.1e} |"
        )
    lines += ["", f"Our passes, ms; predicted: {report['predicted']['source']}.", ""]
    groups = ["gates", *(name for name, *_ in PREDICTED), "dgates", "dg"]
    lines += [f"| H | D | gate | T | {' | '.join(groups)} |", "|---" * (4 + len(groups)) + "|"]
    predicted = {name: dict(zip(PREDICTED_LENGTHS, ms, strict=True)) for name, *ms in PREDICTED}
    for cell in sorted((cell for cell in rows if rows[cell].get("passes")), key=place):
        passes = {name: x["ms"] for name, x in rows[cell]["passes"].items()}
        cells = [[passes[name] for name in group.split(" + ") if name in passes] for group in groups]
        start = f"| {cell.heads} | {cell.dim} | {cell.gate} | {cell.length:,}"
        lines.append(f"{start} | {' | '.join(f'{sum(ms):.3f}' if ms else '-' for ms in cells)} |")
        if replace(cell, length=0) == PREDICTED_CELL and cell.length in PREDICTED_LENGTHS:
            ms = [predicted.get(group, {}).get(cell.length) for group in groups]
            lines.append(f"{start}, predicted | {' | '.join(show(x, 'g') for x in ms)} |")
    reasons: dict[str, list[Cell]] = {}
    for cell, row in rows.items():
        if row["status"] != "measured":
            reasons.setdefault(row["reason"], []).append(cell)
    lines += ["", "Without a time:" if reasons else "Every cell has its times.", ""]
    for reason, cells in reasons.items():
        shown = "; ".join(f"{c.implementation} {c.gate} H={c.heads} D={c.dim} T={c.length:,}" for c in cells[:6])
        lines.append(f"- {reason}: {shown}{f'; and {len(cells) - 6} more' if len(cells) > 6 else ''}")
    return "\n".join(lines).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """Replace ``path`` in one step, so that a killed run leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


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
            write(args.json, json.dumps(report, indent=1) + "\n")

    if args.dry:
        print("dry run in Triton's interpreter: the times mean nothing")
    print("implementation gate H D T: forward ms, forward + backward ms, or the reason", flush=True)
    store(None)
    run_all([c for c in cells if rows[c]["status"] == NOT_REACHED], bench.measure, store, args.budget_seconds)
    print(markdown(report))
    if args.markdown:
        write(args.markdown, markdown(report))


if __name__ == "__main__":
    main()

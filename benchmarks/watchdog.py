"""python benchmarks/watchdog.py [--steps 400] [--json benchmarks/results/watchdog_cpu.json]

What the watchdog costs: a hybrid model is trained by two gloo ranks on this machine, a few steps with the watchdog and
as many without, in turns, so that both meet the same noise. Printed are the medians of a step, the ratio of each turn
to the one beside it (median and quartiles) in wall time and in processor time of all threads, which other programs
disturb less, the microseconds that one collective costs the training thread, and the share of one processor that the
watchdog's own thread takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from lasp import SequenceLayout, comm
from lasp.launch.doctor.machine import processor
from lasp.launch.run.rendezvous import open_store
from lasp.launch.versions import commit
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from lasp.parallel.watch.watchdog import Watchdog

RANKS, TURN = 2, 10  # steps with, then steps without
MODEL = {"vocab_size": 512, "dim": 128, "num_layers": 8, "pattern": "LLLS", "heads": 4, "mixer": "gla"}
TOKENS = 1024


def rank_main(rank: int, port: int, steps: int, out: str) -> None:
    """One rank; the first writes seconds per step of all turns, with and without."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=300)
    store, watch = (TCPStore("127.0.0.1", port, is_master=False, timeout=timeout) for _ in range(2))
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=RANKS)
    mesh = Mesh.build(RANKS)
    model = LinearLlama(ModelConfig.from_dict(MODEL), generator=torch.Generator().manual_seed(0))
    engine = build_engine("ddp", model, mesh, OptimizerSettings(lr=1e-4, steps=2 * steps), torch.float32)
    layout = SequenceLayout.contiguous(TOKENS, RANKS)
    tokens = torch.randint(0, MODEL["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = Batch.cut(tokens, layout, mesh)

    def turn(number: int, watched: bool) -> tuple[list[float], float]:
        """Seconds of each step; processor seconds of all."""
        keys = dist.PrefixStore(f"turn{number}", watch)
        watchdog = Watchdog(keys, rank, RANKS, timeout.total_seconds(), range(RANKS), lambda verdict: os._exit(1))
        seconds, used = [], time.process_time()
        with watchdog if watched else contextlib.nullcontext():
            for _ in range(TURN):
                started = time.perf_counter()
                engine.step([batch])
                seconds.append(time.perf_counter() - started)
            used = time.process_time() - used
        mesh.any(False)
        return seconds, used

    turn(-1, True)
    turns = [(turn(2 * i, i % 2 == 0), turn(2 * i + 1, i % 2 == 1)) for i in range(max(2, steps // TURN))]
    pairs = [pair if i % 2 == 0 else pair[::-1] for i, pair in enumerate(turns)]  # (with, without)
    before = comm.last_number(mesh.world_group)
    engine.step([batch])
    collectives = comm.last_number(mesh.world_group) - before
    if rank == 0:
        values = {"pairs": pairs, "collectives": collectives, "per_call": per_call(mesh, watch), "idle": idle(watch)}
        Path(out).write_text(json.dumps(values))
    mesh.any(False)


def per_call(mesh: Mesh, store: TCPStore, calls: int = 20000) -> float:
    """Microseconds that entering and leaving a collective costs, made-up collectives that nobody issues."""
    keys = dist.PrefixStore("calls", store)
    with Watchdog(keys, 0, RANKS, 300.0, range(1), lambda verdict: os._exit(1)) as watchdog:
        made = [
            comm.Call("all_gather", mesh.world_group, i, "layer 7, linear, forward", time.monotonic(), 1)
            for i in range(calls)
        ]
        started = time.perf_counter()
        for call in made:
            watchdog.entered(call)
            watchdog.left(call)
        return (time.perf_counter() - started) / calls * 1e6


def idle(store: TCPStore, seconds: float = 5.0) -> float:
    """Processor seconds per second of a process that only has a watchdog."""
    keys = dist.PrefixStore("idle", store)
    with Watchdog(keys, 0, RANKS, 300.0, range(1), lambda verdict: os._exit(1)):
        used = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - used) / seconds


def main() -> None:
    """Run the ranks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps with the watchdog, and as many without")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    store = open_store()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "out.json")
        mp.spawn(rank_main, (store.port, options.steps, out), nprocs=RANKS)
        values = json.loads(Path(out).read_text())
    watched, alone = zip(*values["pairs"], strict=True)
    wall = [statistics.median(a) / statistics.median(b) for (a, _), (b, _) in values["pairs"]]
    used = [a / b for (_, a), (_, b) in values["pairs"]]
    result = {
        "step_ms_with": 1e3 * statistics.median(x for turn, _ in watched for x in turn),
        "step_ms_without": 1e3 * statistics.median(x for turn, _ in alone for x in turn),
        "wall_ratio_quartiles": statistics.quantiles(wall, n=4),
        "processor_ratio_quartiles": statistics.quantiles(used, n=4),
        "turns": len(wall),
        "collectives_per_step": values["collectives"],
        "us_per_collective": values["per_call"],
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit() or "unknown",
    }
    result["watchdog_thread_share"] = values["idle"]
    share = result["collectives_per_step"] * result["us_per_collective"] / 1e3 / result["step_ms_without"]
    result["training_thread_share"] = share
    for name, value in result.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

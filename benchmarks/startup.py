"""python benchmarks/startup.py [--turns 7] [--json benchmarks/results/startup.json]

What starting costs: processor time (user and system, one thread) of a new process that imports torch, of the command
line, and of a rank's imports. All cases take turns, so that they meet the same noise. Printed are the medians of each
case, and of the ratio of each turn to the torch import that a case cannot do without, in the same turn. Bytecode is
compiled beforehand, as it is after the first run of any installation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from lasp.launch.doctor.machine import processor
from lasp.launch.versions import commit


class Case(NamedTuple):
    """Arguments of Python, the exit code, the case that it is measured against, and the largest ratio allowed."""

    arguments: tuple[str, ...]
    code: int = 0
    base: str | None = None
    at_most: float | None = None


_LASP = ("-m", "lasp.launch.cli")
CASES = {
    "import torch": Case(("-c", "import torch")),
    "import torch.distributed.fsdp": Case(("-c", "import torch.distributed.fsdp")),
    "lasp --help": Case((*_LASP, "--help")),
    "lasp train MISSING.yaml": Case((*_LASP, "train", "MISSING.yaml"), 1, "import torch", 1.3),
    "imports of a ddp rank": Case(
        ("-c", "import lasp.launch.train, lasp.parallel.engines.ddp"), 0, "import torch", 1.3
    ),
    "imports of an fsdp2 rank": Case(
        ("-c", "import lasp.launch.train, lasp.parallel.engines.fsdp"), 0, "import torch.distributed.fsdp", 1.1
    ),
}


def seconds(case: Case) -> float:
    """Processor time of one process.

    Raises:
        RuntimeError: it did not end as it should.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *case.arguments], env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != case.code:
        raise RuntimeError(f"{' '.join(case.arguments)} ended with {done.returncode}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="processes of each case")
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args()
    for case in CASES.values():  # compiles what is not compiled
        seconds(case)
    turns = [{name: seconds(case) for name, case in CASES.items()} for _ in range(options.turns)]
    measured = {}
    for name, case in CASES.items():
        measured[name] = {"cpu_s": round(statistics.median(turn[name] for turn in turns), 3)}
        line = f"{name:<30} {measured[name]['cpu_s']:7.3f} s"
        if case.base is not None:
            ratio = statistics.median(turn[name] / turn[case.base] for turn in turns)
            measured[name] |= {"ratio": round(ratio, 3), "base": case.base, "at_most": case.at_most}
            line += f"   {ratio:.2f} x {case.base}, at most {case.at_most}"
        print(line)
    facts = {
        "turns": options.turns,
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({"cases": measured, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()

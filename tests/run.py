"""python -m tests.run [PYTEST OPTIONS]: the tests in two processes side by side, and what each of them took.

Launch tests wait for ranks that they start, so a second process keeps the other core busy. Exits with the first status
that is not 0; a part in which the options select nothing passes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PARTS = {  # of about equal length
    "core": (
        "tests/test_rooms.py",
        "tests/test_documents.py",
        "tests/kernels",
        "tests/lasp",
        "tests/parallel/megatron",
        "tests/examples",
    ),
    "jobs": ("tests/launch", "tests/parallel"),
}
_NOTHING_SELECTED = 5


@dataclass
class Part:
    """One pytest process.

    Attributes:
        status: exit status.
        wall_s, cpu_s: seconds on the clock, and of processors, those of its ranks included.
        closing: pytest's last line.
    """

    name: str
    status: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    closing: str = ""

    def run(self, options: list[str]) -> None:
        """Pass on what pytest prints, line by line."""
        folders = list(PARTS[self.name])
        for other in {path for name, paths in PARTS.items() if name != self.name for path in paths}:
            folders += [f"--ignore={other}" for own in PARTS[self.name] if other.startswith(f"{own}/")]
        started = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *folders, *options]
        process = subprocess.Popen(
            command, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            print(f"{self.name} | {line}", end="", flush=True)
            self.closing = line.strip() or self.closing
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.status = 0 if process.returncode == _NOTHING_SELECTED else process.returncode
        self.wall_s, self.cpu_s = time.perf_counter() - started, usage.ru_utime + usage.ru_stime

    def count(self, outcome: str) -> int:
        """Tests with this outcome, as the closing line counts them."""
        found = re.search(rf"(\d+) {outcome}", self.closing)
        return int(found[1]) if found else 0


def main() -> int:
    """Run all parts; the first failure is the result."""
    parts = [Part(name) for name in PARTS]
    threads = [threading.Thread(target=part.run, args=(sys.argv[1:],)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print()
    for part in parts:
        print(f"{part.name}: {part.wall_s:.0f} s, {part.cpu_s:.0f} CPU-seconds, {part.closing}")
    counts = {word: sum(part.count(word) for part in parts) for word in ("passed", "failed", "skipped", "error")}
    print(f"all: {max(part.wall_s for part in parts):.0f} s, {sum(part.cpu_s for part in parts):.0f} CPU-seconds")
    print(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed, {counts['skipped']} skipped")
    return next((part.status for part in parts if part.status), 0)


if __name__ == "__main__":
    sys.exit(main())

"""A planted hang is explained by name, in time, on every rank that survives it."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from lasp.exchange.gather import AllGather
from lasp.launch.cli import main
from lasp.launch.config.schema import load_config
from lasp.launch.launchers.local import run_local
from lasp.launch.launchers.process_tree import children
from lasp.launch.run.failures import RankFailure
from lasp.launch.train import train
from lasp.models.linear_llama import Block
from tests.launch.helpers import tiny_yaml

LEAST_LIMIT_S = 3.0
STEP, LAYER = 3, 1  # where the fault is
MODEL = {"dim": 16, "num_layers": 3, "pattern": "LLS", "heads": 2, "mixer": "gla"}
SETTINGS = {"model": MODEL, "eval": {"every": 100}, "checkpoint": {"every": 100}}
HERE = r"\(layer 1, linear, forward\)"
SINCE = r"since \d+(\.\d)? s"

ABSENT_S = 1000.0
PATIENT = ["timeout_s=200"]  # to meet, and of the watchdog, which is not the one to notice here


def started_s():
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def train_with_fault(config, fault, rank="1"):
    """``train`` with a fault in the forward of one layer of one rank, at its third step.

    Ranks meet without hurry. From the first step on they wait for one another as long as it has taken them to start
    and to meet, which on a busy machine is long, and LEAST_LIMIT_S at least.
    """
    me, calls, skipping = int(os.environ["RANK"]), 0, False
    forward, send = Block.forward, AllGather._send

    def faulty_forward(self, *args, **kwargs):
        nonlocal calls, skipping
        calls += 1
        if calls == 1:
            limit = timedelta(seconds=max(LEAST_LIMIT_S, started_s()))
            for group in tuple(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(limit, group)
        if me == int(rank) and calls == (STEP - 1) * MODEL["num_layers"] + LAYER + 1:
            skipping = fault == "skip"
            if fault == "sleep":
                time.sleep(ABSENT_S)
            if fault == "raise":
                raise RuntimeError("a fault of one rank")
            if fault in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, fault))
        return forward(self, *args, **kwargs)

    def faulty_send(self, message, direction):
        nonlocal skipping
        if not skipping:
            return send(self, message, direction)
        skipping = False
        return mock.Mock(wait=lambda: message.expand(self.cp.cp_size, -1).contiguous())

    with mock.patch.object(Block, "forward", faulty_forward), mock.patch.object(AllGather, "_send", faulty_send):
        train(config)


def failure(folder, fault, ranks, *overrides, rank=1):
    """What the launcher says."""
    config = load_config(tiny_yaml(folder, **SETTINGS), [f"cp={ranks}", "steps=50", *PATIENT, *overrides])
    with pytest.raises(RankFailure) as caught:
        run_local(config, ranks, "tests.launch.test_hangs:train_with_fault", fault=fault, rank=str(rank))
    assert not [
        pid
        for pid in children(os.getpid())
        if "lasp.launch.launchers.local" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    return str(caught.value)


def test_a_rank_that_sleeps_is_named_with_its_stack(tmp_path):
    line, _, stack = failure(tmp_path, "sleep", 2).partition("\n")
    sentence = rf"rank 1 \(host \S+\) never reached collective \d+ {HERE}; rank 0 waits there {SINCE}"
    assert re.fullmatch(sentence, line), line
    assert stack.startswith("rank 1 is here") and "time.sleep(ABSENT_S)" in stack and "in faulty_forward" in stack


def test_a_rank_that_leaves_out_a_collective_is_named(tmp_path):
    """Its next one is of another size, so gloo aborts one of the ranks that did nothing wrong."""
    line = failure(tmp_path, "skip", 2).partition("\n")[0]
    assert re.match(
        rf"rank 1 \(host \S+\) never reached collective \d+ {HERE}: it entered another one there \(layer 2, softmax, ",
        line,
    ), line


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 0])
def test_a_rank_that_is_killed_is_named(tmp_path, rank):
    line, _, found = failure(tmp_path, "SIGKILL", 2, "engine=fsdp2", rank=rank).partition("\n")
    assert f"rank {rank} was killed by SIGKILL" in line
    assert re.fullmatch(
        rf"rank {rank} \(host \S+\) died, the last it entered was collective \d+ \(.*layer 0, linear, forward\); "
        rf"rank {1 - rank} waits in collective \d+ {HERE} {SINCE}",
        found,
    ), found


def test_under_torchrun_every_rank_says_the_same_sentence(tmp_path):
    overrides = ["cp=2", "steps=50", *PATIENT]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.launch.test_hangs"]
    done = subprocess.run(
        [sys.executable, *command, "train", str(tiny_yaml(tmp_path, **SETTINGS)), *overrides],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 2 and lines[0] == lines[1], done.stderr
    sentence = rf"error: rank 1 \(host \S+\) never reached collective \d+ {HERE}; rank 0 waits there {SINCE}"
    assert re.fullmatch(sentence, lines[0]), lines[0]
    assert done.stderr.count("in faulty_forward") >= 2
    ranks, _, _ = done.stderr.rpartition("\nerror: ")  # below: torchrun's own report
    assert "Traceback" not in ranks, done.stderr


if __name__ == "__main__":  # a rank of that test
    with mock.patch("lasp.launch.train.train", functools.partial(train_with_fault, fault="sleep")):
        main()

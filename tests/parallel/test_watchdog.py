"""The sentence that follows from what ranks report, and the thread that ends a process where nothing raises."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from unittest import mock

import torch.distributed as dist

from lasp import comm
from lasp.comm.hangs import Report, Wait, explain
from lasp.parallel.watch.recorder import Neighbour, Recorder
from lasp.parallel.watch.watchdog import Watchdog

CP, DP = tuple(range(4)), (3, 7)
NAMES = {n: f"layer {n % 10}, linear, forward" for n in range(30, 42)}
WAIT = Wait("cp", CP, 41, NAMES[41], 62.0)


def _reports(**changes):
    """Ranks 0-2 of host a wait in collective 41, rank 3 of host b has not come; ``r3={...}`` changes its report."""
    waiting = Report("a", {"cp": 41}, "collective 41 (x)", {"cp": NAMES}, (WAIT,), "its stack", answered=True)
    late = {n: name for n, name in NAMES.items() if n < 41}
    late = Report("b", {"cp": 40}, f"collective 40 ({NAMES[40]})", {"cp": late}, (), "its stack", answered=True)
    reports = {0: waiting, 1: waiting, 2: dataclasses.replace(waiting), 3: late}
    for name, values in changes.items():
        rank = int(name[1:])
        reports[rank] = dataclasses.replace(reports.get(rank, late), **values)
    return {rank: Report.from_json(report.to_json()) for rank, report in reports.items()}


def _line(error="Timed out", watched=True, **changes):
    return explain(WAIT, _reports(**changes), error, watched=watched).partition("\n")


def test_a_late_rank_is_named_with_its_stack():
    line, _, stack = _line()
    assert line == (
        "rank 3 (host b) never reached collective 41 (layer 1, linear, forward); ranks 0-2 wait there since 62 s"
    )
    assert stack == "rank 3 is here (raise timeout_s if it is only slow):\nits stack"


def test_of_waits_that_began_at_different_times_the_oldest_is_told():
    """Of the others and of the one that asks, whose own wait need not be among the reports."""
    younger, older = (dataclasses.replace(WAIT, age_s=age) for age in (61.0, 64.0))
    line, _, _ = _line(r0={"waits": (younger,)}, r1={"waits": (older,)})
    assert line.endswith("; ranks 0-2 wait there since 64 s")
    line, _, _ = _line(r0={"waits": (younger,)}, r1={"waits": (younger,)}, r2={"waits": (younger,)})
    assert line.endswith("; ranks 0-2 wait there since 62 s")


def test_a_late_rank_that_waits_elsewhere_is_a_victim():
    elsewhere = Wait("dp", DP, 5, "gradients, all_reduce", 70.0)
    line, _, _ = _line(
        r3={"waits": (elsewhere,), "reached": {"cp": 40, "dp": 5}},
        r7={"host": "c", "reached": {"dp": 4}, "history": {}},
    )
    assert line == "rank 7 (host c) never reached collective 5 (gradients, all_reduce); rank 3 waits there since 70 s"


def test_a_rank_that_left_the_common_path_is_named():
    other = {**NAMES, 40: NAMES[41], 41: "gradients, all_reduce"}
    line, _, _ = _line(r3={"history": {"cp": other}, "reached": {"cp": 41}})
    assert line.startswith(
        "rank 3 (host b) never reached collective 40 (layer 0, linear, forward): it entered another one there "
        "(layer 1, linear, forward); ranks 0-2 wait in collective 41 (layer 1, linear, forward) since 62 s"
    )


def test_of_two_ranks_the_one_that_left_the_habit_is_named():
    pair, habit = dataclasses.replace(WAIT, ranks=(0, 1)), [f"layer {n % 4}" for n in range(12)]
    usual, other = dict(enumerate(habit, 1)), dict(enumerate([*habit[:9], *habit[10:]], 1))  # the tenth is missing
    reports = {rank: Report(history={"cp": names}, answered=True) for rank, names in enumerate((usual, other))}
    assert explain(pair, reports, "").startswith("rank 1 never reached collective 10 (layer 1): it entered another one")
    short = {rank: Report(history={"cp": {1: f"op {rank}"}}, answered=True) for rank in (0, 1)}
    assert explain(pair, short, "") == "the ranks part at collective 1: rank 0 as (op 0), rank 1 as (op 1)"


def test_a_device_that_runs_behind_its_host_is_late_at_the_first_that_is_missing():
    line, _, _ = _line(r3={"reached": {"cp": 37}, "history": {}})
    assert line.startswith("rank 3 (host b) never reached collective 38 (layer 8, linear, forward); ranks 0-2 wait")


def test_ranks_that_died_stopped_failed_or_ended_are_told_apart():
    last, waits = f"the last it entered was collective 40 ({NAMES[40]})", "ranks 0-2 wait in collective 41 "
    assert _line("Connection closed by peer", r3={"answered": False})[0].startswith(
        f"rank 3 (host b) died, {last}; {waits}"
    )
    assert _line(r3={"answered": False})[0].startswith(
        f"rank 3 (host b) died or is stuck outside Python, {last}; {waits}"
    )
    assert _line(r3={"answered": False, "fate": "is stopped"})[0].startswith(f"rank 3 (host b) is stopped, {last}")
    failed = _line("Connection closed", r3={"ended": "ValueError: bad data"})[0]
    assert failed.startswith("rank 3 (host b) failed (ValueError: bad data) and never reached collective 41 ")
    assert "left the job, its work done, and never" in _line("Connection closed", r3={"ended": ""})[0]
    assert _line(watched=False, r3={"answered": False})[0].startswith(
        "rank 3 (host b) never reached collective 41 (layer 1, linear, forward), or died; ranks 0-2 wait there"
    )
    everyone = _line(r3={"reached": {"cp": 41}, "history": {"cp": NAMES}})[0]
    assert everyone == (
        "ranks 0-3 (hosts a, b) all entered collective 41 (layer 1, linear, forward) and it did not end: Timed out"
    )


def test_a_collective_that_torch_issued_is_not_the_one_that_others_entered():
    gather = {n: name for n, name in NAMES.items() if n < 41}  # of parameters, by an engine
    line, _, stack = _line(r3={"reached": {"cp": 41}, "history": {"cp": gather}})
    assert line == (
        "the ranks part at collective 41: rank 0 (host a) as (layer 1, linear, forward), rank 1 (host a) as (layer 1, "
        "linear, forward), rank 2 (host a) as (layer 1, linear, forward), rank 3 (host b) as (issued by torch)"
    )
    assert stack.endswith("its stack")


CHILD = """
import sys, time
from lasp.parallel.watch.recorder import Recorder
recorder = Recorder()
for number in range(600):
    recorder.write("0", number, f"layer {number}" + "x" * (number == 599) * 200)
print(recorder.address, flush=True)
time.sleep(60)
"""


def test_a_neighbour_reads_what_a_killed_rank_had_entered():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    neighbour = Neighbour(process.stdout.readline().strip())
    assert neighbour.fate() == ""
    process.kill()
    while neighbour.fate() != "died":  # not yet reaped
        time.sleep(0.01)
    process.wait()
    history = neighbour.history()
    assert neighbour.fate() == "died" and [number for _, number, _ in history] == list(range(88, 600))
    assert history[-2] == ("0", 598, "layer 598") and history[-1][2].startswith("layer 599xxx")
    own = Recorder()
    own.write("0", 1, "here")
    assert Neighbour(own.address).history() == own.history() == [("0", 1, "here")]


def _never_ends(group, path, late, limit_s):
    """A collective that the device does not finish and the host does not wait for, as with NCCL; one rank is late."""
    ended, verdicts = threading.Event(), []
    store = dist.FileStore(path, dist.get_world_size(group))

    def end(verdict):
        verdicts.append(verdict)
        ended.set()
        sys.exit()  # of the thread

    with Watchdog(store, dist.get_rank(), dist.get_world_size(group), limit_s, range(2), end) as watchdog:
        with comm.scope("layer 3"), comm.explained("barrier", group):
            dist.barrier(group)
        if dist.get_rank() != late:
            call = comm.Call("all_gather", group, comm.last_number(group) + 1, "layer 4", time.monotonic(), 8)
            with mock.patch.object(comm, "last_number", lambda group: call.number):
                watchdog.entered(call)
                call.done = mock.Mock(query=lambda: False)
                watchdog.left(call)
                ended.wait(30 * limit_s)
        else:
            ended.wait(30 * limit_s)
    return verdicts


def test_where_the_host_does_not_wait_the_watchdog_ends_every_rank_with_one_sentence(ranks, tmp_path):
    verdicts = ranks.run_to_break(_never_ends, str(tmp_path / "store"), 1, size=2)
    assert len(verdicts[0]) == 1 and verdicts[0] == verdicts[1]
    line, _, stack = verdicts[0][0].partition("\n")
    assert re.fullmatch(
        r"rank 1 \(host \S+\) never reached collective \d+ \(layer 4\); rank 0 waits there since [\d.]+ s", line
    ), line
    assert "_never_ends" in stack and os.path.basename(__file__) in stack

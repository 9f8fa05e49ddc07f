"""Ray: where ranks go, what is refused, and a run that loses a rank, a worker or a node and goes on by itself."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from lasp.launch.launchers.local import run_local
from lasp.launch.launchers.placement import Seat, crossing_groups, largest_world, place_ranks, rank_environments
from lasp.launch.launchers.ray_cluster import run_ray
from lasp.launch.launchers.ray_driver import Driver, Loss, NotStarted, _open_store
from lasp.launch.launchers.ray_worker import END, FATAL, PLACE, RUN, STOP
from lasp.launch.run.failures import Interrupted, RankFailure
from lasp.launch.run.report import Report, Screen, read_metrics, show, watch
from tests.launch.helpers import tiny_config, tiny_yaml, train_on_ranks

LIMIT_S = 240  # a group starts in 15 s; these tests share their machine
pytestmark = pytest.mark.timeout(600)


def rank_pids(run_dir):
    """The process of every rank of a run, by rank: what a process was started with tells which run it belongs to."""
    pids = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it has ended
            environment = dict(line.partition("=")[::2] for line in text.split("\0"))
            if environment.get(RUN) == str(run_dir) and "RANK" in environment:
                pids[int(environment["RANK"])] = int(entry.name)
    return pids


def losses(run_dir):
    return {record["step"]: record["loss"] for record in read_metrics(run_dir)}


class FakeCluster:
    """Nodes with slots, and attempts that go as the test says: ``script(store, places)`` of each in turn."""

    own_address, head_address, per_rank = "10.0.0.1", "10.0.0.1:6379", {"CPU": 2}

    def __init__(self, slots, *script, busy=0):
        self.nodes, self.script, self.busy, self.attempts = dict(slots), list(script), busy, []

    def addresses(self):
        return dict.fromkeys(self.nodes, "10.0.0.1")

    def slots(self, *, free):
        return {node: max(0, slots - self.busy * free) for node, slots in self.nodes.items()}

    def fit(self, places, attempt, group_size, environment, loopback):
        assert loopback and environment["TORCHELASTIC_RESTART_COUNT"] == str(attempt) == str(len(self.attempts))
        self.attempts.append(list(places))
        store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), wait_for_workers=False)
        for rank, node in enumerate(places):  # worker numbers are not ranks
            here = {"worker": len(places) - 1 - rank, "node": node, "host": "h", "pid": 1}
            store.set(PLACE.format(rank=rank), json.dumps(here))
        self.script.pop(0)(store, self)


def loses(node):
    def end(store, cluster):
        del cluster.nodes[node]
        raise Loss({0: "The actor died unexpectedly"})

    return end


def succeeds(store, cluster):
    time.sleep(0.3)  # the driver looks around ten times a second


def drive(cluster, folder, *overrides, signals=0):
    config = tiny_config(folder, "launcher=ray", "cp_size=2", "data.batch_size=12", *overrides)
    Driver(config, cluster, SimpleNamespace(count=signals)).run()


def test_the_group_shrinks_to_what_a_lost_node_leaves(tmp_path, capsys):
    cluster = FakeCluster({"a": 4, "b": 4, "c": 4}, loses("b"), loses("a"), succeeds)
    drive(cluster, tmp_path)
    assert cluster.attempts == [["a"] * 4 + ["b"] * 4 + ["c"] * 4, ["a"] * 4 + ["c"] * 4, ["c"] * 4]
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "node b was lost, with rank(s) 4-7. Restart 1 of at most 3, from the last checkpoint." in shown
    assert "node a was lost, with rank(s) 0-3. Restart 2 of at most 3" in shown
    assert "ranks 0-3 on node c (10.0.0.1)" in shown and "do not fit on one node" not in shown


def test_a_group_that_fits_on_no_node_is_named(tmp_path, capsys):
    drive(FakeCluster({"a": 2, "b": 3}, succeeds), tmp_path, "cp_size=4")
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "warning: group(s) 0 of tp_size x cp_size = 4 ranks do not fit on one node (rank slots: 2 on" in shown


def test_a_busy_cluster_starts_fewer_ranks_and_a_fixed_shape_waits(tmp_path):
    cluster = FakeCluster({"a": 4, "b": 4}, succeeds, busy=2)
    drive(cluster, tmp_path, "ray.wait_s=1")
    assert cluster.attempts == [["a", "a", "b", "b"]]
    with pytest.raises(
        ValueError, match=r"^8 rank\(s\) need 16 CPU, and after ray.wait_s = 1 s the cluster has room for 4: "
    ):
        drive(FakeCluster({"a": 4, "b": 4}, busy=2), tmp_path, "ray.wait_s=1", "dp_size=4")
    with pytest.raises(ValueError, match="2 of 4 on node a"):
        drive(FakeCluster({"a": 4, "b": 4}, busy=2), tmp_path, "ray.wait_s=1", "ray.num_workers=8")
    with pytest.raises(ValueError, match=r"^2 rank\(s\) need 4 CPU, .* room for 1: 1 of 1 on node a"):
        drive(FakeCluster({"a": 1}), tmp_path, "ray.wait_s=0.5")


def test_a_store_that_other_machines_cannot_reach_is_refused(tmp_path):
    cluster = FakeCluster({"a": 4, "b": 4})
    cluster.addresses = lambda: {"a": "10.0.0.1", "b": "10.0.0.2"}
    with pytest.raises(ValueError, match=r"ray\.bind=127\.0\.0\.1 must be .* other machines reach, like 10\.0\.0\.1\."):
        drive(cluster, tmp_path, "ray.bind=127.0.0.1")


def report(rank, time, message):
    return lambda store: store.set(
        f"lasp/error/{rank}",
        json.dumps({"rank": rank, "time": time, "expected": True, "message": message, "traceback": ""}),
    )


def fails(failures, *reports):
    def end(store, cluster):
        for leave in reports:
            leave(store)
        raise Loss(failures)

    return end


FULL = report(1, 1, "the disk is full.")
ENDS = {
    "the disk is full. That is failure 1, and ray.max_failures = 0. Run again": fails(
        {0: "x: rank 1 ended with exit code 1\n", 1: "rank 0 ended with exit code 1"}, report(0, 2, "a victim."), FULL
    ),
    "rank 0 was killed by SIGKILL": fails(
        {0: "rank 1 ended with exit code 1", 1: "rank 0 ended with exit code -9"}, FULL
    ),
    "the Ray worker of rank(s) 1 on node a died. That is": fails({0: "died", 1: "rank 0 ended with exit code 1"}, FULL),
    "rank 0 ended with exit code 3, saying: no file": fails({1: "rank 0 ended with exit code 3\nno file\n"}),
}


@pytest.mark.parametrize("message", ENDS)
def test_the_cause_is_shown_when_there_were_too_many_failures(tmp_path, message):
    with pytest.raises(RankFailure, match=f"^{re.escape(message)}"):
        drive(FakeCluster({"a": 2}, ENDS[message]), tmp_path, "ray.max_failures=0")


def test_a_group_that_does_not_come_up_is_started_again_unless_that_is_in_vain(tmp_path, capsys):
    def late(store, cluster):
        raise NotStarted(RuntimeError("a node is gone"), may_pass=True)

    def in_vain(store, cluster):
        raise NotStarted(ModuleNotFoundError("No module named 'lasp'"), may_pass=False)

    drive(FakeCluster({"a": 2}, late, late, succeeds), tmp_path, "ray.max_failures=0")
    assert capsys.readouterr().out.count("Ray could not start the ranks: a node is gone. Trying again.") == 2
    with pytest.raises(RankFailure, match=r"^Ray could not start the ranks: No module named 'lasp'"):
        drive(FakeCluster({"a": 2}, in_vain), tmp_path)
    with pytest.raises(RankFailure, match=r"a node is gone\. That took longer than ray\.wait_s = 0\.001 s"):
        drive(FakeCluster({"a": 2}, late), tmp_path, "ray.wait_s=0.001")


def hangs_until_told(store, seen):
    store.wait([END], timedelta(seconds=30))
    time.sleep(0.3)  # Ray takes its time too
    seen.append(END)
    raise Loss({0: "rank 0 ended with exit code 1"})


def test_an_error_that_no_restart_cures_ends_an_attempt_that_hangs(tmp_path):
    seen = []

    def fatal(store, cluster):
        store.set(FATAL, json.dumps({"message": "no data.", "traceback": "where"}))
        hangs_until_told(store, seen)

    with pytest.raises(RankFailure, match=r"^no data\.$") as failure:
        drive(FakeCluster({"a": 2}, fatal), tmp_path)
    assert failure.value.details == "where" and seen == [END]


def test_a_signal_reaches_the_ranks_and_a_second_one_ends_them(tmp_path):
    config, signals, seen = tiny_config(tmp_path, "launcher=ray"), SimpleNamespace(count=0), []

    def stops(store, cluster):
        signals.count = 1
        store.wait([STOP], timedelta(seconds=30))
        seen.append(STOP)

    def hangs(store, cluster):
        signals.count = 2
        hangs_until_told(store, seen)

    def dies(store, cluster):
        signals.count = 1
        raise Loss({0: "rank 0 ended with exit code -15"})

    Driver(config, FakeCluster({"a": 1}, stops), signals).run()
    assert seen == [STOP]
    for end in (hangs, dies):
        signals.count = 0
        with pytest.raises(Interrupted, match="Run again: it goes on from what is saved"):
            Driver(config, FakeCluster({"a": 1}, end), signals).run()
    assert seen == [STOP, END]


@pytest.fixture(scope="module")
def cluster():
    """Two simulated nodes of two CPUs; they share this machine's address."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b"), ("b", "c", "a")])
def test_groups_stay_on_a_node_where_they_fit(order):
    slots = {"a": 3, "b": 2, "c": 3}
    places = place_ranks({node: slots[node] for node in order}, 6, 2)
    assert places == ["a", "a", "c", "c", "b", "b"] and crossing_groups(places, 2) == []
    places = place_ranks({node: slots[node] for node in order}, 8, 2)
    assert places == ["a", "a", "c", "c", "b", "b", "a", "c"] and crossing_groups(places, 2) == [3]
    places = place_ranks({node: slots[node] for node in order}, 4, 4)
    assert places == ["a", "a", "a", "c"] and crossing_groups(places, 4) == [0]
    with pytest.raises(ValueError, match="9 ranks need as many slots, and the nodes have 8"):
        place_ranks(slots, 9, 1)


def test_ranks_follow_from_where_the_workers_found_themselves():
    nodes, devices = ["b", "a", "b", "a", "a", "b", "a"], [1, 2, 0, 0, 3, 2, 1]
    seats = [Seat(node, "192.168.0.1", device) for node, device in zip(nodes, devices)]  # one address tells nothing
    chance = random.Random(0)
    for _ in range(5):
        chance.shuffle(seats)
        places = {}
        for seat, environment in zip(seats, rank_environments(seats, 2)):
            rank = {name: int(value) for name, value in environment.items()}
            places[rank["RANK"]] = (seat.node, rank["LOCAL_RANK"])
            assert rank["LOCAL_RANK"] == seat.device and rank["WORLD_SIZE"] == 7
            assert rank["LOCAL_WORLD_SIZE"] == nodes.count(seat.node)
        assert [places[rank] for rank in range(7)] == [
            *(("a", 0), ("a", 1), ("a", 2), ("a", 3)),
            *(("b", 0), ("b", 1), ("b", 2)),
        ]


@pytest.mark.parametrize(("slots", "unit", "batch", "world"), [(7, 2, 4, 4), (8, 2, 4, 8), (9, 1, 2, 2), (3, 4, 8, 0)])
def test_the_largest_world_divides_the_batch(slots, unit, batch, world):
    assert largest_world(slots, unit, batch) == world


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["ray.num_workers=2", "dp_size=2"],
            "ray.num_workers = 2 must equal tp_size x pp_size x cp_size x dp_size = 4",
        ),
        (
            ["ray.num_workers=3"],
            "ray.num_workers = 3 must be tp_size x pp_size x cp_size = 2 times a divisor of data.b",
        ),
        (["ray.num_workers=6"], "ray.num_workers = 6 must be"),
        (["ray.gpus_per_worker=1"], "ray.gpus_per_worker = 1 does not go with device=cpu. Leave it out."),
    ],
)
def test_settings_that_contradict_one_another_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(tmp_path, "launcher=ray", "cp_size=2", *overrides)


def test_what_ray_needs_is_said_before_anything_starts(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "launcher=ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^launcher=ray needs Ray: pip install 'lasp\[ray\]', or use launcher=local\.$"
    ):
        run_ray(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="launcher=ray starts the ranks itself, but RANK and WORLD_SIZE are in the"):
        run_ray(config)


def test_a_first_rank_sends_what_its_launcher_shows(tmp_path, capsys):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config = tiny_config(tmp_path, "steps=900")
    config.run_dir.mkdir()
    watch(store)
    with Report(config.run_dir, 900, config.log, 0, active=True, store=store) as report:
        report.say("a word")
        for step in range(1, 901):
            record = {"step": step, "loss": 1.0, "grad_norm": 0.5, "tokens_per_s": 10.0, "seconds": 1e-3}
            report.step(record | ({"eval_loss": 2.0} if step == 77 else {}))
    assert capsys.readouterr().out == "" and len(losses(config.run_dir)) == 900
    show(store, Screen(900, config.log.every_s))
    shown = capsys.readouterr().out
    assert "a word\n" in shown and "held-out loss 2.0000" in shown
    assert "step    900/900" in shown and shown.count("tokens/s") < 450  # every eye has its limit


def test_the_store_listens_where_it_is_told(tmp_path):
    store = _open_store("127.0.0.1", "127.0.0.1")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", store.port), timeout=2):
        pass
    with pytest.raises(ValueError, match=r"ray\.bind=203\.0\.113\.9 must be an address of this machine"):
        _open_store("203.0.113.9", "203.0.113.9")


@contextmanager
def started(cluster, folder, *overrides):
    """``lasp train`` on the cluster, as a process whose output is in folder/output."""
    path = tiny_yaml(folder)
    command = [sys.executable, "-m", "lasp.launch.cli", "train", str(path), "launcher=ray", *overrides]
    with (folder / "output").open("w") as output:
        driver = subprocess.Popen([*command, f"ray.address={cluster.address}"], stdout=output, stderr=subprocess.STDOUT)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def wait_for_step(driver, folder, step, limit_s=LIMIT_S):
    """Return when metrics hold ``step``; a driver that ends or a step that does not come fails the test."""
    deadline = time.monotonic() + limit_s
    while max(losses(folder / "run"), default=0) < step:
        assert driver.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.05)


def kill_at_random(driver, folder, between, parents=False, size=4):
    """kill -9 of a random rank's process, or of the Ray worker that is its parent, at a random step."""
    step, rank = random.randint(*between), random.randrange(size)
    wait_for_step(driver, folder, step)
    pid = rank_pids(folder / "run")[rank]
    os.kill(parent_of(pid) if parents else pid, signal.SIGKILL)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("dp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_leaves_the_curve_as_it_was(ranks, cluster, tmp_path, dp):
    """One rank on each node, or two."""
    overrides = ["cp_size=2", f"dp_size={dp}", "steps=40", "checkpoint.every=4", "eval.every=20"]
    plain = tmp_path / "plain"
    plain.mkdir()
    ranks.run(train_on_ranks, tiny_yaml(plain), overrides, size=2 * dp)
    with started(cluster, tmp_path, *overrides, f"ray.cpus_per_worker={2 // dp}") as driver:
        kill_at_random(driver, tmp_path, (1, 20), size=2 * dp)
        code = driver.wait(LIMIT_S)
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(plain / "run"), output
    assert "was killed by SIGKILL" in output and "Restart 1 of at most 3, from the last checkpoint" in output
    assert "step     40/40  loss" in output and "step     40  held-out loss" in output
    assert output.count("ranks 0 on node" if dp == 1 else "ranks 0-1 on node") == 2 and "127.0.0.1:" in output
    assert not rank_pids(tmp_path / "run")


@pytest.mark.slow
def test_killed_workers_leave_the_curve_as_it_was_until_there_were_too_many(cluster, tmp_path):
    overrides = ("cp_size=2", "dp_size=2", "steps=400", "checkpoint.every=4")
    with started(cluster, tmp_path, *overrides, "ray.max_failures=1") as driver:
        kill_at_random(driver, tmp_path, (3, 20), parents=True)
        wait_for_step(driver, tmp_path, 40)
        kill_at_random(driver, tmp_path, (41, 60), parents=True)
        code = driver.wait(LIMIT_S)
    output = (tmp_path / "output").read_text()
    assert code == 1 and "Restart 1 of at most 1" in output, output
    assert re.search(
        r"error: the Ray worker of rank\(s\) \d on node \w+ died\. That is failure 2, and ray\.max_failures = 1\.",
        output,
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    run_local(tiny_config(plain, *overrides), 4)
    kept = losses(tmp_path / "run")
    assert len(kept) >= 41 and kept.items() <= losses(plain / "run").items()


@pytest.mark.slow
def test_a_lost_node_leaves_a_smaller_group_on_the_same_curve(cluster, tmp_path):
    node = cluster.add_node(num_cpus=2)
    overrides = ("cp_size=2", "steps=60", "data.batch_size=6", "checkpoint.every=4", "dtype=float64")
    plain = tmp_path / "plain"
    plain.mkdir()
    with started(cluster, tmp_path, *overrides) as driver:
        run_local(tiny_config(plain, *overrides, "dp_size=3"), 6)
        wait_for_step(driver, tmp_path, random.randint(3, 30))
        cluster.remove_node(node, allow_graceful=False)
        code = driver.wait(LIMIT_S)
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    assert "dp 3 x cp 2 = 6" in output and "dp 2 x cp 2 = 4" in output
    lost = r"(node \w+ was lost, with|the Ray worker of) rank\(s\) \d-\d.*\. Restart 1 "  # Ray notices the one late
    assert re.search(lost, output), output
    assert losses(tmp_path / "run") == pytest.approx(losses(plain / "run"), rel=1e-8)  # as in test_two_hosts


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(cluster, tmp_path):
    overrides = ("cp_size=2", "steps=4000", "ray.num_workers=2")
    with started(cluster, tmp_path, *overrides) as driver:
        wait_for_step(driver, tmp_path, 5)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(LIMIT_S) == 0, (tmp_path / "output").read_text()
    stopped = max(losses(tmp_path / "run"))
    assert f"stopped at step {stopped} of 4000; saved" in (tmp_path / "output").read_text()
    with started(cluster, tmp_path, *overrides[:1], f"steps={stopped + 2}") as driver:
        assert driver.wait(LIMIT_S) == 0
    assert f"resumed at step {stopped}" in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_an_error_that_no_restart_cures_ends_the_run_at_once(cluster, tmp_path):
    with started(cluster, tmp_path, "cp_size=2", "data.seq_len=6400000") as driver:
        assert driver.wait(LIMIT_S) == 1
    output = (tmp_path / "output").read_text()
    assert "error: data.seq_len = 6,400,000 tokens must not exceed" in output and "Restart" not in output, output
    assert not rank_pids(tmp_path / "run")


@pytest.mark.slow
def test_resources_that_do_not_come_are_named(cluster, tmp_path):
    with started(cluster, tmp_path, "cp_size=2", "ray.cpus_per_worker=3", "ray.wait_s=1") as driver:
        assert driver.wait(LIMIT_S) == 1
    output = (tmp_path / "output").read_text()
    assert "error: 2 rank(s) need 6 CPU, and after ray.wait_s = 1 s the cluster has room for 0: 0 of 0 on n" in output

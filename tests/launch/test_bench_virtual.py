"""The virtual cluster, and exchanges measured over it."""

import os
import signal
import socket
import subprocess

import pytest

from lasp.launch.bench import virtual_cluster
from lasp.launch.bench.exchange import Cell, Settings, measure_cell, summarise
from lasp.launch.bench.ranks import virtual_ranks
from lasp.launch.bench.virtual_cluster import VirtualCluster, why_not
from tests.launch.helpers import forked, forked_main, wait_until


@pytest.fixture(scope="module", autouse=True)
def _possible():
    if reason := why_not():
        pytest.skip(reason)


def _left(pid):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20).stdout
    return [line for line in listed.splitlines() if line.startswith(f"laspvc{pid}x")]


def _name(mesh):
    return socket.gethostname()


def test_two_hosts_have_names_a_limited_link_and_exchanges_that_agree():
    cell = Cell(2, 1, 256 << 10, 1e9)
    with VirtualCluster(2, 1e9) as cluster, virtual_ranks(cluster, 1, timeout_s=60) as ranks:
        assert ranks.ask(f"{__name__}:_name") == ["host0", "host1"] and ranks.nodes == (0, 1)
        fast = measure_cell(ranks, cell, Settings(repeats=3), print)
        assert set(fast["exchanges"]) == {"all_gather", "ring", "all_scan", "log_scan", "hierarchical", "auto"}
        assert fast["auto"]["reason"] and summarise([fast])["model_error_median"] is not None

        cluster.set_rate(5e7)  # of connections that stay
        settings = Settings(exchanges=("all_gather", "ring"), repeats=2, skip_above_s=0.05)
        slow = measure_cell(ranks, Cell(2, 1, 512 << 10, 5e7), settings, print)
        rate = slow["fabric"]["between"]["bytes_per_s"]
        assert 0.5 * 5e7 / 8 < rate < 1.3 * 5e7 / 8, "the link carries what it may"
        assert fast["fabric"]["between"]["bytes_per_s"] > 4 * rate
        assert set(slow["skipped"]) == {"all_gather", "ring"} and "> 0.05 s" in slow["skipped"]["ring"]  # 84 ms
    assert _left(os.getpid()) == []


def test_an_error_and_a_dead_owner_leave_no_namespace(tmp_path):
    with pytest.raises(RuntimeError, match="on purpose"), VirtualCluster(2, 1e9):
        assert len(_left(os.getpid())) == 3
        raise RuntimeError("on purpose")
    assert _left(os.getpid()) == []

    def die():
        VirtualCluster(2, 1e9).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(die, tmp_path / "output") as owner:
        owner.join(60)
    assert owner.exitcode == -signal.SIGKILL and len(_left(owner.pid)) == 3
    with VirtualCluster(1, 1e9):
        assert _left(owner.pid) == []


def test_a_signal_ends_ranks_and_namespaces(tmp_path):
    arguments = ["bench", "exchange", "--virtual", "--hosts", "2", "--ranks", "1", "--output", str(tmp_path / "out")]
    with forked_main(arguments, tmp_path / "said") as process:
        wait_until(lambda: (names := _left(process.pid)) and _pids(names), process, tmp_path / "said", 200)
        os.kill(process.pid, signal.SIGTERM)
        process.join(100)
    text = (tmp_path / "said").read_text()
    assert process.exitcode == 130 and "interrupted" in text, text
    assert _left(process.pid) == [] and not (tmp_path / "out").exists()


def _pids(names):
    hosts = [line.split()[0] for line in names]  # in no order; the switch among them has no process
    listed = (subprocess.run(["ip", "netns", "pids", h], capture_output=True, text=True, timeout=20) for h in hosts)
    return [pid for one in listed for pid in one.stdout.split()]


def test_what_a_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(virtual_cluster.shutil, "which", lambda name: None if name == "tc" else f"/usr/sbin/{name}")
    with pytest.raises(ValueError, match="needs the command tc: install iproute2"), VirtualCluster(2, 1e9):
        pass
    with pytest.raises(ValueError, match="a virtual cluster has 1 to 64 hosts, got 0"):
        VirtualCluster(0, 1e9)


def test_a_machine_that_forbids_namespaces_says_why(monkeypatch):
    real = virtual_cluster.subprocess.run

    def forbidden(command, **options):
        if list(command[:3]) == ["ip", "netns", "add"]:
            return subprocess.CompletedProcess(command, 1, "", "mount --make-shared /run/netns failed: denied\n")
        return real(command, **options)

    monkeypatch.setattr(virtual_cluster.subprocess, "run", forbidden)
    assert "does not allow: ip netns add" in why_not() and "denied. Run as root" in why_not()

"""The documented commands on two hosts: network namespaces of this machine, joined by a cable."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from lasp.launch.config.schema import load_config
from lasp.launch.launchers.process_tree import children, kill_tree
from lasp.launch.launchers.torchrun import has_saved
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from tests.launch.helpers import COMMAND, last_step, tiny_yaml

STEPS, EVERY = 40, 10
OPTIONS = [f"checkpoint.every={EVERY}", "checkpoint.keep=null", "log.sample_tokens=0"]
OPTIONS += ["optimizer.min_lr=0.01"]  # a rate that does not depend on where a run ends
OPTIONS += ["dtype=float64"]  # training amplifies rounding: what float32 rounds differs by 1e-3 after 40 steps


def _ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts():
    """Names, addresses and interfaces of two hosts: ``[(name, address, interface), ...]``."""
    tag = f"{os.getpid() % 100000}"
    names = [f"lasp{tag}{letter}" for letter in "ab"]
    pairs = [(name, f"10.{137 + os.getpid() % 100}.7.{n}", f"lv{tag}{n}") for n, name in enumerate(names, 1)]
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", pairs[0][2], "netns", names[0], "type", "veth", "peer", pairs[1][2], "netns", names[1]]]
    for name, address, interface in pairs:
        steps += [["-n", name, "addr", "add", f"{address}/24", "dev", interface]]
        steps += [["-n", name, "link", "set", device, "up"] for device in (interface, "lo")]
    try:
        for step in steps:
            try:
                done = _ip(*step)
            except FileNotFoundError:
                pytest.skip("two hosts need the command ip (iproute2)")
            if done.returncode:
                pytest.skip(f"two hosts need network namespaces: ip {' '.join(step)}: {done.stderr.strip()}")
        yield pairs
    finally:
        for name in names:
            pids = _ip("netns", "pids", name).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)  # its end of the cable goes with it, and so the other


def _wait_for(condition, processes, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), "a host's command has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def _curve(folder):
    return {record["step"]: record for record in read_metrics(folder)}


def _assert_like_one_process(path, folder):
    """The first steps of the run in ``folder`` against those of this process alone.

    1e-3 of float32, whose unit is 6e-8, is an amplification by 2e4, so float64's unit of 1e-16 grows to 2e-12.
    """
    curve = _curve(folder)
    steps = min(STEPS, max(curve))
    train(load_config(path, [*OPTIONS, f"steps={steps}", f"run_dir={folder.parent}/alone"]))
    alone = _curve(folder.parent / "alone")
    assert list(curve) == list(range(1, max(curve) + 1)) and list(alone) == list(range(1, steps + 1))
    for step, record in alone.items():
        assert curve[step]["loss"] == pytest.approx(record["loss"], rel=1e-8), step
        assert curve[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-6), step


def _start(name, command, log, **environment):
    with log.open("w") as file:
        environment = {**os.environ, **environment}
        inside = ["ip", "netns", "exec", name, *command]
        return subprocess.Popen(inside, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _start_on_both(hosts, logs, work, *arguments, dp=2):
    started = []
    for n, (name, address, interface) in enumerate(hosts):
        own = [f"torchrun.is_host={str(n == 0).lower()}", f"torchrun.local_addr={address}"]
        own += [f"torchrun.interface={interface}", "torchrun.nodes=2", f"torchrun.endpoint={hosts[0][1]}:29400"]
        command = [*COMMAND, work, *arguments, "launcher=torchrun", *own, "--cp", "2", "--dp", str(dp)]
        started.append(_start(name, command, logs[n]))
    return started


@pytest.mark.parametrize("dp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_hosts_train_like_one_go_on_after_a_rank_is_killed_and_save_after_a_signal_to_one(tmp_path, hosts, dp):
    path = str(tiny_yaml(tmp_path))

    run, logs = tmp_path / "run", [tmp_path / f"{name}.log" for name, _, _ in hosts]
    agents, said = [], lambda: "\n".join(log.read_text() for log in logs)
    try:
        agents += _start_on_both(hosts, logs, "train", path, *OPTIONS, "steps=100000", dp=dp)
        _wait_for(lambda: last_step(run) > EVERY and 2 <= last_step(run) % EVERY <= 6, agents)
        (agent,) = children(agents[1].pid)
        os.kill(children(agent)[-1], signal.SIGKILL)
        before = _curve(run)
        _wait_for(lambda: "resumed at step" in said() and last_step(run) > max(before), agents)
        agents[1].send_signal(signal.SIGTERM)
        assert [process.wait(180) for process in agents] == [0, 0], said()
    finally:
        for process in agents:
            kill_tree(process.pid)
            process.wait()

    assert f"dp {dp} x cp 2 = {2 * dp}" in said() and "stopped at step" in said() and has_saved(run), said()
    _assert_like_one_process(path, run)
    curve = _curve(run)
    again = [step for step in before if before[step]["seconds"] != curve[step]["seconds"]]
    assert len(again) > 1 and again[0] % EVERY == 1, again
    for step in again:  # the same numbers, to the last bit
        assert [before[step][key] for key in ("loss", "grad_norm")] == [curve[step][k] for k in ("loss", "grad_norm")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_are_examined_and_a_signal_to_one_saves_on_both(tmp_path, hosts):
    path, logs = str(tiny_yaml(tmp_path)), [tmp_path / f"{name}.log" for name, _, _ in hosts]
    started = []
    try:
        started += _start_on_both(hosts, logs, "doctor", path)
        assert [process.wait(200) for process in started] == [0, 0], "\n".join(log.read_text() for log in logs)
        text = logs[0].read_text() + logs[1].read_text()
        assert "world (4 ranks)" in text and "dp (2 ranks)" in text and "nothing is wrong" in text, text
        assert "rank 3  " in text and "4 rank(s): yes" in text, text

        started += _start_on_both(hosts, logs, "train", path, "steps=100000", "checkpoint.every=null")
        _wait_for(lambda: last_step(tmp_path / "run") >= 3, started[2:])
        started[3].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in started[2:]] == [0, 0], "\n".join(log.read_text() for log in logs)
    finally:
        for process in started:
            kill_tree(process.pid)
            process.wait()
    assert has_saved(tmp_path / "run") and "stopped at step" in logs[0].read_text() + logs[1].read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_of_a_ray_cluster_train_like_one(tmp_path, hosts):
    pytest.importorskip("ray")
    path, run = str(tiny_yaml(tmp_path)), tmp_path / "run"
    (head, address, _), (other, second, _) = hosts
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2"]
    ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
    (tmp_path / "token").write_text(secrets.token_hex(32))  # all nodes of a cluster share one
    own_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    logs = [tmp_path / name for name in ("head.log", "other.log", "train.log")]
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        own = [f"--node-ip-address={address}", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
        started = [_start(head, [*ray, "--head", *own], logs[0], **own_token)]
        try:
            _wait_for(lambda: "Ray runtime started" in logs[0].read_text(), started)
            joins = [f"--address={address}:6379", f"--node-ip-address={second}"]
            started.append(_start(other, [*ray, *joins], logs[1], **own_token))
            _wait_for(lambda: "Ray runtime started" in logs[1].read_text(), started)
            command = [*COMMAND, "train", path, "launcher=ray", f"ray.address={address}:6379", *OPTIONS]
            command += [f"steps={STEPS}"]
            started.append(_start(head, [*command, "--cp", "2", "--dp", "2"], logs[2], **own_token))
            assert started[-1].wait(300) == 0, "\n".join(log.read_text() for log in logs)
        finally:
            for process in started:
                kill_tree(process.pid)
                process.wait()
    text = " ".join(logs[2].read_text().split())
    assert f"({address})" in text and f"({second})" in text and "dp 2 x cp 2 = 4" in text, text
    _assert_like_one_process(path, run)

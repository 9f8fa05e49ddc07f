"""Who owns a run directory: one run at a time, and a restarted job goes on from its own checkpoints only."""

import contextlib
import fcntl
import re
import socket
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from lasp.comm import CommError
from lasp.launch.config.schema import load_config
from lasp.launch.launchers import local
from lasp.launch.run import rendezvous, run_dir
from lasp.launch.run.rendezvous import Job, open_store, process_group
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import forked, run_main, tiny_yaml, wait_until


def _steps(folder):
    return [record["step"] for record in read_metrics(folder)]


@pytest.fixture
def attempt(monkeypatch):
    """``attempt(n)`` makes this process the one rank of the n-th attempt of a torchrun job, whose agent is the test."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }

    def start(number):
        for name, value in (environment | {"TORCHELASTIC_RESTART_COUNT": str(number)}).items():
            monkeypatch.setenv(name, value)

    yield start
    del agent


@pytest.mark.parametrize("resume", ["false", "{older}"])
def test_a_job_that_died_before_it_began_does_not_go_on_from_older_checkpoints(tmp_path, attempt, resume):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    older = tmp_path / "older"
    train(load_config(path, [f"run_dir={older}", "steps=2"]))
    train(load_config(path, ["steps=4"]))  # of an earlier job
    attempt(1)  # attempt 0 never came so far
    train(load_config(path, ["steps=6", f"checkpoint.resume={resume.format(older=older)}"]))
    assert _steps(run / "previous-1") == [1, 2, 3, 4]
    assert _steps(run) == ([1, 2, 3, 4, 5, 6] if resume == "false" else [3, 4, 5, 6])


@pytest.mark.parametrize("resume", ["false", "{older}"])
def test_a_restarted_job_goes_on_from_its_own_checkpoints(tmp_path, attempt, resume, monkeypatch):
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    older = tmp_path / "older"
    train(load_config(path, [f"run_dir={older}", "steps=2"]))
    overrides = ["steps=6", f"checkpoint.resume={resume.format(older=older)}"]
    attempt(0)
    with monkeypatch.context() as dying:
        save = Saver.save

        def save_and_die(self, step, *args):
            save(self, step, *args)
            if step == 4:
                self.wait()
                raise KeyboardInterrupt

        dying.setattr(Saver, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(path, overrides))
    first = {record["step"]: record["seconds"] for record in read_metrics(run)}
    attempt(1)
    train(load_config(path, overrides))
    again = {record["step"]: record["seconds"] for record in read_metrics(run)}
    assert max(first) == 4 and max(again) == 6 and again.items() > first.items()
    assert not list(run.glob("previous-*"))


def test_a_restart_without_the_launchers_store_is_refused_where_it_must_choose(tmp_path, attempt, monkeypatch):
    attempt(1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    with pytest.raises(ValueError, match=r"checkpoint\.resume=False in a restarted job needs .* use resume=true"):
        train(load_config(tiny_yaml(tmp_path), ["checkpoint.resume=false"]))
    train(load_config(tiny_yaml(tmp_path), ["steps=2"]))


def test_an_environment_that_is_no_job_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"WORLD_SIZE must be a whole number .*got 'two'\. Start with torchrun"):
        Job.from_environment({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match="MASTER_PORT is not"):
        Job.from_environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="MASTER_PORT must be below 65536, got 99999"):
        Job.from_environment({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"})
    assert Job.from_environment({"RANK": "0"}) is None


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"rank 0 of 3 waited at 127\.0\.0\.1:PORT for timeout_s = 0\.2 s, and rank\(s\) \[1, 2\] did not come\. "),
        (2, r"rank 2 of 3 cannot reach the job's store at 127\.0\.0\.1:PORT, which rank 0 opens, .* 0\.2 s \(Conn"),
    ],
)
def test_ranks_that_do_not_come_are_named(free_port, rank, message):
    job = Job(rank=rank, world_size=3, port=free_port)
    meeting = process_group(job, torch.device("cpu"), timedelta(seconds=0.2))
    with pytest.raises(CommError, match=message.replace("PORT", str(free_port))), meeting:
        pytest.fail("nobody else came")


def test_a_server_that_is_no_store_is_refused(monkeypatch):
    """It takes the connection and never says a word: torch's client would wait for it for ever."""
    monkeypatch.setattr(rendezvous, "_FOREIGN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sentence = f"who listens at 127.0.0.1:{port} has not answered for 0.5 s and is no store. Choose another MASTER"
        with pytest.raises(CommError, match=re.escape(sentence)):
            Job(rank=1, world_size=2, port=port).store(timedelta(seconds=5))


def test_the_local_launchers_store_is_out_of_reach_of_other_machines():
    store = open_store()
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split()[1:4] for table in tables for line in table]
    listening = [local for local, _, state in sockets if state == "0A" and local.endswith(f":{store.port:04X}")]
    assert listening == [f"0100007F:{store.port:04X}"]
    Job(rank=1, world_size=2, port=store.port).store(timedelta(seconds=10)).set("key", "value")
    assert store.get("key") == b"value"


def test_a_job_that_does_not_come_together_ends_with_one_sentence(tmp_path, monkeypatch, capsys, free_port):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_main(monkeypatch, "train", tiny_yaml(tmp_path), "timeout_s=1") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: rank 0 of 2 waited") and error.count("\n") == 1 and "rank(s) [1]" in error, error


def test_a_second_run_in_a_directory_is_refused_and_a_killed_one_leaves_it_free(tmp_path):
    path = tiny_yaml(tmp_path)

    def hold():
        with run_dir.locked(tmp_path / "run", Mesh.build()):
            print("holds")
            time.sleep(300)

    with forked(hold, tmp_path / "output") as holder:
        wait_until(lambda: "holds" in (tmp_path / "output").read_text(), holder, tmp_path / "output")
        with pytest.raises(ValueError, match=rf"must hold one run at a time, but process {holder.pid} on \S+ trains"):
            train(load_config(path, ["steps=2"]))
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]
    train(load_config(path, ["steps=2"]))  # killed by then
    train(load_config(path, ["steps=3"]))  # an ended run leaves it free as well
    assert _steps(tmp_path / "run") == [1, 2, 3]


def test_a_restarted_run_waits_for_the_end_of_its_last_attempt(tmp_path):
    with contextlib.ExitStack() as last, (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ending = threading.Timer(0.4, fcntl.flock, (file, fcntl.LOCK_UN))
        last.callback(ending.join)
        ending.start()
        with (
            pytest.raises(ValueError, match="must hold one run at a time"),
            run_dir.locked(tmp_path, Mesh.build(), 0.01),
        ):
            pytest.fail("it is held")
        with run_dir.locked(tmp_path, Mesh.build(), 30.0):
            pass  # without a refusal


def _lock_twice(group, folder):
    mesh = Mesh.build(2, 1, group)
    with run_dir.locked(folder, mesh):
        try:
            with run_dir.locked(folder, mesh):
                return "both"
        except ValueError as error:
            return str(error)


def test_every_rank_learns_that_the_directory_is_taken(ranks, tmp_path):
    for message in ranks.run(_lock_twice, tmp_path, size=2):
        assert "must hold one run at a time" in message and "choose another run_dir=" in message


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    import errno

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_dir.locked(tmp_path / "run", Mesh.build()):
        assert (tmp_path / "run" / ".lock").exists()


def test_a_rank_that_finds_its_launcher_gone_ends(tmp_path):
    store = open_store()
    gone = subprocess.Popen(["true"])
    gone.wait(30)
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with forked(local._child, tmp_path / "output", **job, LASP_PARENT=str(gone.pid)) as rank:
        rank.join(60)
        assert rank.exitcode == 1 and not store.check(["lasp/error/0"])  # it waited for no task

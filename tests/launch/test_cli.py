import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from lasp.launch.cli import cli, main
from lasp.launch.data.token_files import TokenFile
from lasp.launch.launchers import local
from lasp.launch.run.rendezvous import Job, open_store, report_error
from lasp.launch.run.report import read_metrics
from lasp.launch.run.signals import blocked
from lasp.launch.train import train
from tests.launch.helpers import COMMAND, forked_main, last_step, once, run_main, tiny_config, tiny_yaml, wait_until


def _children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def _ranks(pid):
    """The processes of the ranks that process ``pid`` has started."""
    found = []
    for child in _children(pid):
        with contextlib.suppress(OSError):
            if "lasp.launch.launchers.local" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
    return found


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_local_ranks_train_like_one_and_a_signal_saves(tmp_path, monkeypatch, capfd):
    """In float64: training amplifies the rounding of float32 to 1e-3 in 40 steps, and so float64's to 1e-11."""
    path, run = tiny_yaml(tmp_path), tmp_path / "run"
    same = ["dtype=float64", "optimizer.min_lr=0.01"]  # a rate that does not depend on where a run ends
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should the signal come when the job is over
    try:
        with once(lambda: last_step(run) >= 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            code = run_main(monkeypatch, "train", path, *same, "steps=100000", "checkpoint.every=1000", "--cp", "2")
    finally:
        signal.signal(signal.SIGTERM, before)
    output = capfd.readouterr().out
    assert code == 0, output
    assert "dp 1 x cp 2 = 2" in output and "stopped at step" in output and "summary" in output, output
    records = read_metrics(run)[:12]
    assert len(records) >= 2
    train(tiny_config(tmp_path, *same, f"run_dir={tmp_path}/alone", f"steps={len(records)}"))
    for record, expected in zip(records, read_metrics(tmp_path / "alone"), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero3"])
def test_a_rank_that_stops_is_named_in_one_sentence(tmp_path, engine):
    process = subprocess.Popen(
        [*COMMAND, "train", str(tiny_yaml(tmp_path)), "steps=100000", "timeout_s=15", f"engine={engine}", "--cp", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if re.match(r"step +2/", line):
            break
    os.kill(max(_children(process.pid)), signal.SIGSTOP)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in rest, rest
    sentence = r"^error: rank 1 \(host \S+\) is stopped, .* rank 0 waits in collective \d+ \(.*\) since \d"
    assert re.search(sentence, rest, re.M), rest


def test_ranks_end_when_their_launcher_is_killed_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "tmp").mkdir()
    arguments = ["train", tiny_yaml(tmp_path), "steps=100000", "--cp", "2"]
    with forked_main(arguments, tmp_path / "output", TMPDIR=str(tmp_path / "tmp")) as launcher:
        wait_until(lambda: last_step(tmp_path / "run"), launcher, tmp_path / "output")
        ranks = _ranks(launcher.pid)
        launcher.kill()
        deadline = time.monotonic() + 60
        while any(map(_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(ranks) == 2 and not any(map(_alive, ranks))
    assert not list((tmp_path / "tmp").glob("lasp-*"))


def test_a_rank_that_fails_shows_its_own_error_once(tmp_path, monkeypatch, capfd):
    assert run_main(monkeypatch, "train", tiny_yaml(tmp_path), "model.vocab_size=100", "--cp", "2") == 1
    error = capfd.readouterr().err
    assert error.count("model.vocab_size is 100") == 1 and "Traceback" not in error, error
    assert not _ranks(os.getpid())


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_ranks_that_fail_one_second_apart_the_earlier_is_shown(monkeypatch, first):
    """The other one is its victim; a rank without a report is no cause."""
    store = open_store()
    for rank, second in ((first, 100.0), (1 - first, 101.0)):
        monkeypatch.setattr("time.time", lambda second=second: second)
        job = Job(rank=rank, world_size=3, port=store.port)
        report_error(store, job, f"rank {rank} has no data.", "its traceback", expected=True)
    failure = local.explain_failure([1, 1, 1], store)
    assert str(failure) == f"rank {first} has no data." and failure.details == "its traceback"


def test_errors_are_one_clean_message(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "train", tiny_yaml(tmp_path), "stepz=3") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: override 'stepz=3': unknown key stepz") and "Traceback" not in error
    assert run_main(monkeypatch, "train") == 2
    monkeypatch.setattr(sys, "argv", ["lasp", "train", str(tiny_yaml(tmp_path)), "stepz=3", "--debug"])
    with pytest.raises(ValueError, match="unknown key stepz"):
        main()


def test_an_interrupted_job_ends_as_the_shell_expects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local, "_wait", lambda ranks: os.kill(os.getpid(), signal.SIGINT) or [-signal.SIGTERM] * 2)
    assert run_main(monkeypatch, "train", tiny_yaml(tmp_path), "--cp", "2") == 130
    assert capsys.readouterr().err.startswith("error: interrupted; not every rank could save its place.")


def test_the_ranks_hear_an_interrupt_from_the_launcher_alone():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with blocked([signal.SIGINT]):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n" and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_prepare_train_inspect_generate(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for n in range(30):
        (source / f"{n}.py").write_text(f"x = {n}\n" * 9)
    (source / "notes.txt").write_text("left out")
    run = CliRunner().invoke
    prefix = str(tmp_path / "out of the way")
    done = run(cli, ["data", "prepare", str(source), "--output", prefix, "--glob", "*.py"])
    assert done.exit_code == 0 and "30 documents" in done.output
    overrides = shlex.split(done.output.partition("train on it with ")[2])
    assert overrides == [f"data.source={prefix}", "data.tokenizer=bytes"]
    assert len(TokenFile(prefix)) == 30
    path = str(tiny_yaml(tmp_path))
    done = run(cli, ["train", path, f"data.source={prefix}", "steps=2", "log.tensorboard=true"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    done = run(cli, ["checkpoint", "inspect", str(tmp_path / "run")])
    assert done.exit_code == 0 and "step-00000002: good" in done.output and "embed.weight" in done.output
    arguments = ["generate", str(tmp_path / "run"), "--prompt", "x =", "--max-new-tokens", "5", "--seed", "3"]
    first, second = run(cli, arguments), run(cli, arguments)
    assert first.exit_code == 0 and first.output.startswith("x =") and first.output == second.output


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "lasp.launch.cli", "train", str(tiny_yaml(tmp_path)), "--cp", "2"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "steps=60"], stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "step-00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(max(_children(process.pid)), signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert "resumed at step" in log.read_text()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 61))

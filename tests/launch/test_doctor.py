"""``lasp doctor`` says what is wrong, and nothing where nothing is."""

import contextlib
import io
import os
from collections import namedtuple
from unittest import mock

import pytest
import torch

from lasp.launch.config.schema import load_config
from lasp.launch.doctor import examine as doctor
from lasp.launch.doctor import machine
from lasp.launch.doctor.examine import Findings
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import forked_main, run_main, tiny_config, tiny_yaml

Usage = namedtuple("Usage", "total used free")


def test_a_sound_machine_has_nothing_wrong(monkeypatch, capsys):
    assert run_main(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    assert "nothing is wrong" in out and torch.__version__ in out and "/dev/shm" in out and "open files" in out
    assert run_main(monkeypatch, "doctor", "--cp", "2") == 1
    assert "--cp has no effect without CONFIG" in capsys.readouterr().err


def test_ranks_under_torchrun_are_examined_together(tmp_path):
    arguments = ["doctor", tiny_yaml(tmp_path), "launcher=torchrun", "layout=zigzag", "--cp", "2"]
    with forked_main(arguments, tmp_path / "output") as job:
        job.join(250)
    text = (tmp_path / "output").read_text()
    assert job.exitcode == 0, text
    assert "torch.distributed.run --nnodes 1 --nproc-per-node 2 --max-restarts 0 " in text and " doctor " in text
    assert "0" * 16 + "1" * 32 + "0" * 16 + "  zigzag, by cp_rank" in text
    assert "dp 0 cp 1" in text and "[16, 32), [32, 48)" in text and "2 rank(s): yes" in text
    for name in ("world (2 ranks)", "cp (2 ranks)"):
        (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
        assert line.count("GB/s") == 3 and "16 MiB" in line, line
    assert "linear layers   torch: Triton needs a CUDA device" in text and "softmax layers  flash_cpu" in text
    assert "rank 1  " in text and " ms " in text and "nothing is wrong" in text


def test_what_is_wrong_ends_with_exit_code_1_and_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert run_main(monkeypatch, "doctor", tiny_yaml(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert "nothing is wrong" not in out
    assert "NCCL_SOCKET_IFNAME=nosuch0, and" in out and "Set torchrun.interface" in out
    assert err == "error: doctor: 1 problem(s), with their remedies in the report above.\n"


def _examined(group, path):
    """What doctor says on this rank, and how it ends, where the last rank alone has a fault."""
    fault = {"NCCL_SOCKET_IFNAME": "nosuch0"} if group.rank() == 3 else {}
    try:
        with (
            mock.patch.dict(os.environ, fault),
            mock.patch.object(doctor, "process_group", lambda *_: contextlib.nullcontext()),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            doctor.examine(load_config(path, ["cp=4"]))
    except ValueError as error:
        return out.getvalue(), str(error)


def test_a_fault_of_one_rank_ends_every_rank(ranks, tmp_path):
    (report, first), *others = ranks.run(_examined, tiny_yaml(tmp_path), size=4)
    assert "NCCL_SOCKET_IFNAME=nosuch0, and" in report and first.startswith("doctor: 1 problem(s)")
    assert others == [("", first)] * 3


def _skews(group, ahead):
    rank = torch.distributed.get_rank(group)
    with mock.patch.object(doctor, "_now", lambda now=doctor._now: now() + (ahead if rank == 2 else 0)):
        return doctor.clock_skews(Mesh.build(1, group=group))


def test_a_clock_that_is_ahead_is_measured_and_named(ranks):
    for skews in ranks.run(_skews, 5.0, size=3):
        assert abs(skews[2] - 5) < 0.5 and abs(skews[1]) < 0.5 and skews[0] == 0
    (problem,) = doctor._skew_problems(skews, ["a", "a", "b"])
    assert problem.startswith("the clock of b is +5.0 s off rank 0's (a)") and "NTP" in problem


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda p: machine.shared_memory(4, True, p),
            "/dev/shm has 64 MiB free, .* Start the container with --shm-size",
        ),
        (
            lambda p: machine.disk(machine.Path("/tmp/x/y"), 10**12, p),
            r"/tmp has 0\.06 GiB free, and .* take 931\.32 GiB",
        ),
        (
            lambda p: machine.limits(10**9, False, p),
            "ulimit -n is .*, and 1000000000 ranks want 8000000064 per process",
        ),
        (lambda p: machine.devices("cuda", 99, p), r"device=cuda, and .* device\(s\) for 99 rank\(s\)"),
    ],
)
def test_each_want_is_a_sentence(monkeypatch, check, message):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(2**30, 0, 64 * 2**20))
    problems = []
    check(problems)
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(problems))


def test_a_host_name_that_others_cannot_reach_is_named(monkeypatch):
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.1.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    problems = []
    machine.network(1, problems)
    assert not problems
    machine.network(2, problems)
    assert "127.0.1.1, which other machines cannot reach" in problems[0]


def test_checkpoints_are_counted_as_they_are_kept(tmp_path):
    config = tiny_config(tmp_path)  # every 2 of 6 steps, keep 3
    one = 3 * 4 * 12784
    assert doctor.checkpoint_bytes(config) == 4 * one
    wide = load_config(tiny_yaml(tmp_path), ["dtype=float64", "checkpoint.keep=null", "checkpoint.every=null"])
    assert doctor.checkpoint_bytes(wide) == 2 * 2 * one


def test_sequences_across_machines_are_said():
    rows = doctor.drawing(
        "contiguous", 64, 2, [("a", "cpu", 0, 0), ("b", "cpu", 0, 1), ("b", "cpu", 1, 0), ("b", "cpu", 1, 1)]
    )
    assert rows["layout"]["across machines"].startswith("the sequences of dp rank(s) 0:")
    many = doctor.drawing("contiguous", 64, 2, [("a", "cpu", n // 2, n % 2) for n in range(64)])["layout"]
    assert many["..."] == "and 32 more ranks" and "rank 31" in many and "rank 32" not in many


def test_problems_are_counted_once_per_machine(capsys):
    found = Findings({"devices": {"CPU": "2"}}, ["is old. Buy another."])
    assert doctor.report([("a", found), ("b", Findings())], Findings()) == 1
    assert "problem: a: is old. Buy another." in capsys.readouterr().out

"""Ranks that differ are named before the first step, by rank, host, key and both values."""

import contextlib
import dataclasses
import os
import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lasp.cost.fabric import Fabric, Link
from lasp.launch.config.schema import load_config
from lasp.launch.run import preflight
from lasp.launch.run.preflight import check_model, check_ranks, checksum, difference
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import forked_main, tiny_yaml

CPU = torch.device("cpu")
HOSTS = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([3e-4, 3e-4, 3e-4, 1e-3], "rank 3 (host b) has optimizer.lr = 0.001, ranks 0-2 have 0.0003. All ranks"),
        ([1, 2, 2, 1], "ranks 1-2 (hosts a, b) have optimizer.lr = 2, ranks 0, 3 have 1."),
        ([1, 1, 2, 3], "rank 2 (host b) has optimizer.lr = 2, rank 3 (host b) has 3, ranks 0-1 have 1."),
        ([None, True, None, None], "rank 1 (host a) has optimizer.lr = true, ranks 0, 2-3 have null."),
    ],
)
def test_the_rank_that_differs_is_named_with_both_values(values, sentence):
    message = difference([{"seed": 0, "optimizer.lr": value} for value in values], HOSTS)
    assert message.startswith(sentence) and message.endswith("Start every rank with the same file and overrides.")


def test_a_difference_has_its_remedy_and_no_difference_has_none():
    own = {"seed": 0, "version of torch": "2.13", "kind of device": "cpu"}
    assert difference([own, dict(own)], HOSTS) is None
    message = difference([own, own | {"version of torch": "2.12"}], HOSTS)
    assert message.startswith("rank 1 (host a) has version of torch = 2.12, rank 0 has 2.13.")
    assert message.endswith("Install the same code on every node.")
    assert "the same code, file and overrides" in difference([own, own | {"seed": 1, "version of torch": "2"}], HOSTS)
    assert "device= to what every node has" in difference([own, own | {"kind of device": "cuda"}], HOSTS)
    assert "rank 1 (host a) has seed = nothing" in difference([own, {}], HOSTS)
    many = difference([{f"k{n}": 0 for n in range(9)}, {f"k{n}": 1 for n in range(9)}], HOSTS)
    assert many.count(" = ") == 4 and "; and 5 more differ." in many


def test_a_checksum_sees_one_bit_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        x = torch.arange(99).to(dtype)
        y = x.clone()
        assert checksum(x) == checksum(y.t() if y.dim() > 1 else y)
        y[7] = 6
        assert checksum(x) != checksum(y)


def _config(folder, *overrides):
    return load_config(folder / "tiny.yaml", list(overrides))


def _refusals(group, folder):
    """What each way to differ makes this rank say, by name."""
    rank, said = dist.get_rank(), {}

    def refused(name, check, *arguments):
        try:
            check(*arguments)
            said[name] = None
        except ValueError as error:
            said[name] = str(error)

    config = _config(folder)
    refused("equal", check_ranks, config, CPU)
    said["left"] = [path.name for path in config.run_dir.iterdir()]
    refused("lr", check_ranks, _config(folder, f"optimizer.lr={0.001 if rank == 3 else 0.01}"), CPU)
    refused("node", check_ranks, _config(folder, "launcher=torchrun", f"torchrun.max_restarts={rank}"), CPU)
    with mock.patch.object(preflight, "source_digest", lambda: f"hash{rank // 2}"):
        refused("code", check_ranks, config, CPU)

    here = os.getcwd()
    (folder / f"node{rank // 2}").mkdir(exist_ok=True)
    os.chdir(folder / f"node{rank // 2}")  # one path, and another folder for ranks 2 and 3
    elsewhere = _config(folder, "run_dir=/proc/self/cwd/run", "timeout_s=2")
    refused("run_dir", check_ranks, elsewhere, CPU)
    link = Link(1e-6, 1e9 * (1 + rank // 2))
    if rank % 2 == 0:
        Fabric("rack", link, link, 1, 0.0, "made up").save("rack.json")
    dist.barrier(group)
    measured = _config(folder, "exchange=all_scan", "fabric=/proc/self/cwd/rack.json")
    refused("fabric", check_ranks, measured, CPU)
    os.chdir(here)

    mesh = Mesh.build(2, 2)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    refused("model", check_model, model, mesh)
    if rank == 2:
        with torch.no_grad():
            model[1].weight[0, 0] = 0.50001
    refused("weight", check_model, model, mesh)
    refused("shape", check_model, nn.Linear(3, 2 + (rank == 1), bias=False), mesh)
    mixed = dataclasses.replace(mesh, cp_rank=1 - mesh.cp_rank) if rank > 1 else mesh
    refused("place", check_model, model, mixed)
    swapped = dataclasses.replace(mesh, cp_group=mesh.dp_group, cp_rank=mesh.dp_rank) if rank == 3 else mesh
    refused("group", check_model, model, swapped)
    return said


def test_every_rank_says_what_differs(ranks, tmp_path):
    tiny_yaml(tmp_path)
    said, *others = ranks.run(_refusals, tmp_path, size=4)
    host = socket.gethostname()
    assert all(other == said | {"left": other["left"]} for other in others)
    assert said["equal"] is said["node"] is said["model"] is None and said["left"] == []
    assert said["lr"].startswith(f"rank 3 (host {host}) has optimizer.lr = 0.001, ranks 0-2 have 0.01.")
    assert said["code"].startswith(f"ranks 2-3 (host {host}) have source code of lasp = hash1, ranks 0-1 have hash0.")
    assert "run_dir /proc/self/cwd/run must be one folder for all ranks, but ranks 2-3 (on" in said["run_dir"]
    assert "did not find a file that rank 0" in said["run_dir"] and "within 1 s" in said["run_dir"]
    assert f"ranks 2-3 (host {host}) have links of fabric: within.bytes_per_s = 2000000000.0, ranks" in said["fabric"]
    assert f"rank 2 (host {host}) has initial parameter 1.weight = bits 0x" in said["weight"]
    assert said["weight"].count(" = ") == 1 and "The same seed must give the same model" in said["weight"]
    assert f"rank 1 (host {host}) has shape of the model = " in said["shape"]
    assert said["place"].startswith("rank 2 has cp_rank 1 in a cp_group of ranks [2, 3].")
    assert said["group"].startswith("rank 2 has a cp_group of ranks [2, 3], rank 3 one of [1, 3].")
    assert not list((tmp_path / "node0" / "run").iterdir())


def test_ranks_with_different_sizes_end_at_once_with_one_sentence(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path, outputs = tiny_yaml(tmp_path), [tmp_path / "rank0", tmp_path / "rank1"]
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                forked_main(["train", path, "timeout_s=100", "--cp", 1 + rank], outputs[rank], **job, RANK=str(rank))
            )
            for rank in range(2)
        ]
        for process, output in zip(ranks, outputs):
            process.join(100)
            error = output.read_text()
            assert process.exitcode == 1 and error.count("\n") == 1, error
            assert f"error: rank 1 (host {socket.gethostname()}) has cp_size = 2, rank 0 has 1." in error
    assert not (tmp_path / "run").exists()

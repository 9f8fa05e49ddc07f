"""One run in three parts, each with another engine and another mesh: the curve and the tokens of one process."""

from unittest import mock

import pytest
import torch

from lasp.launch.config.schema import load_config
from lasp.launch.data.stream import DataPlan
from lasp.launch.train import train
from lasp.parallel.checkpoints import checkpoint as checkpoints
from tests.harness import RankPool
from tests.launch.helpers import train_on_ranks
from tests.launch.test_curve import check, curve
from tests.launch.test_engines import STEPS, _config

PARTS = [(8, "ddp", 4, 1), (14, "fsdp2", 2, 2), (STEPS, "zero2", 1, 2)]  # last step, engine, cp, dp


def _consumed(path, overrides, start):
    """What ``start(path, overrides)`` trained on: this rank's tokens in the order of its steps, and their places."""
    seen = []
    step_batches = DataPlan.step_batches

    def recorded(plan, stream, first_token, mesh):
        batches = step_batches(plan, stream, first_token, mesh)
        for m, batch in enumerate(batches):
            begin = first_token + (m * mesh.dp_size + mesh.dp_rank) * plan.seq_len
            places = batch.cp.layout.shard(torch.arange(plan.seq_len)[None], mesh.cp_rank)[0] + begin
            seen.append((places, batch.tokens[0].clone()))
        return batches

    with mock.patch.object(DataPlan, "step_batches", recorded):
        start(path, overrides)
    return torch.cat([places for places, _ in seen]), torch.cat([tokens for _, tokens in seen])


def _consumed_on_rank(group, path, overrides):
    return _consumed(path, overrides, lambda *arguments: train_on_ranks(group, *arguments))


def _stream(parts):
    """The tokens of a run by their places, each of which was met once."""
    places = torch.cat([places for places, _ in parts])
    tokens = torch.cat([tokens for _, tokens in parts])
    order = places.argsort()
    assert torch.equal(places[order], torch.arange(len(places)))  # none twice, none left out
    return tokens[order]


@pytest.fixture
def pair():
    """Two ranks that are a job of their own: DeepSpeed waits for all ranks there are."""
    pytest.importorskip("deepspeed")
    pool = RankPool(2)
    yield pool
    pool.close()


def test_three_shapes_and_three_engines_learn_what_one_process_learns(ranks, pair, tmp_path):
    constant = ["optimizer.min_lr=1.0e-3", "layout=zigzag"]  # a rate that does not depend on where a part ends
    path = _config(tmp_path / "alone")
    expected = _consumed(path, constant, lambda path, overrides: train(load_config(path, overrides)))
    path, parts = _config(tmp_path / "parts"), []
    for last, engine, cp, dp in PARTS:
        overrides = [*constant, f"engine={engine}", f"cp={cp}", f"dp={dp}", f"steps={last}"]
        pool = pair if cp * dp == 2 else ranks
        parts += pool.run(_consumed_on_rank, path, overrides, size=cp * dp)
        assert checkpoints.load_newest(tmp_path / "parts/run/checkpoints", pytest.fail).step == last
    assert torch.equal(_stream(parts), _stream([expected]))
    check(curve(tmp_path / "parts/run"), curve(tmp_path / "alone/run"), range(1, STEPS + 1), 1e-5, evaluations=1)

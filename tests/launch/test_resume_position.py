"""A resumed run reads on where the last one stopped, whatever its batch is, and draws the numbers that follow."""

import shutil
from unittest import mock

import pytest
import torch

from lasp.launch.data.stream import DataPlan
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from tests.launch.helpers import tiny_config

STEP = "checkpoints/step-00000002"  # of steps of 2 sequences of 64 tokens: 256 tokens were read
LEAN = ["eval.every=100", "log.sample_tokens=0"]


def _followed(config):
    """Train: the tokens that were read, in order, and the random state of each step, in which a number is drawn."""
    tokens, states = [], []
    step_batches = DataPlan.step_batches

    def recorded(plan, stream, first_token, mesh):
        batches = step_batches(plan, stream, first_token, mesh)
        tokens.extend(batch.tokens[0].clone() for batch in batches)
        torch.rand(1)  # as a layer with dropout would
        states.append(torch.get_rng_state())
        return batches

    with mock.patch.object(DataPlan, "step_batches", recorded):
        train(config)
    return torch.cat(tokens), torch.stack(states)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of five steps without a break: its folder, what it read and its random states."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), "steps=5", *LEAN)
    return config.run_dir, *_followed(config)


@pytest.mark.parametrize("changed", ["", "data.batch_size=3 data.seq_len=50", "data.seq_len=100"])
def test_a_resumed_run_reads_the_tokens_that_follow_in_batches_of_any_shape(tmp_path, whole, changed):
    run_dir, tokens, states = whole
    shutil.copytree(run_dir / STEP, tmp_path / "run" / STEP)
    read, states_again = _followed(tiny_config(tmp_path, "steps=3", *LEAN, *changed.split()))
    assert len(read) >= 128
    assert torch.equal(read, tokens[256 : 256 + len(read)])
    assert torch.equal(states_again, states[2:3]), "the random state"


def test_batches_that_change_twice_leave_no_token_out(tmp_path, whole):
    """The position is a count of tokens: what a step of the first or of the last batch holds does not give it."""
    run_dir, tokens, states = whole
    shutil.copytree(run_dir / STEP, tmp_path / "run" / STEP)
    first, states_first = _followed(tiny_config(tmp_path, "steps=4", *LEAN, "data.batch_size=1"))
    second, states_second = _followed(tiny_config(tmp_path, "steps=5", *LEAN, "data.seq_len=32"))
    assert torch.equal(torch.cat([first, second]), tokens[256 : 256 + 2 * 64 + 2 * 32])
    assert torch.equal(torch.cat([states_first, states_second]), states[2:5]), "the random state"
    assert [record["tokens"] for record in read_metrics(tmp_path / "run")] == [320, 384, 448]

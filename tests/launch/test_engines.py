"""Eight steps of every engine on two sequences in flight over two ranks each: what one process learns."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

from lasp.launch.config.schema import load_config
from lasp.launch.data.stream import DataPlan
from lasp.launch.run.backends import make_engine
from lasp.parallel.checkpoints import checkpoint as checkpoints
from lasp.parallel.mesh import Mesh
from tests.launch.curves import apart, check, curve
from tests.launch.helpers import tiny_yaml, train_on_ranks
from tests.rounding import bound

STEPS = 8
HALFWAY = "checkpoints/step-00000004"
SETTINGS = {
    "steps": STEPS,
    # a rate that does not depend on where a run ends, eps of the gradients' size: tests.rounding
    "optimizer": {"lr": 1.0e-2, "min_lr": 1.0e-2, "warmup_steps": 2, "clip": 0.5, "eps": 1.0e-3},
    "eval": {"every": 4, "sequences": 3},  # over two dp ranks: one has none in the last round
    "checkpoint": {"every": 4, "keep": 3},
    "log": {"every_s": 0, "tensorboard": False, "sample_tokens": 0},
    "model": {"dim": 32, "num_layers": 3, "pattern": "SLL", "heads": 2, "mixer": {"preset": "linear", "conv_width": 4}},
}


def _config(folder):
    folder.mkdir()
    data = {"source": str(folder / "text"), "seq_len": 128, "batch_size": 4, "eval_fraction": 0.1}
    return tiny_yaml(folder, data=data, **SETTINGS)


def _consumed_on_rank(group, path, overrides):
    """What this rank trained on: its tokens in the order of its steps, and their places."""
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
        train_on_ranks(group, path, overrides)
    return torch.cat([places for places, _ in seen]), torch.cat([tokens for _, tokens in seen])


class Alone:
    """One process: its curve in float64, what it trained on, its run in float32 and how far that curve is off."""

    def __init__(self, ranks, folder):
        path = _config(folder)
        ranks.run(train_on_ranks, path, ["dtype=float64"], size=1)
        self.curve, self.run_dir = curve(folder / "run"), folder / "narrow"
        (self.consumed,) = ranks.run(_consumed_on_rank, path, [f"run_dir={self.run_dir}"], size=1)
        self.own_error = apart(curve(self.run_dir), self.curve)
        assert self.curve[1]["grad_norm"] > SETTINGS["optimizer"]["clip"]  # clipping is active

    def check(self, run_dir, steps, dtype="float32", evaluations=2):
        check(curve(run_dir), self.curve, steps, bound(self.own_error, getattr(torch, dtype)), evaluations)


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    return Alone(ranks, tmp_path_factory.mktemp("alone") / "one")


TILED = ["model.recompute=true", "model.ffn_tile=50"]
RUNS = {name: ["dtype=float64"] for name in ("ddp", "fsdp2")} | {name: [] for name in ("zero0", "zero1", "zero2")}
RUNS |= {"zero3": [], "ddp tiled": ["dtype=float64", *TILED[1:]], "fsdp2 tiled": ["dtype=float64", *TILED]}
RUNS |= {"zero3 tiled": [*TILED, f"eval.every={STEPS}"]}  # DeepSpeed has no float64


@pytest.mark.parametrize("run", RUNS)
def test_eight_steps_with_accumulation_and_clipping(ranks, tmp_path, alone, run):
    options = [f"engine={run.split()[0]}", "cp=2", "dp=2", *RUNS[run]]
    ranks.run(train_on_ranks, _config(tmp_path / "four"), options, size=4)
    dtype = "float64" if "dtype=float64" in options else "float32"
    evaluations = 1 if run == "zero3 tiled" else 2
    alone.check(tmp_path / "four" / "run", range(1, STEPS + 1), dtype, evaluations)


PARTS = [(2, "ddp", 1, 1), (4, "fsdp2", 2, 2), (6, "ddp", 2, 1), (STEPS, "zero2", 2, 2)]  # last step, engine, cp, dp


def _stream(parts):
    """The tokens of a run by their places, each of which was met once."""
    places = torch.cat([places for places, _ in parts])
    tokens = torch.cat([tokens for _, tokens in parts])
    order = places.argsort()
    assert torch.equal(places[order], torch.arange(len(places)))  # none twice, none left out
    return tokens[order]


def test_four_shapes_and_three_engines_go_on_from_one_another(ranks, tmp_path, alone):
    path, parts = _config(tmp_path / "parts"), []
    for last, engine, cp, dp in PARTS:
        overrides = ["layout=zigzag", f"engine={engine}", f"cp={cp}", f"dp={dp}", f"steps={last}"]
        parts += ranks.run(_consumed_on_rank, path, overrides, size=cp * dp)
        assert checkpoints.load_newest(tmp_path / "parts/run/checkpoints", pytest.fail).step == last
    assert torch.equal(_stream(parts), _stream([alone.consumed]))
    alone.check(tmp_path / "parts/run", range(1, STEPS + 1))


def test_zero_is_quiet_needs_no_compiler_and_goes_on_from_one_process(tmp_path, alone):
    path = _config(tmp_path / "resumed")
    shutil.copytree(alone.run_dir / HALFWAY, tmp_path / "resumed/run" / HALFWAY)
    bare = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-m", "lasp.launch.cli", "train", str(path), "engine=zero3", "dp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **bare})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("[a-z]Warning|deprecated|[Dd]eep[Ss]peed|accelerator", done.stdout + done.stderr)
    assert not (tmp_path / "compiled").exists()
    alone.check(tmp_path / "resumed/run", range(5, STEPS + 1), evaluations=1)


def test_engines_that_cannot_run_are_refused_before_anything_starts(tmp_path, monkeypatch):
    path = _config(tmp_path / "refused")
    with pytest.raises(ValueError, match=r"engine=zero1 computes in float32 or bfloat16, got dtype=float64"):
        load_config(path, ["engine=zero1", "dtype=float64"])
    with pytest.raises(ValueError, match=r"offload_activations=true has no effect with backend=megatron"):
        load_config(path, ["backend=megatron", "offload_activations=true"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    with pytest.raises(ValueError, match=r"engine=zero1 needs DeepSpeed: pip install 'lasp\[deepspeed\]', or use"):
        load_config(path, ["engine=zero1"])


def test_offload_activations_reaches_the_engine(tmp_path):
    path = _config(tmp_path / "offload")
    for override, made in ([], 0), (["offload_activations=true"], 1):
        with mock.patch("lasp.parallel.engines.offload.SavedTensors") as saved:
            make_engine(load_config(path, override), Mesh.build())
        assert saved.call_count == made

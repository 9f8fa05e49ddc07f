"""Twenty steps of every engine on two sequences in flight over two ranks each: what one process learns."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest

from lasp.launch.config.schema import load_config
from lasp.launch.run.backends import make_engine
from lasp.launch.train import train
from lasp.parallel.mesh import Mesh
from tests.launch.helpers import tiny_yaml, train_on_ranks
from tests.launch.test_curve import check, curve

STEPS = 20
HALFWAY = "checkpoints/step-00000010"
SETTINGS = {
    "steps": STEPS,
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 5, "clip": 0.5},
    "eval": {"every": 10, "sequences": 3},
    "checkpoint": {"every": 10, "keep": 3},
    "model": {"dim": 32, "num_layers": 3, "pattern": "SLL", "heads": 2, "mixer": {"preset": "linear", "conv_width": 4}},
}


def _config(folder):
    folder.mkdir()
    data = {"source": str(folder / "text"), "seq_len": 256, "batch_size": 4, "eval_fraction": 0.1}
    return tiny_yaml(folder, data=data, **SETTINGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "one"
    train(load_config(_config(folder)))
    expected = curve(folder / "run")
    assert expected[1]["grad_norm"] > SETTINGS["optimizer"]["clip"]  # clipping is active
    return expected, folder / "run"


TILED = ["model.recompute=true", "model.ffn_tile=50"]
RUNS = {name: [] for name in ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")}
RUNS |= {"ddp tiled": TILED[1:], "fsdp2 tiled": TILED, "zero3 tiled": TILED}


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_with_accumulation_and_clipping(ranks, tmp_path, alone, run):
    options = [f"engine={run.split()[0]}", "cp=2", "dp=2", *RUNS[run]]
    ranks.run(train_on_ranks, _config(tmp_path / "four"), options, size=4)
    check(curve(tmp_path / "four" / "run"), alone[0], range(1, STEPS + 1), 1e-5, evaluations=2)


@pytest.mark.parametrize("engine, dp, sequences", [("fsdp2", 2, 1), ("fsdp2", 2, 3), ("zero3", 4, 3)])
def test_ranks_that_gather_parameters_evaluate_sequences_that_they_do_not_share_evenly(
    ranks, tmp_path, engine, dp, sequences
):
    path = tiny_yaml(tmp_path, **(SETTINGS | {"steps": 2, "optimizer": {"lr": 1.0e-3, "warmup_steps": 1}}))
    uneven = [f"eval.sequences={sequences}", "data.batch_size=4", "timeout_s=20"]
    train(load_config(path, [*uneven, f"run_dir={tmp_path / 'alone'}"]))
    ranks.run(train_on_ranks, path, [*uneven, f"engine={engine}", f"dp={dp}"], size=dp)
    check(curve(tmp_path / "run"), curve(tmp_path / "alone"), range(1, 3), 1e-5, evaluations=1)


@pytest.mark.parametrize("engine, cp, dp", [("fsdp2", 1, 2), ("fsdp2", 2, 2), ("ddp", 2, 1)])
def test_a_checkpoint_of_another_engine_and_shape_goes_on(ranks, tmp_path, alone, engine, cp, dp):
    path = _config(tmp_path / "resumed")
    if engine == "ddp":  # from fsdp2
        ranks.run(train_on_ranks, path, ["engine=fsdp2", "cp=2", "dp=2", "steps=20"], size=4)
        shutil.rmtree(tmp_path / "resumed/run/checkpoints/step-00000020")
    else:  # from one process
        shutil.copytree(alone[1] / HALFWAY, tmp_path / "resumed/run" / HALFWAY)
    ranks.run(train_on_ranks, path, [f"engine={engine}", f"cp={cp}", f"dp={dp}"], size=cp * dp)
    check(
        curve(tmp_path / "resumed/run"), alone[0], range(1 if engine == "ddp" else 11, STEPS + 1), 1e-5, evaluations=1
    )


def test_zero_is_quiet_needs_no_compiler_and_goes_on_from_one_process(tmp_path, alone):
    path = _config(tmp_path / "resumed")
    shutil.copytree(alone[1] / HALFWAY, tmp_path / "resumed/run" / HALFWAY)
    bare = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-m", "lasp.launch.cli", "train", str(path), "engine=zero3", "dp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **bare})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("[a-z]Warning|deprecated|[Dd]eep[Ss]peed|accelerator", done.stdout + done.stderr)
    assert not (tmp_path / "compiled").exists()
    check(curve(tmp_path / "resumed/run"), alone[0], range(11, STEPS + 1), 1e-5, evaluations=1)


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

"""``lasp train`` and ``lasp verify`` with backend=megatron, as a user calls them; all ranks find the shim's devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lasp.launch.config.schema import load_config
from lasp.launch.run.report import read_metrics
from lasp.launch.run.resume import check_same_backend
from lasp.launch.train import train
from lasp.parallel.checkpoints import checkpoint as checkpoints

pytestmark = pytest.mark.timeout(900)  # many processes that load Megatron; a loaded machine takes minutes for it
ROOT = Path(__file__).parents[3]
STEPS = 30
MESH = ["backend=megatron", "--tp", "2", "--pp", "2", "--cp", "2"]
# A positive kernel: a norm per head would amplify rounding over the steps, on one device as well.
MIXER = {"decay": "scalar", "gate": "mamba", "out_gate": "silu", "feature": "elu1", "conv_width": 4}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A hybrid model on the quickstart's data."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "device": "cpu",
        "timeout_s": 300,
        "model": {"dim": 32, "num_layers": 4, "pattern": "SLLL", "heads": 4, "window": 100, "mixer": MIXER},
        "data": {"seq_len": 512, "batch_size": 2},
        "optimizer": {"lr": 1.0e-3, "min_lr": 1.0e-4, "warmup_steps": 5},
        "eval": {"every": 15, "sequences": 3},
        "checkpoint": {"every": 15, "keep": 3},
        "log": {"sample_tokens": 8, "tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def lasp(*arguments, shim=True, **environment):
    """The command in a process of its own."""
    paths = [str(ROOT / "tests" / "parallel" / "megatron" / "site"), str(ROOT)] if shim else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths), **environment}
    command = [sys.executable, "-m", "lasp.launch.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)


def curve(run_dir):
    return {record["step"]: record for record in read_metrics(run_dir)}


def test_training_follows_the_native_curve_and_goes_on_at_another_shape(config, tmp_path):
    train(load_config(config, [f"run_dir={tmp_path}/native"]))
    expected = curve(tmp_path / "native")

    done = lasp("train", config, f"run_dir={tmp_path}/mesh", "backend=megatron", "--pp", "2", "--cp", "2")
    assert done.returncode == 0, done.stderr
    assert "pp 2 x tp 1 x dp 1 x cp 2 = 4" in done.stdout and "sample" in done.stdout
    actual = curve(tmp_path / "mesh")
    assert sorted(actual) == sorted(expected) == list(range(1, STEPS + 1))
    for step, record in expected.items():
        for key in {"loss", "eval_loss"} & record.keys():
            assert actual[step][key] == pytest.approx(record[key], rel=1e-5), (step, key)
        assert actual[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-3)
    assert expected[STEPS]["loss"] < 0.9 * expected[1]["loss"]

    halfway = "checkpoints/step-00000015"  # continued without stages, with tensor and data parallelism, otherwise
    for name in ("native", "mesh"):
        shutil.copytree(tmp_path / name / halfway, tmp_path / f"{name}-resumed" / halfway)
    options = ["log.sample_tokens=0", "optimizer.betas=[0.5, 0.7]"]
    train(load_config(config, [f"run_dir={tmp_path}/native-resumed", *options]))
    mesh = ["backend=megatron", "--tp", "2", "--dp", "2"]
    done = lasp("train", config, f"run_dir={tmp_path}/mesh-resumed", *mesh, *options)
    assert done.returncode == 0, done.stderr
    again, wanted = curve(tmp_path / "mesh-resumed"), curve(tmp_path / "native-resumed")
    assert sorted(again) == sorted(wanted) == list(range(16, STEPS + 1))
    for step, record in again.items():
        assert record["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-5), step
    assert again[STEPS]["loss"] != pytest.approx(actual[STEPS]["loss"], rel=1e-4)  # the other betas count

    done = lasp("generate", tmp_path / "mesh", "--prompt", "def ", "--max-new-tokens", "4", shim=False)
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr
    for resume, backend in ((f"{tmp_path}/native", "native"), (f"{tmp_path}/mesh", "megatron")):
        other = "native" if backend == "megatron" else "megatron"
        arguments = [f"run_dir={tmp_path}/other", f"checkpoint.resume={resume}", f"backend={other}", "--cp", "2"]
        done = lasp("train", config, *arguments)
        assert done.returncode == 1 and f"was written by backend={backend}, and this run has backend={other}" in (
            " ".join(done.stderr.split())
        ), done.stderr


def test_verify_passes_and_names_the_layer_of_a_planted_fault(config, tmp_path):
    arguments = ["verify", config, f"run_dir={tmp_path}", *MESH]
    done = lasp(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: tp 2 x pp 2 x cp 2 on Megatron equals the native model on one rank in every tensor" in done.stdout

    fault = {"layer_number": 3, "cp_rank": 1, "factor": 1.001}  # of the attention's output
    done = lasp(*arguments, MEGATRON_TEST_FAULT=json.dumps(fault))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL: the output of layer 2 (linear) is the first that differs, on cp rank(s) 1" in done.stdout


def test_optimizer_states_are_read_by_the_optimizer_that_wrote_them(config):
    state = {"backend": "megatron", "config": load_config(config, ["backend=megatron"]).portable()}
    saved = checkpoints.Checkpoint(Path("step-00000001"), state, {}, {})
    with pytest.raises(ValueError, match=r"written with megatron\.distributed_optimizer=True, and this run has False"):
        check_same_backend(saved, "megatron", distributed_optimizer=False)
    check_same_backend(saved, "megatron", distributed_optimizer=True)


def test_without_devices_it_says_so(config, tmp_path):
    for command in (["train", config], ["verify", config, "--cp", "2"]):
        done = lasp(*command, f"run_dir={tmp_path}/run", "backend=megatron", shim=False, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        message = " ".join(done.stderr.split())
        assert message.startswith("error: backend=megatron needs a CUDA device per rank, and this process finds none")
        assert message.endswith("Run it on GPUs, or use backend=native.")
    assert not (tmp_path / "run" / "checkpoints").exists()

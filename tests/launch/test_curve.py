"""Fifty steps of a hybrid model: four ranks learn what one rank learns, also from a checkpoint of another cp size."""

import shutil

import pytest

from lasp.launch.config.schema import load_config
from lasp.launch.run.report import read_metrics
from lasp.launch.train import train
from tests.launch.helpers import tiny_yaml, train_on_ranks

STEPS = 50
SETTINGS = {
    "steps": STEPS,
    "layout": "zigzag",
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 5},
    "eval": {"every": 10, "sequences": 3},
    "checkpoint": {"every": 25, "keep": 3},
}


def curve(run_dir):
    return {record["step"]: record for record in read_metrics(run_dir)}


def check(actual, expected, steps, tolerance, evaluations=3):
    assert sorted(actual) == list(steps)
    for step in steps:
        for key in {"loss", "grad_norm", "eval_loss"} & expected[step].keys():
            wanted = pytest.approx(expected[step][key], rel=tolerance)
            assert actual[step][key] == wanted, f"step {step}: {key} {actual[step][key]} is not {expected[step][key]}"
    assert sum("eval_loss" in expected[step] for step in steps) >= evaluations


# A norm per head makes training amplify rounding (a head whose output is nearly zero is turned to a unit vector), so
# that model is followed in float64, where the same amplification leaves its curve equal to a tighter tolerance.
@pytest.mark.parametrize(
    ("mixer", "dtype", "tolerance"),
    [({"preset": "linear", "conv_width": 4}, "float32", 1e-5), ({"preset": "gla"}, "float64", 1e-6)],
    ids=["linear-float32", "gla-float64"],
)
def test_fifty_steps_over_four_ranks_and_a_resume_at_another_size(ranks, tmp_path, mixer, dtype, tolerance):
    model = {"dim": 32, "num_layers": 4, "pattern": "SLLL", "heads": 2, "mixer": mixer}
    folders = {name: tmp_path / name for name in ("one", "four", "resumed")}
    paths = {}
    for name, folder in folders.items():
        folder.mkdir()
        data = {"source": str(folder / "text"), "seq_len": 512, "batch_size": 1, "eval_fraction": 0.1}
        paths[name] = tiny_yaml(folder, data=data, model=model, dtype=dtype, **SETTINGS)
    train(load_config(paths["one"]))
    expected = curve(folders["one"] / "run")
    assert expected[STEPS]["loss"] < 0.8 * expected[1]["loss"]

    ranks.run(train_on_ranks, paths["four"], ["cp=4"], size=4)
    check(curve(folders["four"] / "run"), expected, range(1, STEPS + 1), tolerance)

    halfway = "checkpoints/step-00000025"  # of four ranks, continued on two
    shutil.copytree(folders["four"] / "run" / halfway, folders["resumed"] / "run" / halfway)
    ranks.run(train_on_ranks, paths["resumed"], ["cp=2"], size=2)
    check(curve(folders["resumed"] / "run"), expected, range(26, STEPS + 1), tolerance)

"""Twenty steps of every engine on two sequences in flight over two ranks each: what one process learns."""

import shutil

import pytest

from lasp.launch.schema import load_config
from lasp.launch.train import train
from tests.launch.helpers import tiny_yaml
from tests.launch.test_curve import check, curve
from tests.launch.test_train import _train_on_ranks

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


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_twenty_steps_with_accumulation_and_clipping(ranks, tmp_path, alone, engine):
    ranks.run(_train_on_ranks, _config(tmp_path / "four"), [f"engine={engine}", "cp=2", "dp=2"], size=4)
    check(curve(tmp_path / "four" / "run"), alone[0], range(1, STEPS + 1), 1e-5, evaluations=2)


@pytest.mark.parametrize("engine, cp, dp", [("fsdp2", 1, 2), ("fsdp2", 2, 2), ("ddp", 2, 1)])
def test_a_checkpoint_of_another_engine_and_shape_goes_on(ranks, tmp_path, alone, engine, cp, dp):
    path = _config(tmp_path / "resumed")
    if engine == "ddp":  # from fsdp2
        ranks.run(_train_on_ranks, path, ["engine=fsdp2", "cp=2", "dp=2", "steps=20"], size=4)
        shutil.rmtree(tmp_path / "resumed/run/checkpoints/step-00000020")
    else:  # from one process
        shutil.copytree(alone[1] / HALFWAY, tmp_path / "resumed/run" / HALFWAY)
    ranks.run(_train_on_ranks, path, [f"engine={engine}", f"cp={cp}", f"dp={dp}"], size=cp * dp)
    check(
        curve(tmp_path / "resumed/run"), alone[0], range(1 if engine == "ddp" else 11, STEPS + 1), 1e-5, evaluations=1
    )

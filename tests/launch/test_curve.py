"""A hybrid model on four ranks learns what one rank learns, also from a checkpoint of another cp size."""

import shutil
from unittest import mock

import pytest
import torch

from lasp.launch.run import backends
from tests.launch.curves import apart, check, curve
from tests.launch.helpers import tiny_yaml, train_on_ranks
from tests.rounding import LINEAR, ROOM, bound

build_engine = backends.build_engine


def _path(folder, mixer, steps, seq_len, lr):
    folder.mkdir()
    return tiny_yaml(
        folder,
        steps=steps,
        layout="zigzag",
        optimizer={"lr": lr, "warmup_steps": 5, "eps": 1.0e-3},  # of the gradients' size: tests.rounding
        eval={"every": steps // 4, "sequences": 3},
        checkpoint={"every": steps // 2, "keep": 3},
        log={"every_s": 0, "tensorboard": False, "sample_tokens": 0},
        model={"dim": 32, "num_layers": 4, "pattern": "SLLL", "heads": 2, "mixer": mixer},
        data={"source": str(folder / "text"), "seq_len": seq_len, "batch_size": 1, "eval_fraction": 0.1},
    )


def _compare(ranks, tmp_path, expected, limit, steps, *settings, dtype):
    """Four ranks, and two that continue their checkpoint of half the steps."""
    assert expected[steps]["loss"] < 0.8 * expected[1]["loss"]
    four, resumed = (_path(tmp_path / name, *settings) for name in ("four", "resumed"))
    ranks.run(train_on_ranks, four, ["cp=4", f"dtype={dtype}"], size=4)
    check(curve(tmp_path / "four" / "run"), expected, range(1, steps + 1), limit)

    halfway = f"checkpoints/step-{steps // 2:08d}"
    shutil.copytree(tmp_path / "four" / "run" / halfway, tmp_path / "resumed" / "run" / halfway)
    ranks.run(train_on_ranks, resumed, ["cp=2", f"dtype={dtype}"], size=2)
    check(curve(tmp_path / "resumed" / "run"), expected, range(steps // 2 + 1, steps + 1), limit, evaluations=2)


def _moved(name, model, *arguments, **options):
    """An engine whose model starts with other parameters: each by as much as 32 roundings of float64."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2.0**-48 * torch.randn(p.shape, generator=generator, dtype=torch.float64).sign())
    return build_engine(name, model, *arguments, **options)


def _train_moved(group, path, overrides):
    with mock.patch.object(backends, "build_engine", _moved):
        train_on_ranks(group, path, overrides)


def test_four_ranks_in_float64_and_a_resume_at_another_size(ranks, tmp_path):
    """A norm per head makes training amplify rounding: a head whose output is nearly zero is turned to a unit vector.

    In float32 the curve is soon another one, on one process too. So it is followed in float64, and how much a rounding
    grows is what one process shows whose parameters begin a little elsewhere: by 32 roundings, more than another order
    of the sums over 256 tokens makes, sqrt(256).
    """
    steps = 24
    settings = ({"preset": "gla"}, steps, 256, 1.0e-2)
    path = _path(tmp_path / "one", *settings)
    ranks.run(train_on_ranks, path, ["dtype=float64"], size=1)
    ranks.run(_train_moved, path, ["dtype=float64", f"run_dir={tmp_path}/moved"], size=1)
    expected = curve(tmp_path / "one" / "run")
    grown = apart(curve(tmp_path / "moved"), expected)
    assert 0 < grown < LINEAR
    _compare(ranks, tmp_path, expected, ROOM * grown, steps, *settings, dtype="float64")


@pytest.mark.slow
def test_fifty_steps_on_four_ranks_in_float32(ranks, tmp_path):
    steps = 50
    settings = ({"preset": "linear", "conv_width": 4}, steps, 512, 2.0e-3)
    path = _path(tmp_path / "one", *settings)
    ranks.run(train_on_ranks, path, ["dtype=float64"], size=1)
    ranks.run(train_on_ranks, path, [f"run_dir={tmp_path}/narrow"], size=1)
    expected = curve(tmp_path / "one" / "run")
    limit = bound(apart(curve(tmp_path / "narrow"), expected))
    _compare(ranks, tmp_path, expected, limit, steps, *settings, dtype="float32")

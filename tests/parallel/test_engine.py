"""Every engine trains as plain torch does on one device; what it holds, writes, reads and refuses."""

import pytest
import torch

from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from tests.parallel.engine_cases import SETTINGS, STEPS, Plain, TokenModel, run_steps
from tests.rounding import ROOM, distance


@pytest.fixture(scope="module")
def plain():
    return Plain(TokenModel, STEPS)


def test_the_first_steps_alone_are_clipped(plain):
    norms = [norm for _, norm, _ in plain.curve]
    assert min(norms[:2]) > SETTINGS.clip > max(norms[2:])


@pytest.mark.parametrize(
    "engine, dp_size, cp_size", [("ddp", 1, 1), ("ddp", 2, 2), ("ddp", 4, 1), ("fsdp2", 2, 2), ("fsdp2", 1, 4)]
)
def test_training_equals_plain_torch_on_one_device(ranks, plain, engine, dp_size, cp_size):
    runs = ranks.run(run_steps, dp_size, cp_size, STEPS, torch.float64, None, engine, 3, size=dp_size * cp_size)
    for curve, _, _ in runs:
        plain.check_curve(curve, torch.float64, engine)
    plain.check_parameters(runs[0][1], torch.float64, engine)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_keeps_fp32_master_weights(ranks, plain, engine):
    """As near to float64 as one process in bf16, whose distance is the measure here: one rounding is 2**-8."""
    (curve, parameters, narrow), (_, _, others) = ranks.run(
        run_steps, 1, 2, STEPS, torch.bfloat16, None, engine, size=2
    )
    alone, _, _ = run_steps(None, 1, 1, STEPS, torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in parameters.values())
    assert any((value != value.bfloat16().float()).any() for value in parameters.values())
    assert all(torch.equal(narrow[name], value) for name, value in others.items())
    if engine == "ddp":
        assert all(torch.equal(narrow[name], value.bfloat16().float()) for name, value in parameters.items())
    assert distance(curve, plain.curve) <= ROOM * distance(alone, plain.curve) < 0.1


def test_schedule_warms_up_and_ends_at_the_minimum():
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, steps=11, warmup_steps=4)
    rates = [settings.lr_at(step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


def _error_of_run(group, poison, engine):
    try:
        run_steps(group, 1, 2, 3, torch.float32, poison, engine)
    except FloatingPointError as error:
        return str(error)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_one(ranks):
    for message in ranks.run(_error_of_run, (1, 1), "ddp", size=2):
        assert message.startswith("step 2: loss nan") and "rank(s) [1]" in message


def test_sharded_parameters_that_are_not_finite_stop_all_ranks(ranks):
    for message in ranks.run(_error_of_run, (1, 1), "fsdp2", size=2):
        assert message.startswith("step 2: loss nan")


def test_float16_is_refused():
    with pytest.raises(ValueError, match="loss scaling"):
        build_engine("ddp", TokenModel(0), Mesh.build(), SETTINGS, torch.float16)


def test_engines_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least 2 ranks"):
        build_engine("fsdp2", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)
    with pytest.raises(ValueError, match=r"one of ddp, fsdp2, zero0, .*, zero3, got 'zero9'. Did you mean zero3"):
        build_engine("zero9", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)

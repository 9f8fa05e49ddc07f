import math

import pytest
import torch
from torch import nn

from lasp.layout import SequenceLayout
from lasp.parallel.engine import OptimizerSettings, build_engine
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from tests.harness import assert_close

SETTINGS = OptimizerSettings(lr=0.05, steps=6, warmup_steps=2, clip=0.05, weight_decay=0.2)


class TokenModel(nn.Module):
    """Stands in for a language model: no token sees another, so any cut is right by itself. Sizes divide nothing."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(11, 6, generator=generator))
        self.scale = nn.Parameter(torch.ones(6))
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.5, generator=generator)
        self.output_weight = nn.Parameter(torch.randn(11, 6, generator=generator))

    def forward(self, tokens, cp):
        x = self.embed[tokens]
        for layer in self.layers:
            x = x + layer(x)
        return x * self.scale


def _sequences(steps, per_step=4):
    return torch.randint(0, 11, (steps, per_step, 12), generator=torch.Generator().manual_seed(1))


def _run(group, dp_size, cp_size, steps, dtype, poison=None, name="ddp", resume_at=None):
    mesh = Mesh.build(cp_size, dp_size, group)
    make = lambda: build_engine(name, TokenModel(mesh.rank), mesh, SETTINGS, dtype)  # noqa: E731  unequal: the first's
    engine = make()
    layout = SequenceLayout.contiguous((0, 5, 12), cp_size)
    curve = []
    for step, sequences in enumerate(_sequences(steps)):
        if step == resume_at:
            saved = [
                {key: x.clone() for key, x in part().items()}
                for part in (engine.model_tensors, engine.optimizer_tensors)
            ]
            engine = make()
            engine.load(step, *(saved if mesh.is_first else (None, None)))
        if poison == (step, mesh.rank):
            share = engine.model.embed.detach()
            (share.to_local() if name == "fsdp2" else share).fill_(math.nan)
        mine = sequences[mesh.dp_rank :: mesh.dp_size]
        result = engine.step([Batch.cut(tokens[None], layout, mesh) for tokens in mine])
        curve.append((result.loss, result.grad_norm, result.lr))
    return curve, {name: x.clone() for name, x in engine.model_tensors().items()}


def _plain_training(steps):
    """The same by torch's own means on one device."""
    model = TokenModel(0).double()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [model.scale], "weight_decay": 0.0},
        ],
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
    )
    curve = []
    for step, sequences in enumerate(_sequences(steps)):
        labels = sequences.roll(-1, 1)
        labels[:, [4, 11]] = -100
        logits = model(sequences, None) @ model.output_weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item(), SETTINGS.lr_at(step)))
    return curve, dict(model.named_parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("dp_size, cp_size", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_training_equals_plain_torch_on_one_device(ranks, dp_size, cp_size, engine):
    if engine == "fsdp2" and dp_size * cp_size == 1:
        pytest.skip("nothing to cut")
    expected_curve, expected = _plain_training(6)
    runs = ranks.run(_run, dp_size, cp_size, 6, torch.float64, None, engine, 3, size=dp_size * cp_size)
    for curve, _ in runs:
        for step, wanted in zip(curve, expected_curve, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5)  # clipping in torch adds 1e-6 to the norm
    parameters = runs[0][1]
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        assert_close(name, value, expected[name].detach(), 1e-4)
    assert expected_curve[0][1] > SETTINGS.clip  # clipping was active


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_keeps_fp32_master_weights(ranks, engine):
    (curve, parameters), (_, others) = ranks.run(_run, 1, 2, 6, torch.bfloat16, None, engine, size=2)
    exact, _ = _run(None, 1, 1, 6, torch.float32)
    assert all(value.dtype == torch.float32 for value in parameters.values())
    assert any((value != value.bfloat16().float()).any() for value in parameters.values())
    assert all(torch.equal(parameters[name], value) for name, value in others.items())
    assert [c[0] for c in curve] == pytest.approx([c[0] for c in exact], rel=0.02)


def test_schedule_warms_up_and_ends_at_the_minimum():
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, steps=11, warmup_steps=4)
    rates = [settings.lr_at(step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


def _error_of_run(group, poison, engine):
    try:
        _run(group, 1, 2, 3, torch.float32, poison, engine)
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
    with pytest.raises(ValueError, match="'ddp', 'fsdp2', or 'zero0'"):
        build_engine("zero9", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)

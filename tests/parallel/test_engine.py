"""Every engine trains as plain torch does on one device; what it holds, writes, reads and refuses."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lasp.layout import SequenceLayout
from lasp.parallel.checkpoints.tensor_files import read_tensors, read_whole, write_tensors
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from tests.harness import assert_close, relative_error
from tests.rounding import ROOM, bound, distance

# clip lies between the norms of the first steps and those of the last; eps is of the gradients' size: tests.rounding
SETTINGS = OptimizerSettings(lr=0.05, min_lr=0.01, steps=12, warmup_steps=2, clip=5.0, weight_decay=0.2, eps=1e-2)
STEPS = 6


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
            folder = _written(engine)
            engine = make()
            _restore(engine, step, folder)
        if poison == (step, mesh.rank):
            share = engine.model.embed.detach()
            (share.to_local() if name == "fsdp2" else share).fill_(math.nan)
        mine = sequences[mesh.dp_rank :: mesh.dp_size]
        result = engine.step([Batch.cut(tokens[None], layout, mesh) for tokens in mine])
        curve.append((result.loss, result.grad_norm, result.lr))
    computes_with = {name: _full(p).float() for name, p in engine.model.named_parameters()}
    return curve, read_whole(_written(engine), "model."), computes_with


def _written(engine):
    """A new folder with all that a checkpoint holds of an engine."""
    folder = Path(engine.mesh.on_first(tempfile.mkdtemp)) / "tensors"
    write_tensors(folder, engine.tensors(), engine.mesh.world_group)
    engine.mesh.gather(None)
    return folder


def _restore(engine, step, folder):
    engine.load(step, lambda tensors: read_tensors(folder, tensors, engine.mesh.world_group))


def _full(p):
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()


def _plain_loss(model, sequences):
    """The mean loss, by torch's own means."""
    labels = sequences.roll(-1, 1)
    labels[:, [4, 11]] = -100
    logits = model(sequences, None) @ model.output_weight.T
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _plain_training(model, steps):
    """The curve of training by torch's own means on one device."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
    )
    curve = []
    for step, sequences in enumerate(_sequences(steps)):
        model.step = step
        loss = _plain_loss(model, sequences)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient * min(1.0, SETTINGS.clip / norm)  # exactly; torch's own adds 1e-6 to the norm
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr_at(step)
        optimizer.step()
        curve.append((loss.item(), norm, SETTINGS.lr_at(step)))
    return curve


class Plain:
    """What one device learns in float64, and how far the same in float32 is from it, in curve and parameters."""

    def __init__(self, model, steps):
        self.model, narrow = model(0).double(), model(0)
        self.curve = _plain_training(self.model, steps)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        own_error = distance(_plain_training(narrow, steps), self.curve)
        errors = [relative_error(p.detach(), self.parameters[name]) for name, p in narrow.named_parameters()]
        self.own_error = max(own_error, *errors)

    def check_curve(self, curve, dtype, case):
        expected = [step[: len(curve[0])] for step in self.curve]
        assert distance(curve, expected) <= bound(self.own_error, dtype), f"{case}: {curve} is not {expected}"

    def check_parameters(self, parameters, dtype, case):
        assert parameters.keys() == self.parameters.keys()
        for name, value in parameters.items():
            assert_close(f"{case} {name}", value, self.parameters[name], bound(self.own_error, dtype))


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
    runs = ranks.run(_run, dp_size, cp_size, STEPS, torch.float64, None, engine, 3, size=dp_size * cp_size)
    for curve, _, _ in runs:
        plain.check_curve(curve, torch.float64, engine)
    plain.check_parameters(runs[0][1], torch.float64, engine)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_keeps_fp32_master_weights(ranks, plain, engine):
    """As near to float64 as one process in bf16, whose distance is the measure here: one rounding is 2**-8."""
    (curve, parameters, narrow), (_, _, others) = ranks.run(_run, 1, 2, STEPS, torch.bfloat16, None, engine, size=2)
    alone, _, _ = _run(None, 1, 1, STEPS, torch.bfloat16)
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
    with pytest.raises(ValueError, match=r"one of ddp, fsdp2, zero0, .*, zero3, got 'zero9'. Did you mean zero3"):
        build_engine("zero9", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)

"""A small model, its training by plain torch on one device, and a run of an engine on the same tokens."""

import math
import tempfile
from pathlib import Path

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
from tests.rounding import bound, distance

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


def token_sequences(steps, per_step=4):
    return torch.randint(0, 11, (steps, per_step, 12), generator=torch.Generator().manual_seed(1))


def run_steps(group, dp_size, cp_size, steps, dtype, poison=None, name="ddp", resume_at=None):
    mesh = Mesh.build(cp_size, dp_size, group)
    make = lambda: build_engine(name, TokenModel(mesh.rank), mesh, SETTINGS, dtype)  # noqa: E731  unequal: the first's
    engine = make()
    layout = SequenceLayout.contiguous((0, 5, 12), cp_size)
    curve = []
    for step, sequences in enumerate(token_sequences(steps)):
        if step == resume_at:
            folder = written(engine)
            engine = make()
            restore(engine, step, folder)
        if poison == (step, mesh.rank):
            share = engine.model.embed.detach()
            (share.to_local() if name == "fsdp2" else share).fill_(math.nan)
        mine = sequences[mesh.dp_rank :: mesh.dp_size]
        result = engine.step([Batch.cut(tokens[None], layout, mesh) for tokens in mine])
        curve.append((result.loss, result.grad_norm, result.lr))
    computes_with = {name: full(p).float() for name, p in engine.model.named_parameters()}
    return curve, read_whole(written(engine), "model."), computes_with


def written(engine):
    """A new folder with all that a checkpoint holds of an engine."""
    folder = Path(engine.mesh.on_first(tempfile.mkdtemp)) / "tensors"
    write_tensors(folder, engine.tensors(), engine.mesh.world_group)
    engine.mesh.gather(None)
    return folder


def restore(engine, step, folder):
    engine.load(step, lambda tensors: read_tensors(folder, tensors, engine.mesh.world_group))


def full(p):
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()


def plain_loss(model, sequences):
    """The mean loss, by torch's own means."""
    labels = sequences.roll(-1, 1)
    labels[:, [4, 11]] = -100
    logits = model(sequences, None) @ model.output_weight.T
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain_training(model, steps):
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
    for step, sequences in enumerate(token_sequences(steps)):
        model.step = step
        loss = plain_loss(model, sequences)
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
        self.curve = plain_training(self.model, steps)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        own_error = distance(plain_training(narrow, steps), self.curve)
        errors = [relative_error(p.detach(), self.parameters[name]) for name, p in narrow.named_parameters()]
        self.own_error = max(own_error, *errors)

    def check_curve(self, curve, dtype, case):
        expected = [step[: len(curve[0])] for step in self.curve]
        assert distance(curve, expected) <= bound(self.own_error, dtype), f"{case}: {curve} is not {expected}"

    def check_parameters(self, parameters, dtype, case):
        assert parameters.keys() == self.parameters.keys()
        for name, value in parameters.items():
            assert_close(f"{case} {name}", value, self.parameters[name], bound(self.own_error, dtype))

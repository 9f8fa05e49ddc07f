"""Engine ``ddp``: replicated parameters, gradients summed over dp x cp, AdamW on flat fp32 buffers.

Parameters live twice at most: an fp32 *master* copy that the optimizer updates, laid out in one flat buffer
per weight-decay group, and the parameters that the model computes with, in the dtype of the run. For
float32 (and float64) both are the same memory: the model's parameters are views of the master buffer. For
bfloat16 they are rounded from it after each update. There is no autocast: what the model computes in bf16
is decided by its parameters' dtype, and what it keeps in fp32 (states, norms, the loss) by its own code.

A step: count the labels of all micro batches and ranks; forward and backward of each micro batch, whose
gradients are added to a flat buffer in the master's dtype as they appear; sum the buffer over all ranks;
clip by the norm of that sum, which is the true global norm; update. Nothing is averaged. A cp rank is a
data-parallel rank to all this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, count_labels, evaluate, loss_share, reduce_gradients


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warmup and a cosine decay.

    Attributes:
        lr: peak learning rate, reached after ``warmup_steps``; ``min_lr`` is that of the last step.
        steps: length of the schedule.
        weight_decay: decoupled, for matrices only: norms, biases and gates (one dimension) have none.
        clip: largest global gradient norm; None: no clipping.
    """

    lr: float
    steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps - 1)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks: mean loss per label, global gradient norm before clipping."""

    loss: float
    grad_norm: float
    lr: float
    labels: int


class DataParallelEngine:
    """Trains a model whose parameters every rank holds.

    Args:
        model: in fp32, on its device; called as ``model(tokens, cp)`` for hidden states, ``output_weight``
            is its output projection [vocab, dim]. The first rank's initial values are everybody's.
        mesh: the job.
        settings: the optimizer's.
        dtype: what the model computes in: float32, bfloat16, or float64 (master copy in float64 too).
    """

    def __init__(self, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float64, got {dtype}: float16 would need loss scaling. "
                "Set dtype to bfloat16."
            )
        self.model, self.mesh, self.settings, self.dtype = model, mesh, settings, dtype
        self.step_count = 0
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = {name: p for name, p in named.items() if p.dim() > 1}
        rest = {name: p for name, p in named.items() if p.dim() <= 1}
        decays = ((decayed, settings.weight_decay), (rest, 0.0))
        self._groups = [_FlatGroup(members, decay, wide) for members, decay in decays if members]
        for group in self._groups:
            mesh.broadcast(group.master)
            group.attach(dtype)

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(group.master.numel() for group in self._groups)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro batches. Every rank brings equally many.

        Raises:
            ValueError: the step holds no label, on every rank.
            FloatingPointError: the loss or the gradient is not finite, on every rank; parameters are as before.
        """
        count = count_labels([batch.labels for batch in batches], self.mesh)
        share = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            loss = loss_share(self.model(batch.tokens, batch.cp), self.model.output_weight, batch.labels, count)
            loss.backward()
            share += loss.detach()
        gradients = [group.gradient for group in self._groups]
        reduce_gradients(gradients, self.mesh)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        loss, grad_norm = self.mesh.sum(share.clone()).item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._zero_gradients()
            self._raise_not_finite(loss, grad_norm, share.item())

        clip = self.settings.clip
        if clip is not None and grad_norm > clip:
            torch._foreach_mul_(gradients, clip / grad_norm)
        lr = self.settings.lr_at(self.step_count)
        for group in self._groups:
            _adamw(group, self.settings, lr, self.step_count + 1)
        self._zero_gradients()
        for group in self._groups:
            group.publish()
        self.step_count += 1
        return StepResult(loss, grad_norm, lr, int(count))

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """The loss over held-out batches, equal on all ranks; None where they hold no label."""
        self.model.eval()
        loss = evaluate(lambda b: self.model(b.tokens, b.cp), self.model.output_weight, batches, self.mesh)
        self.model.train()
        return loss

    def model_tensors(self) -> dict[str, Tensor]:
        """The master copy of every parameter by name: what a checkpoint holds and generation reads."""
        return {name: view for group in self._groups for name, view in group.views(group.master).items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of every parameter."""
        return {
            f"{kind}.{name}": view
            for group in self._groups
            for kind, flat in group.moments.items()
            for name, view in group.views(flat).items()
        }

    def load(self, step_count: int, model: dict[str, Tensor] | None, optimizer: dict[str, Tensor] | None) -> None:
        """Continue from a checkpoint: the first rank brings the tensors, the others pass None."""
        self.step_count = step_count
        if self.mesh.is_first:
            for own, theirs in ((self.model_tensors(), model), (self.optimizer_tensors(), optimizer)):
                for name, view in own.items():
                    view.copy_(theirs[name])
        for group in self._groups:
            for flat in (group.master, *group.moments.values()):
                self.mesh.broadcast(flat)
            group.publish()

    def _zero_gradients(self) -> None:
        for group in self._groups:
            group.gradient.zero_()

    def _raise_not_finite(self, loss: float, grad_norm: float, share: float) -> None:
        shares = self.mesh.gather(share)
        guilty = [rank for rank, value in enumerate(shares) if not math.isfinite(value)]
        where = f"first seen on rank(s) {guilty}" if guilty else "the loss itself is finite on every rank"
        raise FloatingPointError(
            f"step {self.step_count + 1}: loss {loss}, gradient norm {grad_norm}: not finite, {where}. "
            "Training stopped before the update. Lower optimizer.lr, lengthen optimizer.warmup_steps or look "
            "at the data of that step."
        )


class _FlatGroup:
    """Parameters with the same optimizer options, as one flat master buffer and one flat gradient buffer."""

    def __init__(self, members: dict[str, nn.Parameter], weight_decay: float, wide: torch.dtype):
        self.members, self.weight_decay = members, weight_decay
        self.master = torch.cat([p.detach().to(wide).reshape(-1) for p in members.values()])
        self.gradient = torch.zeros_like(self.master)
        self.moments = {kind: torch.zeros_like(self.master) for kind in ("exp_avg", "exp_avg_sq")}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """``flat`` cut into the members' shapes."""
        parts = flat.split([p.numel() for p in self.members.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.members.items(), parts, strict=True)}

    def attach(self, dtype: torch.dtype) -> None:
        """Give the model its parameters in ``dtype``; collect their gradients as autograd finishes them."""
        gradients = self.views(self.gradient)
        for name, view in self.views(self.master).items():
            parameter = self.members[name]
            parameter.data = view.to(dtype)  # the view itself where the dtype is the master's
            parameter.register_post_accumulate_grad_hook(_collector(gradients[name]))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master copy into the model's parameters, where they are not the same memory."""
        for name, view in self.views(self.master).items():
            parameter = self.members[name]
            if parameter.data_ptr() != view.data_ptr():
                parameter.data.copy_(view)


@torch.no_grad()
def _adamw(group: _FlatGroup, settings: OptimizerSettings, lr: float, step: int) -> None:
    """One AdamW update (arXiv 1711.05101, algorithm 2) of a flat buffer; ``step`` counts from 1."""
    (beta1, beta2), (mean, square) = settings.betas, group.moments.values()
    mean.lerp_(group.gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(group.gradient, group.gradient, value=1.0 - beta2)
    divisor = square.sqrt().div_((1.0 - beta2**step) ** 0.5).add_(settings.eps)
    group.master.mul_(1.0 - lr * group.weight_decay)
    group.master.addcdiv_(mean, divisor, value=-lr / (1.0 - beta1**step))


def _collector(target: Tensor):
    def collect(parameter: nn.Parameter) -> None:
        target.add_(parameter.grad)
        parameter.grad = None

    return collect

"""What every engine does: one optimizer step, by one rule, however the parameters are held.

A step: count the labels of all micro batches and ranks; forward and backward of each micro batch; sum the gradients
over all ranks; clip by the norm of that sum, which is the true global norm; update. Nothing is averaged. A cp rank is
a data-parallel rank to all this. An engine says how gradients are collected, measured and applied; which engines there
are, and what each holds: :mod:`lasp.parallel.engines.table`. Megatron has parameters, schedules and optimizers of its
own: :mod:`lasp.parallel.megatron.engine`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lasp import comm
from lasp.layout import SequenceLayout
from lasp.parallel.engines.kinds import EngineKind
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, LossModel, count_labels, evaluate


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks: mean loss per label, global gradient norm before clipping."""

    loss: float
    grad_norm: float
    lr: float
    labels: int


class Engine(ABC):
    """Trains a model over the ranks of a mesh.

    Args:
        shapes: of every trained parameter, by name.
        mesh: the job.
        settings: the optimizer's.
        dtype: what the model computes in.

    Attributes:
        step_count: optimizer steps done.
        num_parameters: trained parameters.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype
    ):
        self.shapes, self.mesh, self.settings, self.dtype = shapes, mesh, settings, dtype
        self.step_count = 0
        self.num_parameters = sum(math.prod(shape) for shape in shapes.values())

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro batches. Every rank brings equally many.

        Raises:
            ValueError: the step holds no label, on every rank.
            FloatingPointError: the loss or the gradient is not finite, on every rank; parameters are as before.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """The loss over held-out batches, equal on all ranks; None where they hold no label."""

    @abstractmethod
    def save(self, folder: Path) -> dict[str, Tensor]:
        """What this rank brings to a checkpoint. All ranks call it.

        Args:
            folder: of the checkpoint that is being written, where an engine may leave files of its own.

        Returns:
            tensors by name, for :func:`lasp.parallel.checkpoints.tensor_files.write_tensors`.
        """

    @abstractmethod
    def restore(self, step_count: int, read: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
        """Continue from a checkpoint. All ranks call it.

        Args:
            step_count: steps done.
            read: fills tensors by name in place; all ranks call it once, or none does.
            folder: of the checkpoint.
        """

    def _check_finite(self, loss: float, grad_norm: float, share: float) -> None:
        """Refuse a step whose loss or gradient norm is not finite; ``share`` is this rank's of the loss."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        shares = self.mesh.gather(share)
        guilty = [rank for rank, value in enumerate(shares) if not math.isfinite(value)]
        where = f"first seen on rank(s) {guilty}" if guilty else "the loss itself is finite on every rank"
        raise FloatingPointError(
            f"step {self.step_count + 1}: loss {loss}, gradient norm {grad_norm}: not finite, {where}. "
            "Training stopped before the update. Lower optimizer.lr, lengthen optimizer.warmup_steps or look "
            "at the data of that step."
        )


class ModuleEngine(Engine):
    """An engine around a module that computes on one rank: subclasses say how gradients are summed and applied.

    Args:
        kind: what the table of engines says of it.
        model: in fp32, on its device; called as ``model(tokens, cp)`` for hidden states, ``output_weight``
            is its output projection [vocab, dim]. The first rank's initial values are everybody's.
        mesh, settings: see :class:`Engine`.
        dtype: float32, bfloat16, or float64 (master copy in float64 too).

    Raises:
        ValueError: the engine cannot train in ``dtype``, on so few ranks, or without a package that is not installed.
    """

    def __init__(self, kind: EngineKind, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(
                f"dtype must be float32, bfloat16 or float64, got {dtype}: float16 would need loss scaling. "
                "Set dtype to bfloat16."
            )
        kind.check_available(str(dtype).removeprefix("torch."))
        kind.check_ranks(mesh.world_size)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__({name: tuple(p.shape) for name, p in named.items()}, mesh, settings, dtype)
        self.kind, self.model = kind, model
        self.loss = LossModel(model)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.decayed = {name for name, p in named.items() if p.dim() > 1}  # norms, biases and gates do not decay
        self._owners = _share_out({name: p.numel() for name, p in named.items()}, mesh.world_size)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """See :meth:`Engine.step`."""
        count = count_labels([batch.labels for batch in batches], self.mesh)
        share = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for index, batch in enumerate(batches):
            loss = self.loss(batch) / count  # shares of all ranks and micro batches add up to the loss
            self._backward(loss, last=index == len(batches) - 1)
            share += loss.detach()
        with comm.scope("gradients"):
            norm = self._collect_gradients()
            loss, grad_norm = self.mesh.sum(share.clone()).item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._zero_gradients()
        self._check_finite(loss, grad_norm, share.item())
        clip = self.settings.clip
        lr = self.settings.lr_at(self.step_count)
        self._update(lr, clip / grad_norm if clip is not None and grad_norm > clip else 1.0)
        self._zero_gradients()
        self.step_count += 1
        return StepResult(loss, grad_norm, lr, int(count))

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """See :meth:`Engine.evaluate`."""
        if self.kind.gathers_parameters:  # then all ranks must do equally many forwards
            missing = max(self.mesh.gather(len(batches))) - len(batches)
            batches = [*batches, *[self._blank()] * missing]
        self.model.eval()
        loss = evaluate(self.loss, batches, self.mesh)
        self.model.train()
        return loss

    def _blank(self) -> Batch:
        """A batch without a label: one token per cp rank."""
        size = self.mesh.cp_size
        tokens = torch.zeros(1, size, dtype=torch.int64)
        layout = SequenceLayout.contiguous(size, size)
        return Batch.cut(tokens, layout, self.mesh, loss_mask=torch.zeros_like(tokens, dtype=torch.bool))

    def save(self, folder: Path) -> dict[str, Tensor]:
        """:meth:`tensors`, and no files."""
        return self.tensors()

    def restore(self, step_count: int, read: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
        """See :meth:`Engine.restore`."""
        self.load(step_count, read)

    def owner_of(self, name: str) -> int:
        """The rank that writes a parameter which many hold: each writes about as many bytes."""
        return self._owners[name]

    def offload_activations(self) -> None:
        """Keep what forward passes save for their backward in host memory; see :mod:`lasp.parallel.engines.offload`."""
        from lasp.parallel.engines.offload import SavedTensors  # late: DTensor, which a ddp rank has no other use for

        SavedTensors(self.model, self.mesh.device, to_host=True)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of ``model.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of every parameter, for reading.

        In the master's dtype: DTensors of which this rank has a share, or whole tensors, each on one rank. All ranks
        call it.
        """

    @abstractmethod
    def load(self, step_count: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Continue from a checkpoint. All ranks call it; each calls ``read`` once.

        Args:
            step_count: steps done.
            read: fills the tensors that it is given by name, those of :meth:`tensors`, whole or DTensors, in place.
        """

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass of one micro batch, the last one of the step or not."""
        loss.backward()

    @abstractmethod
    def _collect_gradients(self) -> Tensor:
        """Sum this step's gradients over all ranks; their global norm, a scalar on the device."""

    @abstractmethod
    def _update(self, lr: float, factor: float) -> None:
        """One AdamW step with the collected gradients times ``factor``."""

    @abstractmethod
    def _zero_gradients(self) -> None:
        """Forget this step's gradients."""


def _share_out(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """A rank for each name: the largest first, each to the rank that has least."""
    loads, owners = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners

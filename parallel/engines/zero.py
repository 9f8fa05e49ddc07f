"""Engines ``zero0`` to ``zero3``: DeepSpeed's stages (ZeRO, arXiv 1910.02054) under our loss and gradient rule.

DeepSpeed cuts, reduces, gathers and applies; what is summed, measured and clipped is decided in
:mod:`lasp.parallel.engines.base`, between its backward and its step. It sees the ranks of dp x cp as one data-parallel
group. What a rank holds at which stage: :mod:`lasp.parallel.engines.zero_stages`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import comm
from lasp.parallel.checkpoints.checkpoint import MODEL, MOMENTS
from lasp.parallel.engines.base import ModuleEngine, StepResult
from lasp.parallel.engines.kinds import EngineKind
from lasp.parallel.engines.offload import SavedTensors
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.engines.zero_stages import Cut, Gathered, Whole, surroundings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch

_KINDS = (MODEL, *MOMENTS)


class ZeroEngine(ModuleEngine):
    """Trains a model with DeepSpeed's ZeRO; see :class:`lasp.parallel.engines.base.Engine`.

    Args:
        stage: 0 to 3.

    Raises:
        ValueError: DeepSpeed serves another device, or the mesh is not the whole default process group.
    """

    def __init__(
        self,
        kind: EngineKind,
        model: nn.Module,
        mesh: Mesh,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        *,
        stage: int,
    ):
        super().__init__(kind, model, mesh, settings, dtype)
        if mesh.ranks != tuple(range(dist.get_world_size())):
            raise ValueError(
                f"engine={kind.name} needs a mesh over all {dist.get_world_size()} ranks of the default process group "
                f"in their order, got ranks {mesh.ranks}: DeepSpeed waits for all of them. Build it with group=None."
            )
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in model.parameters():
            mesh.broadcast(p.data)
        exact = {name: p.detach() for name, p in parameters.items()} if dtype != self.wide else {}
        for p in model.parameters():
            p.data = p.data.to(dtype)
        self._parameters = parameters
        held = (Whole, Cut, Cut, Gathered)[stage]
        self._stage = held(stage, self.loss, parameters, self.decayed, exact, settings, mesh)
        self.loss = self._stage.deepspeed
        for name in list(exact):  # the master copy was made from rounded parameters
            self._stage.put(parameters[name], MODEL, exact.pop(name))
        self._stage.publish()
        self._saved = SavedTensors(model, mesh.device, to_host=False) if stage == 3 else None

    def offload_activations(self) -> None:
        """See :meth:`ModuleEngine.offload_activations`."""
        if self._saved is None:
            super().offload_activations()
        else:
            self._saved.to_host = True

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """See :meth:`Engine.step`."""
        with surroundings(self.mesh):
            return super().step(batches)

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """See :meth:`Engine.evaluate`."""
        with surroundings(self.mesh):
            return super().evaluate(batches)

    def tensors(self) -> dict[str, Tensor]:
        """The master copy and the moments, each whole in host memory of one rank; see :meth:`Engine.tensors`."""
        kept = {}
        for name, p in self._parameters.items():
            for kind in _KINDS:
                whole = self._stage.whole(p, kind)  # all ranks gather it
                if self.owner_of(name) == self.mesh.rank:
                    kept[f"{kind}.{name}"] = whole.detach().to("cpu", copy=True)
        return kept

    def load(self, step_count: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Every rank reads what it would write, and sends it; see :meth:`ModuleEngine.load`."""
        mine = [name for name in self._parameters if self.owner_of(name) == self.mesh.rank]
        owned = {f"{kind}.{name}": torch.empty(self.shapes[name], dtype=self.wide) for kind in _KINDS for name in mine}
        read(owned)
        for name, p in self._parameters.items():
            source = self.mesh.ranks[self.owner_of(name)]
            for kind in _KINDS:
                mine = owned.pop(f"{kind}.{name}", None)
                whole = torch.empty(self.shapes[name], dtype=self.wide, device=self.mesh.device)
                if mine is not None:
                    whole.copy_(mine)
                with comm.explained("broadcast", self.mesh.world_group):
                    dist.broadcast(whole, source, group=self.mesh.world_group)
                self._stage.put(p, kind, whole)
        self._stage.publish()
        self.step_count = step_count
        for state in self._stage.optimizer.state.values():
            state["step"].fill_(step_count)

    def _backward(self, loss: Tensor, last: bool) -> None:
        deepspeed = self._stage.deepspeed
        deepspeed.set_gradient_accumulation_boundary(last and self._stage.number > 0)
        deepspeed.backward(loss, scale_wrt_gas=False)

    def _collect_gradients(self) -> Tensor:
        square = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for gradient in self._stage.collect():
            square += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return (square if self._stage.number == 0 else self.mesh.sum(square)).sqrt()

    def _update(self, lr: float, factor: float) -> None:
        for group in self._stage.optimizer.param_groups:
            group["lr"] = lr
        if factor != 1.0:
            torch._foreach_mul_(self._stage.gradients(), factor)
        self._stage.step()

    def _zero_gradients(self) -> None:
        self._stage.forget()

"""Engine ``fsdp2``: every rank holds its share of parameters, gradients and optimizer states (torch ``fully_shard``).

Each block of the model is gathered before it computes and given back after it, in the forward and again in the
backward, where its gradient is summed and cut in the same collective, in fp32. The shares lie over all ranks of dp x
cp: a cp rank is a data-parallel rank here. For bfloat16 runs the share is the fp32 master copy and what is gathered is
bfloat16. Gradients of every micro batch are summed at once, so that no rank ever holds a whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lasp.parallel.checkpoints.checkpoint import MODEL, MOMENTS
from lasp.parallel.engines.base import ModuleEngine
from lasp.parallel.engines.kinds import EngineKind
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh


class ShardedEngine(ModuleEngine):
    """Trains a model of which every rank holds a share; see :class:`lasp.parallel.engines.base.Engine`.

    The modules of ``model.layers``, if there are any, are gathered one by one, the rest as one.
    """

    def __init__(self, kind: EngineKind, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype):
        super().__init__(kind, model, mesh, settings, dtype)
        model.to(self.wide)
        for p in model.parameters():
            mesh.broadcast(p.data)
        narrow = dtype != self.wide
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if narrow else None, reduce_dtype=self.wide if narrow else None, cast_forward_inputs=False
        )
        over = DeviceMesh.from_group(mesh.world_group, mesh.device.type)
        for module in [*getattr(model, "layers", ()), self.loss]:
            fully_shard(module, mesh=over, mp_policy=policy)
        for module in self.loss.modules():
            if isinstance(module, FSDPModule):  # sums, no averages
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decays = ((True, settings.weight_decay), (False, 0.0))
        groups = [
            {
                "params": [p for name, p in self._parameters.items() if (name in self.decayed) is chosen],
                "weight_decay": w,
            }
            for chosen, w in decays
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        for p in self._parameters.values():
            self._optimizer.state[p] = {"step": torch.tensor(0.0), **{kind: torch.zeros_like(p) for kind in MOMENTS}}

    def tensors(self) -> dict[str, Tensor]:
        """The shares of this rank, as DTensors."""
        kinds = {MODEL: self._parameters} | {
            kind: {name: self._optimizer.state[p][kind] for name, p in self._parameters.items()} for kind in MOMENTS
        }
        return {f"{kind}.{name}": x.detach() for kind, shares in kinds.items() for name, x in shares.items()}

    def load(self, step_count: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Every rank reads its shares; see :meth:`lasp.parallel.engines.base.ModuleEngine.load`."""
        read(self.tensors())
        self.step_count = step_count
        for p in self._parameters.values():
            self._optimizer.state[p]["step"].fill_(step_count)

    def _collect_gradients(self) -> Tensor:
        square = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for p in self._parameters.values():
            if p.grad is None:  # not used in this step: it decays all the same
                p.grad = torch.zeros_like(p)
            square += p.grad.to_local().double().square().sum()
        return self.mesh.sum(square).sqrt()

    def _update(self, lr: float, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if factor != 1.0:
            for p in self._parameters.values():
                p.grad.to_local().mul_(factor)
        self._optimizer.step()

    def _zero_gradients(self) -> None:
        self._optimizer.zero_grad()

"""Engine ``ddp``: replicated parameters, gradients summed over dp x cp, AdamW on flat fp32 buffers.

Parameters live twice at most: an fp32 *master* copy that the optimizer updates, laid out in one flat buffer
per weight-decay group, and the parameters that the model computes with, in the dtype of the run. For
float32 (and float64) both are the same memory: the model's parameters are views of the master buffer. For
bfloat16 they are rounded from it after each update. There is no autocast: what the model computes in bf16
is decided by its parameters' dtype, and what it keeps in fp32 (states, norms, the loss) by its own code.

Gradients of each micro batch are added to a flat buffer in the master's dtype as they appear; the buffer is
summed over all ranks once per step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasp.parallel.checkpoints.checkpoint import MODEL, MOMENTS
from lasp.parallel.engines.base import ModuleEngine
from lasp.parallel.engines.kinds import EngineKind
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import reduce_gradients


class DataParallelEngine(ModuleEngine):
    """Trains a model whose parameters every rank holds; see :class:`lasp.parallel.engines.base.Engine`."""

    def __init__(self, kind: EngineKind, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype):
        super().__init__(kind, model, mesh, settings, dtype)
        named = dict(model.named_parameters())
        decayed = {name: named[name] for name in self.shapes if name in self.decayed}
        rest = {name: named[name] for name in self.shapes if name not in self.decayed}
        decays = ((decayed, settings.weight_decay), (rest, 0.0))
        self._groups = [_FlatGroup(members, decay, self.wide) for members, decay in decays if members]
        for group in self._groups:
            mesh.broadcast(group.master)
            group.attach(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the master copy and the moments of those parameters that this rank writes."""
        mine = [name for name in self.shapes if self.owner_of(name) == self.mesh.rank]
        return {f"{kind}.{name}": views[name] for kind, views in self._views().items() for name in mine}

    def load(self, step_count: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Every rank reads all; see :meth:`lasp.parallel.engines.base.ModuleEngine.load`."""
        read({f"{kind}.{name}": view for kind, views in self._views().items() for name, view in views.items()})
        self.step_count = step_count
        for group in self._groups:
            group.publish()

    def _views(self) -> dict[str, dict[str, Tensor]]:
        """Of every parameter, by kind and name."""
        views: dict[str, dict[str, Tensor]] = {MODEL: {}, **{kind: {} for kind in MOMENTS}}
        for group in self._groups:
            for kind, flat in ((MODEL, group.master), *group.moments.items()):
                views[kind] |= group.views(flat)
        return views

    def _collect_gradients(self) -> Tensor:
        reduce_gradients([group.gradient for group in self._groups], self.mesh)
        views = [view for group in self._groups for view in group.views(group.gradient).values()]
        norms = torch._foreach_norm(views, 2.0, torch.float64)  # in fp32 millions of squares lose digits
        return torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, lr: float, factor: float) -> None:
        if factor != 1.0:
            torch._foreach_mul_([group.gradient for group in self._groups], factor)
        for group in self._groups:
            _adamw(group, self.settings, lr, self.step_count + 1)
            group.publish()

    def _zero_gradients(self) -> None:
        for group in self._groups:
            group.gradient.zero_()


class _FlatGroup:
    """Parameters with the same optimizer options, as one flat master buffer and one flat gradient buffer."""

    def __init__(self, members: dict[str, nn.Parameter], weight_decay: float, wide: torch.dtype):
        self.members, self.weight_decay = members, weight_decay
        self.master = torch.cat([p.detach().to(wide).reshape(-1) for p in members.values()])
        self.gradient = torch.zeros_like(self.master)
        self.moments = {kind: torch.zeros_like(self.master) for kind in MOMENTS}

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

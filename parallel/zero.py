"""Engines ``zero0`` to ``zero3``: DeepSpeed's stages (ZeRO, arXiv 1910.02054) under our loss and gradient rule.

    stage   a rank holds whole                      a rank holds its share of
    0       parameters, gradients, optimizer states
    1       parameters, gradients                   master copy, optimizer states
    2       parameters                              the same and the gradients
    3                                               everything

DeepSpeed cuts, reduces, gathers and applies; what is summed, measured and clipped is decided in
:mod:`lasp.parallel.engine`, between its backward and its step. It sees the ranks of dp x cp as one data-parallel group.
The model is given to it in the dtype of the run as if that were plain data: its own 16-bit modes would accumulate, or
send, gradients in 16 bits at some stage. The master copy, the sums of gradients and the moments are fp32 at every
stage. At stage 0 DeepSpeed has no master copy, so it is kept here.

The only file that imports deepspeed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import comm
from lasp.parallel.checkpoint import MODEL, MOMENTS
from lasp.parallel.engine import ModuleEngine, OptimizerSettings, StepResult
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from lasp.parallel.offload import SavedTensors

BUCKET_ELEMENTS = 2**26  # gradients summed at once: 256 MiB in fp32
PERSISTENT_ELEMENTS = 100_000  # stage 3 leaves parameters up to this size whole
LIVE_ELEMENTS = 10**9  # and keeps at most so many of the others whole, if they are needed again soon
_KINDS = (MODEL, *MOMENTS)


def check_available(engine: str, dtype: torch.dtype) -> None:
    """Refuse what cannot be before anything starts.

    Raises:
        ValueError: DeepSpeed is not installed, or has no stage for the dtype.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"engine={engine} needs DeepSpeed: pip install 'lasp[deepspeed]', or use engine=fsdp2.")
    if dtype == torch.float64:
        raise ValueError(
            f"engine={engine} computes in float32 or bfloat16, got dtype=float64: DeepSpeed's master copy is float32. "
            "Use engine=ddp or engine=fsdp2."
        )


class ZeroEngine(ModuleEngine):
    """Trains a model with DeepSpeed's ZeRO; see :class:`lasp.parallel.engine.Engine`.

    Args:
        stage: 0 to 3.

    Raises:
        ValueError: DeepSpeed is not there or serves another device, the dtype is float64, the job has one rank, or the
            mesh is not the whole default process group.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, settings: OptimizerSettings, dtype: torch.dtype, stage: int):
        super().__init__(model, mesh, settings, dtype)
        name = f"engine=zero{stage}"
        check_available(f"zero{stage}", dtype)
        if mesh.world_size == 1:
            raise ValueError(f"{name} needs at least 2 ranks to share states over, got 1. Use engine=ddp.")
        if mesh.ranks != tuple(range(dist.get_world_size())):
            raise ValueError(
                f"{name} needs a mesh over all {dist.get_world_size()} ranks of the default process group in their "
                f"order, got ranks {mesh.ranks}: DeepSpeed waits for all of them. Build the mesh with group=None."
            )
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in model.parameters():
            mesh.broadcast(p.data)
        exact = {name: p.detach() for name, p in parameters.items()} if dtype != self.wide else {}
        for p in model.parameters():
            p.data = p.data.to(dtype)
        self._parameters = parameters
        self._stage = (_Whole, _Cut, _Cut, _Gathered)[stage](stage, self, exact)
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
        with _surroundings(self.mesh):
            return super().step(batches)

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """See :meth:`Engine.evaluate`."""
        with _surroundings(self.mesh):
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
        """Every rank reads what it would write, and sends it; see :meth:`lasp.parallel.engine.ModuleEngine.load`."""
        mine = [name for name in self._parameters if self.owner_of(name) == self.mesh.rank]
        owned = {f"{kind}.{name}": torch.empty(self.shapes[name], dtype=self.wide) for kind in _KINDS for name in mine}
        read(owned)
        for name, p in self._parameters.items():
            source = self.mesh.ranks[self.owner_of(name)]
            for kind in _KINDS:
                whole = owned.pop(f"{kind}.{name}", torch.empty(0)).to(self.mesh.device)
                if not whole.numel():
                    whole = torch.empty(self.shapes[name], dtype=self.wide, device=self.mesh.device)
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


class _Stage(ABC):
    """What differs between the stages: where DeepSpeed keeps what.

    Attributes:
        deepspeed: its engine, called like the module in it.
        optimizer: ours, over the tensors that DeepSpeed made of the parameters.
    """

    def __init__(self, number: int, engine: ZeroEngine, exact: dict[str, Tensor]):
        self.number, self.mesh, self.parameters = number, engine.mesh, engine._parameters
        self.optimizer = self._optimizer(engine, exact)
        self.deepspeed = _initialize(number, engine.loss, self.optimizer, engine.mesh, engine.num_parameters)
        self.zero = self.deepspeed.optimizer
        for master in self._masters():  # as the first step would make them, so that they can be read and set before
            zeros = {kind: torch.zeros_like(master) for kind in MOMENTS}
            self.optimizer.state[master] = {"step": torch.tensor(0.0), **zeros}

    def _optimizer(self, engine: ZeroEngine, exact: dict[str, Tensor]) -> torch.optim.Optimizer:
        settings = engine.settings
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if (name in engine.decayed) is chosen],
                "weight_decay": decay,
            }
            for chosen, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """What the optimizer updates on this rank, in fp32."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """This rank's gradients of the step, in fp32."""

    def collect(self) -> list[Tensor]:
        """:meth:`gradients`, summed over all ranks."""
        return self.gradients()

    def step(self) -> None:
        """Update the master copy, and the parameters from it."""
        self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            raise FloatingPointError(
                "DeepSpeed skipped the update: its gradient norm is not finite. Lower optimizer.lr."
            )

    @abstractmethod
    def forget(self) -> None:
        """Drop this step's gradients."""

    @abstractmethod
    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        """The master copy or a moment of a parameter, on the device of every rank."""

    @abstractmethod
    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set the master copy or a moment of a parameter from its whole value, which every rank brings."""

    @abstractmethod
    def publish(self) -> None:
        """Round the master copy into the parameters."""


class _Whole(_Stage):
    """Stage 0: DeepSpeed reduces and steps; fp32 sums of gradients and, for bfloat16, master copies are ours."""

    def _optimizer(self, engine: ZeroEngine, exact: dict[str, Tensor]) -> torch.optim.Optimizer:
        bits16 = self.parameters
        self.master = {p: nn.Parameter(exact[name]) if name in exact else p for name, p in self.parameters.items()}
        self.sums = {p: torch.zeros_like(master) for p, master in self.master.items()}
        for p, total in self.sums.items():
            p.register_post_accumulate_grad_hook(_adder(total))
        self.parameters = {name: self.master[p] for name, p in bits16.items()}
        return super()._optimizer(engine, exact)

    def _masters(self) -> list[Tensor]:
        return list(self.master.values())

    def gradients(self) -> list[Tensor]:
        return list(self.sums.values())

    def collect(self) -> list[Tensor]:
        self.deepspeed.buffered_allreduce_fallback(grads=self.gradients(), elements_per_buffer=BUCKET_ELEMENTS)
        return self.gradients()

    def step(self) -> None:
        for p, master in self.master.items():
            master.grad = self.sums[p]
        self.deepspeed.set_gradient_accumulation_boundary(True)
        super().step()
        self.publish()

    def forget(self) -> None:
        for p, master in self.master.items():
            self.sums[p].zero_()
            master.grad = None

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        master = self.master[p]
        return master if kind == MODEL else self.optimizer.state[master][kind]

    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        self.whole(p, kind).detach().copy_(value)

    def publish(self) -> None:
        for p, master in self.master.items():
            if p is not master:
                p.data.copy_(master.data)


class _Cut(_Stage):
    """Stages 1 and 2: the optimizer updates a share of each flat group; parameters are whole."""

    def __init__(self, number: int, engine: ZeroEngine, exact: dict[str, Tensor]):
        super().__init__(number, engine, exact)
        self.zero._lazy_init_hp_params_optimizer_state()  # makes the moments known to deepspeed.utils

    def _masters(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def gradients(self) -> list[Tensor]:
        return [g for group in self.zero.averaged_gradients.values() for g in group]  # sums: gradient_allreduce_op

    def forget(self) -> None:
        self.zero.zero_grad()
        for held in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            held.update(dict.fromkeys(held))

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed import utils

        if kind == MODEL:
            return utils.safe_get_full_fp32_param(p)
        return utils.safe_get_full_optimizer_state(p, kind)

    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        if kind == MODEL:
            utils.safe_set_full_fp32_param(p, value)
        else:
            utils.safe_set_full_optimizer_state(p, value, kind)

    def publish(self) -> None:
        self.zero.update_lp_params()


class _Gathered(_Stage):
    """Stage 3: a parameter is whole while its module computes."""

    def _masters(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def gradients(self) -> list[Tensor]:
        return [g for group in self.zero.averaged_gradients.values() for g in group]

    def collect(self) -> list[Tensor]:
        torch._foreach_mul_(self.gradients(), self.mesh.world_size)  # this stage can only average
        return self.gradients()

    def forget(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients.clear()
        self.zero.grad_partitions_flat_buffer.zero_()  # or a parameter without gradient would meet its last one

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        from deepspeed import utils

        if kind == MODEL:
            return utils.safe_get_full_fp32_param(p)
        return utils.safe_get_full_optimizer_state(p, kind)

    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        size = p.ds_tensor.numel()  # the last share is padded
        flat = F.pad(value.flatten(), (0, size * self.mesh.world_size - value.numel()))
        share = flat[size * self.mesh.rank : size * (self.mesh.rank + 1)]
        if kind == MODEL:
            utils.safe_set_local_fp32_param(p, share)
        else:
            utils.safe_set_local_optimizer_state(p, share, kind)

    def publish(self) -> None:
        self.zero.parameter_offload.partition_all_parameters()
        for flat, master in zip(self.zero.fp16_partitioned_groups_flat, self._masters(), strict=True):
            flat.data.copy_(master.data)


def _adder(total: Tensor) -> Callable[[nn.Parameter], None]:
    def add(p: nn.Parameter) -> None:
        total.add_(p.grad)
        p.grad = None

    return add


class _Ranks:
    """The job as DeepSpeed asks for it: one data-parallel group of all ranks."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.world_group

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.world_size

    def get_data_parallel_rank(self) -> int:
        return self._mesh.rank

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _initialize(stage: int, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, elements: int) -> Any:
    """DeepSpeed's engine around ``module``: no process group, no compiled operator and no output of its own."""
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        zero |= {"compute_grad_norm": False}  # it is measured before the step
    if stage:
        zero |= {"reduce_bucket_size": min(BUCKET_ELEMENTS, elements)}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "memory_efficient_linear": False,  # would replace torch's function; SavedTensors does what it is for
        }
    config = {
        "train_micro_batch_size_per_gpu": 1,  # nothing depends on it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # done before the step
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "log_level": "error",
    }
    with _surroundings(mesh):
        import deepspeed

        # It uses torch's old names for collectives: a line per rank and call site.
        warnings.filterwarnings("ignore", message=".*_(tensor|base)` is deprecated", category=FutureWarning)
        deepspeed.utils.logger.setLevel("ERROR")
        served = deepspeed.get_accelerator().device_name()
        if served != mesh.device.type:
            raise ValueError(
                f"DeepSpeed serves {served} in this process and the run computes on {mesh.device.type}. Set device="
                f"{served}, or unset DS_ACCELERATOR and start a new process."
            )
        # An unprobed table: probing runs compilers, and the operator would be compiled on every rank.
        operators = vars(deepspeed.ops).setdefault("__compatible_ops__", defaultdict(bool))
        operators["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=_Ranks(mesh), dist_init_required=False
        )
    return engine


@contextlib.contextmanager
def _surroundings(mesh: Mesh) -> Iterator[None]:
    """The variables of the environment that DeepSpeed reads while it starts and while it computes."""
    values = {"LOCAL_RANK": str(mesh.device.index or 0)}  # the device that it makes tensors on
    if mesh.device.type == "cpu":
        values["DS_ACCELERATOR"] = "cpu"
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

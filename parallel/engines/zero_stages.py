"""What DeepSpeed holds at each ZeRO stage, and how it is read, set and stepped: the only file that imports deepspeed.

    stage   class      a rank holds whole                          a rank holds its share of
    0       Whole      parameters, gradients, optimizer states
    1       Cut        parameters, gradients                       master copy, optimizer states
    2       Cut        parameters                                  the same, and the gradients
    3       Gathered                                               everything

DeepSpeed is told that the model is plain data, whatever its dtype: its own 16-bit modes would accumulate, or send,
gradients in 16 bits at some stage. So the master copy, the sums of gradients and the moments are fp32 at every stage.
At stage 0 DeepSpeed has no master copy, so it is kept here.

It promises little of what is read here: a test of lasp.parallel.engines.zero says which name is gone, if one is.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.parallel.checkpoints.checkpoint import MODEL, MOMENTS
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.engines.zero_sizes import BUCKET_ELEMENTS, LIVE_ELEMENTS, PERSISTENT_ELEMENTS
from lasp.parallel.mesh import Mesh


class Stage(ABC):
    """What differs between the stages: where DeepSpeed keeps what.

    Args:
        number: 0 to 3.
        module: gives a loss; on its device, in the dtype of the run.
        parameters: its trained ones by name.
        decayed: names of those with weight decay.
        exact: fp32 values of the parameters where these were rounded, else empty.

    Attributes:
        deepspeed: its engine, called like ``module``.
        optimizer: ours, over the tensors that DeepSpeed made of the parameters.
    """

    def __init__(
        self,
        number: int,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        decayed: Set[str],
        exact: Mapping[str, Tensor],
        settings: OptimizerSettings,
        mesh: Mesh,
    ):
        self.number, self.mesh = number, mesh
        decays = ((True, settings.weight_decay), (False, 0.0))
        groups = [
            {
                "params": [self._optimized(p) for name, p in parameters.items() if (name in decayed) is chosen],
                "weight_decay": decay,
            }
            for chosen, decay in decays
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        elements = sum(p.numel() for p in parameters.values())
        self.deepspeed = _initialize(number, module, self.optimizer, mesh, elements)
        self.zero = self.deepspeed.optimizer
        for master in self._masters():  # as the first step would make them, so that they can be read and set before
            zeros = {kind: torch.zeros_like(master) for kind in MOMENTS}
            self.optimizer.state[master] = {"step": torch.tensor(0.0), **zeros}

    def _optimized(self, p: nn.Parameter) -> nn.Parameter:
        """What the optimizer is made with for a parameter."""
        return p

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

    def whole(self, p: nn.Parameter, kind: str) -> Tensor:
        """The master copy (``model``) or a moment of a parameter, on the device of every rank."""
        from deepspeed import utils

        if kind == MODEL:
            return utils.safe_get_full_fp32_param(p)
        return utils.safe_get_full_optimizer_state(p, kind)

    @abstractmethod
    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set the master copy or a moment of a parameter from its whole value, which every rank brings."""

    @abstractmethod
    def publish(self) -> None:
        """Round the master copy into the parameters."""


class Whole(Stage):
    """Stage 0: DeepSpeed reduces and steps; fp32 sums of gradients and, for bfloat16, master copies are ours."""

    def __init__(self, number, module, parameters, decayed, exact, settings, mesh):
        self.master = {p: nn.Parameter(exact[name]) if name in exact else p for name, p in parameters.items()}
        self.sums = {p: torch.zeros_like(master) for p, master in self.master.items()}
        for p, total in self.sums.items():
            p.register_post_accumulate_grad_hook(_adder(total))
        super().__init__(number, module, parameters, decayed, exact, settings, mesh)

    def _optimized(self, p: nn.Parameter) -> nn.Parameter:
        return self.master[p]

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


class Cut(Stage):
    """Stages 1 and 2: the optimizer updates a share of each flat group; parameters are whole."""

    def __init__(self, *args):
        super().__init__(*args)
        self.zero._lazy_init_hp_params_optimizer_state()  # makes the moments known to deepspeed.utils

    def _masters(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def gradients(self) -> list[Tensor]:
        return [g for group in self.zero.averaged_gradients.values() for g in group]  # sums: gradient_allreduce_op

    def forget(self) -> None:
        self.zero.zero_grad()
        for held in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            held.update(dict.fromkeys(held))

    def put(self, p: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        if kind == MODEL:
            utils.safe_set_full_fp32_param(p, value)
        else:
            utils.safe_set_full_optimizer_state(p, value, kind)

    def publish(self) -> None:
        self.zero.update_lp_params()


class Gathered(Stage):
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
    ranks = SimpleNamespace(  # one data-parallel group of all ranks of dp x cp
        get_data_parallel_group=lambda: mesh.world_group,
        get_data_parallel_world_size=lambda: mesh.world_size,
        get_data_parallel_rank=lambda: mesh.rank,
        get_model_parallel_group=lambda: None,
        get_model_parallel_world_size=lambda: 1,
        get_model_parallel_rank=lambda: 0,
    )
    with surroundings(mesh):
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
            model=module, optimizer=optimizer, config=config, mpu=ranks, dist_init_required=False
        )
    return engine


@contextlib.contextmanager
def surroundings(mesh: Mesh) -> Iterator[None]:
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

"""Engine ``megatron``: the native model on megatron-core's schedules, DDP, distributed optimizer and checkpoints.

One rule for loss and gradients, that of :mod:`lasp.parallel.objective`: every rank's share of the loss is its sum over
the global count of labels, and everything is summed. In Megatron's words that is ``calculate_per_token_loss`` without
the division at the end, which would round the count's inverse to fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from lasp.models.linear_llama import LinearLlama
from lasp.parallel.checkpoints.checkpoint import SHARDS
from lasp.parallel.engines.base import Engine, StepResult
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.gpt.weights import to_megatron
from lasp.parallel.megatron.layouts import LayoutParams
from lasp.parallel.megatron.model import build_chunks, set_values, transformer_config
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import IGNORED, Batch, count_labels

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class MegatronEngine(Engine):
    """Trains a native model as a Megatron GPTModel; see :class:`lasp.parallel.engines.base.Engine`.

    Args:
        model: its configuration, and the initial values; equal on all ranks, on the CPU, in fp32.
        mesh: of :func:`lasp.parallel.megatron.mesh.megatron_mesh`.
        settings: the optimizer's.
        dtype: float32 or bfloat16 (fp32 master weights).
        virtual_stages: model chunks per pipeline stage, None: one.
        sequence_parallel: Megatron's: norms on 1 / tp_size of the tokens.
        distributed_optimizer: optimizer states cut over dp x cp.

    Raises:
        ValueError: Megatron has no place for an option of the model; the mesh cannot cut it; another dtype.
    """

    def __init__(
        self,
        model: LinearLlama,
        mesh: Mesh,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        *,
        virtual_stages: int | None = None,
        sequence_parallel: bool = False,
        distributed_optimizer: bool = True,
    ):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16 with backend=megatron, got {dtype}: its optimizers.")
        super().__init__({name: tuple(p.shape) for name, p in model.named_parameters()}, mesh, settings, dtype)
        options = {"virtual_stages": virtual_stages, "sequence_parallel": sequence_parallel}
        self.config = transformer_config(model.config, mesh, dtype, **options)
        models = build_chunks(model.config, self.config)
        values = to_megatron(dict(model.named_parameters()), model.config)
        for chunk in models:
            set_values(chunk, values, mesh)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
        )
        if dtype == torch.bfloat16:
            models = [Float16Module(self.config, chunk) for chunk in models]
        self.chunks = [DistributedDataParallel(self.config, ddp, chunk) for chunk in models]
        for chunk in self.chunks:
            chunk.broadcast_params()
            _keep_padding(chunk)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.eps,
                clip_grad=settings.clip or 0.0,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=distributed_optimizer,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        for part in self.optimizer.chained_optimizers:
            _allocate_state(part.optimizer)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """See :meth:`lasp.parallel.engines.base.Engine.step`."""
        count = int(count_labels([batch.labels for batch in batches], self.mesh)) // self.mesh.copies
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = run_schedule(self.chunks, batches, self.mesh, count)
        self.optimizer.prepare_grads()
        loss, grad_norm = self.mesh.sum(share.clone()).item(), float(self.optimizer.get_grad_norm())
        self._check_finite(loss, grad_norm, share.item())
        lr = self.settings.lr_at(self.step_count)
        for group in self.optimizer.param_groups:
            group |= {"lr": lr, "betas": self.settings.betas, "eps": self.settings.eps}  # a checkpoint brings its own
            group["weight_decay"] = self.settings.weight_decay * group["wd_mult"]  # 0 for norms, biases and gates
        self.optimizer.step()  # prepares and measures again: Megatron has no step that takes the norm
        self.step_count += 1
        return StepResult(loss, grad_norm, lr, count)

    def evaluate(self, batches: Sequence[Batch]) -> float | None:
        """See :meth:`lasp.parallel.engines.base.Engine.evaluate`."""
        for chunk in self.chunks:
            chunk.eval()
        total = run_schedule(self.chunks, batches, self.mesh)
        for chunk in self.chunks:
            chunk.train()
        count = sum(((batch.labels != IGNORED).sum() for batch in batches), torch.zeros_like(total))
        loss, count = self.mesh.sum(torch.stack([total, count / self.mesh.copies])).tolist()
        return loss / count if count else None

    def save(self, folder: Path) -> dict[str, Tensor]:
        """Megatron's distributed checkpoint in ``folder / SHARDS``: every rank writes its part of it.

        Raises:
            ValueError: a rank does not see the folder.
        """
        self._check_shared(folder)
        if self.mesh.is_first:
            (folder / SHARDS).mkdir()
        self.mesh.gather(None)  # the folder is there
        dist_checkpointing.save(self._sharded(is_loading=False), str(folder / SHARDS))
        return {}

    def restore(self, step_count: int, read: Any, folder: Path) -> None:
        """Read :meth:`save`'s files, at any sizes of the mesh.

        Raises:
            ValueError: a rank does not see the folder.
        """
        self._check_shared(folder)
        state = dist_checkpointing.load(self._sharded(is_loading=True), str(folder / SHARDS))
        for i, chunk in enumerate(self.chunks):
            inner(chunk).load_state_dict(state[_key(i, self.chunks)])
        for part in self.optimizer.chained_optimizers:
            _load_optimizer(part, state["optimizer"])
        self.step_count = step_count

    def _check_shared(self, folder: Path) -> None:
        blind = [rank for rank, seen in enumerate(self.mesh.gather(folder.is_dir())) if not seen]
        if blind:
            raise ValueError(
                f"checkpoints of backend=megatron are written and read by all ranks, and ranks {blind} do not see "
                f"{folder}. Put run_dir on a file system that all nodes share."
            )

    def _sharded(self, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer as Megatron's sharded state."""
        state = {
            _key(i, self.chunks): inner(chunk).sharded_state_dict(metadata=_SHARDING)
            for i, chunk in enumerate(self.chunks)
        }
        return {**state, "optimizer": self.optimizer.sharded_state_dict(state, is_loading, metadata=_SHARDING)}


def _allocate_state(optimizer: torch.optim.Optimizer | None) -> None:
    """Megatron's checkpoints read the states of torch's Adam before its first step has made them."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                moments = {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(0.0), **moments}


def _keep_padding(chunk: DistributedDataParallel) -> None:
    """Checkpoint a buffer with the padding at the end of its buckets.

    Megatron-Core 0.16 leaves it out of what it saves, yet reads parameters at their places with it: those of the second
    bucket, a tied embedding, would be saved shifted. Nothing else reads these sizes.
    """
    for buffer in chunk.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _load_optimizer(part: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load one optimizer.

    With torch's Adam, which keeps a step per parameter, the distributed one of 0.16 asks the checkpoint for steps that
    it did not save, and makes one tensor of all, which every parameter would then count up.
    """
    if "param_state" not in state:
        part.load_state_dict(state)
        return
    part.load_state_dict({k: v for k, v in state.items() if not k.startswith("param_state")})
    steps = {p: own.pop("step") for p, own in part.optimizer.state.items() if "step" in own}
    part.load_parameter_state_from_fully_reshardable(state["param_state"])
    for p, step in steps.items():
        part.optimizer.state[p]["step"] = step.clone()


def run_schedule(chunks: list[nn.Module], batches: Sequence[Batch], mesh: Mesh, count: int | None = None) -> Tensor:
    """Micro batches through the pipeline.

    Args:
        chunks: of this stage, in Megatron's DDP, which gets the summed gradients.
        batches: of this rank; with ``count`` all of one length.
        count: labels of the whole step, that the loss is divided by. None: forward only, and the loss is a sum.

    Returns:
        this rank's share of the loss, fp64: 0 on ranks that do not see it, or as a second one.

    Raises:
        ValueError: lengths that differ, with ``count``; tokens that sequence parallelism cannot cut.
    """
    lengths = {batch.cp.layout.total_tokens for batch in batches}
    if count is not None and len(lengths) > 1:  # each schedule would sum the gradients over ranks again
        raise ValueError(f"the sequences of a step must have one length, got {sorted(lengths)}. Pad or cut them.")
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    many = len(chunks) > 1
    # Stages send tensors of one shape. By the whole length, so that all cp ranks have the same groups.
    for _, same in groupby(batches, lambda batch: batch.cp.layout.total_tokens):
        group = list(same)
        length = group[0].cp.num_tokens
        if inner(chunks[0]).config.sequence_parallel and length % mesh.tp_size:
            raise ValueError(
                f"megatron.sequence_parallel cuts the {length} tokens of a cp rank over tp_size = {mesh.tp_size} "
                "ranks, which does not divide them. Choose a data.seq_len that it divides, or leave it out."
            )
        padded = _whole_groups(group, mesh, len(chunks))
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, count or 1),
            data_iterator=[iter(padded) for _ in chunks] if many else iter(padded),
            model=chunks if many else chunks[0],
            num_microbatches=len(padded),
            seq_length=length * mesh.cp_size,
            micro_batch_size=1,
            forward_only=count is None,
        )
        if mesh.tp_rank == 0:  # the last stage has them, every tp rank the same
            total += sum(report["loss"] for report in reports)
    return total


def _whole_groups(batches: Sequence[Batch], mesh: Mesh, num_chunks: int) -> list[Batch]:
    """An interleaved schedule takes micro batches by the number of stages: fill up with some without labels."""
    missing = -len(batches) % mesh.pp_size if num_chunks > 1 else 0
    idle = [Batch(b.tokens, torch.full_like(b.labels, IGNORED), b.cp) for b in batches[-1:]]
    return [*batches, *idle * missing]


def _forward_step(count: int, batches: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Any]:
    """One micro batch through this rank's part of the model, and what the last stage makes of its output."""
    batch = next(batches)
    labels = batch.labels.where(batch.labels != IGNORED, 0)
    output = chunk(batch.tokens, None, None, labels=labels, packed_seq_params=LayoutParams(batch.cp))
    return output, partial(_loss, batch.labels, count)


def _loss(labels: Tensor, count: int, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token losses [1, T_local] to their share of the mean, Megatron's own count, which is not used, and the share."""
    labelled = labels != IGNORED
    share = losses.where(labelled, 0.0).sum() / count
    return share, labelled.sum().int(), {"loss": share.detach().double()}


def inner(chunk: nn.Module) -> nn.Module:
    """A GPTModel without Megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _key(i: int, chunks: list[nn.Module]) -> str:
    """Name of a chunk's part of the state: keys inside it are global, whatever the number of chunks."""
    return f"model{i}" if len(chunks) > 1 else "model"

"""One training step of a model on a Megatron mesh, without its update, and what can be compared with another run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn

from lasp.models.linear_llama import LinearLlama
from lasp.parallel.gpt.weights import to_megatron
from lasp.parallel.megatron.engine import inner, run_schedule
from lasp.parallel.megatron.model import build_chunks, cut_dim, global_parameters, set_values, transformer_config
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import IGNORED, Batch, count_labels


def trace_step(
    model: LinearLlama,
    batch: Batch,
    eval_batches: list[Batch],
    mesh: Mesh,
    *,
    virtual_stages: int | None = None,
    sequence_parallel: bool = False,
) -> dict[str, Tensor]:
    """Forward and backward of one micro batch through Megatron's schedule and DDP.

    Args:
        model: the configuration, the values and the dtype; equal on all ranks.
        batch: this rank's part of one sequence.
        eval_batches: held-out sequences.
        mesh: of :func:`lasp.parallel.megatron.mesh.megatron_mesh`.

    Returns:
        what this rank has: ``output.I`` and ``gradient.I`` [T_local, dim] of its layers (-1: the embedding; with
        sequence parallelism [T_local / tp, dim]); ``parameter.DIM.NAME``, its shard of the gradient, cut along DIM (or
        none), by Megatron's global names; ``loss`` and, with ``eval_batches``, ``eval_loss`` of the whole mesh.
    """
    options = {"virtual_stages": virtual_stages, "sequence_parallel": sequence_parallel}
    config = transformer_config(model.config, mesh, model.embed.weight.dtype, **options)
    models = build_chunks(model.config, config)
    values = to_megatron(dict(model.named_parameters()), model.config)
    for chunk in models:
        set_values(chunk, values, mesh)
    chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in models]
    count = int(count_labels([batch.labels], mesh)) // mesh.copies
    trace: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(_watch(trace, i)) for i, module in _blocks(models)]
    try:
        share = run_schedule(chunks, [batch], mesh, count)
    finally:
        for hook in hooks:
            hook.remove()
    for chunk in chunks:
        for name, parameter in global_parameters(inner(chunk)).items():
            dim = cut_dim(parameter) if mesh.tp_size > 1 else None
            trace[f"parameter.{'none' if dim is None else dim}.{name}"] = parameter.main_grad.detach().clone()
    trace["loss"] = mesh.sum(share.reshape(1))
    for chunk in chunks:
        chunk.eval()
    total = run_schedule(chunks, eval_batches, mesh)
    labels = sum((int((b.labels != IGNORED).sum()) for b in eval_batches), 0)
    total, labels = mesh.sum(torch.stack([total, total.new_tensor(labels / mesh.copies)]))
    if labels:
        trace["eval_loss"] = (total / labels).reshape(1)
    return {name: value.cpu().contiguous() for name, value in trace.items()}


def _blocks(models: list[nn.Module]) -> list[tuple[int, nn.Module]]:
    """The layers of this rank with their global indices, and the embedding as -1."""
    found = [(layer.layer_number - 1, layer) for chunk in models for layer in chunk.decoder.layers]
    return found + [(-1, chunk.embedding) for chunk in models if chunk.pre_process]


def _watch(trace: dict[str, Tensor], index: int) -> Callable[..., None]:
    """Keeps a block's output [T_local, 1, dim] and the gradient that arrives at it, of the first micro batch alone.

    An interleaved schedule is filled up with others.
    """
    seen = False

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
        nonlocal seen
        x = output[0] if isinstance(output, tuple) else output
        trace.setdefault(f"output.{index}", x.detach().flatten(0, -2))
        if torch.is_grad_enabled() and not seen:  # a recomputed layer runs without gradients first
            seen = True
            x.register_hook(lambda grad: trace.__setitem__(f"gradient.{index}", grad.detach().flatten(0, -2)))

    return keep

"""What the ranks of a Megatron mesh traced, put together under the names of the native model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lasp.models.config import ModelConfig
from lasp.parallel.gpt.weights import join, to_native


def join_traces(
    ranks: Sequence[Mapping[str, Tensor]],
    model: ModelConfig,
    tp_size: int,
    cp_size: int,
    *,
    sequence_parallel: bool = False,
) -> list[dict[str, Tensor]]:
    """One trace per cp rank: all pipeline stages, and shards of tensor parallelism, as one model.

    Args:
        ranks: of :func:`lasp.parallel.megatron.trace.trace_step`, in the order of the mesh: tp, cp, pp; dp_size is 1.
        model: the native configuration.
        tp_size, cp_size: of the mesh.
        sequence_parallel: outputs are cut over tp, too.

    Returns:
        ``output.I``, ``gradient.I``, ``parameter.NAME`` by native names, ``loss``, ``grad_norm`` and ``eval_loss``.
    """
    return [
        _join([ranks[i : i + tp_size] for i in range(cp_rank * tp_size, len(ranks), cp_size * tp_size)], model, cut)
        for cut in [sequence_parallel]
        for cp_rank in range(cp_size)
    ]


def _join(stages: list[Sequence[Mapping[str, Tensor]]], model: ModelConfig, cut_outputs: bool) -> dict[str, Tensor]:
    trace: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for shards in stages:
        for name, first in shards[0].items():
            kind, _, rest = name.partition(".")
            parts = [shard[name] for shard in shards]
            if kind == "parameter":
                dim, _, rest = rest.partition(".")
                gradients[rest] = join(rest, parts, None if dim == "none" else int(dim))
            else:
                trace[name] = torch.cat(parts) if cut_outputs and kind in ("output", "gradient") else first
    gradients = {name: x.contiguous() for name, x in to_native(gradients, model).items()}
    trace["grad_norm"] = torch.stack([g.double().norm() for g in gradients.values()]).norm().reshape(1)
    return trace | {f"parameter.{name}": x for name, x in gradients.items()}

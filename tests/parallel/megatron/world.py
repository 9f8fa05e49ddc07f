"""A small GPT on any Megatron mesh of eight gloo ranks, and the same model in one process, with equal weights.

Weights and gradients go by global names (``decoder.layers.2...``) and global shapes: every value is a function of
its name, so a mesh cannot change it, and a sharded gradient is put together before it is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lasp import comm
from tests.harness import KEPT
from tests.parallel.megatron.shim import megatron_on_cpu

VOCAB, LENGTH, BATCH, MICROBATCHES = 64, 32, 2, 2
DOCUMENTS = (0, 8, 16, 32)  # of a packed batch, each padded to a multiple of 8
PADDING = (3, 3, 10)  # tokens at the end of documents that count for no loss; a power of two counts, because
# Megatron divides gradients by the count in fp32


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a mesh. ``dp`` follows from the eight ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int | None = None
    layout: str | None = None  # which layers each stage has, where it is not the same number
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float64
    pattern: str = "LLSL"
    mixer: Any = "basic"
    order: str = "zigzag"
    groups: int = 2
    window: int | None = None
    packed: bool = False
    exchange: str = "all_gather"
    softmax_exchange: str = "all_gather"
    spread: bool = False  # micro-batches over data-parallel ranks; else each has all of them
    distributed_optimizer: bool = False
    recompute: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def alone(self) -> Case:
        """The same model on a mesh of one."""
        return dataclasses.replace(
            self, tp=1, pp=1, cp=1, vp=None, layout=None, sequence_parallel=False, recompute=None
        )


def on_cpu(fn):
    """Runs a rank's function under the shim, with one thread and without Megatron's warnings."""

    @functools.wraps(fn)
    def wrapped(*args):
        with warnings.catch_warnings(), megatron_on_cpu():
            warnings.simplefilter("ignore")
            return fn(*args)

    return wrapped


_MESHES: dict[tuple, tuple[dict, set]] = {}  # of the last two meshes: Megatron's globals, and the groups in them


def enter_mesh(case: Case) -> None:
    """Megatron's process groups for the case, and its random generators.

    Groups are globals of one module. To make them takes a second, to keep many of them costs every rank its threads: a
    case and its run on one rank find theirs again, older ones end with the case (see the pool).
    """
    from megatron.core import parallel_state, tensor_parallel

    mesh = case.tp, case.pp, case.vp, case.cp
    found = dist.distributed_c10d._world.pg_map
    if mesh not in _MESHES:
        while len(_MESHES) > 1:
            KEPT.difference_update(_MESHES.pop(next(iter(_MESHES)))[1])
        before = set(found)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            *mesh[:3], context_parallel_size=case.cp, create_gloo_process_groups=False
        )
        values = {name: x for name, x in vars(parallel_state).items() if name.startswith("_") and name.isupper()}
        _MESHES[mesh] = values, set(found) - before
        KEPT.update(_MESHES[mesh][1])
    vars(parallel_state).update(_MESHES[mesh][0])
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def make_config(case: Case):
    """The TransformerConfig of a case."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    recompute = {
        None: {},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    }[case.recompute]
    return TransformerConfig(
        **{
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": case.groups,
            "ffn_hidden_size": 48,
            "tensor_model_parallel_size": case.tp,
            "pipeline_model_parallel_size": case.pp,
            "virtual_pipeline_model_parallel_size": case.vp,
            "pipeline_model_parallel_layout": case.layout,
            "context_parallel_size": case.cp,
            "sequence_parallel": case.sequence_parallel,
            "params_dtype": case.dtype,
            "pipeline_dtype": case.dtype,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "calculate_per_token_loss": True,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            **recompute,
            **case.config,
        }
    )


class Norm(nn.LayerNorm):
    """Megatron's local LayerNorm refuses sequence parallelism: it does not mark its parameters. This one does."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def make_chunks(case: Case, config=None) -> list[nn.Module]:
    """This rank's model chunks, one or one per virtual stage, with the weights of their names."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from lasp.cp_context import ExchangeOptions
    from lasp.parallel.megatron import CPContexts, hybrid_layer_spec

    config = config or make_config(case)
    chunks = []
    for stage in range(case.vp or 1):
        vp_stage = None if case.vp is None else stage
        block = hybrid_layer_spec(
            config,
            case.pattern,
            mixer=case.mixer,
            order=case.order,
            window=case.window,
            vp_stage=vp_stage,
            contexts=CPContexts(case.order, ExchangeOptions(case.exchange, case.softmax_exchange)),
        )
        block.layer_norm = Norm
        for layer in block.layer_specs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        chunk = GPTModel(
            config,
            block,
            VOCAB,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        chunk.to(case.dtype)
        set_weights(chunk)
        chunks.append(chunk)
    return chunks


def global_name(chunk: nn.Module, name: str) -> str:
    """``decoder.layers.0...`` of a stage as the model counts it."""
    parts = name.removeprefix("module.").split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def cut(parameter: torch.Tensor) -> int | None:
    """The dimension along which TP cuts a parameter."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def set_weights(chunk: nn.Module) -> None:
    """Every parameter: normal values by its name, around 1 for norms; the shard of this TP rank."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            name, dim, shape = global_name(chunk, name), cut(parameter), list(parameter.shape)
            if dim is not None:
                shape[dim] *= size
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(shape, generator=generator) * 0.2  # fp32, so that models in fp32 and fp64 are equal
            if "norm" in name and name.endswith("weight"):
                value += 1
            parameter.copy_(value if dim is None else value.chunk(size, dim)[rank])


def batches(case: Case) -> list[dict[str, torch.Tensor]]:
    """The micro-batches, whole: tokens, labels, loss_mask and position_ids, [B, T]."""
    found = []
    for i in range(MICROBATCHES):
        rows = 1 if case.packed else BATCH
        tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(i))
        positions, mask = torch.arange(LENGTH), torch.ones(rows, LENGTH)
        if case.packed:
            for start, stop, unused in zip(DOCUMENTS, DOCUMENTS[1:], PADDING, strict=False):
                positions[start:stop] -= start
                mask[:, stop - unused : stop] = 0
        found.append(
            {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": mask,
                "position_ids": positions.expand(rows, -1),
            }
        )
    return found


def packing(case: Case):
    """PackedSeqParams of a packed batch, None of another."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if not case.packed:
        return None
    borders = torch.tensor(DOCUMENTS, dtype=torch.int32)
    longest = max(b - a for a, b in zip(DOCUMENTS, DOCUMENTS[1:], strict=False))
    return PackedSeqParams("thd", borders, borders, borders, borders, longest, longest)


def shard(case: Case, batch: dict[str, torch.Tensor], chunks) -> dict[str, torch.Tensor]:
    """This cp rank's part: cut by Megatron; by the documents; or by the contiguous order."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if case.packed:
        from lasp.parallel.megatron.contexts import packed_layout

        layout = packed_layout(list(DOCUMENTS), case.cp)
        rank = parallel_state.get_context_parallel_rank()
        return {name: layout.shard(x, rank) for name, x in batch.items()}
    if case.order == "contiguous" and case.cp > 1:
        return chunks.order.shard(batch)
    return get_batch_on_this_cp_rank(dict(batch))


def token_losses(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Sum, count and report of one micro-batch."""
    total = (losses * loss_mask).sum()
    count = loss_mask.sum().int()
    return total, count, {"loss": torch.stack([total.detach(), count.to(total)])}


class Chunks(list):
    """Model chunks, and for contiguous order its owner."""

    order = None


def prepare(case: Case) -> Chunks:
    """Mesh, chunks in Megatron's DDP, and the functions that schedules read from the config."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    enter_mesh(case)
    config = make_config(case)
    config.finalize_model_grads_func = finalize_model_grads
    models = make_chunks(case, config)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=case.distributed_optimizer)
    chunks = Chunks(DistributedDataParallel(config, ddp, model) for model in models)
    if case.order == "contiguous" and case.cp > 1:
        from lasp.parallel.megatron import ContiguousOrder

        chunks.order = ContiguousOrder(models)
    return chunks


def run_step(case: Case, chunks: Chunks) -> torch.Tensor:
    """All micro-batches forward and backward through Megatron's schedule: the loss on the last stage, else None."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator, model):
        batch, packed = shard(case, next(iterator), chunks), packing(case)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
        return losses, functools.partial(token_losses, batch["loss_mask"])

    for chunk in chunks:
        chunk.zero_grad_buffer()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = batches(case)[rank::size] if case.spread else batches(case)
    rows = 1 if case.packed else BATCH
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(own) for _ in chunks] if len(chunks) > 1 else iter(own),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(own),
        seq_length=LENGTH,
        micro_batch_size=rows,
        forward_only=False,
    )
    if not reports:
        return None
    total = torch.stack([report["loss"] for report in reports]).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]


def gather(chunks: Chunks, read: Callable[[nn.Parameter], torch.Tensor]) -> dict:
    """By global name: this TP rank, the dimension that TP cuts, and what ``read`` finds of the parameter."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    return {
        global_name(chunk.module, name): (rank, cut(parameter), read(parameter).detach().clone())
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


@on_cpu
def distributed_step(group, case: Case):
    """(loss, gradients, calls on the wire) of this rank."""
    chunks = prepare(case)
    with comm.record() as ledger:
        loss = run_step(case, chunks)
    return loss, gather(chunks, lambda p: p.main_grad), dict(ledger.calls)


def lone_model(case: Case) -> nn.Module | None:
    """The model of a mesh of one, on rank 0."""
    enter_mesh(case.alone())
    return make_chunks(case.alone())[0] if dist.get_rank() == 0 else None


def lone_loss(case: Case, model: nn.Module) -> torch.Tensor:
    """The mean loss over all micro-batches."""
    total = count = 0
    for batch in batches(case):
        given = {"labels": batch["labels"], "packed_seq_params": packing(case)}
        losses = model(batch["tokens"], batch["position_ids"], None, **given)
        total, count = total + (losses * batch["loss_mask"]).sum(), count + batch["loss_mask"].sum()
    return total / count


@on_cpu
def lone_step(group, case: Case):
    """(loss, gradients) of one process, by plain autograd: no schedule, no DDP."""
    model = lone_model(case)
    if model is None:
        return None
    loss = lone_loss(case, model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole(parts: list[dict[str, tuple[int, int | None, torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
    """By name, every replica of each gradient, its TP shards put together."""
    found: dict[str, dict[int, list]] = {}
    dims = {}
    for part in parts:
        for name, (rank, dim, gradient) in part.items():
            found.setdefault(name, {}).setdefault(rank, []).append(gradient)
            dims[name] = dim
    put = {}
    for name, shards in found.items():
        if dims[name] is None:
            put[name] = [g for replicas in shards.values() for g in replicas]
        else:
            put[name] = [torch.cat(row, dims[name]) for row in zip(*(shards[r] for r in sorted(shards)), strict=True)]
    return put

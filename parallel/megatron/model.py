"""A LinearLlama as a Megatron GPTModel: the same configuration, the same weights, cut over TP and PP."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lasp.models.config import ModelConfig
from lasp.models.layers import RMSNorm
from lasp.parallel.gpt.rules import check_model
from lasp.parallel.gpt.weights import canonical_name, cut, padded_vocab_size
from lasp.parallel.megatron.layouts import LayoutOrder
from lasp.parallel.megatron.specs import hybrid_layer_spec
from lasp.parallel.mesh import Mesh


def transformer_config(
    model: ModelConfig,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    virtual_stages: int | None = None,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of a native model on a mesh.

    Raises:
        ValueError: Megatron has no place for an option of the model, or the mesh cannot cut it.
    """
    check_model(model, mesh, virtual_stages, sequence_parallel)
    linear, softmax = "L" in model.layer_kinds, "S" in model.layer_kinds
    rotated = [kind == "S" or model.mixer.position == "rope" for kind in model.layer_kinds]
    recompute = {"granularity": "full", "method": "uniform", "num_layers": 1} if model.recompute else {}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.dim,
        num_attention_heads=model.mixer_heads if linear else model.heads,
        num_query_groups=model.kv_heads or (model.heads if softmax else model.mixer_heads),
        kv_channels=model.softmax_head_dim if softmax else model.key_dim,
        ffn_hidden_size=model.hidden_dim,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        no_rope_freq=[int(not turns) for turns in rotated],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=mesh.cp_size,
        sequence_parallel=sequence_parallel,
        calculate_per_token_loss=True,  # gradients are summed
        finalize_model_grads_func=_finalize,
        init_method=nn.init.zeros_,  # the native model's values are put in; without any, TP marks no parameter
        output_layer_init_method=nn.init.zeros_,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **{f"recompute_{name}": value for name, value in recompute.items()},
    )


def _finalize(chunks: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Sum gradients over ranks; the loss has been divided by the count of labels already."""
    finalize_model_grads(chunks, None, **options)


def build_chunks(model: ModelConfig, config: TransformerConfig) -> list[GPTModel]:
    """This rank's part of the model, one chunk per virtual stage, without values."""
    mixer = replace(model.mixer, position="none", heads=None, key_dim=None, value_dim=None, expand_k=1.0, expand_v=1.0)
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages or 1):
        vp_stage = None if stages is None else stage
        spec = hybrid_layer_spec(
            config,
            model.pattern,
            mixer=mixer,
            window=model.window,
            linear_query_groups=model.mixer_heads if model.kv_heads and "L" in model.layer_kinds else None,
            vp_stage=vp_stage,
        )
        if config.sequence_parallel and importlib.util.find_spec("transformer_engine") is None:
            spec.layer_norm = _SequenceParallelNorm
            for layer in spec.layer_specs:
                layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _SequenceParallelNorm
        chunk = GPTModel(
            config,
            spec,
            padded_vocab_size(model),
            max_sequence_length=0,  # of learnt positions, which there are none of
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            share_embeddings_and_output_weights=model.tie_embeddings,
            vp_stage=vp_stage,
        )
        if chunk.post_process:
            chunk.output_layer.register_forward_hook(partial(_hide_padding, model.vocab_size))
        chunks.append(chunk.to(config.params_dtype))
    LayoutOrder(chunks)
    return chunks


class _SequenceParallelNorm(RMSNorm):
    """An RMSNorm whose gradient Megatron sums over TP: its own local norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.init_parameters()
        self.weight.sequence_parallel = True


def _hide_padding(vocab_size: int, layer: nn.Module, _: tuple, output: tuple) -> tuple:
    """Logits [T, B, rows of this TP rank]: those of no token are -inf, so that they are no part of the softmax."""
    logits, bias = output
    known = max(0, vocab_size - layer.tp_group.rank() * logits.shape[-1])
    if known >= logits.shape[-1]:
        return output
    padding = torch.arange(logits.shape[-1], device=logits.device) >= known
    return logits.masked_fill(padding, float("-inf")), bias


def global_parameters(chunk: MegatronModule) -> dict[str, nn.Parameter]:
    """A chunk's parameters under the names that they have in a model of one stage."""
    found = {}
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        found[canonical_name(".".join(parts))] = parameter
    return found


def cut_dim(parameter: nn.Parameter) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter, None for a replicated one."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


@torch.no_grad()
def set_values(chunk: MegatronModule, whole: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Put this rank's part of whole values, by global Megatron names, into a chunk."""
    for name, parameter in global_parameters(chunk).items():
        parameter.copy_(cut(name, whole[name], cut_dim(parameter), mesh.tp_rank, mesh.tp_size))

"""What the plug-in refuses because Megatron would train it silently wrong, before any message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.models.config import MixerConfig

CP_COMM_TYPES = (None, "p2p", "all_gather")  # p2p is Megatron-LM's default


def check_config(config: TransformerConfig) -> None:
    """Refuse options of the model that would have no effect on these layers, or a wrong one."""
    if isinstance(config.cp_comm_type, list):
        raise ValueError(
            f"cp_comm_type must be one of {CP_COMM_TYPES} for all layers, got the list {config.cp_comm_type}: "
            "Megatron-Core 0.16 gives layer i the entry of layer i + 1. Choose kinds of layers by the spec's pattern."
        )
    for name, allowed in (
        ("window_size", (None,)),
        ("softmax_type", ("vanilla",)),
        ("attention_output_gate", (False,)),
        ("multi_latent_attention", (False,)),
        ("fused_single_qkv_rope", (False,)),
        ("apply_query_key_layer_scaling", (False,)),
        ("qk_clip", (False,)),
    ):
        value = getattr(config, name)
        if value not in allowed:
            instead = {"window_size": " Use the spec's window.", "attention_output_gate": " Use the mixer's out_gate."}
            raise ValueError(
                f"{name} must be {allowed[0]!r} with LASP layers, which do not read it, got {value!r}."
                + instead.get(name, "")
            )


def check_core(
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    attention_type: str,
    dropout: float,
    cp_comm_type: str | None,
    tp_size: int,
    unknown: Mapping[str, Any],
) -> None:
    """Refuse what a core cannot be built for."""
    check_config(config)
    _check_known(unknown, "argument of a LASP core_attention; see ModuleSpec.params")
    _check_mask_type(attn_mask_type)
    if attention_type != "self":
        raise ValueError(f"attention_type must be 'self', got {attention_type!r}: there is no cross-attention.")
    if dropout:
        raise ValueError(f"attention_dropout must be 0, got {dropout}: the operators have none. Set it to 0.")
    if cp_comm_type not in CP_COMM_TYPES:
        raise ValueError(
            f"cp_comm_type must be one of {CP_COMM_TYPES}, got {cp_comm_type!r}: it chooses among exchanges of "
            "TransformerEngine, and these layers have their own."
        )
    if config.num_attention_heads % tp_size:
        raise ValueError(
            f"num_attention_heads must be a multiple of the tensor-parallel size: {config.num_attention_heads} heads, "
            f"{tp_size} ranks. Use a TP size that divides."
        )


def check_mixer(mixer: MixerConfig, config: TransformerConfig) -> None:
    """Refuse options of a mixer that Megatron owns or has no place for."""
    heads, width = config.num_attention_heads, config.kv_channels
    for name, allowed, why in (
        ("heads", (None, heads), "num_attention_heads sets it"),
        ("key_dim", (None, width), "kv_channels sets it"),
        ("value_dim", (None, width), "kv_channels sets it"),
        ("expand_k", (1.0,), "kv_channels sets the width"),
        ("expand_v", (1.0,), "kv_channels sets the width"),
        ("position", ("none",), "Megatron rotates q and k: set position_embedding_type, and no_rope_freq per layer"),
        ("gate_rank", (None,), "the decay is a part of the one fused projection"),
        ("out_gate_rank", (None,), "the gate is a part of the one fused projection"),
        ("causal", (True,), "Megatron's GPT is causal"),
    ):
        value = getattr(mixer, name)
        if value not in allowed:
            raise ValueError(f"mixer.{name} must be {allowed[-1]!r} under Megatron, got {value!r}: {why}.")


def check_convolution(mixer: MixerConfig, config: TransformerConfig, layer_number: int) -> None:
    """Refuse a convolution behind Megatron's rotation, and one over keys that several query heads share."""
    if not mixer.conv_width:
        return
    if config.num_query_groups != config.num_attention_heads:
        raise ValueError(
            f"mixer.conv_width = {mixer.conv_width} needs a key and value head per query head: num_attention_heads = "
            f"{config.num_attention_heads}, num_query_groups = {config.num_query_groups}. Pass linear_query_groups = "
            f"{config.num_attention_heads} to the spec, or set conv_width to 0."
        )
    frequency = config.no_rope_freq
    if not frequency or not frequency[layer_number - 1]:
        raise ValueError(
            f"mixer.conv_width = {mixer.conv_width} needs config.no_rope_freq[{layer_number - 1}] = 1, got "
            f"no_rope_freq = {frequency}: the convolution comes before a rotation, and Megatron's is before the core. "
            "Set 1 for each linear layer, or conv_width to 0."
        )


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: AttnMaskType | None,
    attention_bias: Tensor | None,
    thd: bool,
    unknown: Mapping[str, Any],
) -> None:
    """Refuse what a core cannot be called with."""
    _check_known({name: x for name, x in unknown.items() if x is not None}, "argument of forward")
    if attn_mask_type is not None:
        _check_mask_type(attn_mask_type)
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask must be None, got shape {tuple(attention_mask.shape)}: the layers are causal and read "
            "none. Pass None (Megatron-LM: --no-create-attention-mask-in-dataloader), documents as packed_seq_params."
        )
    if attention_bias is not None:
        raise ValueError(f"attention_bias must be None, got shape {tuple(attention_bias.shape)}: no layer reads it.")
    dims = 3 if thd else 4
    if query.dim() != dims:
        expected = "[s, b, heads, width] without" if dims == 4 else "[s, heads, width] with"
        raise ValueError(f"query must be {expected} packed_seq_params, got shape {tuple(query.shape)}.")
    if not len(query) == len(key) == len(value):
        raise ValueError(
            f"query, key and value must have as many tokens: {len(query)}, {len(key)} and {len(value)}. Inference with "
            "a cache is not supported: `lasp generate` runs a trained model."
        )


def check_no_inference(context: object | None) -> None:
    """Refuse a forward with an inference context."""
    if context is not None:
        raise ValueError(
            f"inference_context must be None, got {type(context).__name__}: a linear layer keeps no keys and values. "
            "Evaluate without a context."
        )


def _check_known(unknown: Mapping[str, Any], what: str) -> None:
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no {what}.")


def _check_mask_type(attn_mask_type: AttnMaskType) -> None:
    if attn_mask_type != AttnMaskType.causal:
        raise ValueError(
            f"attn_mask_type must be causal, got {attn_mask_type}: padding and other masks are not read. Put "
            "{'attn_mask_type': AttnMaskType.causal} into the params of the self-attention spec."
        )

"""The layers of a hybrid model as a Megatron spec: which are linear, which softmax, and which this stage builds."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lasp.models.config import MixerConfig
from lasp.parallel.megatron.attention import LinearSelfAttention
from lasp.parallel.megatron.contexts import CPContexts, Order
from lasp.parallel.megatron.core import LinearCoreAttention, SoftmaxCoreAttention
from lasp.parallel.megatron.refusals import check_config, check_mixer


def hybrid_layer_spec(
    config: TransformerConfig,
    pattern: str | None = None,
    *,
    mixer: MixerConfig | Mapping[str, Any] | str = "basic",
    order: Order = "zigzag",
    contexts: CPContexts | None = None,
    window: int | None = None,
    linear_query_groups: int | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    softmax_core: type | ModuleSpec | None = None,
    use_transformer_engine: bool | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, for ``GPTModel(config, transformer_layer_spec=...)``.

    Sets ``config.linear_attention_freq`` where it is None: checkpoints then have a key per layer, which layers of two
    kinds need.

    Args:
        config: of the whole model.
        pattern: ``L`` linear and ``S`` softmax, repeated to ``num_layers``: ``"LLLS"``. None: from
            ``config.linear_attention_freq``.
        mixer: the linear layers: a MixerConfig, its fields as a mapping, or a preset's name.
        order: of the tokens: "zigzag", as Megatron cuts batches, or "contiguous" with
            :class:`~lasp.parallel.megatron.order.ContiguousOrder`.
        contexts: shared with layers of other calls, in the same order; None: of this call's layers.
        window: softmax layers read this many newest keys; None: all.
        linear_query_groups: key and value heads of the linear layers; None: ``config.num_query_groups``.
        vp_stage, pp_rank: which stage; None: the only virtual one, and this rank's.
        softmax_core: another core_attention for the softmax layers, such as TEDotProductAttention; None: LASP-2H.
        use_transformer_engine: layers of TransformerEngine, or Megatron's local ones; None: TE where it is installed.

    Raises:
        ValueError: an unknown kind of layer; a pattern that is not the config's; softmax layers that cannot do
            context parallelism in this order; an option without effect; what the layers refuse of the config.
    """
    kinds = _layer_kinds(config, pattern)
    check_config(config)
    if config.linear_attention_freq is None:
        config.linear_attention_freq = [int(kind == "L") for kind in kinds]
    contexts = CPContexts(order) if contexts is None else contexts
    if contexts.order != order:
        raise ValueError(f"order={order!r} must be that of contexts, {contexts.order!r}. Make both the same.")
    linear = _linear_core(config, kinds, MixerConfig.from_dict(mixer), contexts)
    softmax = _softmax_core(config, kinds, contexts, window, softmax_core)
    if use_transformer_engine is None:
        use_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    options = {"use_transformer_engine": use_transformer_engine, "normalization": config.normalization}
    block = get_gpt_decoder_block_spec(config, **options, vp_stage=vp_stage, pp_rank=pp_rank)
    groups = _linear_groups(config, kinds, linear_query_groups)
    mine = [kinds[i] for i in _stage_layers(config, vp_stage, pp_rank)]
    block.layer_specs = [
        _layer(spec, linear, {"num_query_groups": groups}) if kind == "L" else _layer(spec, softmax)
        for spec, kind in zip(block.layer_specs, mine, strict=True)
    ]
    return block


def _layer_kinds(config: TransformerConfig, pattern: str | None) -> str:
    """One character per layer of the model; the pattern and the config's must agree."""
    frequency, layers = config.linear_attention_freq, config.num_layers
    known = None
    if isinstance(frequency, int):
        known = "".join("L" if (i + 1) % frequency else "S" for i in range(layers))
    elif frequency is not None:
        known = "".join("L" if kind else "S" for kind in frequency)
        if len(known) != layers:
            raise ValueError(
                f"linear_attention_freq must have num_layers = {layers} entries, got {len(known)}: {frequency}."
            )
    if pattern is None:
        if known is None:
            raise ValueError(
                "pattern and config.linear_attention_freq are both None: nothing says which layers are linear. "
                "Pass a pattern like 'LLLS'."
            )
        return known
    if not pattern or set(pattern) - {"L", "S"} or len(pattern) > layers:
        raise ValueError(
            f"pattern must be made of L (linear) and S (softmax), at most num_layers = {layers}, like 'LLLS', got "
            f"{pattern!r}."
        )
    kinds = (pattern * layers)[:layers]
    if known not in (None, kinds):
        raise ValueError(
            f"pattern {pattern!r}, over {layers} layers {kinds!r}, must be that of config.linear_attention_freq = "
            f"{frequency}, {known!r}. Leave one of them None."
        )
    return kinds


def _linear_core(config: TransformerConfig, kinds: str, mixer: MixerConfig, contexts: CPContexts) -> ModuleSpec:
    if "L" in kinds:
        check_mixer(mixer, config)
    if "S" not in kinds and config.softmax_scale is not None:
        raise ValueError(
            f"softmax_scale = {config.softmax_scale} has no effect: {kinds!r} has no softmax layer. Use mixer.scale."
        )
    return ModuleSpec(LinearCoreAttention, params={"mixer": mixer, "contexts": contexts})


def _softmax_core(
    config: TransformerConfig, kinds: str, contexts: CPContexts, window: int | None, core: type | ModuleSpec | None
) -> ModuleSpec | type:
    """The core of the softmax layers: ours, or another one that can do what the config asks."""
    if "S" not in kinds and (window is not None or core is not None):
        raise ValueError(f"window = {window} and softmax_core = {core} have no effect: {kinds!r} has no softmax layer.")
    if core is None:
        return ModuleSpec(SoftmaxCoreAttention, params={"window": window, "contexts": contexts})
    if window is not None:
        raise ValueError(f"window = {window} is read by LASP's softmax layers only. Leave it or softmax_core None.")
    kind = get_module(core)
    if config.context_parallel_size > 1 and issubclass(kind, DotProductAttention):
        raise ValueError(
            f"softmax_core = {kind.__name__} has no context parallelism, and context_parallel_size is "
            f"{config.context_parallel_size}. Leave softmax_core None, or use TEDotProductAttention."
        )
    if contexts.order != "zigzag" and not issubclass(kind, SoftmaxCoreAttention):
        raise ValueError(
            f"softmax_core = {kind.__name__} reads its tokens in zigzag order, and order is {contexts.order!r}. Leave "
            "softmax_core None."
        )
    return core


def _linear_groups(config: TransformerConfig, kinds: str, groups: int | None) -> int | None:
    """Key and value heads of the linear layers, where they are not the config's."""
    if groups is not None and ("L" not in kinds or config.num_attention_heads % groups):
        raise ValueError(
            f"linear_query_groups must divide num_attention_heads = {config.num_attention_heads} of a model with "
            f"linear layers, got {groups} for {kinds!r}. Leave it None."
        )
    return groups


def _layer(spec: ModuleSpec, core: ModuleSpec | type, linear: Mapping[str, Any] | None = None) -> ModuleSpec:
    """A Megatron layer with another core, in our SelfAttention if it is linear and has these options."""
    layer = copy.deepcopy(spec)
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = core
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.causal}
    if linear is not None:
        attention.module = LinearSelfAttention
        attention.params |= linear
    return layer


def _stage_layers(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """Indices of the layers that this stage builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(start, start + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))

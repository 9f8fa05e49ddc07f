"""Megatron's SelfAttention for linear layers: decays that depend on the token, and output gates.

Their projections widen ``linear_qkv``, so that a layer still has one fused, TP-sharded projection. Per query group:

    [ q of each head | k | v | tail of each head ]        tail = decay (1 or feature width), then gate (kv_channels)

The tail then travels behind its query head, ``[q | tail]``. RoPE turns only the first columns of a head, and Megatron's
recompute and offloading treat what is in the query as the inputs of the core that they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lasp.parallel.megatron.core import LinearCoreAttention
from lasp.parallel.megatron.refusals import check_config, check_no_inference


class LinearSelfAttention(SelfAttention):
    """SelfAttention around a :class:`LinearCoreAttention`, whose options say how much wider ``linear_qkv`` is.

    Args:
        config, layer_number, attn_mask_type, cp_comm_type, pg_collection: as Megatron passes them.
        num_query_groups: key and value heads of this layer; None: the config's.
        submodules: with a LinearCoreAttention, or a spec of one, as ``core_attention``.

    Raises:
        ValueError: another core; what :mod:`lasp.parallel.megatron.refusals` refuses.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        num_query_groups: int | None = None,
    ):
        check_config(config)
        if num_query_groups is not None:
            config = copy.copy(config)
            config.num_query_groups = num_query_groups
        submodules = replace(submodules, linear_qkv=self._widened(submodules.linear_qkv))
        super().__init__(config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        self.linear_qkv_out_dim += config.num_attention_heads * self.core_attention.tail_dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: object | None = None,
        inference_params: object | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, hidden] to (output [s, b, hidden], bias); see SelfAttention.

        Raises:
            ValueError: an inference context; a ``config.window_size`` and the like.
        """
        check_no_inference(inference_context if inference_params is None else inference_params)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s, b, hidden] to query [s, b, heads / tp, kv_channels + tail], key and value."""
        tail_dim = self.core_attention.tail_dim
        if not tail_dim:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        mixed, _ = self.linear_qkv(hidden_states)
        groups, tp = self.config.num_query_groups, self.tp_group
        ranks_per_group = max(tp.size() // groups, 1)
        if groups < tp.size():  # a group is cut over ranks: make it whole, keep one's heads of it below
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=tp)
            mixed = mixed.unflatten(-1, (groups, -1)).narrow(2, tp.rank() // ranks_per_group, 1)
        else:
            mixed = mixed.unflatten(-1, (groups // tp.size(), -1))
        heads, width = self.config.num_attention_heads // groups, self.hidden_size_per_attention_head
        query, key, value, tail = mixed.split([heads * width, width, width, heads * tail_dim], -1)
        query, tail = (x.unflatten(-1, (heads, -1)).flatten(2, 3) for x in (query, tail))  # [s, b, heads, width]
        own = heads // ranks_per_group
        if groups < tp.size():
            query, tail = (x.narrow(2, tp.rank() % ranks_per_group * own, own) for x in (query, tail))
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        return torch.cat([query, tail], -1), key, value

    def _widened(self, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """The builder of linear_qkv, called when the core exists, with room for the tails of all heads."""

        def build_wider(input_size: int, output_size: int, **kwargs: Any) -> nn.Module:
            if not isinstance(self.core_attention, LinearCoreAttention):
                raise ValueError(
                    "core_attention of LinearSelfAttention must be a LinearCoreAttention, got "
                    f"{type(self.core_attention).__name__}. Use SelfAttention for other cores."
                )
            extra = self.config.num_attention_heads * self.core_attention.tail_dim
            return build(input_size, output_size + extra, **kwargs)

        return build_wider

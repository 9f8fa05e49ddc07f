"""The ``core_attention`` of Megatron's SelfAttention: LASP-2 for linear layers, LASP-2H for softmax layers.

Megatron owns the projections, RoPE, tensor and pipeline parallelism; what lies between the projections is
:class:`lasp.models.linear_mixer.LinearMixer` or :func:`lasp.softmax_attention`, on this rank's heads and tokens. Under
Megatron's activation recompute the forward message of a layer is sent again, unless the micro-batch brings
LayoutParams, which keep what the first run received; the backward one never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from lasp import comm
from lasp.attention import softmax_attention
from lasp.convolution import short_convolution
from lasp.cp_context import CPContext
from lasp.models.config import MixerConfig, ModelConfig
from lasp.models.features import init_normal
from lasp.models.linear_mixer import LinearMixer
from lasp.models.sizes import LinearSizes
from lasp.parallel.megatron.contexts import CPContexts, Order
from lasp.parallel.megatron.layouts import LayoutParams
from lasp.parallel.megatron.refusals import check_call, check_convolution, check_core, check_mixer


class _CoreAttention(MegatronModule):
    """What both cores share: Megatron's constructor and forward, which heads this rank has, the context of a batch.

    Args:
        config, layer_number, attn_mask_type, attention_type: as Megatron passes them; ``layer_number`` counts from 1
            over all pipeline stages.
        attention_dropout: must be None or 0, and so must ``config.attention_dropout``.
        softmax_scale: factor of the scores of softmax; linear layers have ``mixer.scale``.
        cp_comm_type: None, "p2p" or "all_gather": it chooses among TransformerEngine's exchanges and has no other
            meaning here.
        pg_collection: has ``tp`` and ``cp``; None: Megatron's own groups.
        order: of the tokens, "zigzag" (Megatron's) or "contiguous"; None: that of ``contexts``, or zigzag.
        contexts: shared with other layers; None: of this layer alone.

    Raises:
        ValueError: what the operators cannot do, see :mod:`lasp.parallel.megatron.refusals`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        order: Order | None = None,
        contexts: CPContexts | None = None,
        **unknown: Any,
    ):
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.layer_number, self.softmax_scale = layer_number, softmax_scale
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        check_core(config, attn_mask_type, attention_type, dropout, cp_comm_type, self.tp_group.size(), unknown)
        if contexts is not None and order not in (None, contexts.order):
            raise ValueError(f"order={order!r} must be that of contexts, {contexts.order!r}. Leave one of them out.")
        self.contexts = CPContexts(order or "zigzag") if contexts is None else contexts
        heads = config.num_attention_heads // self.tp_group.size()
        self.heads = range(self.tp_group.rank() * heads, (self.tp_group.rank() + 1) * heads)
        self.head_dim = config.kv_channels

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unknown: Any,
    ) -> Tensor:
        """Attend over the whole sequence, of which this rank has s tokens.

        Args:
            query: [s, b, heads / tp, width], or [s, heads / tp, width] packed.
            key, value: [s, b, groups / tp, kv_channels], or [s, groups / tp, kv_channels] packed.
            attention_mask, attention_bias: must be None.
            attn_mask_type: causal.
            packed_seq_params: documents in format thd, or :class:`~lasp.parallel.megatron.layouts.LayoutParams`.

        Returns:
            [s, b, heads / tp * kv_channels], or [s, heads / tp * kv_channels] packed.

        Raises:
            ValueError: what the operators cannot do, see :mod:`lasp.parallel.megatron.refusals`.
        """
        thd = packed_seq_params is not None and not isinstance(packed_seq_params, LayoutParams)
        check_call(query, key, value, attention_mask, attn_mask_type, attention_bias, thd, unknown)
        length = query.shape[0]
        if thd:
            cp = self.contexts.of_packed(packed_seq_params, length, self.cp_group)
            return self._in_layer(*(x.unsqueeze(0) for x in (query, key, value)), cp).squeeze(0)
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if packed_seq_params is None:
            cp = self.contexts.of_length(length, self.cp_group)
            return self._in_layer(query, key, value, cp).transpose(0, 1).contiguous()
        cp = packed_seq_params.context(length, self.cp_group)
        recomputes = self.training and self.config.recompute_granularity is not None
        with packed_seq_params.tape(self.layer_number, recomputes):
            return self._in_layer(query, key, value, cp).transpose(0, 1).contiguous()

    def _in_layer(self, *q_k_v_cp: Any) -> Tensor:
        """:meth:`_attend`, whose collectives are this layer's."""
        with comm.scope(f"layer {self.layer_number - 1}"):
            return self._attend(*q_k_v_cp)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
        """q [B, T, heads, width] and k, v [B, T, groups, kv_channels] to [B, T, heads * kv_channels]."""
        raise NotImplementedError


class SoftmaxCoreAttention(_CoreAttention):
    """Causal softmax attention whose keys and values, not expanded to the query heads, are gathered over CP.

    Args:
        window: keep the newest ``window`` keys; None: all.
        others: see :class:`_CoreAttention`.
    """

    def __init__(self, *args: Any, window: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.window = window

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
        options = {"window": self.window, "scale": self.softmax_scale, "exchange": cp.softmax_exchange}
        return softmax_attention(q, k, v, cp=cp, **options).flatten(-2)


class LinearCoreAttention(_CoreAttention):
    """Linear attention on this TP rank's heads: one exchange of memory states over CP per direction.

    Decays that depend on the token, and output gates, need projections of their own: with them the query is
    ``[query | decay | gate]`` per head, which :class:`~lasp.parallel.megatron.attention.LinearSelfAttention` makes.

    Args:
        mixer: the options of the layer: a MixerConfig, its fields as a mapping, or a preset's name.
        others: see :class:`_CoreAttention`.
    """

    def __init__(self, *args: Any, mixer: MixerConfig | Mapping[str, Any] | str = "basic", **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.config
        mixer = MixerConfig.from_dict(mixer)
        check_mixer(mixer, config)
        check_convolution(mixer, config, self.layer_number)
        widths = {"expand_k": 1.0, "expand_v": 1.0, "key_dim": self.head_dim, "value_dim": self.head_dim}
        model = ModelConfig(
            vocab_size=1,
            dim=config.hidden_size,
            num_layers=config.num_layers,
            heads=config.num_attention_heads,
            mixer=replace(mixer, heads=config.num_attention_heads, **widths),
            norm_eps=config.layernorm_epsilon,
        )
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        place = {"device": device, "dtype": config.params_dtype}
        self.mixer = _HeadMixer(model, self.layer_number - 1, **place, heads=self.heads)
        self.tail_dims = (
            LinearSizes.of(model).decays,
            self.head_dim if mixer.out_gate != "none" else 0,
        )
        for name, parameter in self.mixer.named_parameters():
            if name in self.mixer.per_head:
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if config.perform_initialization:
            self._init_parameters(model)

    @property
    def tail_dim(self) -> int:
        """Width per head of what follows the query: the projected decay and gate."""
        return sum(self.tail_dims)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For distributed checkpoints: per-head parameters are cut over TP, the others replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"mixer.{name}": 0 for name in self.mixer.per_head},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def _init_parameters(self, model: ModelConfig) -> None:
        """Draw the values of all heads on every rank and keep one's own: the same model at any TP size."""
        whole = _HeadMixer(model, self.layer_number - 1, heads=range(model.mixer_heads))
        for module in whole.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters()
        values = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in self.mixer.named_parameters():
                value = values[name]
                if name in self.mixer.per_head:
                    value = value.unflatten(0, (model.mixer_heads, -1))[self.heads.start : self.heads.stop].flatten(
                        0, 1
                    )
                parameter.copy_(value)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cp: CPContext) -> Tensor:
        if q.shape[-1] != self.head_dim + self.tail_dim:
            raise ValueError(
                f"query must have heads of kv_channels = {self.head_dim}, followed by {self.tail_dim} of projected "
                f"decay and gate, got a width of {q.shape[-1]}. A mixer with decay='scalar' or 'channel' or an "
                "out_gate needs LinearSelfAttention in place of SelfAttention: hybrid_layer_spec sets it."
            )
        q, decay, gate = (x.flatten(-2) for x in q.split([self.head_dim, *self.tail_dims], -1))
        decay, gate = (x if width else None for x, width in zip((decay, gate), self.tail_dims, strict=True))
        replicated = {
            name: tensor_parallel.copy_to_tensor_model_parallel_region(parameter, group=self.tp_group)
            for name, parameter in self.mixer.named_parameters()
            if name not in self.mixer.per_head  # each TP rank has the gradient of its heads: the sum is the gradient
        }
        o, _ = torch.func.functional_call(self.mixer, replicated, (q, k.flatten(-2), v.flatten(-2), decay, gate, cp))
        return o


class _HeadMixer(LinearMixer):
    """A mixer whose host owns the projections: calling it is all that lies between them.

    The convolution's weights are apart for q, k and v, [h * width, conv_width] each, so that heads can be cut over TP.
    """

    def __init__(self, config: ModelConfig, layer: int, device=None, dtype=None, *, heads: range):
        super().__init__(config, layer, device, dtype, heads=heads)
        if self.options.conv_width:
            widths = {"conv_q": self.key_dim, "conv_k": self.key_dim, "conv_v": self.value_dim}
            for name, width in widths.items():
                weight = torch.empty(len(heads) * width, self.options.conv_width, device=device, dtype=dtype)
                self.register_parameter(name, torch.nn.Parameter(weight))

    @property
    def per_head(self) -> tuple[str, ...]:
        """Parameters of heads, which TP cuts along dim 0; the others are replicated."""
        decay = () if self.options.gate is None else tuple(f"decay.{name}" for name in self.decay.per_head)
        return (*decay, "conv_q", "conv_k", "conv_v") if self.options.conv_width else decay

    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """The convolution, as :meth:`lasp.models.linear_mixer.LinearMixer.init_parameters`."""
        if self.options.conv_width:
            for weight in (self.conv_q, self.conv_k, self.conv_v):
                init_normal(weight, self.options.conv_width**-0.5, generator)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, gate: Tensor | None, cp: CPContext
    ) -> tuple[Tensor, Tensor | None]:
        """q, k [B, T, h * K], v [B, T, h * V], projected; see :meth:`lasp.models.linear_mixer.LinearMixer.mix`."""
        if self.options.conv_width:
            mixed, weight = torch.cat([q, k, v], -1), torch.cat([self.conv_q, self.conv_k, self.conv_v])
            y = short_convolution(mixed, weight, activation=self.options.conv_activation, cp=cp)
            q, k, v = y.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
        return self.mix(q, k, v, decay, gate, {}, cp)

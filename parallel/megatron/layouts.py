"""Micro-batches in any layout: documents packed without padding, cut anywhere, contiguous or zigzag.

Megatron's own path knows two orders, zigzag of whole rows and padded zigzag of packed documents. A micro-batch that
brings its :class:`LayoutParams` is free of both: attention reads the layout's context, and RoPE its positions, which
restart in every document. The object travels with the micro-batch through pipeline stages and recompute; no layer
keeps anything between calls.

    order = LayoutOrder(model)                                  after GPTModel, before Megatron's DDP
    params = LayoutParams(CPContext(layout, cp_group))          one per micro-batch
    tokens, labels = (layout.shard(x, cp_rank) for x in (tokens, labels))
    losses = model(tokens, None, None, labels=labels, packed_seq_params=params)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from lasp.cp_context import CPContext
from lasp.models.layers import rotary_frequencies
from lasp.models.recompute import AttachedTape, ExchangeTape


class LayoutParams(PackedSeqParams):
    """What Megatron carries beside the tokens of one micro-batch: ``packed_seq_params`` of a model with LASP layers.

    Args:
        cp: the layout and the cp_group of the micro-batch.

    Raises:
        ValueError: no context.
    """

    def __init__(self, cp: CPContext):
        self.qkv_format = "sbhd"  # Megatron's layers see a plain sequence; its other fields stay None
        if not isinstance(cp, CPContext):
            raise ValueError(f"cp must be a CPContext, got {cp!r:.80}. Make one: CPContext(layout, cp_group).")
        self.cp = cp
        self._tapes: dict[int, ExchangeTape] = {}  # by layer number

    @property
    def max_seqlen_q(self) -> int:
        """Read by Megatron's own RoPE, which would rotate to other positions than the layout's."""
        raise ValueError("LayoutParams need LayoutOrder(model): Megatron's RoPE does not know their positions.")

    def context(self, length: int, group: dist.ProcessGroup) -> CPContext:
        """The context, if it is of these tokens and of this group.

        Raises:
            ValueError: another number of tokens; another cp_group.
        """
        if self.cp.num_tokens != length:
            raise ValueError(
                f"the layout of packed_seq_params gives cp rank {self.cp.cp_rank} {self.cp.num_tokens} tokens, and the "
                f"model received {length}. Cut the batch with layout.shard(x, cp_rank)."
            )
        own = [] if group.size() == 1 else dist.get_process_group_ranks(group)
        theirs = [] if self.cp.cp_size == 1 else dist.get_process_group_ranks(self.cp.group)
        if own != theirs:
            raise ValueError(
                f"the context of packed_seq_params must be on pg_collection.cp, ranks {own or 'alone'}, got "
                f"{theirs or 'alone'}. Make it with parallel_state.get_context_parallel_group()."
            )
        return self.cp

    def tape(self, layer_number: int, recomputes: bool) -> contextlib.AbstractContextManager:
        """Keeps what a layer's exchange brought in a pass without gradients, for the pass that repeats it with them.

        Megatron's recompute runs a layer without gradients first and again in backward. The second run reads the tape:
        no message is sent twice.
        """
        if not recomputes:
            return contextlib.nullcontext()
        if not torch.is_grad_enabled():
            self._tapes[layer_number] = ExchangeTape()
            return AttachedTape(self._tapes[layer_number], self.cp, replay=False)
        known = self._tapes.pop(layer_number, None)
        return contextlib.nullcontext() if known is None else AttachedTape(known, self.cp, replay=True)


class LayoutOrder:
    """Lets the rotary embedding of a model follow the layout of each micro-batch.

    Args:
        chunks: the GPTModel of this pipeline stage, or those of its virtual stages; before Megatron's wrappers.

    Raises:
        ValueError: no GPTModel; attention that is not LASP's; position embeddings other than rope and none; scaled
            frequencies; multi-token prediction, which follows Megatron's order.
    """

    def __init__(self, chunks: nn.Module | Iterable[nn.Module]):
        chunks = [chunks] if isinstance(chunks, nn.Module) else list(chunks)
        models = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "position_embedding_type")]
        if not models:
            raise ValueError(f"chunks must have GPTModels, got {[type(chunk).__name__ for chunk in chunks]}.")
        for core in (m.core_attention for chunk in chunks for m in chunk.modules() if hasattr(m, "core_attention")):
            if not hasattr(core, "contexts"):
                raise ValueError(
                    f"every attention layer must be LASP's to read a layout, got {type(core).__name__} in layer "
                    f"{core.layer_number}. Leave softmax_core None in hybrid_layer_spec."
                )
        for model in models:
            kind = model.position_embedding_type
            if kind not in ("rope", "none") or getattr(model, "mtp_process", False):
                raise ValueError(
                    "a layout serves position_embedding_type 'rope' and 'none' without multi-token prediction, got "
                    f"{kind!r}. Use order='zigzag' without LayoutParams."
                )
            if kind == "rope":
                model.rotary_pos_emb = _LayoutRotary(model.rotary_pos_emb, model.rotary_base, model.config)


class _LayoutRotary(RotaryEmbedding):
    """A RotaryEmbedding whose angles are those of the positions in a micro-batch's layout, in fp64."""

    def __init__(self, stock: RotaryEmbedding, theta: float, config):
        nn.Module.__init__(self)  # the settings are those of `stock`, computed
        self.__dict__.update(stock.__dict__)
        if config.apply_rope_fusion or stock.rotary_interleaved:
            raise ValueError(
                "a layout needs Megatron's plain half-split RoPE: apply_rope_fusion and rotary_interleaved must be "
                f"False, got {config.apply_rope_fusion} and {stock.rotary_interleaved}."
            )
        frequencies = rotary_frequencies(config.kv_channels, theta, stock.inv_freq.device)
        same = stock.seq_len_interpolation_factor is None and stock.inv_freq.shape == frequencies.shape
        if not same or not torch.allclose(stock.inv_freq.double(), frequencies, rtol=1e-5, atol=0):
            raise ValueError(
                f"a layout needs RoPE of all kv_channels = {config.kv_channels} with base {theta:g} and without "
                "scaling: leave rotary_percent, rope_scaling and seq_len_interpolation_factor at their defaults."
            )
        self.frequencies = frequencies

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, transformer_config, params=None, **_
    ):
        """The context of the micro-batch, which Megatron hands to :meth:`forward` as it is."""
        if not isinstance(params, LayoutParams):
            raise ValueError(
                f"packed_seq_params must be LayoutParams with LayoutOrder, got {type(params).__name__}: nothing else "
                "says where the tokens are. Pass LayoutParams(CPContext(layout, cp_group))."
            )
        return params.cp

    def forward(self, max_seq_len: CPContext, offset: int = 0, packed_seq: bool = False, cp_group=None) -> Tensor:
        """Angles [T_local, 1, 1, kv_channels] of the tokens that this rank owns."""
        cp = max_seq_len
        positions = cp.plan(
            ("megatron_positions", self.frequencies.device), lambda: cp.position_ids.to(self.frequencies.device)
        )
        angles = positions.double()[:, None] * self.frequencies
        return torch.cat([angles, angles], -1)[:, None, None, :]

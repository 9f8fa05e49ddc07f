"""Which tokens Megatron's data path gives to a rank, as the contexts that the attention operators read.

sequence    a0 a1 a2 a3 a4 a5 a6 a7             cp_size 2
zigzag      rank 0: a0 a1 a6 a7                 rank 1: a2 a3 a4 a5          get_batch_on_this_cp_rank and RoPE
contiguous  rank 0: a0 a1 a2 a3                 rank 1: a4 a5 a6 a7          lasp.parallel.megatron.order
packed      per document (padded to a multiple of 2 * cp_size) as zigzag     PackedSeqParams, format thd
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils.weak import WeakTensorKeyDictionary

from lasp.cp_context import CPContext, ExchangeOptions
from lasp.layout import SequenceLayout

Order = Literal["zigzag", "contiguous"]
KEPT_LENGTHS = 64  # a context in use lives on without being kept


class CPContexts:
    """The contexts of a model's attention layers: one per sequence length or packed batch, made once.

    Give one object to all layers (:func:`~lasp.parallel.megatron.specs.hybrid_layer_spec` does), so that they share
    plans and device tables.

    Args:
        order: the order of tokens in the batch that the model receives.
        options: how layers exchange; None: by all-gathers.

    Raises:
        ValueError: an unknown order.
    """

    def __init__(self, order: Order = "zigzag", options: ExchangeOptions | None = None):
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}.")
        self.order, self.options = order, options or ExchangeOptions()
        self._owned = False
        self._whole: dict[tuple[dist.ProcessGroup, int], CPContext] = {}
        self._packed = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, its group, its context)

    def own(self) -> None:
        """Someone cuts batches and RoPE in this order: :class:`~lasp.parallel.megatron.order.ContiguousOrder`."""
        self._owned = True

    def of_length(self, length: int, group: dist.ProcessGroup) -> CPContext:
        """One document per row, of which every rank has ``length`` tokens.

        Raises:
            ValueError: zigzag order and an odd ``length``; contiguous order that nobody owns.
        """
        size = group.size()
        if size > 1 and self.order != "zigzag" and not self._owned:
            raise ValueError(
                f"order={self.order!r} needs ContiguousOrder(model): Megatron cuts batches and RoPE in zigzag order, "
                f"over {size} cp ranks. Make one after the model, and cut batches with its shard()."
            )
        if size > 1 and self.order == "zigzag" and length % 2:
            raise ValueError(
                f"under order='zigzag' a rank has two chunks of equal length, got {length} tokens on each of {size} "
                f"cp ranks. Use a sequence length that is a multiple of 2 * cp_size = {2 * size}."
            )
        key = (group, length)
        if key not in self._whole:
            if len(self._whole) == KEPT_LENGTHS:
                self._whole.pop(next(iter(self._whole)))
            cut = SequenceLayout.zigzag if self.order == "zigzag" else SequenceLayout.contiguous
            self._whole[key] = self.options.context(cut(length * size, size), group)
        return self._whole[key]

    def of_packed(self, packed: PackedSeqParams, length: int, group: dist.ProcessGroup) -> CPContext:
        """Documents packed into one row, each padded and cut in zigzag; every rank has ``length`` tokens in all.

        Reads the borders to the host, once per tensor.

        Raises:
            ValueError: contiguous order; another format than thd; borders of keys that are not those of queries;
                a cp_group of its own; borders that do not fit ``length`` or cannot be cut.
        """
        self._check_packed(packed, group)
        borders, keys = packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded
        borders, keys = (packed.cu_seqlens_q, packed.cu_seqlens_kv) if borders is None else (borders, keys)
        known = None if borders is None else self._packed.get(borders)
        if known is None or known[:2] != (borders._version, group):
            if borders is None or (keys is not None and not torch.equal(borders, keys)):
                raise ValueError(
                    "packed_seq_params must have cu_seqlens_q, equal to cu_seqlens_kv: self-attention has one set of "
                    f"documents, got {borders} and {keys}."
                )
            layout = packed_layout(borders.tolist(), group.size())
            known = (borders._version, group, self.options.context(layout, group))
            self._packed[borders] = known
        context = known[2]
        if context.num_tokens != length:
            raise ValueError(
                f"the borders of packed_seq_params must end at the tokens of the batch, cp_size * {length} = "
                f"{group.size() * length}, got {context.layout.total_tokens}. Pad the last document."
            )
        return context

    def _check_packed(self, packed: PackedSeqParams, group: dist.ProcessGroup) -> None:
        """Refuse what the host can see without reading the borders."""
        if self.order != "zigzag" and group.size() > 1:
            raise ValueError(
                f"packed_seq_params needs order='zigzag', got {self.order!r}: Megatron's RoPE rotates packed documents "
                "in zigzag order. Build the spec with order='zigzag', or do not pack."
            )
        if packed.qkv_format != "thd":
            raise ValueError(f"packed_seq_params.qkv_format must be 'thd', got {packed.qkv_format!r}.")
        own = packed.cp_group is None or _ranks(packed.cp_group) == _ranks(group)
        if not own or packed.local_cp_size not in (None, group.size()):
            theirs = packed.local_cp_size if own else _ranks(packed.cp_group)
            raise ValueError(
                "packed_seq_params must not change the cp_group per batch: RoPE rotates with pg_collection.cp, ranks "
                f"{_ranks(group)}, got {theirs}. Turn hybrid context parallelism off."
            )


def packed_layout(borders: list[int], cp_size: int) -> SequenceLayout:
    """Every document [a, b) by itself in zigzag: rank r owns its chunks r and ``2 * cp_size - 1 - r``, side by side.

    Args:
        borders: of the padded documents, in global tokens: ``[0, ..., T]``.
        cp_size: number of ranks.

    Raises:
        ValueError: a document whose length ``2 * cp_size`` does not divide; no tokens.
    """
    if cp_size == 1:
        return SequenceLayout.contiguous(borders, 1)
    fragments = [[] for _ in range(cp_size)]
    for i, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        chunk, rest = divmod(stop - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"packed documents must be padded to a multiple of 2 * cp_size = {2 * cp_size}, got {stop - start} "
                f"tokens in document {i}. Pad it, and pass the padded borders as cu_seqlens_q_padded."
            )
        for rank in range(cp_size if chunk else 0):
            for at in (rank, 2 * cp_size - 1 - rank):
                fragments[rank].append((start + at * chunk, start + (at + 1) * chunk))
    return SequenceLayout(borders, fragments)


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)

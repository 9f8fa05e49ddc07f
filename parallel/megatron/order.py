"""Contiguous order: one fragment per rank, so that a linear layer sends half of what zigzag order sends.

Megatron cuts batches and RoPE in zigzag order. Contiguous cores below a zigzag RoPE or batch would train, to a wrong
model, without a word. So one object owns both halves, and what did not pass through it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lasp.layout import SequenceLayout


class ContiguousOrder:
    """Cuts the batches and the rotary embedding of a model whose attention layers have ``order="contiguous"``.

    Args:
        chunks: the GPTModel of this pipeline stage, or those of its virtual stages; before Megatron's wrappers, or in
            them.

    Raises:
        ValueError: a layer of another order or kind; multi-token prediction, which follows Megatron's order; position
            embeddings other than rope and learned_absolute.
    """

    def __init__(self, chunks: nn.Module | Iterable[nn.Module]):
        chunks = [chunks] if isinstance(chunks, nn.Module) else list(chunks)
        self._shards = WeakTensorKeyDictionary()  # tensors that shard() returned
        cores = [m.core_attention for chunk in chunks for m in chunk.modules() if hasattr(m, "core_attention")]
        for core in cores:
            order = core.contexts.order if hasattr(core, "contexts") else f"that of {type(core).__name__}"
            if order != "contiguous":
                raise ValueError(
                    f"every attention layer must have order='contiguous', got {order} in layer {core.layer_number}. "
                    "Build the spec with hybrid_layer_spec(..., order='contiguous')."
                )
        models = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "position_embedding_type")]
        if not models:
            raise ValueError(
                f"chunks must have GPTModels, got {[type(chunk).__name__ for chunk in chunks]}. Pass the stage's."
            )
        self._group = models[0].pg_collection.cp  # a stage may have no attention layer
        for model in models:
            self._adopt(model)
        for core in cores:
            core.contexts.own()

    def shard(self, batch: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """This rank's part of a batch, in place of Megatron's ``get_batch_on_this_cp_rank``.

        Args:
            batch: tensors [b, s, ...] of the whole sequence, on the model's device; None stays None.

        Returns:
            Tensors [b, s / cp_size, ...]: pass these very tensors to the model.

        Raises:
            ValueError: an attention_mask; a length that cp_size does not divide.
        """
        size, rank, cut = self._group.size(), self._group.rank(), {}
        for name, x in batch.items():
            if x is not None and name == "attention_mask":
                raise ValueError("attention_mask must be None: the layers are causal and read no mask.")
            if x is not None and x.shape[1] % size:
                raise ValueError(
                    f"{name} must have a sequence length that is a multiple of cp_size = {size}, got {x.shape[1]}."
                )
            cut[name] = None if x is None else SequenceLayout.contiguous(x.shape[1], size).shard(x, rank)
            if x is not None:
                self._shards[cut[name]] = True
        return cut

    def _adopt(self, model: nn.Module) -> None:
        """Replace the model's rotary embedding, and look at its inputs."""
        kind = model.position_embedding_type
        if kind not in ("rope", "learned_absolute", "none") or getattr(model, "mtp_process", False):
            raise ValueError(
                "contiguous order serves position_embedding_type 'rope', 'learned_absolute' and 'none' without "
                f"multi-token prediction, got {kind!r}. Use order='zigzag'."
            )
        if kind == "rope":
            model.rotary_pos_emb = _ContiguousRotary(model.rotary_pos_emb)
        model.register_forward_pre_hook(self._check_inputs, with_kwargs=True)

    def _check_inputs(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Tokens and labels that were not cut here may be in another order."""
        if self._group.size() == 1:
            return
        names = ("input_ids", "position_ids", "attention_mask", "decoder_input", "labels")  # of GPTModel.forward
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in ("input_ids", "position_ids", "labels"):
            x = given.get(name)
            if x is not None and x not in self._shards:
                raise ValueError(
                    f"{name} must be a tensor that ContiguousOrder.shard returned, as it is: what Megatron cut is in "
                    "zigzag order. Call shard(batch) in place of get_batch_on_this_cp_rank(batch)."
                )


class _ContiguousRotary(RotaryEmbedding):
    """A RotaryEmbedding that gives each cp rank the positions of its contiguous part."""

    def __init__(self, stock: RotaryEmbedding):
        nn.Module.__init__(self)  # the settings are those of `stock`, computed
        self.__dict__.update(stock.__dict__)

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Angles [max_seq_len / cp_size, 1, 1, dim]; see RotaryEmbedding."""
        group = self.cp_group if cp_group is None else cp_group
        length = max_seq_len // group.size()
        return self.get_emb(length, offset + group.rank() * length)

"""The one place that knows what the loss is, by what it is divided, and how gradients are summed.

    loss = sum over all tokens of the step of -log p(label)  /  number of labels of the step

A step is one optimizer step: every micro batch of the accumulation window, on every rank of dp x cp. A
rank's share of the loss is its own sum over the *global* count, so shares add up to the loss and gradients
of shares add up to the gradient: everything is summed, nothing is averaged, and a rank without labels adds
zeros. Evaluation takes the same path. Labels are shifted in global token order before a sequence is cut, so
that no label is lost at the edge of a shard; the last token of a document has none.

The cross-entropy never makes ``[T, vocab]`` logits: it walks over chunks of tokens and, where a gradient is
wanted, makes it in the same pass, so that each chunk's logits exist once and are gone. Memory: two buffers
of ``chunk_tokens * vocab`` in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lasp import comm
from lasp.cp_context import CPContext, ExchangeOptions
from lasp.layout import SequenceLayout
from lasp.parallel.mesh import Mesh

IGNORED = -100
CHUNK_ELEMENTS = 2**25  # logits per chunk: 128 MiB in fp32


@dataclass(frozen=True)
class Batch:
    """One micro batch as this rank sees it: its tokens [B, T_local], their labels, and who owns the rest."""

    tokens: Tensor
    labels: Tensor
    cp: CPContext

    @classmethod
    def cut(
        cls,
        tokens_global: Tensor,
        layout: SequenceLayout,
        mesh: Mesh,
        *,
        loss_mask: Tensor | None = None,
        options: ExchangeOptions | None = None,
        device: torch.device | None = None,
    ) -> Batch:
        """This rank's part of whole sequences [B, T], labelled before the cut; see :func:`shift_labels`."""
        labels = shift_labels(tokens_global, layout, loss_mask)
        place = lambda x: layout.shard(x, mesh.cp_rank).to(device or mesh.device)  # noqa: E731
        return cls(place(tokens_global), place(labels), mesh.cp_context(layout, options))


def shift_labels(tokens_global: Tensor, layout: SequenceLayout, loss_mask: Tensor | None = None) -> Tensor:
    """The label of each token of whole sequences: the next token of its document, -100 where there is none.

    Args:
        tokens_global: [B, T], all tokens of the sequence.
        layout: its documents.
        loss_mask: bool [B, T], true where the token is to be predicted *as a label*. Default: everywhere.
    """
    if tokens_global.dim() != 2 or tokens_global.shape[1] != layout.total_tokens:
        raise ValueError(
            f"tokens_global must be [B, T] with the layout's T = {layout.total_tokens}, got "
            f"{tuple(tokens_global.shape)}. Label the whole sequence, then cut it."
        )
    targets = tokens_global if loss_mask is None else tokens_global.masked_fill(~loss_mask, IGNORED)
    labels = targets.roll(-1, dims=1)
    last = sorted({border - 1 for border in layout.cu_seqlens_global[1:] if border > 0})
    labels[:, last] = IGNORED
    return labels


@comm.scope("label count")
def count_labels(labels: Sequence[Tensor], mesh: Mesh) -> Tensor:
    """Labels of the whole step: all micro batches of all ranks. A scalar on the device, at least 1.

    Raises:
        ValueError: there is none, on every rank: there is nothing to learn.
    """
    count = sum((part != IGNORED).sum() for part in labels)
    count = mesh.sum(torch.as_tensor(count, dtype=torch.int64, device=mesh.device))
    if not count.item():
        raise ValueError(
            "a training step must hold at least one label, got 0: no token of it has a next token in its document. "
            "Use longer documents or data.join_documents=true."
        )
    return count


class LossModel(nn.Module):
    """A model with its loss on top: all that reads parameters is inside one forward, as sharded parameters need it.

    Args:
        model: called as ``model(tokens, cp)`` for hidden states; ``output_weight`` is its projection [vocab, dim].
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses of this rank's part of a batch, a scalar in fp32 (fp64 for fp64 models)."""
        return token_loss_sum(self.model(batch.tokens, batch.cp), self.model.output_weight, batch.labels)


def reduce_gradients(buffers: Iterable[Tensor], mesh: Mesh, bucket_elements: int = 2**24) -> None:
    """Sum gradient buffers over dp x cp, in place, in buckets so that no backend needs a copy of all."""
    for buffer in buffers:
        for bucket in buffer.view(-1).split(bucket_elements):
            mesh.sum(bucket)


@comm.scope("evaluation")
@torch.no_grad()
def evaluate(loss_sum: Callable[[Batch], Tensor], batches: Iterable[Batch], mesh: Mesh) -> float | None:
    """The loss over ``batches``, equal on all ranks and the same at every cp size; None where no rank has a label.

    Args:
        loss_sum: sum of the token losses of a batch, as :class:`LossModel`.
        batches: this rank's. The ranks of a cp_group hold the parts of the same sequences; dp ranks may
            hold different numbers of sequences, none included.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        totals[0] += loss_sum(batch)
        totals[1] += (batch.labels != IGNORED).sum()
    loss, count = mesh.sum(totals).tolist()
    return loss / count if count else None


def token_loss_sum(hidden: Tensor, output_weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum of ``-log softmax(hidden @ output_weight.T)[label]`` over the tokens that have a label.

    Args:
        hidden: [B, T, dim], any float dtype; output_weight: [vocab, dim], the same dtype.
        labels: int64 [B, T], -100 where a token has none.
        chunk_tokens: tokens whose logits exist at a time. Default: so many that they take 128 MiB in fp32.

    Returns:
        a scalar in fp32 (fp64 for fp64 inputs); its gradients have the dtypes of the inputs, sums are in fp32.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have one entry per token of hidden: hidden {tuple(hidden.shape)}, labels "
            f"{tuple(labels.shape)}. Cut both with the same layout."
        )
    if hidden.shape[-1] != output_weight.shape[-1] or hidden.dtype != output_weight.dtype:
        raise ValueError(
            f"hidden and output_weight must agree in width and dtype: hidden {tuple(hidden.shape)} {hidden.dtype}, "
            f"output_weight {tuple(output_weight.shape)} {output_weight.dtype}. Convert one to the other's."
        )
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS // output_weight.shape[0])
    return _ChunkedCrossEntropy.apply(hidden, output_weight, labels, chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, for an upstream gradient of one: the loss is a scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_tokens):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(flat) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight if _matmul_widens(weight) else weight.to(wide)
            for start in range(0, flat.shape[0], chunk_tokens):
                rows = slice(start, min(start + chunk_tokens, flat.shape[0]))
                h = flat[rows] if _matmul_widens(flat) else flat[rows].to(wide)
                labelled = flat_labels[rows] != IGNORED
                index = flat_labels[rows].where(labelled, 0)[:, None]
                logits = _matmul(h, w.T)  # [C, vocab]
                normaliser = logits.logsumexp(1, keepdim=True)
                loss = normaliser - logits.gather(1, index)
                total += loss[:, 0].where(labelled, 0.0).sum()
                if not (need_hidden or need_weight):
                    continue
                d_logits = logits.sub_(normaliser).exp_()  # softmax
                d_logits.scatter_add_(1, index, torch.full_like(loss, -1.0))
                d_logits.masked_fill_(~labelled[:, None], 0.0)
                d_logits = d_logits.to(w.dtype)
                if need_hidden:
                    d_hidden[rows] = _matmul(d_logits, w)
                if need_weight:
                    d_weight += _matmul(d_logits.T, h)
        ctx.dtype = weight.dtype
        ctx.shape = hidden.shape
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * d_total).to(d_hidden.dtype).view(ctx.shape)
        if d_weight is not None:
            d_weight = (d_weight * d_total).to(ctx.dtype)
        return d_hidden, d_weight, None, None


def _matmul_widens(x: Tensor) -> bool:
    """Whether the device multiplies this dtype and returns fp32 without a rounding in between."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if _matmul_widens(a) else torch.mm(a, b)

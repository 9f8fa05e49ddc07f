"""Which tokens a step reads: an endless stream of packed documents that depends on the seed alone.

    epoch 0: documents in an order shuffled by (seed, 0) | epoch 1: shuffled by (seed, 1) | ...
    one stream of tokens, cut every seq_len tokens into sequences 0, 1, 2, ...

Sequence ``i`` is stream tokens ``[i * seq_len, (i + 1) * seq_len)`` and the borders of the documents in it;
a document that is cut there goes on in the next sequence as a new one. Step ``s`` reads sequences ``s *
batch_size`` and on; micro step ``m`` of data rank ``d`` reads the ``m * dp_size + d``-th of them. So the
position in the data is a count of global tokens, and neither dp_size nor cp_size changes which tokens a
step learns from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lasp.cp_context import ExchangeOptions
from lasp.launch.data.token_files import STDLIB, TokenFile, read_texts, stdlib_files, with_suffix, write_token_file
from lasp.launch.data.tokenizer import BYTES, Tokenizer, fingerprint
from lasp.layout import SequenceLayout
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of a stream: tokens [T] and the borders of its documents (0, ..., T)."""

    tokens: Tensor
    cu_seqlens: tuple[int, ...]


class PackedStream:
    """Documents of a token file, packed end to end.

    Args:
        file: the data.
        documents: which of its documents.
        seed: of the shuffle; None: no shuffle, every epoch in file order.
        vocab_size: of the model; None: do not check tokens against it.
    """

    def __init__(self, file: TokenFile, documents: np.ndarray, seed: int | None, vocab_size: int | None = None):
        self._vocab_size = vocab_size
        self._file, self._documents, self._seed = file, documents[file.lengths[documents] > 0], seed
        self.epoch_tokens = int(file.lengths[self._documents].sum(dtype=np.int64))
        if self.epoch_tokens == 0:
            raise ValueError(
                f"{file.prefix} holds no token in {len(documents)} documents. Prepare files that hold text."
            )
        self._epoch = lru_cache(maxsize=2)(self._order_epoch)

    @property
    def prefix(self) -> Path:
        """Of the token file."""
        return self._file.prefix

    def sequence(self, start: int, length: int) -> PackedSequence:
        """Stream tokens ``[start, start + length)``."""
        parts: list[np.ndarray] = []
        borders = [0]
        while borders[-1] < length:
            epoch, offset = divmod(start + borders[-1], self.epoch_tokens)
            order, ends = self._epoch(epoch)
            n = int(np.searchsorted(ends, offset, side="right"))
            document = int(order[n])
            size = int(self._file.lengths[document])
            begin = offset - (int(ends[n]) - size)
            stop = min(size, begin + length - borders[-1])
            parts.append(self._file.document(document, begin, stop))
            borders.append(borders[-1] + stop - begin)
        tokens = np.concatenate(parts)
        if self._vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(
                f"{self._file.prefix} holds token ids from {tokens.min()} to {tokens.max()}, but model.vocab_size is "
                f"{self._vocab_size}. Set data.tokenizer to the one that prepared it, or raise model.vocab_size."
            )
        return PackedSequence(torch.from_numpy(tokens), tuple(borders))

    def _order_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where each ends in it."""
        order = self._documents
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return order, np.cumsum(self._file.lengths[order], dtype=np.int64)


@dataclass(frozen=True)
class DataPlan:
    """How sequences become batches.

    Attributes:
        seq_len: tokens of a training sequence.
        batch_size: sequences per optimizer step, over all ranks.
        layout: ``contiguous`` or ``zigzag``.
        options: how layers exchange.
        join_documents: a sequence is one document, whatever it was packed from.
    """

    seq_len: int
    batch_size: int
    layout: str = "contiguous"
    options: ExchangeOptions | None = None
    join_documents: bool = False

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.batch_size

    def micro_steps(self, mesh: Mesh) -> int:
        """Micro batches of a rank per optimizer step."""
        if self.batch_size % mesh.dp_size:
            raise ValueError(
                f"data.batch_size must be a multiple of dp_size: {self.batch_size} sequences per step, dp_size = "
                f"{mesh.dp_size}. Set data.batch_size to a multiple of {mesh.dp_size}."
            )
        return self.batch_size // mesh.dp_size

    def check_length(self, stream: PackedStream) -> None:
        """Refuse a sequence that is longer than an epoch: it would hold the same documents more than once.

        Raises:
            ValueError: naming both lengths.
        """
        if self.seq_len > stream.epoch_tokens:
            raise ValueError(
                f"data.seq_len = {self.seq_len:,} tokens must not exceed the {stream.epoch_tokens:,} of all training "
                f"documents in {stream.prefix}. Shorten data.seq_len or prepare more text."
            )

    def cut(self, sequence: PackedSequence, mesh: Mesh) -> Batch:
        """This rank's part of a sequence, every cp rank having made the same one."""
        make = getattr(SequenceLayout, self.layout)
        layout = make(len(sequence.tokens) if self.join_documents else sequence.cu_seqlens, mesh.cp_size)
        return Batch.cut(sequence.tokens[None], layout, mesh, options=self.options)

    def step_batches(self, stream: PackedStream, first_token: int, mesh: Mesh) -> list[Batch]:
        """This rank's micro batches of the step that begins at stream token ``first_token``."""
        starts = [first_token + (m * mesh.dp_size + mesh.dp_rank) * self.seq_len for m in range(self.micro_steps(mesh))]
        return [self.cut(stream.sequence(start, self.seq_len), mesh) for start in starts]

    def eval_batches(self, stream: PackedStream, sequences: int, mesh: Mesh) -> tuple[list[Batch], str | None]:
        """This rank's share of the first ``sequences`` held-out sequences; the stream is read once at most.

        Returns:
            the batches, and what the user should know: sequences that nothing can be measured on are left out.
        """
        starts = [n * self.seq_len for n in range(sequences) if n * self.seq_len < stream.epoch_tokens]
        lengths = [min(self.seq_len, stream.epoch_tokens - start) for start in starts]
        wanted = [(a, n) for a, n in zip(starts, lengths, strict=True) if self.labels(stream.sequence(a, n))]
        used = [(a, n) for a, n in wanted if n >= mesh.cp_size]
        batches = [self.cut(stream.sequence(a, n), mesh) for a, n in used[mesh.dp_rank :: mesh.dp_size]]
        if not wanted:
            return [], "the held-out sequences hold no label: there is no held-out loss. Hold out longer documents."
        if len(used) < len(wanted):
            short = f"{len(wanted) - len(used)} of {len(wanted)} held-out sequences"
            return batches, f"{short} left out: shorter than cp_size = {mesh.cp_size} tokens. Hold out more text."
        return batches, None

    def labels(self, sequence: PackedSequence) -> int:
        """How many of a sequence's tokens have a next token in their document."""
        return len(sequence.tokens) - (1 if self.join_documents else len(sequence.cu_seqlens) - 1)


def split_documents(num_documents: int, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Documents for training and held-out ones: the same split at every seed, so that losses compare.

    Raises:
        ValueError: too few documents to hold one out.
    """
    if num_documents < 1:
        raise ValueError(
            f"the data must hold at least one document, got {num_documents}. Prepare files that hold text."
        )
    held_out = round(num_documents * eval_fraction)
    if eval_fraction > 0:
        held_out = max(1, held_out)
    if held_out >= num_documents:
        raise ValueError(
            f"data.eval_fraction = {eval_fraction} of {num_documents} document(s) leaves none to train on. Prepare "
            "more documents or set data.eval_fraction=0."
        )
    order = np.random.default_rng(0).permutation(num_documents)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def open_source(source: str, cache_dir: Path, tokenizer: Tokenizer) -> TokenFile:
    """The token file of ``data.source``: a prefix, or ``stdlib``, which is prepared into ``cache_dir`` once.

    Raises:
        ValueError: no such file, or one that another tokenizer made.
    """
    own = fingerprint(tokenizer)
    if source == STDLIB:
        digest = "" if own == BYTES else f"-{own[:12]}"
        prefix = cache_dir / f"stdlib-{Path(tokenizer.name).stem}{digest}"
        if not all(with_suffix(prefix, s).is_file() for s in (".bin", ".idx", ".json")):
            write_token_file(prefix, read_texts(stdlib_files()), tokenizer)
        file = TokenFile(prefix)
    else:
        file = TokenFile(source)
    made_by = file.info.get("tokenizer", tokenizer.name)
    if file.info.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise ValueError(
            f"{file.prefix} was prepared with tokenizer {made_by!r} of {file.info['vocab_size']} ids, but "
            f"data.tokenizer is {tokenizer.name!r} of {tokenizer.vocab_size}. Set data.tokenizer={made_by}."
        )
    theirs = str(file.info.get("tokenizer_sha256", own))
    if theirs != own:
        raise ValueError(
            f"{file.prefix} was prepared with tokenizer {made_by!r} ({theirs[:12]}), but data.tokenizer is "
            f"{tokenizer.name!r} ({own[:12]}): the same ids mean other text. Set data.tokenizer to the one that "
            "prepared it, or prepare the data again."
        )
    return file

"""The data of a run, ready to be read: what it learns from, what it holds out, and how sequences become batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lasp.launch.data.stream import DataPlan, PackedStream, open_source, split_documents
from lasp.launch.data.token_files import TokenFile
from lasp.launch.data.tokenizer import Tokenizer
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch


@dataclass(frozen=True)
class RunData:
    """The data of a run, as one rank reads it. Make it with :func:`open_data`.

    Attributes:
        file: all documents.
        learned, held_out: numbers of the documents that are trained on, and of those that are not.
        stream: the documents to learn from, packed.
        plan: how sequences of the stream become batches.
        eval_batches: this rank's share of the held-out sequences.
        unmeasured: what the user should know of held-out sequences that are left out; None if none are.
    """

    file: TokenFile
    learned: np.ndarray
    held_out: np.ndarray
    stream: PackedStream
    plan: DataPlan
    eval_batches: list[Batch]
    unmeasured: str | None

    def step_batches(self, position: int, mesh: Mesh) -> list[Batch]:
        """This rank's micro batches of the step that begins at global token ``position``."""
        return self.plan.step_batches(self.stream, position, mesh)

    def opening(self, tokens: int) -> list[int]:
        """The first tokens of a document, a held-out one if there is any."""
        documents = self.held_out if len(self.held_out) else self.learned
        return self.file.document(int(documents[0]), 0).tolist()[:tokens]


def open_data(
    source: str,
    cache_dir: Path,
    tokenizer: Tokenizer,
    plan: DataPlan,
    mesh: Mesh,
    *,
    eval_fraction: float,
    eval_sequences: int,
    seed: int,
    vocab_size: int,
) -> RunData:
    """The first rank prepares the data once, all map the same files. All ranks of the mesh call it.

    Args:
        source: ``data.source``; what has to be prepared goes into ``cache_dir``.
        eval_fraction: of the documents, held out; ``eval_sequences`` of their sequences, at most, are measured.
        seed: of the order of the documents.
        vocab_size: of the model.

    Raises:
        ValueError: the source does not fit the tokenizer, the plan or the mesh.
        OSError: a file cannot be read or written.
    """
    mesh.on_first(lambda: len(open_source(source, cache_dir, tokenizer)))
    file = open_source(source, cache_dir, tokenizer)
    learned, held_out = split_documents(len(file), eval_fraction)
    stream = PackedStream(file, learned, seed, vocab_size)
    plan.micro_steps(mesh)
    plan.check_length(stream)
    eval_batches, unmeasured = [], None
    if len(held_out):
        held_out_stream = PackedStream(file, held_out, None, vocab_size)
        eval_batches, unmeasured = plan.eval_batches(held_out_stream, eval_sequences, mesh)
    return RunData(file, learned, held_out, stream, plan, eval_batches, unmeasured)

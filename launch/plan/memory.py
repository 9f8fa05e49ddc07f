"""A model of the memory of one rank: plain functions, every term named with its formula.

A step is at its fullest in one of a few phases: in the *loss* (what all blocks keep, and the buffers of the chunked
cross-entropy), in the *backward* of a block (what the others keep, what this one has kept or made again, and the
gradients in work), or in the *update*. What is there in all of them is *held*: parameters, gradients, optimizer states
(the table in docs/scaling.md), gathered parameters, the device's own share. The peak is held + the largest phase.

A prediction: counted from the code. What it leaves out is what an allocator loses by fragmentation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lasp.exchange import EXCHANGES
from lasp.launch.plan.activations import Load, Saved, Term, rms_norm, saved_by_block, work_terms
from lasp.models.config import ModelConfig
from lasp.models.sizes import LinearSizes
from lasp.parallel.engines.kinds import EngineKind, Master
from lasp.parallel.engines.table import engine_kind
from lasp.parallel.gpt.weights import padded_vocab_size
from lasp.parallel.objective import CHUNK_ELEMENTS

CUDA_BYTES = 2 * 2**30  # context, libraries, NCCL's buffers: assumed


@dataclass(frozen=True)
class Setup:
    """Who holds what.

    Attributes:
        engine: a name in the table of engines; ``megatron`` is its distributed optimizer.
        load: what a rank computes at a time.
        ranks: that share states: dp x cp.
        pp_size, micro_batches: pipeline stages, and micro batches of a step.
        offload: activations that are kept go to host memory.
    """

    engine: str
    load: Load
    ranks: int = 1
    pp_size: int = 1
    micro_batches: int = 1
    offload: bool = False

    @property
    def kind(self) -> EngineKind:
        """What the table of engines says of the engine."""
        return engine_kind(self.engine)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        held: there during the whole step.
        phases: what each phase has beside it.
    """

    held: tuple[Term, ...]
    phases: Mapping[str, tuple[Term, ...]]

    @property
    def phase(self) -> str:
        """The fullest one."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment of a step."""
        return total(self.terms)

    @property
    def terms(self) -> tuple[Term, ...]:
        """What is there at that moment."""
        return (*self.held, *self.phases[self.phase])


def total(terms: Iterable[Term]) -> float:
    """Bytes of all."""
    return sum(term.bytes for term in terms)


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank: all, of the largest block, and of the embedding (and the head, where it is apart)."""

    all: float
    block: float
    root: float
    vocabulary: float

    @classmethod
    def of(cls, config: ModelConfig, tp_size: int = 1, pp_size: int = 1) -> Parameters:
        """With heads, hidden width and vocabulary over ``tp_size`` ranks and layers over ``pp_size``."""
        sizes = [size / tp_size for size, _ in block_sizes(config)]
        rows = config.vocab_size if tp_size * pp_size == 1 else padded_vocab_size(config)
        root = rows * config.dim / tp_size * (1 if config.tie_embeddings else 2)
        return cls(sum(sizes[: math.ceil(len(sizes) / pp_size)]) + root, max(sizes), root, rows / tp_size)


@functools.cache
def block_sizes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Parameters of each block, and those of them that are matrices. Builds the model without storage."""
    from lasp.models.linear_llama import LinearLlama

    blocks = [list(block.parameters()) for block in LinearLlama(config, device="meta").layers]
    return tuple((sum(p.numel() for p in b), sum(p.numel() for p in b if p.dim() > 1)) for b in blocks)


def predict_memory(config: ModelConfig, setup: Setup) -> Memory:
    """The memory of one rank over a training step; of pipeline stages that of the first, which keeps most.

    Raises:
        ValueError: an unknown engine.
    """
    load, parameters = setup.load, Parameters.of(config, setup.load.tp_size, setup.pp_size)
    held = [*state_terms(setup, parameters), Term("tokens and labels", 16 * load.tokens, "2 x T x 8")]
    if load.device == "cuda":
        held.append(Term("CUDA context and NCCL", CUDA_BYTES, "assumed"))
    kinds = config.layer_kinds[: math.ceil(config.num_layers / setup.pp_size)]
    kept = {kind: _kept_by_block(config, kind, load) for kind in set(kinds)}
    phases = _loss_phases(config, setup, parameters, _all_kept(config, setup, kinds, kept, leave_out=None))
    weight = _output_weight_gradient(config, setup, parameters)
    for kind in sorted(set(kinds)):
        others = _all_kept(config, setup, kinds, kept, leave_out=None if config.recompute else kind)
        saved, work = saved_by_block(config, kind, load), work_terms(config, kind, load)
        for part, terms in work.items():
            name = f"backward of a {_KINDS[kind]} layer: {part}"
            phases[name] = (*others, *weight, *_of_block(config, saved, part), *terms)
    phases["backward of the embedding"] = (*weight, *weight)
    sharing = setup.ranks if setup.kind.cut_states else 1
    phases["update"] = (
        Term("divisor of AdamW", parameters.all / sharing * load.wide, f"parameters updated x {load.wide}"),
    )
    return Memory(tuple(held), phases)


_KINDS = {"L": "linear", "S": "softmax"}


def state_terms(setup: Setup, parameters: Parameters) -> list[Term]:
    """Parameters, gradients and optimizer states of one rank, and what its engine gathers."""
    kind, n, ranks = setup.kind, parameters.all, setup.ranks
    width, wide = setup.load.width, setup.load.wide

    def held(name: str, cut: bool, count: int, size: int) -> Term:
        """``count`` tensors as large as the parameters, of numbers of ``size`` bytes."""
        times = "" if count == 1 else f"{count} x "
        share, elements = (f"N / {ranks}", n / ranks) if cut else ("N", n)
        return Term(name, count * elements * size, f"{times}{share} x {size}")

    terms = [] if kind.master is Master.ALONE else [held("parameters", kind.cut_parameters, 1, width)]
    if kind.master is not Master.IF_NARROW or width < wide:
        terms.append(held("master copy", kind.cut_states, 1, wide))
    terms += [held("moments", kind.cut_states, 2, wide), held("gradients", kind.cut_gradients, 1, wide)]
    return [*terms, *(Term(*part) for part in kind.in_work(parameters, width, wide))]


def _kept_by_block(config: ModelConfig, kind: str, load: Load) -> tuple[Term, ...]:
    """What a block keeps until its backward begins."""
    if not config.recompute:
        return saved_by_block(config, kind, load).all
    terms = [Term("inputs of blocks", load.tokens * config.dim * load.width, f"T x dim x {load.width}")]
    if kind == "L" and load.cp_size > 1:
        s = LinearSizes.of(config, load.tp_size)
        maps = load.cp_size if EXCHANGES[load.exchange].keeps_transitions else 1
        size = load.rows * load.fragments * (s.state_elements + maps * s.transition_elements) * load.wide
        terms.append(Term("states that exchanges brought", size, f"F x (H K V + {maps} a) x {load.wide}"))
    return tuple(terms)


def _all_kept(
    config: ModelConfig, setup: Setup, kinds: str, kept: Mapping[str, tuple[Term, ...]], leave_out: str | None
) -> list[Term]:
    """What all blocks of the rank keep, those of one kind together; one block of ``leave_out`` is left out."""
    in_flight = min(setup.pp_size, setup.micro_batches)
    sums: dict[str, Term] = {}
    for kind, terms in kept.items():
        count = in_flight * kinds.count(kind) - (kind == leave_out)
        for term in terms:
            before = sums.get(term.name)
            size, formula = count * term.bytes, f"{count} x {term.formula}"
            sums[term.name] = Term(term.name, size, formula) if before is None else before.joined(size, formula)
    if not setup.offload:
        return [*sums.values(), *_rotary(config, setup.load)]
    blocks = sum(kinds.count(kind) for kind in kept) * in_flight
    return [Term(f"{t.name} (on the way to the host)", 2 * t.bytes / blocks, "2 blocks") for t in sums.values()]


def _rotary(config: ModelConfig, load: Load) -> list[Term]:
    widths = {config.softmax_head_dim} if "S" in config.layer_kinds else set()
    if "L" in config.layer_kinds and config.mixer.position == "rope":
        widths.add(config.key_dim)
    tokens = load.tokens // load.rows
    size = tokens * sum(widths) * load.wide
    return [Term("cos and sin", size, f"T x {sum(widths)} x {load.wide}")] if widths else []


def _of_block(config: ModelConfig, saved: Saved, part: str) -> list[Term]:
    """What a block has, kept or made again, when the backward of one of its parts runs."""
    terms = {
        "feed-forward": saved.all,
        "norm": (*saved.before, *saved.after, saved.feed_forward[0]),
        "attention": saved.before,
        "convolution": saved.before,
    }[part]
    if not config.recompute:
        return list(terms)
    return [t._replace(name=f"made again: {t.name}") for t in terms if not t.name.endswith("block: input")]  # is kept


def _output_weight_gradient(config: ModelConfig, setup: Setup, parameters: Parameters) -> list[Term]:
    """Made in the loss; it waits for the embedding's where they are one, or where all is summed at the end."""
    if not config.tie_embeddings and not setup.kind.gathers_parameters:
        return []
    size = parameters.vocabulary * config.dim * setup.load.width
    return [Term("gradient of the output weight", size, f"vocab x dim x {setup.load.width}")]


def _loss_phases(
    config: ModelConfig, setup: Setup, parameters: Parameters, kept: list[Term]
) -> dict[str, tuple[Term, ...]]:
    """The final norm and the cross-entropy, which makes its gradients in the forward pass."""
    load, rows, dim = setup.load, parameters.vocabulary, config.dim
    count, width, wide = load.tokens, load.width, load.wide
    norm = rms_norm("final norm", "dim", dim, count, load)
    if not setup.kind.native:
        size = count * rows * (2 * width + 2 * wide)
        return {"loss": (*kept, norm, Term("logits", size, f"T x vocab x (2 x {width} + 2 x {wide})"))}
    chunk = max(1, min(count, CHUNK_ELEMENTS // config.vocab_size))
    weight_sum = Term("sum of the output weight's gradient", 2 * rows * dim * wide, f"2 x vocab x dim x {wide}")
    forward = [
        norm,
        Term("hidden states and their gradient", 2 * count * dim * width, f"2 x T x dim x {width}"),
        Term("logits of a chunk", 2 * chunk * rows * wide, f"2 x {chunk} x vocab x {wide}"),
        weight_sum,
    ]
    if load.device == "cpu" and width < wide:
        forward.append(Term("output weight in fp32", rows * dim * wide, f"vocab x dim x {wide}"))
    backward = [
        norm,
        Term("gradient of hidden states, twice", 2 * count * dim * width, f"2 x T x dim x {width}"),
        weight_sum,
        *_output_weight_gradient(config, setup, parameters),
    ]
    return {"loss": (*kept, *forward), "backward of the loss": (*kept, *backward)}

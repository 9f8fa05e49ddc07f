"""What one block of the model keeps for its backward pass, and what that backward needs beside it, term by term.

Everything is counted from the code that allocates it: a term is a tensor (or a few alike) that autograd saves in
:mod:`lasp.models.layers`, :mod:`lasp.models.linear_mixer` and the operators below them, or that a backward holds at its
fullest. Terms for ``cpu`` are compared with the tensors that autograd really saves, for every kind of layer
(tests/launch/test_memory.py); those for ``cuda`` differ where the implementation does: RMSNorm is fused there and keeps
its input instead of copies in fp32, and the Triton kernels keep one state per superchunk. T below is the number of
tokens of one micro batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lasp.exchange import EXCHANGES
from lasp.kernels.torch_linear.operator import tokens_per_state
from lasp.kernels.triton_linear.tiles import superchunk
from lasp.models.config import ModelConfig
from lasp.models.features import FEATURES, FeatureMap
from lasp.models.gates import GATES
from lasp.models.outputs import OUT_GATES, OUT_NORMS
from lasp.models.sizes import LinearSizes
from lasp.softmax.table import SOFTMAX_EXCHANGES, Sizes


class Term(NamedTuple):
    """``bytes`` on one rank, and how they were counted."""

    name: str
    bytes: float
    formula: str

    def joined(self, size: float, formula: str) -> Term:
        """This term and ``size`` bytes more of the same."""
        return Term(self.name, self.bytes + size, f"{self.formula} + {formula}")


@dataclass(frozen=True)
class Load:
    """What one rank computes at a time: one micro batch.

    Attributes:
        tokens: T, of all rows of the micro batch on this rank.
        width: bytes of an activation: 2, 4 or 8.
        device: ``cuda`` or ``cpu``.
        rows: sequences of the micro batch.
        cp_size, fragments: ranks per sequence, fragments per rank (2 with zigzag).
        tp_size: ranks that share heads and hidden width.
        exchange, softmax_exchange: of the linear and of the softmax layers.
    """

    tokens: int
    width: int = 2
    device: str = "cuda"
    rows: int = 1
    cp_size: int = 1
    fragments: int = 1
    tp_size: int = 1
    exchange: str = "all_gather"
    softmax_exchange: str = "all_gather"

    @property
    def wide(self) -> int:
        """Bytes of a number in states, sums and statistics."""
        return max(4, self.width)


class Saved(NamedTuple):
    """What a block keeps: up to the attention operator, behind it, and in the feed-forward part."""

    before: tuple[Term, ...]
    after: tuple[Term, ...]
    feed_forward: tuple[Term, ...]

    @property
    def all(self) -> tuple[Term, ...]:
        """Of the whole block."""
        return (*self.before, *self.after, *self.feed_forward)


def saved_by_block(config: ModelConfig, kind: str, load: Load) -> Saved:
    """What one block, ``L`` or ``S``, keeps from its forward to its backward without recomputation."""
    before, after = (_linear_saved if kind == "L" else _softmax_saved)(config, load)
    dim, width, count = config.dim, load.width, load.tokens
    hidden = config.hidden_dim // load.tp_size
    head = (
        rms_norm("norm of the block", "dim", dim, count, load),
        Term("normalised input of the attention", count * dim * width, f"T x dim x {width}"),
    )
    feed_forward = [
        rms_norm("norm of the feed-forward part", "dim", dim, count, load),
        Term("normalised input of the feed-forward part", count * dim * width, f"T x dim x {width}"),
    ]
    if not _tiled(config, load):
        formula = f"4 x T x ffn_dim x {width}"
        feed_forward.append(Term("hidden activations of SwiGLU", 4 * count * hidden * width, formula))
    return Saved((*head, *before), tuple(after), tuple(feed_forward))


def _tiled(config: ModelConfig, load: Load) -> bool:
    return config.ffn_tile is not None and load.tokens > config.ffn_tile


def rms_norm(name: str, what: str, elements: int, count: int, load: Load, affine: bool = True) -> Term:
    """RMSNorm: fused on CUDA (its input, one number per row); else in fp32, as copies of its input and result."""
    if load.device == "cuda":
        return Term(f"{name}: input", count * (elements * load.width + 4), f"T x ({what} x {load.width} + 4)")
    copies = 2 if affine else 1
    size = count * (copies * elements + 1) * load.wide
    return Term(f"{name}: copies in fp32", size, f"T x ({copies} x {what} + 1) x {load.wide}")


def _linear_saved(config: ModelConfig, load: Load) -> tuple[list[Term], list[Term]]:
    mixer, s, count, width = config.mixer, LinearSizes.of(config, load.tp_size), load.tokens, load.width
    keys, features, values = s.heads * s.key_dim, s.heads * s.state_dim, s.heads * s.value_dim
    before, after = [], []

    def keep(where: list[Term], name: str, elements: float, formula: str, size: int = width) -> None:
        where.append(Term(name, count * elements * size, f"T x {formula} x {size}"))

    if mixer.conv_width:
        keep(before, "input of the convolution", 2 * keys + values, "(2 H K + H V)")
    feature = FEATURES[mixer.feature]
    raw = 2 * s.heads * feature.kept(s.key_dim, s.state_dim)
    if raw:
        keep(before, f"q and k before and in the map {mixer.feature}", raw, _raw_formula(feature))
    keep(before, "q and k", 2 * features, "2 H K")
    keep(before, "v", s.heads * s.columns, "H V")
    if mixer.conv_width and raw and mixer.normaliser == "sum":  # q, k and v before the map are one tensor
        keep(before, "v before its column of ones", values, "H V")
    if mixer.gate is not None:
        copies = GATES[mixer.gate].kept[load.device]
        keep(before, "log-decay and what makes it", copies * s.heads * s.decays, f"{copies} x gates", load.wide)
        if mixer.gate_rank:
            keep(before, "decay through its rank", mixer.gate_rank, "gate_rank")
    before.append(_states(config, s, load))
    if mixer.normaliser == "sum":
        keep(after, "numerator and denominator", values + 2 * s.heads, "(H V + 2 H)", load.wide)
    norm, gate = OUT_NORMS[mixer.out_norm], OUT_GATES[mixer.out_gate]
    if norm is not None:
        span, what, groups = (values, "H V", 1) if norm.spans_heads else (s.value_dim, "V", s.heads)
        term = rms_norm("norm of the output", what, span, count * groups, load, norm.affine)
        per_head = term.formula if norm.spans_heads else term.formula.replace("T x", "T x H x")
        after.append(term._replace(formula=per_head))
    if gate is not None:
        keep(before, "output gate", gate.kept * values, f"{gate.kept} x H V")
        keep(after, "output before its gate", values, "H V")
        if mixer.out_gate_rank:
            keep(before, "output gate through its rank", mixer.out_gate_rank, "out_gate_rank")
    keep(after, "input of the output projection", values, "H V")
    return before, after


def _raw_formula(feature: FeatureMap) -> str:
    counts = {"H key_dim": feature.keeps_keys, "H K": feature.keeps_features, "H": feature.keeps_scalars}
    parts = [f"{2 * count} {what}" for what, count in counts.items() if count]
    return parts[0] if len(parts) == 1 else f"({' + '.join(parts)})"


def _states(config: ModelConfig, s: LinearSizes, load: Load) -> Term:
    """States from which the backward goes on: one per superchunk (Triton) or tile (PyTorch), and per segment."""
    per_row = load.tokens // load.rows
    if load.device == "cuda":
        decay = ("none", "fixed", "scalar", "channel").index(config.mixer.decay)
        length = superchunk(decay, load.tokens * s.heads)
        what = "superchunk"
    else:
        length = tokens_per_state(
            per_row, load.fragments, load.rows, s.heads, s.state_dim, s.columns, device_type=load.device
        )
        what = "tile"
    states = -(-per_row // length) + load.fragments
    entries = load.fragments * (load.cp_size > 1)
    size = load.rows * (states + entries) * s.state_elements * load.wide
    return Term("states", size, f"(T / {length} per {what} + segments) x H K V x {load.wide}")


def _softmax_saved(config: ModelConfig, load: Load) -> tuple[list[Term], list[Term]]:
    count, width, head = load.tokens, load.width, config.softmax_head_dim
    heads, kv_heads = config.heads // load.tp_size, max(1, (config.kv_heads or config.heads) // load.tp_size)
    terms = [
        Term("q and o", 2 * count * heads * head * width, f"2 x T x H D x {width}"),
        Term("k and v", 2 * count * kv_heads * head * width, f"2 x T x Hkv D x {width}"),
        Term("log of the sums", count * heads * load.wide, f"T x H x {load.wide}"),
    ]
    if config.window is not None and load.cp_size > 1:
        halo = load.rows * load.fragments * min(config.window - 1, load.tokens // load.rows)
        terms.append(Term("halo", 2 * halo * kv_heads * head * width, f"2 x F (window - 1) x Hkv D x {width}"))
    return terms, []


def work_terms(config: ModelConfig, kind: str, load: Load) -> dict[str, tuple[Term, ...]]:
    """What the backward of a block holds at its fullest beside what was saved, part by part."""
    count, width, dim = load.tokens, load.width, config.dim
    stream = Term("gradient of the residual stream", count * dim * width, f"T x dim x {width}")
    grads = Term("gradients of the norm", count * dim * width, f"T x dim x {width}")
    if load.device == "cpu":
        grads = Term("gradients of the norm in fp32", 3 * count * dim * load.wide, f"3 x T x dim x {load.wide}")
    attention = _linear_work(config, load) if kind == "L" else _softmax_work(config, load)
    parts = {
        "feed-forward": (stream, *_feed_forward_work(config, load)),
        "norm": (stream, grads),
        "attention": (stream, *attention),
    }
    if kind == "L" and config.mixer.conv_width:
        parts["convolution"] = (stream, *_convolution_work(config, load))
    return parts


def _convolution_work(config: ModelConfig, load: Load) -> list[Term]:
    s = LinearSizes.of(config, load.tp_size)
    channels = load.tokens * s.heads * (2 * s.key_dim + s.value_dim)
    formula, copied = "T x (2 H K + H V)", int(load.width < load.wide)  # into fp32 and back
    return [
        Term(
            "padded input and gradient",
            (2 + copied) * channels * load.width,
            f"{2 + copied} x {formula} x {load.width}",
        ),
        Term(
            "sums and gradients in fp32", (3 + copied) * channels * load.wide, f"{3 + copied} x {formula} x {load.wide}"
        ),
    ]


def _feed_forward_work(config: ModelConfig, load: Load) -> list[Term]:
    hidden, width, count = config.hidden_dim // load.tp_size, load.width, load.tokens
    result = Term("gradient of the feed-forward input", count * config.dim * width, f"T x dim x {width}")
    if not _tiled(config, load):
        return [
            Term("gradients of hidden activations", 2 * count * hidden * width, f"2 x T x ffn_dim x {width}"),
            result,
        ]
    tile = config.ffn_tile
    return [
        Term("hidden activations of a tile", 6 * tile * hidden * width, f"6 x ffn_tile x ffn_dim x {width}"),
        Term("sums of weight gradients", 3 * config.dim * hidden * load.wide, f"3 x dim x ffn_dim x {load.wide}"),
        result,
    ]


def _linear_work(config: ModelConfig, load: Load) -> list[Term]:
    mixer, s, count, width = config.mixer, LinearSizes.of(config, load.tp_size), load.tokens, load.width
    size = width if load.device == "cuda" else load.wide  # the PyTorch operator sums gradients in fp32
    features, columns = s.heads * s.state_dim, s.heads * s.columns
    terms = [
        Term("gradient of the output", count * columns * width, f"T x H V x {width}"),
        Term("gradients of q, k and v", count * (2 * features + columns) * size, f"T x (2 H K + H V) x {size}"),
        _states(config, s, load)._replace(name="gradients of states"),
    ]
    if size > width:
        terms.append(
            Term("their rounded copies", count * (2 * features + columns) * width, f"T x (2 H K + H V) x {width}")
        )
    if mixer.out_gate != "none":
        terms.append(Term("gradient of the output gate", count * columns * width, f"T x H V x {width}"))
    if mixer.gate is not None:
        size = 2 * count * s.heads * s.decays * 4  # cumulative decays and the products that dg sums; or dg twice
        terms.append(Term("decays and their gradient", size, "2 x T x gates x 4"))
    exchange = exchange_term(config, load)
    return terms if exchange is None else [*terms, exchange]


def exchange_term(config: ModelConfig, load: Load) -> Term | None:
    """Messages of one exchange of a linear layer, received and being folded; None on one rank."""
    if load.cp_size == 1:
        return None
    s, f = LinearSizes.of(config, load.tp_size), load.fragments
    state, transition = (load.rows * n * load.wide for n in (s.state_elements, s.transition_elements))
    buffers = EXCHANGES[load.exchange].buffers
    return Term("exchange", buffers.size(load.cp_size, f, state, transition), buffers.formula)


def _softmax_work(config: ModelConfig, load: Load) -> list[Term]:
    count, width, head, wide = load.tokens, load.width, config.softmax_head_dim, load.wide
    heads, kv_heads = config.heads // load.tp_size, max(1, (config.kv_heads or config.heads) // load.tp_size)
    local, queries = 2 * count * kv_heads * head, count * heads * head
    entry = SOFTMAX_EXCHANGES[load.softmax_exchange]
    gathers = load.cp_size > 1 and config.window is None and entry.head_groups is not None
    groups = min(entry.head_groups, kv_heads) if gathers else 1
    own_keys = local * (not gathers)  # those of all ranks are counted below
    kernel = (2 * queries + own_keys) * width + own_keys * wide + (queries * wide if load.device == "cpu" else 0)
    packed = queries * width + 3 * own_keys * wide
    terms = [
        Term("gradient of the output", queries * width, f"T x H D x {width}"),
        Term("gradients of q, k and v", (queries + local) * width, f"T x (H D + 2 Hkv D) x {width}"),
        Term(
            "gradients of a group of heads, in work", max(kernel, packed) / groups, f"T x H D, Hkv D / {groups} groups"
        ),
    ]
    if load.cp_size == 1 or config.window is not None:
        return terms
    sizes = Sizes(load.cp_size, count, heads, kv_heads, head, width, wide)
    return [*terms, *(Term(*held) for held in entry.held(sizes))]

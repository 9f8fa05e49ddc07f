"""The table of the exchanges of softmax layers. What any room knows of one by its name, it reads here.

A new exchange is a file with its attention, and an entry: layers, contexts, the schema, ``auto``, the planner, the
memory model and the list in docs/exchanges.md take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lasp import cost
from lasp.checks import not_one_of
from lasp.context.context import Context
from lasp.cost import traffic
from lasp.cost.fabric import Fabric
from lasp.cost.traffic import Traffic
from lasp.exchange import AUTO
from lasp.softmax.gather import HEAD_GROUPS, GatherAttention
from lasp.softmax.ring import RingAttention
from lasp.softmax.ulysses import UlyssesAttention, heads_fit
from lasp.softmax.window import WindowAttention

Attend = Callable[[Tensor, Tensor, Tensor, Context, bool, "int | None", float], Tensor]


class Held(NamedTuple):
    """Bytes that one rank holds at once, and how they were counted."""

    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Sizes:
    """A layer on one rank: cp ranks, tokens T, heads H and Hkv, head dim D, bytes of an activation and of a sum."""

    ranks: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    wide: int

    @property
    def keys(self) -> int:
        """Numbers in the rank's keys and values."""
        return 2 * self.tokens * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class SoftmaxExchange:
    """One way to bring the queries of a rank and the keys of others together.

    Attributes:
        name: in configurations, plans and reports.
        attend: ``attend(q, k, v, cp, causal, window, scale) -> o``.
        traffic: what travels in one direction: of ``(nodes, fabric, kv_bytes, q_bytes, backward)``.
        held: what the backward holds beside the rank's own keys and gradients.
        hidden: share of a layer's attention behind which its messages fly.
        head_groups: into how many groups of kv heads it cuts the keys of all ranks, of which it gathers one at a time;
            None: the rank works on all heads of its own keys.
        no_window: why it takes no window; empty where it takes one.
        fits: whether heads H, Hkv can be dealt to so many ranks; None: any can.
        heads_rule: what breaks ``fits``, with ``{cp_size}``, ``{heads}`` and ``{kv_heads}``.
        in_collective: as in :class:`lasp.exchange.Exchange`.
        title, facts: its column in docs/exchanges.md, beside :data:`FACTS`.
    """

    name: str
    attend: Attend
    traffic: Callable[[tuple[int, ...], Fabric, int, int, bool], Traffic]
    held: Callable[[Sizes], list[Held]]
    title: str
    facts: tuple[str, ...]
    hidden: float = 0.0
    head_groups: int | None = None
    no_window: str = ""
    fits: Callable[[int, int, int], bool] | None = None
    heads_rule: str = ""
    in_collective: bool = False

    def heads_fit(self, heads: int, kv_heads: int, cp_size: int) -> bool:
        """Whether the heads can be dealt to ``cp_size`` ranks."""
        return self.fits is None or self.fits(heads, kv_heads, cp_size)

    def sent(self, nodes: tuple[int, ...], fabric: Fabric, kv_bytes: int, q_bytes: int, backward: bool) -> Traffic:
        """What travels in one direction."""
        return self.traffic(nodes, fabric, kv_bytes, q_bytes, backward)


def _gather(q, k, v, cp, causal, window, scale) -> Tensor:
    """With a window each fragment fetches just the tokens before it."""
    if window is not None:
        return WindowAttention.apply(q, k, v, cp, window, scale)
    return GatherAttention.apply(q, k, v, cp, causal, scale)


def _ring(q, k, v, cp, causal, window, scale) -> Tensor:
    assert window is None, "the table says that it takes none"
    return RingAttention.apply(q, k, v, cp, causal, scale)


def _gathered(s: Sizes) -> list[Held]:
    groups = min(HEAD_GROUPS, s.kv_heads)
    copies = 3 if groups == 1 else 4  # those of the group before are on their way
    share = s.ranks * s.keys / groups
    formula = f"W T x 2 Hkv D / {groups} groups"
    return [
        Held("gathered keys and values", 3 * share * s.width, f"3 x {formula} x {s.width}"),
        Held("their gradients", copies * share * s.wide, f"{copies} x {formula} x {s.wide}"),
    ]


def _in_flight(s: Sizes) -> list[Held]:
    size = 2 * s.keys * (s.width + s.wide)
    return [Held("keys and values in flight", size, f"4 x T x Hkv D x {s.width + s.wide}")]


def _swapped(s: Sizes) -> list[Held]:
    moved = s.tokens * (2 * s.heads + 2 * s.kv_heads) * s.head_dim * s.width
    return [Held("heads exchanged", 2 * moved, f"2 x T x (2 H + 2 Hkv) D x {s.width}")]


FACTS = (
    "what moves",
    "calls per rank, forward",
    "calls per rank, backward",
    "in flight during attention",
    "keys and values beyond its own that a rank holds",
    "causal work is balanced",
    "window",
    "heads",
)
SOFTMAX_EXCHANGES: dict[str, SoftmaxExchange] = {
    entry.name: entry
    for entry in (
        SoftmaxExchange(
            name="all_gather",
            attend=_gather,
            traffic=traffic.gather_keys,
            held=_gathered,
            hidden=0.75,  # the first quarter of the heads waits
            head_groups=HEAD_GROUPS,
            in_collective=True,
            title="LASP-2H",
            facts=(
                "keys and values to every rank, a quarter of the heads at a time",
                "up to 4 all-gathers",
                "the same, and as many reduce-scatters",
                "the next group of heads",
                "2 of 4 groups of heads, W shards long",
                "by zigzag",
                "fetches just the halo, one all-to-all per direction",
                "any",
            ),
        ),
        SoftmaxExchange(
            name="ring",
            attend=_ring,
            traffic=traffic.pass_keys,
            held=_in_flight,
            hidden=0.75,
            no_window="whole shards would travel for a few tokens",
            title="Ring Attention",
            facts=(
                "shards of keys and values, from rank r to r + 1, in the backward followed by their gradients",
                "up to W - 1 sends, one after the other",
                "up to 2 (W - 1) sends",
                "the next shard, and the gradients of the last one",
                "2 shards",
                "by zigzag, hop by hop",
                "refused",
                "any",
            ),
        ),
        SoftmaxExchange(
            name="ulysses",
            attend=UlyssesAttention.apply,
            traffic=traffic.swap_heads,
            held=_swapped,
            fits=heads_fit,
            heads_rule="deals whole heads to ranks: cp_size = {cp_size} must divide the H = {heads} query heads, and "
            "divide or be a multiple of the Hkv = {kv_heads} kv heads",
            in_collective=True,
            title="DeepSpeed-Ulysses",
            facts=(
                "tokens of all ranks to the rank that has their heads, and back",
                "2 all-to-alls",
                "2 all-to-alls",
                "nothing",
                "those of H / W heads, saved for the backward",
                "always: whole documents",
                "yes, of the local attention",
                "W divides H, and divides Hkv or is a multiple of it",
            ),
        ),
    )
}
WITH_WINDOW = "all_gather"  # what ``auto`` takes then: it fetches just the window


def softmax_names() -> tuple[str, ...]:
    """What ``softmax_exchange`` may be: every entry, and ``auto``."""
    return (*SOFTMAX_EXCHANGES, AUTO)


def find_softmax(name: str) -> SoftmaxExchange:
    """The entry of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in SOFTMAX_EXCHANGES:
        raise ValueError(f"softmax exchange {not_one_of(SOFTMAX_EXCHANGES, name)}")
    return SOFTMAX_EXCHANGES[name]


def estimate_softmax(
    name: str, nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric, *, backward: bool = False
) -> cost.Estimate:
    """:func:`lasp.cost.estimate_softmax` of the exchange of this name."""
    return cost.estimate_softmax(find_softmax(name), nodes, kv_bytes, q_bytes, fabric, backward=backward)


def check_heads(name: str, heads: int, kv_heads: int, cp_size: int, key: str = "exchange") -> None:
    """Refuse head counts that the exchange cannot deal to ``cp_size`` ranks. ``key``: where it was named.

    Raises:
        ValueError: they do not fit; it names the other exchanges and the sizes that do.
    """
    entry = find_softmax(name)
    if not entry.heads_fit(heads, kv_heads, cp_size):
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if entry.heads_fit(heads, kv_heads, size))
        whole = " or ".join(repr(e.name) for e in SOFTMAX_EXCHANGES.values() if e.fits is None)
        rule = entry.heads_rule.format(cp_size=cp_size, heads=heads, kv_heads=kv_heads)
        raise ValueError(f"{key}={name!r} {rule}. Use {key}={whole}, which cut no heads, or a cp_size of {sizes}.")


def check_window(name: str, window: int | None, key: str = "exchange", window_key: str = "window") -> None:
    """Refuse a window that the exchange does not take. ``key``, ``window_key``: where the two were named.

    Raises:
        ValueError: it does not; the message names those that do.
    """
    why = find_softmax(name).no_window
    if window is not None and why:
        takers = " or ".join(repr(e.name) for e in SOFTMAX_EXCHANGES.values() if not e.no_window)
        raise ValueError(f"{window_key}={window} has no use for {key}={name!r}: {why}. Use {key}={takers}.")


def document() -> str:
    """The list in docs/exchanges.md, which a test compares with this table: a column per exchange."""
    entries = SOFTMAX_EXCHANGES.values()
    rows = [("", *(f"`{e.name}` ({e.title})" for e in entries))]
    rows += [(fact, *(e.facts[i] for e in entries)) for i, fact in enumerate(FACTS)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines[0] = lines[0].replace("|  |", "| |", 1)
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

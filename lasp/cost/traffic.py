"""What travels in each exchange, when, and over which link: the terms that :mod:`lasp.cost` adds up.

W ranks on N nodes, R of them on the largest, F fragments per rank, P = F W positions in global order; a state of b
bytes, a transition of a bytes. The formulas stand in :mod:`lasp.cost`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from lasp.cost.fabric import Fabric, Link


@dataclass(frozen=True)
class Case:
    """What one layer's exchange moves, and between how many.

    Attributes:
        nodes: ranks of each node, in rank order.
        state_bytes: b, of one state map of all heads.
        transition_bytes: a, of its transition: 0 (identity, fixed decay), heads x 4 (a decay per token), heads x K x 4
            (per channel), heads x K x K x 4 (dense).
        fragments: F, most fragments of any rank: 1 (contiguous) or 2 (zigzag).
        value_columns: V of the layer: no more slices than that.

    Raises:
        ValueError: a value that cannot be.
    """

    nodes: tuple[int, ...]
    state_bytes: int
    transition_bytes: int
    fragments: int = 1
    value_columns: int = 128

    def __post_init__(self):
        check_nodes(self.nodes)
        for name, least in (("state_bytes", 1), ("transition_bytes", 0), ("fragments", 1), ("value_columns", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")

    @property
    def ranks(self) -> int:
        """W, of all nodes."""
        return sum(self.nodes)


@dataclass(frozen=True)
class Phase:
    """Messages of ``size`` bytes over a link that ``sharers`` of them use at once, ``repeats`` times in a row."""

    link: Link
    size: float
    sharers: float = 1.0
    repeats: int = 1

    @property
    def seconds(self) -> float:
        """Of the phase."""
        return self.repeats * self.link.seconds(self.size * self.sharers)


@dataclass(frozen=True)
class Stream:
    """Bytes behind one another over links whose latencies other phases count."""

    size: float
    bytes_per_s: float

    @property
    def seconds(self) -> float:
        """Of the phase."""
        return self.size / self.bytes_per_s


@dataclass(frozen=True)
class Traffic:
    """Phases; messages and bytes of the whole group; those that the busiest rank hands to the transport."""

    phases: Sequence[Phase | Stream]
    all_messages: int
    all_bytes: float
    messages: int
    bytes_sent: float


def _slowest(phases: list[Phase]) -> list[Phase]:
    """Of phases at the same time, the one that lasts."""
    return [max(phases, key=lambda phase: phase.seconds)] if phases else []


def ring_pass(nodes: tuple[int, ...], fabric: Fabric, size: int, *, rings: int) -> Traffic:
    """Every rank passes on one message W - 1 times round ``rings`` rings, each over an interface of its own.

    The latencies are those of one message's way round; the bytes of the W - 1 follow one another through the slowest
    link. So reckons NCCL's own model (src/graph/tuning.cc, ring all-gather).
    """
    ranks, count = sum(nodes), len(nodes)
    if ranks == 1:
        return Traffic([], 0, 0, 0, 0)
    rates = [fabric.within.bytes_per_s] if max(nodes) > 1 else []
    rates += [fabric.between.bytes_per_s * rings] if count > 1 else []
    waits = [Phase(fabric.within, 0, repeats=ranks - count), Phase(fabric.between, 0, repeats=count - 1)]
    sent = (ranks - 1) * size
    return Traffic([*waits, Stream(sent, min(rates))], ranks * (ranks - 1), ranks * sent, ranks - 1, sent)


def ring_gather(nodes: tuple[int, ...], fabric: Fabric, size: int) -> Traffic:
    """A ring for each interface of a node; a rank hands over its own message once, the transport passes it on."""
    passed = ring_pass(nodes, fabric, size, rings=min(fabric.nics_per_node, *nodes))
    return replace(passed, messages=min(1, passed.messages), bytes_sent=min(size, passed.bytes_sent))


def gather(case: Case, fabric: Fabric) -> Traffic:
    """All maps of all ranks, by the ring algorithm."""
    return ring_gather(case.nodes, fabric, case.fragments * (case.state_bytes + case.transition_bytes))


def chain(case: Case, fabric: Fabric, slices: int = 1) -> Traffic:
    """F sweeps over the ranks, there and back in turn, each slice one hop behind the one before it."""
    hops = _hops(_sweeps(case.ranks, case.fragments), case.ranks)
    borders = case.fragments * (len(case.nodes) - 1)
    phases = _pipeline(case, fabric, case.state_bytes / slices, sum(hops) - borders, borders, slices)
    busiest = max(hops)
    return Traffic(
        phases, sum(hops) * slices, sum(hops) * case.state_bytes, busiest * slices, busiest * case.state_bytes
    )


def _pipeline(case: Case, fabric: Fabric, size: float, inner: int, borders: int, slices: int) -> list[Phase]:
    """The first slice over all hops, then the others behind it at the pace of the slowest hop."""
    meet = 2 if case.fragments > 1 and case.ranks > 2 else 1  # behind the turn a rank sends up and down at once
    meet_between = meet if min(fabric.nics_per_node, *case.nodes) == 1 else 1
    hops, waits = [], []
    for link, count, sharers in ((fabric.within, inner, meet), (fabric.between, borders, meet_between)):
        if count:
            hops.append(Phase(link, size, 1, count))
            waits.append(Phase(link, size, sharers, slices - 1))
    return hops + _slowest(waits)


def _sweeps(members: int, fragments: int) -> list[int]:
    """The member that owns each position: there and back in turn."""
    there = list(range(members))
    return [m for f in range(fragments) for m in (there if f % 2 == 0 else reversed(there))]


def _hops(owners: Sequence[int], members: int) -> list[int]:
    """How often each member sends along the chain; what stays on its owner is no message."""
    hops = [0] * members
    for sender, receiver in pairwise(owners):
        hops[sender] += sender != receiver
    return hops


def _doubling(positions: int, owners: Sequence[int]) -> Iterator[list[tuple[int, int, bool]]]:
    """Steps of recursive doubling: (sender, receiver, whether a transition travels) of every message.

    Position p sends the composed map of positions p - 2^s + 1 .. p to p + 2^s; one that reaches the start needs no
    transition. What stays on its owner is no message.
    """
    stride = 1
    while stride < positions:
        pairs = ((p, owners[p], owners[p + stride]) for p in range(positions - stride))
        yield [(sender, receiver, p >= stride) for p, sender, receiver in pairs if sender != receiver]
        stride *= 2


def log_scan(case: Case, fabric: Fabric) -> Traffic:
    """Every step waits for its slowest: a rank's messages inside its node, or a node's over its interfaces."""
    home = [node for node, ranks in enumerate(case.nodes) for _ in range(ranks)]
    owners = _sweeps(case.ranks, case.fragments)
    phases, messages, sent = [], [0] * case.ranks, [0] * case.ranks
    for step in _doubling(len(owners), owners):
        inside, crossing = [0] * case.ranks, [([], []) for _ in case.nodes]  # sizes out of a node, into it
        for sender, receiver, with_transition in step:
            size = case.state_bytes + (case.transition_bytes if with_transition else 0)
            messages[sender] += 1
            sent[sender] += size
            if home[sender] == home[receiver]:
                inside[sender] += size
            else:
                crossing[home[sender]][0].append(size)
                crossing[home[receiver]][1].append(size)
        waits = [Phase(fabric.within, max(inside))] if any(inside) else []
        for ranks, ways in zip(case.nodes, crossing, strict=True):
            used = min(fabric.nics_per_node, ranks)
            waits += [Phase(fabric.between, max(sizes), ceil(len(sizes) / used)) for sizes in ways if sizes]
        phases += _slowest(waits)
    return Traffic(phases, sum(messages), sum(sent), max(messages), max(sent))


def hierarchical(case: Case, fabric: Fabric, slices: int) -> Traffic:
    """Slices of the state to their carriers inside the node, a scan of every slice over the nodes, and back."""
    most = max(case.nodes)
    carried = [ceil(most / ranks) for ranks in case.nodes]  # slices of the busiest rank of each node
    phases, inner = [], [0.0] * len(case.nodes)
    for transition in (case.transition_bytes, 0):  # there with the transitions, and back
        sizes = [case.fragments * (k * case.state_bytes / most + transition) for k in carried]
        inner = [sent + (n - 1) * size for sent, n, size in zip(inner, case.nodes, sizes, strict=True)]
        waits = [Phase(fabric.within, (n - 1) * size) for n, size in zip(case.nodes, sizes, strict=True) if n > 1]
        phases += _slowest(waits)
    scan, messages, outer = _scan_over_nodes(case, fabric, slices, carried)
    phases[1:1] = scan
    per_node = list(zip(case.nodes, carried, messages, inner, outer, strict=True))
    return Traffic(
        phases,
        sum(2 * n * (n - 1) + most * m for n, _, m, _, _ in per_node),
        sum(n * i + most * o for n, _, _, i, o in per_node),
        max(2 * (n - 1) + k * m for n, k, m, _, _ in per_node),
        max(i + k * o for _, k, _, i, o in per_node),
    )


def _scan_over_nodes(
    case: Case, fabric: Fabric, slices: int, carried: Sequence[int]
) -> tuple[list[Phase], list[int], list[float]]:
    """Phases of the scan between nodes; messages and bytes that each node sends per carried slice."""
    size, count = case.state_bytes / max(case.nodes), len(case.nodes)
    owners = _sweeps(count, case.fragments)
    sharers = [k * ceil(n / fabric.nics_per_node) for n, k in zip(case.nodes, carried, strict=True)]
    if slices > 1:
        hops, share = _hops(owners, count), max(sharers)
        meet = 2 if case.fragments > 1 and count > 2 else 1
        phases = [Phase(fabric.between, size / slices, share, sum(hops))]
        phases += [Phase(fabric.between, size / slices, share * meet, slices - 1)]
        return phases if count > 1 else [], [h * slices for h in hops], [h * size for h in hops]
    phases, messages, sent = [], [0] * count, [0.0] * count
    for step in _doubling(len(owners), owners):
        out, into = [0.0] * count, [0.0] * count
        for sender, receiver, with_transition in step:
            load = size + (case.transition_bytes if with_transition else 0)
            messages[sender] += 1
            out[sender] += load
            into[receiver] += load
        sent = [before + load for before, load in zip(sent, out, strict=True)]
        if step:
            loads = (max(ways) * share for *ways, share in zip(out, into, sharers, strict=True))
            phases.append(Phase(fabric.between, max(loads)))
    return phases, messages, sent


def all_to_all(nodes: tuple[int, ...], fabric: Fabric, size: int) -> list[Phase]:
    """Pairwise: every rank sends 1/W of its ``size`` bytes to each other one, first inside its node, then outside."""
    ranks = sum(nodes)
    inner = [Phase(fabric.within, size / ranks, 1, max(nodes) - 1)] if max(nodes) > 1 else []
    outer = [
        Phase(fabric.between, size / ranks, ceil(n / fabric.nics_per_node), ranks - n) for n in set(nodes) if n < ranks
    ]
    return inner + _slowest(outer)


def gather_keys(nodes: tuple[int, ...], fabric: Fabric, kv_bytes: int, q_bytes: int, backward: bool) -> Traffic:
    """LASP-2H: every rank gathers all keys and values by the ring algorithm; gradients are scattered the same way."""
    return ring_gather(nodes, fabric, kv_bytes)


def pass_keys(nodes: tuple[int, ...], fabric: Fabric, kv_bytes: int, q_bytes: int, backward: bool) -> Traffic:
    """Ring Attention: keys and values pass W - 1 neighbours; in the backward their gradients too."""
    return ring_pass(nodes, fabric, kv_bytes * (2 if backward else 1), rings=1)


def swap_heads(nodes: tuple[int, ...], fabric: Fabric, kv_bytes: int, q_bytes: int, backward: bool) -> Traffic:
    """Ulysses: an all-to-all of q, k, v to heads, another of the output back; the backward likewise."""
    ranks, parts = sum(nodes), (q_bytes + kv_bytes, q_bytes)
    phases = [phase for part in parts for phase in all_to_all(nodes, fabric, part)]
    sent = sum(parts) * (ranks - 1) // ranks
    return Traffic(phases, 2 * ranks * (ranks - 1), ranks * sent, 2 * (ranks - 1), sent)


def check_nodes(nodes: tuple[int, ...]) -> None:
    """Refuse what is no tuple of at least one positive number of ranks."""
    if not isinstance(nodes, tuple) or not nodes or any(type(n) is not int or n < 1 for n in nodes):
        raise ValueError(f"nodes must be a tuple of the ranks of each node, each an integer >= 1, got {nodes!r}.")

"""What each exchange of a layer costs on a fabric, as closed forms: the model behind ``exchange="auto"`` and plans.

W ranks on N nodes, R of them on the largest, F fragments per rank, P = F W positions in global order; a state of b
bytes, a transition of a bytes. A message of n bytes over a link takes ``latency + n / rate`` (:mod:`lasp.fabric`). An
exchange is a list of phases, one after the other, and costs the fabric's ``overhead_s`` once:

    all_gather    (W - 1) (latency + F (b + a) / rate)             ring algorithm: a step is as slow as its slowest
                                                                   link; the interfaces of a node carry a ring each
    ring          sum over the P - 1 hops of (latency + b / rate)  a hop is inside a node or between two
    all_scan      the same with b / S, + (S - 1) x slowest hop     a pipeline of S slices
    log_scan      ceil(log2 P) steps, each as slow as its slowest  step s: 2^s positions further, b + a; the messages
                                                                   that leave a node share its interfaces
    hierarchical  latency + (R - 1) F (b / R + a) / rate           all-to-all inside a node: a slice of b to its carrier
                  ceil(log2 F N) steps of (b / R + a)              recursive doubling between nodes; for S > 1 a chain
                                                                   of S slices of b / R
                  latency + (R - 1) F b / R / rate                 back inside the node

Ring all-gather and recursive doubling: Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005; all_scan: ZeCO, arXiv
2507.01004; the chain: LASP-1, arXiv 2404.02882. Folding received states is not modelled: it is part of a fabric's
latencies, which are measured with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from lasp.fabric import Fabric, Link

EXCHANGES = ("all_gather", "ring", "all_scan", "log_scan", "hierarchical")
SOFTMAX_EXCHANGES = ("all_gather", "ring", "ulysses")
MAX_SLICES = 64


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
class Estimate:
    """What one exchange of one layer, in one direction, is predicted to take.

    Attributes:
        exchange: one of :data:`EXCHANGES`, for a softmax layer of :data:`SOFTMAX_EXCHANGES`.
        slices: parts that a pipelined state travels in; 1 where it is not cut.
        seconds: from its start until the last rank has what it needs.
        messages, bytes_sent: what the busiest rank hands to the transport (an all-gather's one message is then passed
            on W - 1 times).
    """

    exchange: str
    slices: int
    seconds: float
    messages: int
    bytes_sent: int


@dataclass(frozen=True)
class Choice:
    """The exchange to take, and why.

    Attributes:
        exchange, slices, seconds: of the fastest estimate.
        exposed_s: the part of ``seconds`` that local work does not hide.
        reason: one sentence.
        estimates: all candidates, in the order of :data:`EXCHANGES`.
    """

    exchange: str
    slices: int
    seconds: float
    exposed_s: float
    reason: str
    estimates: tuple[Estimate, ...]


def estimate(
    exchange: str, case: Case, fabric: Fabric, *, slices: int | None = None, backward: bool = False
) -> Estimate:
    """The time of one exchange in one direction; with ``slices`` None in its best number of slices.

    Raises:
        ValueError: no such exchange, or ``slices`` it cannot serve.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}: choose one of {', '.join(EXCHANGES)}.")
    most = _most_slices(exchange, case)
    if slices is None:
        possible = [2**i for i in range(most.bit_length())]
    elif type(slices) is int and 1 <= slices <= most:
        possible = [slices]
    else:
        raise ValueError(
            f"slices = {slices!r} must be an integer between 1 and {most} for {exchange} with "
            f"{case.value_columns} value columns and {max(case.nodes)} ranks per node. Leave it None for the best."
        )
    found = [_priced(exchange, s, _plan(exchange, case, fabric, s, backward), fabric) for s in possible]
    return min(found, key=lambda e: e.seconds)  # the first of equals: fewest slices


def choose(case: Case, fabric: Fabric, *, hidden_s: float = 0.0) -> Choice:
    """The exchange with the least exposed time, of equals the fastest, then the first of :data:`EXCHANGES`.

    ``hidden_s`` are seconds of local work while the exchange flies. The answer depends on the arguments alone, so ranks
    that share them agree without a message.
    """
    estimates = tuple(estimate(exchange, case, fabric) for exchange in EXCHANGES)
    exposed = [max(0.0, e.seconds - hidden_s) for e in estimates]
    best = min(range(len(estimates)), key=lambda i: (exposed[i], estimates[i].seconds, i))
    taken = estimates[best]
    reason = _reason(taken, exposed[best], estimates, case, fabric, hidden_s)
    return Choice(taken.exchange, taken.slices, taken.seconds, exposed[best], reason, estimates)


def estimate_softmax(
    exchange: str, nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric, *, backward: bool = False
) -> Estimate:
    """The time of a softmax layer's exchange in one direction.

    - all_gather (LASP-2H): every rank gathers all keys and values by the ring algorithm; the backward scatters their
      gradients the same way.
    - ring (Ring Attention, arXiv 2310.01889): keys and values pass W - 1 neighbours; their gradients too
      in the backward.
    - ulysses (arXiv 2309.14509): all-to-all of q, k, v to heads, all-to-all of the output back; the backward
      likewise.

    ``kv_bytes``: keys and values of one rank together; ``q_bytes``: its queries, of the size of its output.

    Raises:
        ValueError: no such exchange, or a value that cannot be.
    """
    if exchange not in SOFTMAX_EXCHANGES:
        raise ValueError(f"unknown softmax exchange {exchange!r}: choose one of {', '.join(SOFTMAX_EXCHANGES)}.")
    check_nodes(nodes)
    for name, value in (("kv_bytes", kv_bytes), ("q_bytes", q_bytes)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    ranks = sum(nodes)
    if exchange == "all_gather":
        plan = _ring_gather(nodes, fabric, kv_bytes)
    elif exchange == "ring":
        carried = kv_bytes * (2 if backward else 1)
        plan = _Plan(*_ring_steps(nodes, fabric, carried, rings=False), ranks - 1, (ranks - 1) * carried)
    else:
        parts = (q_bytes + kv_bytes, q_bytes)
        phases = [phase for part in parts for phase in _all_to_all(nodes, fabric, part)]
        sent = sum(parts) * (ranks - 1) // ranks
        plan = _Plan(phases, 2 * ranks * (ranks - 1), ranks * sent, 2 * (ranks - 1), sent)
    return _priced(exchange, 1, plan, fabric)


def check_nodes(nodes: tuple[int, ...]) -> None:
    """Refuse what is no tuple of at least one positive number of ranks."""
    if not isinstance(nodes, tuple) or not nodes or any(type(n) is not int or n < 1 for n in nodes):
        raise ValueError(f"nodes must be a tuple of the ranks of each node, each an integer >= 1, got {nodes!r}.")


@dataclass(frozen=True)
class _Phase:
    """Messages of ``size`` bytes over a link that ``sharers`` of them use at once, ``repeats`` times in a row."""

    link: Link
    size: float
    sharers: float = 1.0
    repeats: int = 1

    @property
    def seconds(self) -> float:
        return self.repeats * self.link.seconds(self.size * self.sharers)


@dataclass(frozen=True)
class _Plan:
    """Phases; messages and bytes of the whole group; those that the busiest rank hands to the transport."""

    phases: Sequence[_Phase]
    all_messages: int
    all_bytes: float
    messages: int
    bytes_sent: float


def _slowest(phases: list[_Phase]) -> list[_Phase]:
    """Of phases at the same time, the one that lasts."""
    return [max(phases, key=lambda phase: phase.seconds)] if phases else []


def _priced(exchange: str, slices: int, plan: _Plan, fabric: Fabric) -> Estimate:
    seconds = sum(phase.seconds for phase in plan.phases)
    if plan.all_messages:  # one rank exchanges nothing
        seconds += fabric.overhead_s + fabric.message_s * plan.all_messages + fabric.byte_s * plan.all_bytes
    return Estimate(exchange, slices, seconds, plan.messages, ceil(plan.bytes_sent))


def _most_slices(exchange: str, case: Case) -> int:
    columns = {"all_scan": case.value_columns, "hierarchical": case.value_columns // max(case.nodes)}.get(exchange, 1)
    return max(1, min(MAX_SLICES, columns))


def _plan(exchange: str, case: Case, fabric: Fabric, slices: int, backward: bool) -> _Plan:
    if exchange == "all_gather":
        transition = 0 if backward else case.transition_bytes  # known from the forward
        return _ring_gather(case.nodes, fabric, case.fragments * (case.state_bytes + transition))
    if exchange == "log_scan":
        return _log_scan(case, fabric)
    if exchange == "hierarchical":
        return _hierarchical(case, fabric, slices)
    return _chain(case, fabric, slices)


def _ring_gather(nodes: tuple[int, ...], fabric: Fabric, size: int) -> _Plan:
    """(W - 1) steps in which every rank passes on one message; as many rings as a node has interfaces."""
    ranks = sum(nodes)
    return _Plan(*_ring_steps(nodes, fabric, size, rings=True), int(ranks > 1), size * (ranks > 1))


def _ring_steps(nodes: tuple[int, ...], fabric: Fabric, size: int, *, rings: bool) -> tuple[list[_Phase], int, int]:
    """Phases, messages and bytes of W - 1 steps round a ring, each as slow as its slowest link."""
    ranks, links = sum(nodes), []
    if max(nodes) > 1:
        links.append(_Phase(fabric.within, size, repeats=ranks - 1))
    if len(nodes) > 1:
        used = min(fabric.nics_per_node, *nodes) if rings else 1
        links.append(_Phase(fabric.between, size, 1 / used, ranks - 1))
    return _slowest(links), ranks * (ranks - 1), ranks * (ranks - 1) * size


def _chain(case: Case, fabric: Fabric, slices: int) -> _Plan:
    """F sweeps over the ranks, there and back in turn, each slice one hop behind the one before it."""
    hops = _hops(_sweeps(case.ranks, case.fragments), case.ranks)
    borders = case.fragments * (len(case.nodes) - 1)
    phases = _pipeline(case, fabric, case.state_bytes / slices, sum(hops) - borders, borders, slices)
    busiest = max(hops)
    return _Plan(phases, sum(hops) * slices, sum(hops) * case.state_bytes, busiest * slices, busiest * case.state_bytes)


def _pipeline(case: Case, fabric: Fabric, size: float, inner: int, borders: int, slices: int) -> list[_Phase]:
    """The first slice over all hops, then the others behind it at the pace of the slowest hop."""
    meet = 2 if case.fragments > 1 and case.ranks > 2 else 1  # behind the turn a rank sends up and down at once
    meet_between = meet if min(fabric.nics_per_node, *case.nodes) == 1 else 1
    hops, waits = [], []
    for link, count, sharers in ((fabric.within, inner, meet), (fabric.between, borders, meet_between)):
        if count:
            hops.append(_Phase(link, size, 1, count))
            waits.append(_Phase(link, size, sharers, slices - 1))
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


def _log_scan(case: Case, fabric: Fabric) -> _Plan:
    """Every step waits for its slowest: a rank's messages inside its node, or a node's over its interfaces."""
    home = [node for node, ranks in enumerate(case.nodes) for _ in range(ranks)]
    owners = _sweeps(case.ranks, case.fragments)
    phases, messages, sent = [], [0] * case.ranks, [0] * case.ranks
    for step in _doubling(len(owners), owners):
        inside, leaving = [0] * case.ranks, [[] for _ in case.nodes]
        for sender, receiver, with_transition in step:
            size = case.state_bytes + (case.transition_bytes if with_transition else 0)
            messages[sender] += 1
            sent[sender] += size
            if home[sender] == home[receiver]:
                inside[sender] += size
            else:
                leaving[home[sender]].append(size)
        waits = [_Phase(fabric.within, max(inside))] if any(inside) else []
        for ranks, sizes in zip(case.nodes, leaving, strict=True):
            if sizes:
                used = min(fabric.nics_per_node, ranks)
                waits.append(_Phase(fabric.between, max(sizes), ceil(len(sizes) / used)))
        phases += _slowest(waits)
    return _Plan(phases, sum(messages), sum(sent), max(messages), max(sent))


def _hierarchical(case: Case, fabric: Fabric, slices: int) -> _Plan:
    """Slices of the state to their carriers inside the node, a scan of every slice over the nodes, and back."""
    most = max(case.nodes)
    carried = [ceil(most / ranks) for ranks in case.nodes]  # slices of the busiest rank of each node
    phases, inner = [], [0.0] * len(case.nodes)
    for transition in (case.transition_bytes, 0):  # there with the transitions, and back
        sizes = [case.fragments * (k * case.state_bytes / most + transition) for k in carried]
        inner = [sent + (n - 1) * size for sent, n, size in zip(inner, case.nodes, sizes, strict=True)]
        waits = [_Phase(fabric.within, (n - 1) * size) for n, size in zip(case.nodes, sizes, strict=True) if n > 1]
        phases += _slowest(waits)
    scan, messages, outer = _scan_over_nodes(case, fabric, slices, carried)
    phases[1:1] = scan
    per_node = list(zip(case.nodes, carried, messages, inner, outer, strict=True))
    return _Plan(
        phases,
        sum(2 * n * (n - 1) + most * m for n, _, m, _, _ in per_node),
        sum(n * i + most * o for n, _, _, i, o in per_node),
        max(2 * (n - 1) + k * m for n, k, m, _, _ in per_node),
        max(i + k * o for _, k, _, i, o in per_node),
    )


def _scan_over_nodes(
    case: Case, fabric: Fabric, slices: int, carried: Sequence[int]
) -> tuple[list[_Phase], list[int], list[float]]:
    """Phases of the scan between nodes; messages and bytes that each node sends per carried slice."""
    size, count = case.state_bytes / max(case.nodes), len(case.nodes)
    owners = _sweeps(count, case.fragments)
    sharers = [k * ceil(n / fabric.nics_per_node) for n, k in zip(case.nodes, carried, strict=True)]
    if slices > 1:
        hops, share = _hops(owners, count), max(sharers)
        meet = 2 if case.fragments > 1 and count > 2 else 1
        phases = [_Phase(fabric.between, size / slices, share, sum(hops))]
        phases += [_Phase(fabric.between, size / slices, share * meet, slices - 1)]
        return phases if count > 1 else [], [h * slices for h in hops], [h * size for h in hops]
    phases, messages, sent = [], [0] * count, [0.0] * count
    for step in _doubling(len(owners), owners):
        loads = [0.0] * count
        for sender, _, with_transition in step:
            messages[sender] += 1
            loads[sender] += size + (case.transition_bytes if with_transition else 0)
        sent = [before + load for before, load in zip(sent, loads, strict=True)]
        if step:
            phases.append(_Phase(fabric.between, max(load * s for load, s in zip(loads, sharers, strict=True))))
    return phases, messages, sent


def _all_to_all(nodes: tuple[int, ...], fabric: Fabric, size: int) -> list[_Phase]:
    """Pairwise: every rank sends 1/W of its ``size`` bytes to each other one, first inside its node, then outside."""
    ranks = sum(nodes)
    inner = [_Phase(fabric.within, size / ranks, 1, max(nodes) - 1)] if max(nodes) > 1 else []
    outer = [
        _Phase(fabric.between, size / ranks, ceil(n / fabric.nics_per_node), ranks - n) for n in set(nodes) if n < ranks
    ]
    return inner + _slowest(outer)


def _reason(
    taken: Estimate, exposed: float, found: Sequence[Estimate], case: Case, fabric: Fabric, hidden: float
) -> str:
    where = f"{case.ranks} ranks on {len(case.nodes)} node{'s' if len(case.nodes) > 1 else ''} over {fabric.name}"
    if case.ranks == 1:
        return f"{taken.exchange}: one rank exchanges nothing."
    cut = f" in {taken.slices} slices" if taken.slices > 1 else ""
    second = min((e for e in found if e.exchange != taken.exchange), key=lambda e: e.seconds)
    covered = f", of which {_time(exposed)} are not hidden by {_time(hidden)} of local work" if hidden else ""
    return (
        f"{taken.exchange}{cut} takes {_time(taken.seconds)} for a state of {case.state_bytes / 2**20:.3g} MiB "
        f"between {where}{covered}; next is {second.exchange} with {_time(second.seconds)} (predicted)."
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

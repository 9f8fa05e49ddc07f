"""What each exchange of a layer costs on a fabric, as closed forms: the model behind ``exchange="auto"`` and plans.

W ranks on N nodes, R of them on the largest, F fragments per rank, P = F W positions in global order; a state of b
bytes, a transition of a bytes. A message of n bytes over a link takes ``latency + n / rate`` (:mod:`lasp.cost.fabric`).
An exchange is a list of phases, one after the other, and costs the fabric's ``overhead_s`` once:

    all_gather    (W - N) latency within + (N - 1) between         ring algorithm: one message's way round, the others
                  + (W - 1) F (b + a) / rate of the slowest        behind it; each interface of a node carries a ring
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

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from numbers import Real

from lasp.cost.fabric import Fabric
from lasp.cost.traffic import (
    Case,
    Traffic,
    all_to_all,
    chain,
    check_nodes,
    hierarchical,
    log_scan,
    ring_gather,
    ring_pass,
)

EXCHANGES = ("all_gather", "ring", "all_scan", "log_scan", "hierarchical")
SOFTMAX_EXCHANGES = ("all_gather", "ring", "ulysses")
MAX_SLICES = 64


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
    found = [_priced(exchange, s, _traffic(exchange, case, fabric, s, backward), fabric) for s in possible]
    return min(found, key=lambda e: e.seconds)  # the first of equals: fewest slices


def choose(case: Case, fabric: Fabric, *, hidden_s: float = 0.0) -> Choice:
    """The exchange with the least exposed time, of equals the fastest, then the first of :data:`EXCHANGES`.

    ``hidden_s`` are seconds of local work while the exchange flies. The answer depends on the arguments alone, so ranks
    that share them agree without a message.

    Raises:
        ValueError: ``hidden_s`` is no finite number >= 0.
    """
    if not isinstance(hidden_s, Real) or not 0 <= hidden_s < inf:
        raise ValueError(f"hidden_s must be a finite number >= 0, got {hidden_s!r}.")
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
        traffic = ring_gather(nodes, fabric, kv_bytes)
    elif exchange == "ring":
        carried = kv_bytes * (2 if backward else 1)
        traffic = ring_pass(nodes, fabric, carried, rings=1)
    else:
        parts = (q_bytes + kv_bytes, q_bytes)
        phases = [phase for part in parts for phase in all_to_all(nodes, fabric, part)]
        sent = sum(parts) * (ranks - 1) // ranks
        traffic = Traffic(phases, 2 * ranks * (ranks - 1), ranks * sent, 2 * (ranks - 1), sent)
    return _priced(exchange, 1, traffic, fabric)


def choose_softmax(
    nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric, *, candidates: Sequence[str]
) -> Choice:
    """The exchange of a softmax layer whose forward and backward together take least, of equals the first candidate.

    Attention that hides it is not reckoned with. ``seconds`` are of both directions.
    """
    found = []
    for exchange in candidates:
        there, back = (estimate_softmax(exchange, nodes, kv_bytes, q_bytes, fabric, backward=b) for b in (False, True))
        messages, sent = there.messages + back.messages, there.bytes_sent + back.bytes_sent
        found.append(Estimate(exchange, 1, there.seconds + back.seconds, messages, sent))
    taken = min(found, key=lambda e: e.seconds)
    others = sorted((e for e in found if e is not taken), key=lambda e: e.seconds)
    after = f"; next is {others[0].exchange} with {_time(others[0].seconds)}" if others else ""
    reason = (
        f"{taken.exchange} should take {_time(taken.seconds)}, forward and backward, for {kv_bytes / 2**20:.3g} MiB of "
        f"keys and values per rank over {fabric.name}{after}."
    )
    return Choice(taken.exchange, 1, taken.seconds, taken.seconds, reason, tuple(found))


def _priced(exchange: str, slices: int, traffic: Traffic, fabric: Fabric) -> Estimate:
    seconds = sum(phase.seconds for phase in traffic.phases)
    if traffic.all_messages:  # one rank exchanges nothing
        seconds += fabric.overhead_s + fabric.message_s * traffic.all_messages + fabric.byte_s * traffic.all_bytes
    return Estimate(exchange, slices, seconds, traffic.messages, ceil(traffic.bytes_sent))


def _most_slices(exchange: str, case: Case) -> int:
    columns = {"all_scan": case.value_columns, "hierarchical": case.value_columns // max(case.nodes)}.get(exchange, 1)
    return max(1, min(MAX_SLICES, columns))


def _traffic(exchange: str, case: Case, fabric: Fabric, slices: int, backward: bool) -> Traffic:
    if exchange == "all_gather":
        transition = 0 if backward else case.transition_bytes  # known from the forward
        return ring_gather(case.nodes, fabric, case.fragments * (case.state_bytes + transition))
    if exchange == "log_scan":
        return log_scan(case, fabric)
    if exchange == "hierarchical":
        return hierarchical(case, fabric, slices)
    return chain(case, fabric, slices)


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
        f"{taken.exchange}{cut} should take {_time(taken.seconds)} for a state of {case.state_bytes / 2**20:.3g} MiB "
        f"between {where}{covered}; next is {second.exchange} with {_time(second.seconds)}."
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

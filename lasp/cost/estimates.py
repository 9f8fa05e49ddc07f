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

The exchanges themselves stand in the tables above this folder; here an exchange is what it sends, a :class:`Modelled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from numbers import Real
from typing import Protocol

from lasp.cost.fabric import Fabric
from lasp.cost.traffic import Case, Traffic, check_nodes

MAX_SLICES = 64


class Modelled(Protocol):
    """What the model knows of an exchange of linear layers."""

    @property
    def name(self) -> str:
        """In configurations and reports."""

    @property
    def keeps_transitions(self) -> bool:
        """Whether every rank keeps all transitions from the forward, so that the backward sends none."""

    def columns(self, case: Case) -> int:
        """Value columns that may travel one after the other: no more slices than that; 1 where a state is not cut."""

    def sent(self, case: Case, fabric: Fabric, slices: int) -> Traffic:
        """What travels in one direction."""


class ModelledSoftmax(Protocol):
    """What the model knows of an exchange of softmax layers."""

    @property
    def name(self) -> str:
        """In configurations and reports."""

    def sent(self, nodes: tuple[int, ...], fabric: Fabric, kv_bytes: int, q_bytes: int, backward: bool) -> Traffic:
        """What travels in one direction, as in :func:`estimate_softmax`."""


@dataclass(frozen=True)
class Estimate:
    """What one exchange of one layer, in one direction, is predicted to take.

    Attributes:
        exchange: its name.
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
        estimates: all candidates, in the order given.
    """

    exchange: str
    slices: int
    seconds: float
    exposed_s: float
    reason: str
    estimates: tuple[Estimate, ...]


def estimate(
    exchange: Modelled, case: Case, fabric: Fabric, *, slices: int | None = None, backward: bool = False
) -> Estimate:
    """The time of one exchange in one direction; with ``slices`` None in its best number of slices.

    Raises:
        ValueError: ``slices`` it cannot serve.
    """
    most = max(1, min(MAX_SLICES, exchange.columns(case)))
    if slices is None:
        possible = [2**i for i in range(most.bit_length())]
    elif type(slices) is int and 1 <= slices <= most:
        possible = [slices]
    else:
        raise ValueError(
            f"slices = {slices!r} must be an integer between 1 and {most} for {exchange.name} with "
            f"{case.value_columns} value columns and {max(case.nodes)} ranks per node. Leave it None for the best."
        )
    if backward and exchange.keeps_transitions:
        case = replace(case, transition_bytes=0)
    found = [_priced(exchange.name, s, exchange.sent(case, fabric, s), fabric) for s in possible]
    return min(found, key=lambda e: e.seconds)  # the first of equals: fewest slices


def choose(exchanges: Sequence[Modelled], case: Case, fabric: Fabric, *, hidden_s: float = 0.0) -> Choice:
    """The exchange with the least exposed time, of equals the fastest, then the first of ``exchanges``.

    ``hidden_s`` are seconds of local work while the exchange flies. The answer depends on the arguments alone, so ranks
    that share them agree without a message.

    Raises:
        ValueError: ``hidden_s`` is no finite number >= 0.
    """
    if not isinstance(hidden_s, Real) or not 0 <= hidden_s < inf:
        raise ValueError(f"hidden_s must be a finite number >= 0, got {hidden_s!r}.")
    estimates = tuple(estimate(exchange, case, fabric) for exchange in exchanges)
    exposed = [max(0.0, e.seconds - hidden_s) for e in estimates]
    best = min(range(len(estimates)), key=lambda i: (exposed[i], estimates[i].seconds, i))
    taken = estimates[best]
    reason = _reason(taken, exposed[best], estimates, case, fabric, hidden_s)
    return Choice(taken.exchange, taken.slices, taken.seconds, exposed[best], reason, estimates)


def estimate_softmax(
    exchange: ModelledSoftmax,
    nodes: tuple[int, ...],
    kv_bytes: int,
    q_bytes: int,
    fabric: Fabric,
    *,
    backward: bool = False,
) -> Estimate:
    """The time of a softmax layer's exchange in one direction.

    ``kv_bytes``: keys and values of one rank together; ``q_bytes``: its queries, of the size of its output.

    Raises:
        ValueError: a value that cannot be.
    """
    check_nodes(nodes)
    for name, value in (("kv_bytes", kv_bytes), ("q_bytes", q_bytes)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    return _priced(exchange.name, 1, exchange.sent(nodes, fabric, kv_bytes, q_bytes, backward), fabric)


def choose_softmax(
    exchanges: Sequence[ModelledSoftmax], nodes: tuple[int, ...], kv_bytes: int, q_bytes: int, fabric: Fabric
) -> Choice:
    """The exchange of a softmax layer whose forward and backward together take least, of equals the first.

    Attention that hides it is not reckoned with. ``seconds`` are of both directions.
    """
    found = []
    for exchange in exchanges:
        there, back = (estimate_softmax(exchange, nodes, kv_bytes, q_bytes, fabric, backward=b) for b in (False, True))
        messages, sent = there.messages + back.messages, there.bytes_sent + back.bytes_sent
        found.append(Estimate(exchange.name, 1, there.seconds + back.seconds, messages, sent))
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

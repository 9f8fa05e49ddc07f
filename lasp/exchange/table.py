"""The table of the exchanges of linear layers. What any room knows of an exchange by its name, it reads here.

A new exchange is a file with its class, and an entry: contexts, the schema, ``auto``, the planner, the memory model,
``lasp bench`` and the list in docs/exchanges.md take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lasp import cost
from lasp.checks import not_one_of
from lasp.cost import traffic
from lasp.cost.fabric import Fabric
from lasp.cost.traffic import Case, Traffic
from lasp.exchange.base import StateExchange
from lasp.exchange.gather import AllGather
from lasp.exchange.line_scan import Scan, chain_part, doubling_part, node_part

AUTO = "auto"


@dataclass(frozen=True)
class Buffers:
    """What an exchange holds at once in messages: sent, received, and being folded.

    Attributes:
        copies: of the maps of a rank's fragments.
        all_ranks: whether those of all ranks are there at once.
        transitions: whether transitions are among them.
    """

    copies: int
    all_ranks: bool = False
    transitions: bool = True

    def size(self, ranks: int, fragments: int, state: float, transition: float) -> float:
        """Bytes, where a state has ``state`` bytes and a transition ``transition``."""
        maps = self.copies * fragments * (ranks if self.all_ranks else 1)
        return maps * (state + (transition if self.transitions else 0))

    @property
    def formula(self) -> str:
        """The size, in the letters of the documents."""
        one = "(b + a)" if self.transitions else "b"
        return f"{self.copies} x {'W ' if self.all_ranks else ''}F {one}"


@dataclass(frozen=True)
class Exchange:
    """One way in which ranks turn their maps into the states that enter their segments.

    Attributes:
        name: in configurations, plans and reports.
        scheme: makes it for one layer from a context and a plan, and from a number of slices where ``cut`` is given.
        traffic: what travels in one direction, for a case and a fabric, and for a number of slices where ``cut`` is
            given.
        buffers: what a rank holds in messages.
        cut: value columns of a case that may travel one after the other: a fabric then sets the number of slices. None:
            a state travels in one piece.
        slices: how many it takes without a fabric.
        needs_nodes: whether it treats ranks of one node apart from others.
        keeps_transitions: whether every rank keeps the transitions of all ranks from the forward to the backward, which
            then sends none.
        in_collective: whether it is one collective of all ranks. If not, messages go from rank to rank, and the group
            makes a collective first: NCCL wants all ranks in the first one.
        paper, steps, rounds, suits: its row in docs/exchanges.md.
    """

    name: str
    scheme: Callable[..., StateExchange]
    traffic: Callable[..., Traffic]
    buffers: Buffers
    steps: str
    rounds: str
    suits: str
    paper: str = ""
    cut: Callable[[Case], int] | None = None
    slices: int = 1
    needs_nodes: bool = False
    keeps_transitions: bool = False
    in_collective: bool = False

    @property
    def takes_fabric(self) -> bool:
        """Whether a fabric has an effect on it."""
        return self.cut is not None

    def columns(self, case: Case) -> int:
        """Value columns that may travel one after the other."""
        return 1 if self.cut is None else self.cut(case)

    def sent(self, case: Case, fabric: Fabric, slices: int) -> Traffic:
        """What travels in one direction."""
        return self.traffic(case, fabric) if self.cut is None else self.traffic(case, fabric, slices)


EXCHANGES: dict[str, Exchange] = {
    entry.name: entry
    for entry in (
        Exchange(
            name="all_gather",
            paper="LASP-2",
            scheme=AllGather,
            traffic=traffic.gather,
            buffers=Buffers(2, all_ranks=True),
            keeps_transitions=True,
            in_collective=True,
            steps="every rank gets all maps and folds those it needs",
            rounds="one collective",
            suits="few ranks, fast links",
        ),
        Exchange(
            name="ring",
            paper="LASP-1",
            scheme=partial(Scan, chain_part),
            traffic=traffic.chain,
            buffers=Buffers(2, transitions=False),
            steps="the state goes from place to place: apply, send on",
            rounds="P - 1",
            suits="nothing; to compare with",
        ),
        Exchange(
            name="all_scan",
            paper="ZeCO",
            scheme=partial(Scan, chain_part),
            traffic=traffic.chain,
            buffers=Buffers(2, transitions=False),
            cut=lambda case: case.value_columns,
            slices=8,  # ZeCO's figures stop to improve there
            steps="the same in S slices of value columns, slice j leaves place p in round p + j",
            rounds="P - 1 + S - 1",
            suits="thin links: each carries a state once",
        ),
        Exchange(
            name="log_scan",
            scheme=partial(Scan, doubling_part),
            traffic=traffic.log_scan,
            buffers=Buffers(3),
            steps="recursive doubling: in step s a place gets the map of the 2^s places before it",
            rounds="log2 P",
            suits="latency: few, large messages",
        ),
        Exchange(
            name="hierarchical",
            scheme=partial(Scan, node_part),
            traffic=traffic.hierarchical,
            buffers=Buffers(3),
            cut=lambda case: case.value_columns // max(case.nodes),
            needs_nodes=True,
            steps="inside a node each rank gets 1/R of the columns of all its maps; between nodes each such slice "
            "scans on an interface of its own; back inside the node",
            rounds="2 + log2 N, or with slices 2 + N - 1 + S - 1",
            suits="nodes with many interfaces",
        ),
    )
}


def names() -> tuple[str, ...]:
    """What ``exchange`` may be: every entry, and ``auto``."""
    return (*EXCHANGES, AUTO)


def find(name: str) -> Exchange:
    """The entry of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXCHANGES:
        raise ValueError(f"exchange {not_one_of(EXCHANGES, name)}")
    return EXCHANGES[name]


def estimate(
    name: str, case: Case, fabric: Fabric, *, slices: int | None = None, backward: bool = False
) -> cost.Estimate:
    """:func:`lasp.cost.estimate` of the exchange of this name."""
    return cost.estimate(find(name), case, fabric, slices=slices, backward=backward)


def choose(case: Case, fabric: Fabric, *, hidden_s: float = 0.0) -> cost.Choice:
    """:func:`lasp.cost.choose` among all exchanges."""
    return cost.choose(tuple(EXCHANGES.values()), case, fabric, hidden_s=hidden_s)


def document() -> str:
    """The list in docs/exchanges.md, which a test compares with this table."""
    rows = ["| exchange | what happens | rounds, one after the other | it suits |", "|---|---|---|---|"]
    for e in EXCHANGES.values():
        paper = f" ({e.paper})" if e.paper else ""
        rows.append(f"| `{e.name}`{paper} | {e.steps} | {e.rounds} | {e.suits} |")
    return "\n".join(rows)

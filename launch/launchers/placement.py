"""Which rank runs where: the ranks of a group on one node where they fit, neighbours on neighbouring ranks.

    slots a: 3, b: 2, c: 3    groups of 2    world 6        a group: the cp x tp ranks that share a sequence

    node    a  a | c  c | b  b                              no group crosses a node; one slot of a and of c stays free
    rank    0  1 | 2  3 | 4  5

With world 8 the fourth group gets what is left, one slot of a and one of c: it crosses, and the launcher says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """Where one worker found itself at the start.

    Attributes:
        node: id of its node; addresses do not tell nodes apart.
        address: of the node.
        device: the number of its GPU there; 0 without one.
    """

    node: str
    address: str = "127.0.0.1"
    device: int = 0


def largest_world(num_slots: int, unit: int, batch_size: int) -> int:
    """The most ranks that ``num_slots`` hold: whole models of ``unit`` ranks, as many as divide the batch; or 0."""
    dp_size = min(num_slots // unit, batch_size)
    while dp_size > 0 and batch_size % dp_size:
        dp_size -= 1
    return dp_size * unit


def place_ranks(slots: Mapping[str, int], world_size: int, group_size: int) -> list[str]:
    """The node of every rank, by rank. Equal arguments give equal places, whatever the order of ``slots``.

    Args:
        slots: how many ranks each node can hold.
        group_size: neighbouring ranks that should share a node; it divides ``world_size``.

    Raises:
        ValueError: there are fewer slots than ranks.
    """
    if sum(slots.values()) < world_size:
        raise ValueError(
            f"{world_size} ranks need as many slots, and the nodes have {sum(slots.values())}. Start fewer ranks."
        )
    free, places = dict(slots), []
    for node in sorted(free, key=lambda node: (-free[node], node)):
        whole = min(free[node], world_size - len(places)) // group_size * group_size
        places += [node] * whole
        free[node] -= whole
    for node in sorted(free, key=lambda node: (-free[node], node)):
        places += [node] * min(free[node], world_size - len(places))
    return places


def crossing_groups(places: Sequence[str], group_size: int) -> list[int]:
    """The groups whose ranks are on more than one node."""
    groups = [places[first : first + group_size] for first in range(0, len(places), group_size)]
    return [number for number, nodes in enumerate(groups) if len(set(nodes)) > 1]


def rank_environments(seats: Sequence[Seat], group_size: int) -> list[dict[str, str]]:
    """What torchrun would tell each worker, in the order of ``seats``: its rank follows from where the workers are."""
    waiting = defaultdict(list)
    for worker in sorted(range(len(seats)), key=lambda worker: (seats[worker].device, worker)):
        waiting[seats[worker].node].append(worker)
    ranks_on, environments = Counter(seat.node for seat in seats), [{} for _ in seats]
    seated = Counter()
    for rank, node in enumerate(place_ranks(ranks_on, len(seats), group_size)):
        environments[waiting[node][seated[node]]] = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(seated[node]),
            "LOCAL_WORLD_SIZE": str(ranks_on[node]),
        }
        seated[node] += 1
    return environments

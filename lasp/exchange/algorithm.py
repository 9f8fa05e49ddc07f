"""One rank's part in a scan along a line, whichever way the states travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from lasp.comm import Messages
from lasp.exchange.line import Parcel, Round
from lasp.exchange.wire import Wire
from lasp.kernels.state import StateMap, apply, compose


class Talk(ABC):
    """What a rank has to say and to hear, round by round.

    Attributes:
        rounds: a host plan; all ranks count the same ones.
    """

    rounds: Sequence[Round]

    @abstractmethod
    def outgoing(self, key: tuple) -> StateMap:
        """The map of a parcel that is sent now."""

    @abstractmethod
    def incoming(self, key: tuple, value: StateMap) -> None:
        """The map of a parcel that has arrived."""


class Algorithm(Talk):
    """A scan while it runs, and in the end the state that enters each own place."""

    @abstractmethod
    def entered(self) -> dict[int, Tensor]:
        """After the last round: the state that enters each own place that wants one, [B, H, K, V]."""


class InStep(Talk):
    """Several scans in step, their parcels of a round in the same messages. A key tells whose it is first."""

    def __init__(self, parts: dict[object, Algorithm]):
        self.parts = parts
        self.rounds = merge({name: part.rounds for name, part in parts.items()})

    def outgoing(self, key: tuple) -> StateMap:
        return self.parts[key[0]].outgoing(key[1])

    def incoming(self, key: tuple, value: StateMap) -> None:
        self.parts[key[0]].incoming(key[1], value)


def merge(rounds: dict[object, Sequence[Round]]) -> tuple[Round, ...]:
    """The rounds of several scans in step, each key with the name of its scan in front."""

    def named(name: object, parcels: tuple[Parcel, ...]) -> list[Parcel]:
        return [Parcel(p.peer, (name, p.key), p.columns, p.tokens) for p in parcels]

    merged = []
    for together in zip_longest(*rounds.values(), fillvalue=Round()):
        pairs = list(zip(rounds, together, strict=True))
        sends = tuple(p for name, r in pairs for p in named(name, r.sends))
        receives = tuple(p for name, r in pairs for p in named(name, r.receives))
        merged.append(Round(sends, receives))
    return tuple(merged)


def run(talk: Talk, wire: Wire, messages: Messages) -> None:
    """Go through the rounds. Parcels from one rank to another in one round are one message."""
    early = wire.device.type == "cpu"  # a receive that waits already saves the sender a round trip
    plan = [(_by_peer(round_.sends), _by_peer(round_.receives)) for round_ in talk.rounds]
    inbox = [{peer: _buffer(wire, parcels) for peer, parcels in receives.items()} for _, receives in plan]
    works = [messages.post((), tuple(buffers.items())) if early else [] for buffers in inbox]
    before: set[int] = set()
    for (sends, receives), buffers, posted in zip(plan, inbox, works, strict=True):
        if not sends and not receives:
            continue
        outbox = [(to, wire.pack([talk.outgoing(p.key) for p in ps], ps)) for to, ps in sends.items()]
        if early:
            if sends and before != set(sends):
                messages.flush()  # a rank that waits for nobody would share its link among all rounds at once
                before = set(sends)
            messages.post(outbox, ())
        else:
            posted = messages.post(outbox, tuple(buffers.items()))
        messages.wait(posted)
        for peer, parcels in receives.items():
            for parcel, value in zip(parcels, wire.unpack(buffers[peer], parcels), strict=True):
                talk.incoming(parcel.key, value)


def after(later: StateMap, earlier: StateMap, *, closed: bool) -> StateMap:
    """The map of ``earlier`` followed by ``later``; ``closed``: it forgets what enters, so a state is enough."""
    return StateMap(apply(later, earlier.state)) if closed else compose(later, earlier)


def columns(map_: StateMap, start: int, stop: int) -> StateMap:
    """The map on value columns [start, stop): a transition acts on each column alone."""
    return StateMap(map_.state[..., start:stop], map_.log_decay, map_.matrix)


def _by_peer(parcels: tuple[Parcel, ...]) -> dict[int, list[Parcel]]:
    peers: dict[int, list[Parcel]] = {}
    for parcel in parcels:
        peers.setdefault(parcel.peer, []).append(parcel)
    return peers


def _buffer(wire: Wire, parcels: list[Parcel]) -> Tensor:
    return torch.empty(wire.num_bytes(parcels), dtype=torch.uint8, device=wire.device)

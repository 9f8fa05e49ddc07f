"""Scans along a line, all ranks in one process: states, messages and bytes, for every transition."""

import random
import threading
from collections import Counter

import pytest
import torch

from lasp import SequenceLayout
from lasp.exchange.algorithm import run
from lasp.exchange.chain import Chain, chain_rounds
from lasp.exchange.doubling import Doubling, doubling_rounds
from lasp.exchange.hierarchical import Hierarchical, NodePlan
from lasp.exchange.line import Line, widths
from lasp.exchange.wire import Wire
from lasp.kernels.state import StateMap, apply

HEADS, KEYS, VALUES = 2, 3, 5
KINDS = ("identity", "fixed", "scalar", "diagonal", "dense")


class Mail:
    """The messages of all ranks; one rank's ``post`` and ``wait`` as :class:`lasp.comm.Messages` has them."""

    def __init__(self):
        self.queues, self.sent, self.bytes = {}, Counter(), Counter()

    def of(self, rank):
        return Box(self, rank)


class Box:
    def __init__(self, mail, rank):
        self.mail, self.rank, self.turn = mail, rank, None

    def post(self, sends, receives):
        for peer, x in sends:
            assert x.is_contiguous() and x.dtype == torch.uint8
            self.mail.queues.setdefault((self.rank, peer), []).append(x.clone())
            self.mail.sent[self.rank] += 1
            self.mail.bytes[self.rank] += x.numel()
        return list(receives)

    def flush(self):
        """What is sent is on its way."""

    def wait(self, works):
        for peer, x in works:
            while not self.mail.queues.get((peer, self.rank)):
                self.turn()  # let the others go on
            arrived = self.mail.queues[peer, self.rank].pop(0)
            assert arrived.shape == x.shape, (arrived.shape, x.shape)
            x.copy_(arrived)


def simulate(algorithms, wire):
    """Run all ranks, each in a thread, one at a time; when all wait for one another it fails."""
    mail, ready = Mail(), threading.Semaphore(0)
    stuck, errors = threading.Event(), []
    locks = [threading.Semaphore(0) for _ in algorithms]
    done = [False] * len(algorithms)

    def work(rank):
        box = mail.of(rank)

        def turn():
            ready.release()
            locks[rank].acquire()
            if stuck.is_set():
                raise RuntimeError(f"rank {rank} waits for ever")

        box.turn = turn
        locks[rank].acquire()
        try:
            run(algorithms[rank], wire, box)
        except Exception as error:
            errors.append(error)
        done[rank] = True
        ready.release()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(algorithms))]
    for thread in threads:
        thread.start()
    before = None
    while not all(done):
        progress = (sum(mail.sent.values()), sum(map(len, mail.queues.values())), sum(done))
        if progress == before:
            stuck.set()
        before = progress
        for rank in range(len(algorithms)):
            if not done[rank]:
                locks[rank].release()
                ready.acquire()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert not any(mail.queues.values()), "messages that nobody received"
    return mail


def random_layout(rng, ranks):
    total = rng.randint(2 * ranks, 40)
    inner = sorted(rng.choices(range(total + 1), k=rng.choice((0, 0, 1, 3))))
    borders = (0, *inner, total)
    kind = rng.choice(("contiguous", "zigzag", "any"))
    if kind != "any":
        return getattr(SequenceLayout, kind)(borders, ranks)
    cuts = sorted(rng.sample(range(1, total), min(total - 1, rng.randint(ranks, 2 * ranks + 2) - 1)))
    pieces = list(zip([0, *cuts], [*cuts, total], strict=True))
    owners = [*range(ranks), *(rng.randrange(ranks) for _ in range(len(pieces) - ranks))]
    rng.shuffle(owners)
    return SequenceLayout(borders, [[p for p, o in zip(pieces, owners, strict=True) if o == r] for r in range(ranks)])


def random_maps(kind, count, line, dtype=torch.float64):
    """A map per place, and the fixed decay."""
    state = torch.randn(count, 1, HEADS, KEYS, VALUES, dtype=dtype)
    if kind == "fixed":
        fixed = -torch.rand(HEADS, dtype=dtype)
        decay = torch.tensor(line.lengths, dtype=dtype)[:, None, None, None] * fixed[:, None]
        return StateMap(state, decay), fixed
    if kind == "dense":
        return StateMap(state, matrix=torch.randn(count, 1, HEADS, KEYS, KEYS, dtype=dtype) / KEYS**0.5), None
    shape = {"scalar": (count, 1, HEADS, 1), "diagonal": (count, 1, HEADS, KEYS)}.get(kind)
    return StateMap(state, None if shape is None else -torch.rand(shape, dtype=dtype)), None


def one(maps, i):
    log_decay, matrix = (None if x is None else x[i] for x in (maps.log_decay, maps.matrix))
    return StateMap(maps.state[i], log_decay, matrix)


def folded(line, maps):
    """What enters each place that wants it, one place after the other."""
    entered, state = {}, None
    for place in range(len(line)):
        if line.wanted[place]:
            entered[place] = state
        own = one(maps, place)
        state = own.state if line.fresh[place] else apply(own, state)
    return entered


def algorithms_of(name, line, maps, ranks, nodes):
    for rank in range(ranks):
        own = {p: one(maps, p) for p in line.own(rank)}
        exchange, _, slices = name.partition(":")
        slices = int(slices or 1)
        if exchange == "chain":
            yield Chain(line, chain_rounds(line, rank, VALUES, slices), own, VALUES, slices)
        elif exchange == "doubling":
            yield Doubling(line, doubling_rounds(line, rank, VALUES), own)
        else:
            yield Hierarchical(NodePlan(line, nodes, rank, VALUES, slices), own)


NAMES = ("chain", "chain:3", "chain:64", "doubling", "nodes", "nodes:2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_gets_what_the_fold_gives(name, kind):
    rng = random.Random(f"{name} {kind}")
    torch.manual_seed(0)
    for ranks in range(1, 9):
        for _ in range(6):
            layout = random_layout(rng, ranks)
            nodes = tuple(sorted(rng.randrange(3) for _ in range(ranks)))
            if rng.random() < 0.2:
                nodes = tuple(rng.sample(nodes, ranks))  # neighbours need not be ranks in a row
            for backward in (False, True):
                line = Line.make(layout, backward=backward)
                maps, fixed = random_maps(kind, len(line), line)
                parts = list(algorithms_of(name, line, maps, ranks, nodes))
                simulate(parts, Wire.of(maps, fixed, None))
                found = {p: s for part in parts for p, s in part.entered().items()}
                expected = folded(line, maps)
                assert found.keys() == expected.keys(), (layout, nodes)
                for place, state in expected.items():
                    assert torch.allclose(found[place], state, rtol=1e-12, atol=1e-12), (layout, nodes, place)


def even(ranks, nodes):
    """Node of each rank of equal nodes."""
    return tuple(rank * nodes // ranks for rank in range(ranks))


def sent(name, kind, ranks, nodes, borders=None, backward=False):
    """Messages and bytes that each rank sends, by default for one document."""
    line = Line.make(SequenceLayout.contiguous(borders or 8 * ranks, ranks), backward=backward)
    maps, fixed = random_maps(kind, len(line), line, torch.float32)
    parts = list(algorithms_of(name, line, maps, ranks, even(ranks, nodes)))
    mail = simulate(parts, Wire.of(maps, fixed, None))
    return [mail.sent[r] for r in range(ranks)], [mail.bytes[r] for r in range(ranks)]


STATE = HEADS * KEYS * VALUES * 4
TRANSITION = {
    "identity": 0,
    "fixed": 0,
    "scalar": HEADS * 4,
    "diagonal": HEADS * KEYS * 4,
    "dense": HEADS * KEYS**2 * 4,
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_messages_and_bytes_follow_their_formulas(kind, backward):
    a, ranks = TRANSITION[kind], 6
    order = (lambda values: values[::-1]) if backward else (lambda values: values)

    # ring, all_scan: every rank but the last sends the state, in one piece or several; never a transition
    for slices in (1, 3):
        messages, size = sent(f"chain:{slices}", kind, ranks, 1, backward=backward)
        assert order(messages) == [slices] * 5 + [0] and order(size) == [STATE] * 5 + [0]

    # log_scan: rank p sends in step s if there is a rank p + 2^s; no transition where its run begins the document
    messages, size = sent("doubling", kind, ranks, 1, backward=backward)
    steps = [[s for s in range(3) if p + 2**s < ranks] for p in range(ranks)]
    assert order(messages) == [len(s) for s in steps]
    assert order(size) == [sum(STATE + (0 if p - 2**s + 1 <= 0 else a) for s in own) for p, own in enumerate(steps)]

    # hierarchical, 3 nodes of 2: half of the state and the transition to the neighbour, half of it back to who needs
    # it, and between nodes recursive doubling of half the state; columns are cut 3 + 2
    messages, size = sent("nodes", kind, ranks, 3, backward=backward)
    halves = [HEADS * KEYS * width * 4 for width in widths(VALUES, 2)]
    out, count = [0] * ranks, [0] * ranks
    for p in range(ranks):
        place = ranks - 1 - p if backward else p
        mine, other = halves[p % 2], halves[1 - p % 2]
        neighbour = place + 1 if place % 2 == 0 else place - 1
        if place < ranks - 1:  # the map of the last place is nobody's business
            out[p] += other + (0 if place == 0 else a)
            count[p] += 1
        if neighbour > 0:  # nothing enters the first place
            out[p] += mine
            count[p] += 1
        node = place // 2
        for step in range(2):
            if node + 2**step < 3:
                out[p] += mine + (0 if node - 2**step + 1 <= 0 else a)
                count[p] += 1
    assert messages == count and size == out


def test_a_document_that_begins_on_a_rank_starts_a_chain_of_its_own():
    """Four ranks, documents that end where ranks do: nothing travels; one token later, one state does."""
    for borders, expected in (((0, 8, 16, 24, 32), 0), ((0, 8, 17, 24, 32), 1)):
        line = Line.make(SequenceLayout.contiguous(borders, 4), backward=False)
        maps, _ = random_maps("scalar", len(line), line)
        for name in NAMES:
            parts = list(algorithms_of(name, line, maps, 4, (0, 1, 2, 3)))
            mail = simulate(parts, Wire.of(maps, None, None))
            assert sum(mail.bytes.values()) == expected * HEADS * KEYS * VALUES * 8, name


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_that_nobody_wants_stays_home(kind, backward):
    """Two nodes of two ranks, and a document on each. Inside a node, the carriers of half a state are both ranks.

    The document's first rank gives one half of its map away and the other, as what enters, to its neighbour; nobody
    continues what its second rank has. No transition: the map begins its document.
    """
    messages, size = sent("nodes", kind, 4, 2, borders=(0, 16, 32), backward=backward)
    order = (lambda values: values[::-1]) if backward else (lambda values: values)
    assert order(messages) == [2, 0, 2, 0] and order(size) == [STATE, 0, STATE, 0]


def test_the_glossarys_line():
    line = Line.make(SequenceLayout.zigzag((0, 5, 12), 2), backward=False)
    assert line.owners == (0, 1, 1, 0)
    assert line.fresh == (True, True, False, False) and line.wanted == (False, True, True, True)
    assert line.lengths == (3, 1, 3, 3) and line.start == (0, 1, 1, 1)

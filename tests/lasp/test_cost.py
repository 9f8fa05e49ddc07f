"""The cost model: formulas against numbers worked out by hand, known limits, the choice, what is refused."""

import re

import pytest

from lasp.cost import Case
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import EXCHANGES, choose, estimate
from lasp.softmax.table import SOFTMAX_EXCHANGES, estimate_softmax

# Latencies of 1 and 10 us, rates of 100 and 10 bytes/us, two interfaces per node, 5 us per exchange.
TOY = Fabric("toy", Link(1e-6, 100e6), Link(10e-6, 10e6), 2, 5e-6, "by hand")
THIN = Fabric("thin", Link(50e-6, 2e9), Link(200e-6, 50e6), 1, 0.0, "400 Mbit/s per host")
H100 = Fabric.preset("h100-ib")
MIB = 2**20


def seconds(exchange, case, fabric=TOY, **options):
    return estimate(exchange, case, fabric, **options).seconds


@pytest.mark.parametrize(
    "exchange, slices, microseconds",
    [
        # 6 latencies inside, one between, 7 messages of 1000 bytes over two interfaces of 10 bytes/us
        ("all_gather", 1, 5 + 6 * 1 + 10 + 7 * 1000 / 20),
        # 6 hops inside: 1 + 8; one between: 10 + 80
        ("ring", 1, 5 + 6 * 9 + 90),
        # slices of 200 bytes: 6 x (1 + 2) + (10 + 20), then 3 more over the border
        ("all_scan", 4, 5 + 6 * 3 + 30 + 3 * 30),
        # strides 1, 2, 4: 1, 2 and 4 messages over two interfaces; the last needs no transition
        ("log_scan", 1, 5 + (10 + 100) + (10 + 100) + (10 + 2 * 80)),
        # 3 x (200 + 200) there, one step of 200 (4 carriers on 2 interfaces; the map begins the document), 3 x 200 back
        ("hierarchical", 1, 5 + (1 + 12) + (10 + 2 * 20) + (1 + 6)),
        # two sub-slices of 100: one hop and one wait
        ("hierarchical", 2, 5 + (1 + 12) + 2 * (10 + 2 * 10) + (1 + 6)),
    ],
)
def test_formulas_against_numbers_by_hand(exchange, slices, microseconds):
    case = Case((4, 4), state_bytes=800, transition_bytes=200)
    assert seconds(exchange, case, slices=slices) == pytest.approx(microseconds * 1e-6)


@pytest.mark.parametrize(
    "exchange, microseconds",
    [
        # two fragments per message
        ("all_gather", 5 + 6 * 1 + 10 + 7 * 2000 / 20),
        # there and back: 12 hops inside, two between; the turn stays on its rank
        ("ring", 5 + 12 * 9 + 2 * 90),
        # 16 positions, node 1 has 4..11. Strides 1, 2: one and two messages of each node over its two interfaces.
        # 4: four of each, 8..11 to 12..15 with transitions. 8: four of each, all from the start, without
        ("log_scan", 5 + (10 + 100) + (10 + 100) + (10 + 2 * 100) + (10 + 2 * 80)),
        # 4 positions of 2 nodes. Stride 1: 0 -> 1 begins the document, 2 -> 3 does not. 2: one message of each node
        ("hierarchical", 5 + (1 + 24) + (10 + 2 * 40) + (10 + 2 * 20) + (1 + 12)),
    ],
)
def test_zigzag_by_hand(exchange, microseconds):
    case = Case((4, 4), state_bytes=800, transition_bytes=200, fragments=2)
    assert seconds(exchange, case, slices=1) == pytest.approx(microseconds * 1e-6)


def test_uneven_nodes_by_hand():
    """The one rank of the small node carries all three slices, over one interface."""
    case = Case((3, 1), state_bytes=600, transition_bytes=0)
    assert seconds("hierarchical", case, slices=1) == pytest.approx((5 + (1 + 4) + (10 + 3 * 20) + (1 + 4)) * 1e-6)
    # with one rank it has one ring; with one interface a message at a time, though the large node has two
    assert seconds("log_scan", Case((2, 1, 1), 600, 0)) == pytest.approx((5 + (10 + 60) + (10 + 60)) * 1e-6)
    assert seconds("all_gather", case) == pytest.approx((5 + 2 * 1 + 10 + 3 * 600 / 10) * 1e-6)


@pytest.mark.parametrize("nodes", [(2,) * 5, (1,) * 4, (6,), (3, 1, 4)])
@pytest.mark.parametrize("slices", [1, 3, 16])
def test_a_chain_takes_as_long_as_its_slices_queue(nodes, slices):
    """Each slice leaves a rank when it has arrived and the slice before it is gone."""
    case = Case(nodes, 960, 0)
    home = [node for node, ranks in enumerate(nodes) for _ in range(ranks)]
    hops = [TOY.within if a == b else TOY.between for a, b in zip(home, home[1:])]
    done = [0.0] * slices
    for link in hops:
        free = 0.0
        for j in range(slices):
            free = done[j] = max(done[j], free) + link.seconds(960 / slices)
    assert seconds("all_scan", case, slices=slices) == pytest.approx(TOY.overhead_s + done[-1])


@pytest.mark.parametrize(
    "exchange, fragments, messages, bytes_sent",
    [
        ("all_gather", 1, 1, 900),
        ("all_gather", 2, 1, 1800),
        ("ring", 1, 1, 800),
        ("ring", 2, 2, 1600),  # ranks 1 and 2 have a hop up and one down
        ("all_scan", 1, 4, 800),
        ("log_scan", 1, 2, 1700),  # rank 1: its own map, then that of 0 and 1, which begins the document
        ("log_scan", 2, 5, 4400),  # rank 2, positions 2 and 5: to 3, 6, 4, 7 with transitions, to 6 without
    ],
)
def test_what_the_busiest_rank_sends(exchange, fragments, messages, bytes_sent):
    case = Case((2, 2), state_bytes=800, transition_bytes=100, fragments=fragments)
    found = estimate(exchange, case, TOY, slices=4 if exchange == "all_scan" else 1)
    assert (found.messages, found.bytes_sent) == (messages, bytes_sent)


def test_the_transition_is_known_in_a_gathers_backward():
    case = Case((2, 2), 800, 100)
    assert estimate("all_gather", case, TOY, backward=True).bytes_sent == 800
    assert estimate("log_scan", case, TOY, backward=True) == estimate("log_scan", case, TOY)


def test_shared_processors_pay_for_every_message_and_byte():
    shared = Fabric("one machine", TOY.within, TOY.between, 2, 5e-6, "by hand", message_s=1e-6, byte_s=1e-9)
    case = Case((2, 2), 1000, 0)
    more = {e: seconds(e, case, shared, slices=1) - seconds(e, case, slices=1) for e in EXCHANGES}
    assert more["all_gather"] == pytest.approx(12 * 2e-6)  # 4 ranks pass on 3 messages
    assert more["ring"] == pytest.approx(3 * 2e-6)
    assert more["log_scan"] == pytest.approx((3 + 2) * 2e-6)
    assert more["hierarchical"] == pytest.approx((4 + 2 + 4) * 1.5e-6)  # halves: there, over the border, back


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_more_ranks_bytes_and_latency_never_cost_less(exchange):
    def at(nodes=4, ranks=2, state=MIB, transition=2**12, latency=1e-5):
        fabric = Fabric("x", Link(latency, 1e10), Link(2 * latency, 1e9), 2, 1e-5, "x")
        return seconds(exchange, Case((ranks,) * nodes, state, transition), fabric)

    for name, values in {
        "nodes": range(1, 40), "state": (2**10, 2**16, MIB, 2**24), "transition": (0, 2**12, 2**18, MIB),
        "latency": (1e-7, 1e-6, 1e-5, 1e-3),
    }.items():  # fmt: skip
        times = [at(**{name: value}) for value in values]
        assert times == sorted(times), name


def test_one_rank_exchanges_nothing():
    choice = choose(Case((1,), MIB, 0), H100)
    assert (choice.exchange, choice.seconds) == ("all_gather", 0.0)
    assert {(e.seconds, e.messages, e.bytes_sent) for e in choice.estimates} == {(0.0, 0, 0)}
    assert choice.reason == "all_gather: one rank exchanges nothing."


def test_thin_links_want_the_pipelined_chain():
    """8 hosts of 2 ranks, 400 Mbit/s each, one interface, 2 MiB."""
    choice = choose(Case((2,) * 8, 2 * MIB, 0), THIN)
    by_name = {e.exchange: e.seconds for e in choice.estimates}
    assert choice.exchange == "all_scan" and choice.slices >= 8
    assert by_name["all_gather"] > 8 * by_name["all_scan"]
    assert by_name["all_gather"] == pytest.approx(15 * 2 * MIB / 50e6, rel=0.01)


def test_latency_wants_few_steps():
    slow = Fabric("far", Link(1e-6, 1e11), Link(1e-3, 1e11), 8, 0.0, "latency alone")
    choice = choose(Case((1,) * 64, 2**16, 0), slow)
    assert choice.exchange == "log_scan" and choice.seconds == pytest.approx(6e-3, rel=0.01)
    choice = choose(Case((8,) * 64, 2**16, 0), slow)
    assert choice.exchange == "hierarchical" and choice.slices == 1


def test_many_interfaces_want_the_state_cut_between_them():
    wide = Fabric("wide", Link(1e-6, 1e12), Link(1e-6, 1e9), 8, 0.0, "rate alone")
    case = Case((8,) * 4, 64 * MIB, 0)
    choice = choose(case, wide)
    assert choice.exchange == "hierarchical" and choice.slices > 1
    assert choice.seconds < seconds("all_scan", case, wide) / 4


def test_no_more_slices_than_value_columns():
    assert estimate("all_scan", Case((2,) * 8, 2 * MIB, 0, value_columns=11), THIN).slices == 8
    assert estimate("hierarchical", Case((2,) * 8, 2 * MIB, 0, value_columns=11), THIN).slices == 4
    assert estimate("hierarchical", Case((8,) * 8, 2 * MIB, 0, value_columns=5), THIN).slices == 1


def test_the_best_slices_are_the_best():
    case = Case((2,) * 8, 2 * MIB, 0)
    for exchange in ("all_scan", "hierarchical"):
        best = estimate(exchange, case, THIN)
        assert best.seconds == min(seconds(exchange, case, THIN, slices=s) for s in (1, 2, 4, 8, 16, 32, 64))


def test_the_choice_depends_on_its_arguments_alone():
    case = Case((8,) * 32, 2 * MIB, 2**14)
    choice = choose(case, H100, hidden_s=1e-4)
    assert choice == choose(case, H100, hidden_s=1e-4)
    assert tuple(e.exchange for e in choice.estimates) == tuple(EXCHANGES)
    assert choice.exposed_s == pytest.approx(choice.seconds - 1e-4)
    assert choose(case, H100, hidden_s=1.0).exposed_s == 0.0
    assert choose(case, H100, hidden_s=1.0).exchange == choice.exchange  # all hidden: the fastest still


def test_the_first_of_equals_is_taken():
    """Two ranks on two nodes, no transition: ring, log_scan and hierarchical are the same message."""
    choice = choose(Case((1, 1), 1000, 0, value_columns=1), TOY)
    assert len({e.seconds for e in choice.estimates}) == 1 and choice.exchange == "all_gather"


def test_the_reason_is_one_sentence():
    assert choose(Case((2,) * 8, 2 * MIB, 0), THIN, hidden_s=0.01).reason == (
        "all_scan in 32 slices should take 58.1 ms for a state of 2 MiB between 16 ranks on 8 nodes over thin, of "
        "which 48.1 ms are not hidden by 10 ms of local work; next is hierarchical with 58.6 ms."
    )


@pytest.mark.parametrize(
    "exchange, backward, microseconds",
    [
        ("all_gather", False, 5 + 6 * 1 + 10 + 7 * 1600 / 20),
        ("all_gather", True, 5 + 6 * 1 + 10 + 7 * 1600 / 20),
        ("ring", False, 5 + 6 * 1 + 10 + 7 * 1600 / 10),
        ("ring", True, 5 + 6 * 1 + 10 + 7 * 3200 / 10),
        # q, k, v: 2400 bytes, 300 to each; then o: 800 bytes, 100 to each. 3 peers inside, 4 outside on 2 interfaces
        ("ulysses", False, 5 + 3 * (1 + 3) + 4 * (10 + 2 * 30) + 3 * (1 + 1) + 4 * (10 + 2 * 10)),
    ],
)
def test_softmax_by_hand(exchange, backward, microseconds):
    found = estimate_softmax(exchange, (4, 4), kv_bytes=1600, q_bytes=800, fabric=TOY, backward=backward)
    assert found.seconds == pytest.approx(microseconds * 1e-6)
    assert estimate_softmax(exchange, (1,), kv_bytes=1600, q_bytes=800, fabric=TOY).seconds == 0.0


def test_bad_values_are_refused():
    case = Case((2, 2), MIB, 0, value_columns=16)
    with pytest.raises(
        ValueError,
        match=r"exchange must be one of \('all_gather', .*'hierarchical'\), got 'gather'\. Did you mean 'all_gather'\?",
    ):
        estimate("gather", case, TOY)
    with pytest.raises(ValueError, match=r"slices = 17 must be an integer between 1 and 16 for all_scan with 16 value"):
        estimate("all_scan", case, TOY, slices=17)
    with pytest.raises(ValueError, match=r"slices = 9 must be an integer between 1 and 8 for hierarchical .* 2 ranks"):
        estimate("hierarchical", case, TOY, slices=9)
    with pytest.raises(ValueError, match=r"slices = 2 must be an integer between 1 and 1 for ring"):
        estimate("ring", case, TOY, slices=2)
    for hidden in (-1e-3, float("nan"), float("inf"), "long"):
        with pytest.raises(ValueError, match=r"hidden_s must be a finite number >= 0, got"):
            choose(case, TOY, hidden_s=hidden)
    for nodes in ((), (0,), (2, -1), (1.0,), 4, [2, 2]):
        with pytest.raises(ValueError, match=r"nodes must be a tuple of the ranks of each node, each an integer >= 1"):
            Case(nodes, MIB, 0)
        with pytest.raises(ValueError, match=r"nodes must be a tuple"):
            estimate_softmax("ring", nodes, 1, 1, TOY)
    for name, value in {"state_bytes": 0, "transition_bytes": -1, "fragments": 0, "value_columns": 0}.items():
        with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d, got {value}"):
            Case(**{"nodes": (1,), "state_bytes": 1, "transition_bytes": 0, name: value})
    known = re.escape(str(tuple(SOFTMAX_EXCHANGES)))
    with pytest.raises(ValueError, match=rf"softmax exchange must be one of {known}, got 'log_scan'"):
        estimate_softmax("log_scan", (1,), 1, 1, TOY)
    with pytest.raises(ValueError, match=r"kv_bytes must be an integer >= 1, got 0"):
        estimate_softmax("ring", (1,), 0, 1, TOY)

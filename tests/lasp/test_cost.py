"""The cost model: formulas against numbers worked out by hand, known limits, the choice, what is refused."""

import pytest

from lasp.cost import EXCHANGES, Case, choose, estimate, estimate_softmax
from lasp.fabric import Fabric, Link

# Latencies 1 and 10 us, rates 100 and 10 bytes/us, two interfaces per node, 5 us per exchange.
TOY = Fabric("toy", Link(1e-6, 100e6), Link(10e-6, 10e6), 2, 5e-6, "by hand")
THIN = Fabric("thin", Link(50e-6, 2e9), Link(200e-6, 50e6), 1, 0.0, "8 hosts, 400 Mbit/s each")


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
    assert estimate(exchange, case, TOY, slices=slices).seconds == pytest.approx(microseconds * 1e-6)


def test_thin_links_want_the_pipelined_chain():
    choice = choose(Case((2,) * 8, 2 * 2**20, 0), THIN)
    by_name = {e.exchange: e.seconds for e in choice.estimates}
    assert choice.exchange == "all_scan"
    assert by_name["all_gather"] > 8 * by_name["all_scan"]


def test_the_choice_names_what_it_compares():
    case = Case((8,) * 32, 2**21, 2**14)
    choice = choose(case, Fabric.preset("h100-ib"), hidden_s=1e-4)
    assert choice == choose(case, Fabric.preset("h100-ib"), hidden_s=1e-4)
    assert tuple(e.exchange for e in choice.estimates) == EXCHANGES
    assert choice.reason.count(".") >= 1 and "256 ranks on 32 nodes over h100-ib" in choice.reason


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown exchange 'gather': choose one of all_gather, ring"):
        estimate("gather", Case((1,), 1, 0), TOY)
    with pytest.raises(ValueError, match=r"unknown softmax exchange 'log_scan': choose one of all_gather, ring, ulys"):
        estimate_softmax("log_scan", (1,), 1, 1, TOY)

"""Every exchange gives the outputs, final states and gradients of all_gather, over gloo ranks, with fewer messages."""

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lasp import CPContext, SequenceLayout, comm, linear_attention
from lasp.comm.nodes import node_ids
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import EXCHANGES, setting
from tests.harness import RankPool
from tests.lasp.linear_cases import PACKED, Case, known, matrix, results, scale, special, worst
from tests.lasp.places import Places

OTHERS = tuple(name for name in EXCHANGES if name != "all_gather")
NODES = {1: (0,), 2: (0, 1), 3: (0, 0, 1), 4: (0, 0, 0, 1), 5: (0, 1, 1, 1, 2), 6: (0, 0, 0, 0, 1, 1)}
NODES |= {7: (0, 0, 0, 1, 1, 2, 2), 8: (0, 0, 0, 1, 1, 1, 2, 2)}


@pytest.fixture(scope="module")
def eight():
    pool = RankPool(8)
    yield pool
    pool.close()


def apart(group, cases, names, tolerance):
    """How many values were compared with all_gather's, and one line for each that is further off than ``tolerance``."""
    count, lines = 0, []
    nodes = NODES[dist.get_world_size(group)]
    for case, want in cases:
        gathered = results(group, case)
        for name in names:
            found = results(group, replace(case, exchange=name, nodes=nodes if name == "hierarchical" else None))
            assert found.keys() == gathered.keys()
            for key, value in found.items():
                count += 1
                error = (value - gathered[key]).abs().max().item() / scale(key, want) if value.numel() else 0.0
                if not error <= tolerance:
                    lines.append(f"{name} {case.label} {key}: {error:.2e}")
    return count, lines


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8])
def test_all_give_what_all_gather_gives(eight, size):
    cases = [
        Case("token", "zigzag", borders=PACKED),
        Case("channel", "contiguous", batch=2),
        Case("fixed", "uneven", borders=PACKED),
        Case("none", "zigzag", causal=False, borders=PACKED),
    ]
    for count, lines in eight.run(apart, known(cases), OTHERS, 1e-6, size=size):
        assert count > 80 and not lines, "\n".join(lines)


def test_every_gate_and_layout(ranks):
    cases = known(c for c in matrix() + special() if c.borders[-1] < 900)
    for count, lines in ranks.run(apart, cases, OTHERS, 1e-6, size=4):
        assert count > 150 * len(OTHERS) and not lines, "\n".join(lines)


@pytest.mark.parametrize("name", OTHERS)
def test_float64_is_exact_to_rounding(ranks, name):
    cases = [Case("channel", "uneven", borders=PACKED), Case("fixed", "zigzag"), Case("none", causal=False)]
    cases = [replace(c, dtype=torch.float64, exchange=name) for c in cases]
    for _, failures in ranks.run(worst, known(cases), 1e-12, size=3):
        assert not failures, "\n".join(failures)


def one_rank_missing(group, name, limit_s):
    """Rank 1 refuses its own bad tensor; the others end by timeout."""
    cp = CPContext(SequenceLayout.contiguous(30, dist.get_world_size(group)), group, name)
    q = torch.zeros(1, 10 if cp.cp_rank != 1 else 9, 1, 4)
    try:
        linear_attention(q, q, q, cp=cp)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("name", ["ring", "hierarchical"])
def test_a_rank_that_never_arrives_is_named(ranks, name):
    results = ranks.run_to_break(one_rank_missing, name, size=3)
    assert results[1][0] == "ValueError"
    for rank in (0, 2):
        kind, message = results[rank]
        assert kind == "CommError" and "rank 1 never reached collective" in message, (rank, message)
        assert "(linear, forward)" in message, (rank, message)


def asked_twice(group, folder):
    """Ranks per node of the default group, which at first has four ranks, later two."""
    rank, found = dist.get_rank(), [len(node_ids(None))]
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
        found.append(len(node_ids(None)))
    return found


def test_the_default_group_may_become_another_one(ranks, tmp_path):
    found = ranks.run(asked_twice, tmp_path, size=4)
    ranks.restart()
    assert found == [[4, 2], [4, 2], [4], [4]]


def numbers_of(group, name, states):
    """What observers and the ledger see of one forward and one backward, and of a collective after it."""
    layout = SequenceLayout.contiguous(64, dist.get_world_size(group))
    cp, x = CPContext(layout, group, name), Case("channel", borders=(0, 64)).inputs()
    local = {n: layout.shard(x[n], cp.cp_rank).float().requires_grad_() for n in "qkvg"}
    seen = Places()
    seen.attach()
    try:
        with comm.record() as ledger:
            o, final = linear_attention(**local, cp=cp, output_final_state=states)
            (o.sum() + (final.sum() if states else 0.0)).backward()
        comm.all_gather(torch.ones(3), group, "after it").wait()
    finally:
        seen.detach()
    assert not seen.open
    return seen.seen, dict(ledger.calls), dict(ledger.bytes)


@pytest.mark.parametrize("name", OTHERS)
def test_an_exchange_is_one_collective_to_those_who_watch(ranks, name):
    """Numbers agree on all ranks, whatever each one sends, and go on behind it."""
    results = ranks.run(numbers_of, name, False, size=3)
    (first, *_), (second, *_), (third, *_) = results
    assert first == second == third
    assert [place for _, place in first] == ["linear, forward", "linear, backward", "after it"]
    start = first[0][0]
    assert [number - start for number, _ in first] == [0, 1, 2]
    (_, _, with_states), *_ = ranks.run(numbers_of, name, True, size=3)
    assert set(with_states) == {"send", "all_to_all"}


def test_messages_of_one_document_follow_their_formulas(ranks):
    """Ring: every rank but the last sends its states on, and none its decays. Case: H = 2, K = 5, V = 7."""
    state = 2 * 5 * 7 * 4
    for name, pieces in (("ring", 1), ("all_scan", 7)):  # 8 slices of 7 columns are 7
        results = ranks.run(numbers_of, name, False, size=3)
        calls = [calls.get("send", 0) for _, calls, _ in results]
        assert calls == [pieces, 2 * pieces, pieces]  # forward to the right, backward to the left
        assert [sizes["send"] for _, _, sizes in results] == [state, 2 * state, state]


def narrow(group, name, wire_dtype):
    """Outputs and a gradient in float32."""
    layout = SequenceLayout.contiguous(64, dist.get_world_size(group))
    cp = CPContext(layout, group, name, wire_dtype=wire_dtype)
    x = Case("token", borders=(0, 64), key_dim=16, value_dim=16, strength=0.1).inputs()
    local = {n: layout.shard(x[n], cp.cp_rank).float().requires_grad_() for n in "qkvg"}
    with comm.record() as ledger:
        o, final = linear_attention(**local, cp=cp, output_final_state=True)
        (o.square().sum() + final.sum()).backward()
    return o.detach(), final.detach(), local["k"].grad, sum(ledger.bytes.values())


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_narrow_wire_halves_the_states_and_rounds_them(ranks, name):
    plain, cast = (ranks.run(narrow, name, dtype, size=4) for dtype in (None, torch.bfloat16))
    for (*wide, sent), (*found, less) in zip(plain, cast, strict=True):
        assert less < sent
        assert all(a.dtype == torch.float32 for a in found)
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, wide, strict=True)]
        assert 0 < max(errors) < 3 * 2**-8  # a rounding of 2^-9 per hop, three hops
    finals = [final for _, final, _, _ in cast]
    assert all(torch.equal(finals[0], final) for final in finals)


def chosen(group, link, nodes):
    """What auto takes for two layers of different states, and the outputs beside those of all_gather."""
    layout = SequenceLayout.contiguous(64, dist.get_world_size(group))
    fabric = Fabric("test", link, link, 1, 1e-6, "made up")
    cp = CPContext(layout, group, "auto", fabric=fabric, nodes=nodes)
    names = []
    for width in (4, 64):
        x = Case("token", borders=(0, 64), key_dim=width, value_dim=width).inputs()
        local = {n: layout.shard(x[n], cp.cp_rank).float() for n in "qkvg"}
        o, _ = linear_attention(**local, cp=cp)
        expected, _ = linear_attention(**local, cp=CPContext(layout, group))
        assert torch.allclose(o, expected, rtol=1e-5, atol=1e-5)
        names.append(setting(cp, 2 * width * width, 2, width, torch.float32))
    return [(s.exchange, s.slices) for s in names], names[0].reason


def test_auto_chooses_by_the_fabric_and_gives_the_same_numbers(ranks):
    thin, slow = Link(1e-6, 1e6), Link(1e-2, 1e12)
    for link, winner in ((thin, "all_scan"), (slow, "log_scan")):
        results = ranks.run(chosen, link, (0, 1, 2, 3), size=4)
        assert len(set(map(str, results))) == 1  # all ranks agree
        names, reason = results[0]
        assert {name for name, _ in names} == {winner}
        assert winner in reason and "4 ranks on 4 nodes" in reason


def refused(group):
    layout, messages = SequenceLayout.contiguous(32, dist.get_world_size(group)), []
    node_ids(group)  # asked once per group, where a context that is not refused needs it
    with comm.record() as ledger:
        for arguments in (
            {"exchange": "gossip"},
            {"exchange": "auto"},
            {"exchange": "auto", "fabric": "carrier-pigeon"},
            {"exchange": "auto", "fabric": "missing.json"},
            {"exchange": "ring", "fabric": "laptop"},
            {"exchange": "log_scan", "nodes": (0, 1)},
            {"exchange": "hierarchical", "nodes": (0, 1, 2)},
            {"exchange": "hierarchical", "nodes": ("a", "b")},
            {"exchange": "ring", "wire_dtype": torch.float16},
            {"softmax_exchange": "gossip"},
        ):
            try:
                CPContext(layout, group, **arguments)
                messages.append("")
            except ValueError as error:
                messages.append(str(error))
    return messages, dict(ledger.calls)


def test_what_cannot_serve_is_refused_with_the_alternatives(ranks):
    (messages, calls), other = ranks.run(refused, size=2)
    assert (messages, calls) == other and not calls
    expected = [
        "exchange must be one of.*hierarchical.*got 'gossip'",
        "fabric must name a preset, h100-ib.*lasp bench fabric.*Or name one of",
        "unknown fabric 'carrier-pigeon': the presets are h100-ib",
        "fabric file missing.json does not exist. `lasp bench fabric` measures one",
        "fabric has no effect on exchange='ring'; leave it None, got 'laptop'. It chooses for 'auto'",
        "nodes has no effect on exchange='log_scan'",
        "nodes must hold the node of each rank of the group: 2 ranks, got 3",
        r"nodes must hold integers, equal on ranks that share a machine, got \('a', 'b'\)",
        "wire_dtype must be torch.bfloat16 or None",
        "softmax_exchange must be one of.*ulysses",
    ]
    for pattern, message in zip(expected, messages, strict=True):
        assert re.search(pattern, message), (pattern, message)

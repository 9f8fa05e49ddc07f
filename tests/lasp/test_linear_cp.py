"""linear_attention with the sequence cut over gloo ranks: exact against one device, one message per direction."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasp import CPContext, SequenceLayout, comm, linear_attention
from tests.lasp.layout_cases import any_layouts
from tests.lasp.linear_cases import GATES, Case, known, matrix, special, worst, worst_in_small_tiles


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_gate_and_layout_equals_the_reference_on_every_rank(ranks, size):
    results = ranks.run(worst, known(matrix() + special()), 1e-5, size=size)
    assert all(count > 200 for count, _ in results)
    failures = [f"rank {r}: {line}" for r, (_, lines) in enumerate(results) for line in lines]
    assert not failures, "\n".join(failures)


def test_float64_is_exact_to_rounding(ranks):
    cases = [replace(c, dtype=torch.float64) for c in matrix(layouts=("zigzag", "uneven")) + special()]
    for _, failures in ranks.run(worst, known(cases), 1e-12, size=4):
        assert not failures, "\n".join(failures)


def test_states_travel_through_many_tiles_and_ranks(ranks):
    cases = known(replace(c, dtype=torch.float64) for c in matrix() + special())
    for size, chunks in ((2, 1), (3, 2), (4, 1)):
        for _, failures in ranks.run(worst_in_small_tiles, cases, 1e-12, chunks, size=size):
            assert not failures, "\n".join(failures)


@pytest.mark.parametrize("gate", ["fixed", "token", "channel"])
def test_strong_decay_costs_no_accuracy_when_cut(ranks, gate):
    case = Case(gate, "zigzag", borders=(0, 130, 300), key_dim=16, value_dim=16)
    unsharded = worst(None, known([case]), 0.0)[1]
    budget = 4 * max(float(line.rsplit(" ", 1)[1]) for line in unsharded)
    cases = known(replace(case, strength=s) for s in (1.0, 100.0, 3000.0))
    for _, failures in ranks.run(worst, cases, budget, size=4):
        assert not failures, "\n".join(failures)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=any_layouts(), gate=st.sampled_from(GATES), causal=st.booleans(), seed=st.integers(0, 1000))
def test_random_layouts(ranks, layout, gate, causal, seed):
    case = Case(
        gate if causal else "none",
        borders=layout.cu_seqlens_global,
        fragments=layout.fragments,
        causal=causal,
        dtype=torch.float64,
        seed=seed,
    )
    for _, failures in ranks.run(worst, known([case]), 1e-11, size=layout.cp_size):
        assert not failures, f"{layout}\n" + "\n".join(failures)


def ledger_of(group, gate, length, batch, zigzag, states, profile):
    """Collectives of one forward and one backward: from the ledger, or as torch's profiler saw them."""
    size = dist.get_world_size(group)
    layout = (SequenceLayout.zigzag if zigzag else SequenceLayout.contiguous)(length, size)
    case = Case(gate, borders=(0, length), batch=batch)
    x, cp = case.inputs(), CPContext(layout, group)
    per_token = {"q", "k", "v", "g"} if gate != "fixed" else {"q", "k", "v"}
    local = {n: layout.shard(x[n], cp.cp_rank) if n in per_token else x[n] for n in "qkvg" if x[n] is not None}
    local = {n: t.float().requires_grad_() for n, t in local.items()}
    initial = x["initial_state"].float().requires_grad_() if states else None
    stages = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        with comm.record() as ledger:
            o, final = linear_attention(**local, cp=cp, initial_state=initial, output_final_state=states)
        stages.append((dict(ledger.calls), dict(ledger.bytes)))
        with comm.record() as ledger:
            ((o * 2).sum() + (final.sum() if states else 0.0)).backward()
        stages.append((dict(ledger.calls), dict(ledger.bytes)))
    if profile:
        names = [e.key for e in seen.key_averages() for _ in range(e.count)]
        return [n for n in names if n.startswith(("gloo:", "c10d::", "nccl:"))]
    return stages


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_one_all_gather_per_direction_of_the_published_size(ranks, gate, zigzag):
    heads, key_dim, value_dim, batch = 2, 5, 7, 2
    fragments = 2 if zigzag else 1
    decay = {"none": 0, "fixed": 0, "token": 1, "channel": key_dim}[gate]
    forward = fragments * batch * heads * (key_dim * value_dim + decay) * 4
    backward = fragments * batch * heads * key_dim * value_dim * 4
    for length in (64, 640):  # the size does not depend on T
        for stages in ranks.run(ledger_of, gate, length, batch, zigzag, False, False, size=4):
            assert stages == [
                ({"all_gather": 1}, {"all_gather": forward}),
                ({"all_gather": 1}, {"all_gather": backward}),
            ]


def test_states_ride_in_the_same_messages(ranks):
    for stages in ranks.run(ledger_of, "token", 64, 2, False, True, False, size=2):
        assert [calls for calls, _ in stages] == [{"all_gather": 1}, {"all_gather": 1}]


def test_the_profiler_sees_two_collectives_and_nothing_else(ranks):
    for names in ranks.run(ledger_of, "token", 64, 1, True, True, True, size=2):
        assert len([n for n in names if n.startswith("gloo:")]) == 2, names
        assert len([n for n in names if n.startswith("c10d::")]) == 2, names
        assert all("gather" in n for n in names), names


def one_rank_without_gradients(group):
    """Rank 0's inputs need no gradient; the others still get theirs."""
    layout = SequenceLayout.contiguous(32, dist.get_world_size(group))
    cp = CPContext(layout, group)
    x = Case("token", borders=(0, 32)).inputs()
    local = {n: layout.shard(x[n], cp.cp_rank) for n in "qkvg"}
    for name, t in local.items():
        t.requires_grad_(cp.cp_rank > 0 or name == "q")
    o, _ = linear_attention(**local, cp=cp)
    o.sum().backward()
    return local["k"].grad is not None


def test_backward_collectives_do_not_depend_on_who_needs_gradients(ranks):
    assert ranks.run(one_rank_without_gradients, size=2) == [False, True]


def shared_fault(group):
    layout = SequenceLayout.contiguous(32, dist.get_world_size(group))
    cp, x = CPContext(layout, group), torch.zeros(1, 16, 1, 4)
    with comm.record() as ledger:
        for bad in (lambda: linear_attention(x, x, x, cp=cp, impl="reference"), lambda: wrong_size(group)):
            with pytest.raises(ValueError, match="cp_size"):
                bad()
    return dict(ledger.calls)


def wrong_size(group):
    CPContext(SequenceLayout.contiguous(32, 3), group)


def test_faults_that_all_ranks_share_raise_everywhere_before_any_traffic(ranks):
    assert ranks.run(shared_fault, size=2) == [{}, {}]


def one_rank_missing(group, limit_s):
    """Rank 1 refuses its own bad tensor; the others end by timeout and say who is missing."""
    cp = CPContext(SequenceLayout.contiguous(30, dist.get_world_size(group)), group)
    q = torch.zeros(1, 10 if cp.cp_rank != 1 else 9, 1, 4)
    try:
        linear_attention(q, q, q, cp=cp)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_rank_that_never_arrives_is_named_by_those_that_wait(ranks):
    results = ranks.run_to_break(one_rank_missing, size=3)
    assert results[1][0] == "ValueError" and "must hold the 10 tokens of cp rank 1" in results[1][1]
    for rank in (0, 2):
        kind, message = results[rank]
        named = "rank 1 never reached collective" in message and "(linear, forward)" in message
        assert kind == "CommError" and named, message


def outputs_that_move(group, gate):
    """Whether outputs on the last rank see the first rank's values, and only through the exchange."""
    layout = SequenceLayout.contiguous(61, dist.get_world_size(group))
    cp, x = CPContext(layout, group), Case(gate, strength=0.01).inputs()
    local = {
        n: layout.shard(x[n], cp.cp_rank) if n != "g" or gate != "fixed" else x[n] for n in "qkvg" if x[n] is not None
    }
    base, _ = linear_attention(**local, cp=cp)
    if cp.cp_rank == 0:
        local["v"] = local["v"].clone()
        local["v"][:, -1] += 1.0
    moved, _ = linear_attention(**local, cp=cp)
    return (moved != base).flatten(2).any(-1)[0].tolist()


@pytest.mark.parametrize("gate", GATES)
def test_causality_holds_across_ranks(ranks, gate):
    first, *rest = ranks.run(outputs_that_move, gate, size=3)
    assert first == [False] * (len(first) - 1) + [True]
    assert all(all(flags) for flags in rest)


def counted_tokens(group, decay):
    """Unnormalised attention over ones in the glossary's example: outputs count the tokens of the document so far."""
    layout = SequenceLayout.zigzag((0, 5, 12), 2)
    cp = CPContext(layout, group)
    ones = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    g = None if decay is None else torch.tensor([decay], dtype=torch.float64).log()
    return linear_attention(ones, ones, ones, g, cp=cp, scale=1.0)[0].flatten().tolist()


def test_the_glossarys_numbers(ranks):
    assert ranks.run(counted_tokens, None, size=2) == [[1, 2, 3, 5, 6, 7], [4, 5, 1, 2, 3, 4]]
    first, _ = ranks.run(counted_tokens, 0.5, size=2)
    assert first[3] == pytest.approx(0.5 * 1.875 + 1)


def under_autocast(group, enabled):
    """Outputs, states and a gradient of three ranks, where every rank but the first folds several maps."""
    layout = SequenceLayout.contiguous(64, dist.get_world_size(group))
    cp, x = CPContext(layout, group), Case("token", borders=(0, 64), key_dim=32, value_dim=32).inputs()
    local = [layout.shard(x[n], cp.cp_rank).float().requires_grad_() for n in "qkvg"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        o, final = linear_attention(*local, cp=cp, output_final_state=True)
        (o.square().sum() + final.sum()).backward()
    return [o.detach(), final.detach(), *(t.grad for t in local)]


def test_autocast_of_the_caller_does_not_reach_the_fold(ranks):
    plain, cast = (ranks.run(under_autocast, enabled, size=3) for enabled in (False, True))
    for expected, actual in zip(plain, cast, strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)

import contextlib
import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp import comm
from lasp.attention import softmax_attention
from lasp.cp_context import CPContext
from lasp.halo import halo_plan
from lasp.kernels import reference
from lasp.layout import SequenceLayout
from lasp.softmax import gather as softmax_gather
from tests.harness import assert_close, relative_error
from tests.lasp.layout_cases import PACKED, TOLERANCE, layouts, random_layouts
from tests.lasp.softmax_cases import make

NAMES = ("q", "k", "v")


def check_attention(group, name, layout, batch, heads, dims, dtype, **options):
    """One case on this rank: output and gradients of its tokens, and which collectives ran."""
    rank, cp = dist.get_rank(group), CPContext(layout, group)
    *full, do = make(heads[1], batch, layout.total_tokens, *heads, *dims)
    full = [x.requires_grad_() for x in full]
    want = reference.softmax_attention(*full, cu_seqlens=layout.cu_seqlens_global, **options)
    want_gradients = torch.autograd.grad(want, full, do)

    local = [layout.shard(x, rank).detach().to(dtype).requires_grad_() for x in full]
    with comm.record() as forward:
        o = softmax_attention(*local, cp=cp, **options)
    with comm.record() as backward:
        gradients = torch.autograd.grad(o, local, layout.shard(do, rank).to(dtype))
    if layout.cp_size == 1:
        assert not forward.calls and not backward.calls, name
    elif options.get("window") is None:
        groups = math.ceil(heads[1] / math.ceil(heads[1] / 4))
        longest = max(layout.num_tokens(r) for r in range(layout.cp_size))
        gathered = batch * longest * heads[1] * sum(dims) * torch.finfo(dtype).bits // 8
        assert forward.calls == {"all_gather": groups} and forward.bytes["all_gather"] == gathered, name
        assert backward.calls == {"all_gather": groups, "reduce_scatter": groups}, name
        assert backward.bytes == {"all_gather": gathered, "reduce_scatter": gathered * layout.cp_size}, name
    else:
        cut = not halo_plan(cp, options["window"] - 1).silent
        assert forward.calls == backward.calls == ({"all_to_all": 1} if cut else {}), name
    assert o.dtype == dtype and all(g.dtype == dtype for g in gradients)
    assert_close(f"o, {name}", o, layout.shard(want, rank), TOLERANCE[dtype])
    longest_document = max(b - a for a, b in pairwise(layout.cu_seqlens_global))
    one_key = min(longest_document, options.get("window") or longest_document) == 1
    for which, found, expected in zip(NAMES, gradients, want_gradients, strict=True):
        # with one key per token dq and dk are zero, reached by cancelling terms of size ~1
        terms = 1.0 if one_key else expected.abs().max().item()
        assert_close(f"d{which}, {name}", found, layout.shard(expected, rank), TOLERANCE[dtype], terms)


OPTIONS = ({}, {"causal": False}, {"window": 3}, {"window": 17, "scale": 0.3}, {"window": 1})
HEADS = ((2, 2), (6, 1), (12, 6))  # query heads, kv heads; six kv heads travel in groups of two
DIMS = ((4, 4), (5, 3))


def all_attentions(group, dtype):
    number = 0
    for layout_name, layout in layouts(dist.get_world_size(group)).items():
        for options in OPTIONS:
            heads, dims = HEADS[number % 3], DIMS[number % 2]
            number += 1
            batch = 2 if layout.num_documents == 1 else 1
            name = f"{layout_name}, H={heads}, D={dims}, {options}"
            check_attention(group, name, layout, batch, heads, dims, dtype, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_attention_equals_one_device(ranks, size):
    ranks.run(all_attentions, torch.float64, size=size)
    ranks.run(all_attentions, torch.float32, size=size)


def attention_on(group, layout, options):
    check_attention(group, f"{layout}, {options}", layout, 1, (4, 2), (4, 4), torch.float64, **options)


@settings(max_examples=15, deadline=None)
@given(
    layout=random_layouts(),
    options=st.one_of(
        st.builds(lambda causal: {"causal": causal}, st.booleans()),
        st.builds(lambda window: {"window": window}, st.integers(1, 30)),
    ),
)
def test_attention_on_random_layouts(ranks, layout, options):
    ranks.run(attention_on, layout, options, size=layout.cp_size)


def test_without_a_context_every_row_is_a_document():
    tensors = make(0, 2, 19, 4, 2, 8, 8)
    local = [x.requires_grad_() for x in tensors[:3]]
    for options in OPTIONS:
        with comm.record() as ledger:
            o = softmax_attention(*local, **options)
            gradients = torch.autograd.grad(o, local, tensors[3])
        assert not ledger.calls
        want = reference.softmax_attention(*local, **options)
        assert_close(f"o {options}", o, want.detach(), 1e-12)
        for x, y in zip(gradients, torch.autograd.grad(want, local, tensors[3]), strict=True):
            assert_close(f"gradient {options}", x, y, 1e-12, terms=1.0)


def probe_causality(group):
    """A changed token moves no earlier output and no other document, and moves those that read it."""
    rank, layout = dist.get_rank(group), SequenceLayout.zigzag(PACKED, dist.get_world_size(group))
    cp = CPContext(layout, group)
    tensors = make(1, 1, 41, 2, 1, 4, 4)[:3]
    for options, reach in (({}, 41), ({"window": 5}, 5), ({"causal": False}, None)):
        base = softmax_attention(*(layout.shard(x, rank) for x in tensors), cp=cp, **options)
        for t in (0, 4, 5, 17, 30):
            changed = [x.clone() for x in tensors]
            for x in changed:
                x[:, t] += 1.0
            o = softmax_attention(*(layout.shard(x, rank) for x in changed), cp=cp, **options)
            moved = (o != base).flatten(2).any(-1)[0]
            borders, token = layout.cu_seqlens_global, torch.arange(41)
            document = max(n for n in range(len(borders) - 1) if borders[n] <= t < borders[n + 1])
            expected = (token >= borders[document]) & (token < borders[document + 1])
            if reach is not None:
                expected &= (token >= t) & (token < t + reach)
            assert torch.equal(moved, layout.shard(expected, rank, 0)), (options, t)


def test_causality_probe(ranks):
    ranks.run(probe_causality, size=3)


def order_of_events(group):
    """What this rank starts, in order: a gather (g), the attention of a head group (a), a scatter (s)."""
    layout = SequenceLayout.zigzag(24, dist.get_world_size(group))
    *local, _ = (layout.shard(x, dist.get_rank(group)) for x in make(5, 1, 24, 8, 4, 4, 4))
    local[0].requires_grad_()
    events = []

    def noted(event, function):
        return lambda *args, **kwargs: events.append(event) or function(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner, name, event in (
            (comm, "all_gather", "g"),
            (comm, "reduce_scatter", "s"),
            (softmax_gather, "softmax_forward", "a"),
            (softmax_gather, "softmax_backward", "a"),
        ):
            stack.enter_context(mock.patch.object(owner, name, noted(event, getattr(owner, name))))
        o = softmax_attention(*local, cp=CPContext(layout, group))
        events.append("|")
        o.sum().backward()
    return "".join(events)


def test_the_next_gather_is_in_flight_during_attention(ranks):
    assert ranks.run(order_of_events, size=2) == ["ggagagaa|ggasgasgasas"] * 2


def window_bytes(group, length):
    layout = SequenceLayout.contiguous(length, dist.get_world_size(group))
    q, k, v, _ = (layout.shard(x, dist.get_rank(group)).float() for x in make(2, 1, length, 4, 2, 6, 5))
    k.requires_grad_()
    with comm.record() as forward:
        o = softmax_attention(q, k, v, window=9, cp=CPContext(layout, group))
    with comm.record() as backward:
        o.sum().backward()
    return dict(forward.bytes), dict(backward.bytes)


def test_traffic_of_a_window_does_not_grow_with_the_length(ranks):
    short, long = (ranks.run(window_bytes, length, size=3) for length in (30, 600))
    halo = 8 * 2 * (6 + 5) * 4  # tokens, kv heads, D + Dv, bytes
    sends = [({"all_to_all": a}, {"all_to_all": b}) for a, b in ((halo, 0), (halo, halo), (0, halo))]
    assert short == long == sends


def unneeded_gradients(group):
    """Ranks that need fewer gradients, or whose loss ignores the output, run the same collectives."""
    layout = SequenceLayout.zigzag(24, dist.get_world_size(group))
    rank = dist.get_rank(group)
    q, k, v, _ = (layout.shard(x, rank) for x in make(3, 1, 24, 2, 2, 4, 4))
    (q if rank else v).requires_grad_()
    calls = []
    for options in ({}, {"window": 4}):
        o = softmax_attention(q, k, v, cp=CPContext(layout, group), **options)
        with comm.record() as ledger:
            (o * 0.0 if rank else o).sum().backward()
        calls.append(dict(ledger.calls))
    return calls


def test_backward_runs_whatever_a_rank_needs(ranks):
    expected = [{"all_gather": 2, "reduce_scatter": 2}, {"all_to_all": 1}]
    assert ranks.run(unneeded_gradients, size=2) == [expected] * 2


def bfloat16_errors(group):
    """Largest relative error of o, dq, dk, dv against float64, on this rank and for the whole sequence unsharded."""
    rank, layout = dist.get_rank(group), SequenceLayout.zigzag(150, dist.get_world_size(group))
    tensors = [x.bfloat16() for x in make(4, 1, 150, 4, 2, 16, 16)]
    cases = []
    for options in ({}, {"window": 20}):
        exact = [x.double().requires_grad_() for x in tensors[:3]]
        want = reference.softmax_attention(*exact, **options)
        want = (want.detach(), *torch.autograd.grad(want, exact, tensors[3].double()))
        errors = []
        for cp, shard in ((None, lambda x: x), (CPContext(layout, group), lambda x: layout.shard(x, rank))):
            local = [shard(x).detach().requires_grad_() for x in tensors[:3]]
            o = softmax_attention(*local, cp=cp, **options)
            found = (o.detach(), *torch.autograd.grad(o, local, shard(tensors[3])))
            largest = [x.abs().max().item() for x in want]
            shares = [
                relative_error(x, shard(y)) * shard(y).abs().max().item() for x, y in zip(found, want, strict=True)
            ]
            errors.append([share / top for share, top in zip(shares, largest, strict=True)])
        cases.append(errors)
    return cases


def test_sixteen_bit_errors_are_those_of_one_device(ranks):
    for cases in ranks.run(bfloat16_errors, size=4):
        for unsharded, sharded in cases:
            for one, many in zip(unsharded, sharded, strict=True):
                assert many <= 2 * one + 2**-9  # two roundings of merged parts beside the op's own error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exchange": "rings"}, r"exchange must be one of \('all_gather', 'ring', 'ulysses', 'auto'\), got 'rings'"),
        ({"window": 0}, "window must be an int of at least 1 .* got 0"),
        ({"window": 2.0}, "window must be an int .* got 2.0"),
        ({"window": True}, "window must be an int .* got True"),
        ({"window": 3, "causal": False}, "window=3 needs causal=True"),
        ({"scale": 0.0}, "scale must be a finite number above 0 .* got 0.0"),
        ({"q": torch.zeros(1, 6, 8)}, r"q must have shape \[B, T_local, heads, head dim\].*got \(1, 6, 8\)"),
        ({"k": torch.zeros(1, 6, 0, 8)}, r"k must have shape .* without empty heads, got \(1, 6, 0, 8\)"),
        ({"k": torch.zeros(1, 6, 3, 8), "v": torch.zeros(1, 6, 3, 8)}, "must divide .* H = 4, k has Hkv = 3"),
        ({"v": torch.zeros(1, 6, 4, 8)}, "as many heads: k has 2, v has 4"),
        ({"k": torch.zeros(1, 6, 2, 7)}, "k must have q's head dim: q has D = 8, k has 7"),
        ({"v": torch.zeros(1, 5, 2, 8)}, r"v must have q's batch size and tokens, \(1, 6\), got \(1, 5\)"),
        ({"v": torch.zeros(1, 6, 2, 8).double()}, "one floating-point dtype: q has torch.float32, v has torch.float64"),
        ({"k": torch.zeros(1, 6, 2, 8, device="meta")}, "k must be on the device of q, cpu, got meta"),
        ({"cp": CPContext.local(7)}, "q must hold the 7 tokens of cp rank 0"),
        ({"cp": SequenceLayout.contiguous(6, 1)}, "cp must be a CPContext or None, got SequenceLayout. Wrap a layout"),
        ({"cp": 4}, "cp must be a CPContext or None, got int"),
        ({"q": None}, "q must be a tensor of a floating dtype, got NoneType"),
        ({"v": [1.0]}, "v must be a tensor of a floating dtype, got list. Pass float64"),
        ({"k": torch.zeros(1, 6, 2, 8).long()}, "k must be a tensor of a floating dtype, got torch.int64"),
        ({"scale": "x"}, "scale must be a finite number above 0 or None, got 'x'. Leave it None for D"),
        (dict.fromkeys("qkv", torch.zeros(1, 0, 2, 8)), r"q must have no empty dimension, got shape \(1, 0, 2, 8\)"),
    ],
)
def test_faulty_arguments_are_named(change, message):
    arguments = {"q": torch.zeros(1, 6, 4, 8), "k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arguments)


def test_rows_cannot_be_packed_documents():
    x = torch.zeros(2, 6, 2, 8)
    with pytest.raises(ValueError, match=r"q must have B = 1 .* B = 2, 2 documents"):
        softmax_attention(x, x, x, cp=CPContext.local((0, 2, 6)))


@pytest.mark.parametrize("window", [None, 3])
def test_inputs_of_any_strides_give_the_same_result(window):
    make = lambda heads: torch.randn(1, 4, 8, heads, dtype=torch.float64).transpose(1, 3)  # noqa: E731
    q, k = make(6), make(2)  # [1, heads, 8, 4]: the last dim is not dense
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    v = torch.randn(1, 8, 2, 1, dtype=torch.float64).expand(-1, -1, -1, 4)
    results = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = softmax_attention(*leaves, window=window)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for strided, dense in zip(*results, strict=True):
        torch.testing.assert_close(strided, dense)

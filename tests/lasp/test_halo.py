import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp import comm
from lasp.convolution import short_convolution
from lasp.cp_context import CPContext
from lasp.halo import HaloExchange, HaloPlan, HaloReturn, halo_plan
from lasp.kernels import reference
from lasp.layout import SequenceLayout
from tests.harness import assert_close, relative_error
from tests.lasp.layout_cases import PACKED, TOLERANCE, draw_tensors, layouts, random_layouts, tiling


def check_convolution(group, name, layout, batch, width, activation, has_bias, dtype):
    """One case on this rank: output, gradients of its tokens, and the sum of the weights' gradients."""
    rank, channels = dist.get_rank(group), 3
    cp = CPContext(layout, group)
    shapes = (batch, layout.total_tokens, channels), (channels, width), (channels,)
    x, weight, bias, dy = draw_tensors(width, *shapes, shapes[0])
    full = [x.requires_grad_(), weight.requires_grad_(), *([bias.requires_grad_()] if has_bias else [])]
    want = reference.short_convolution(*full, activation=activation, cu_seqlens=layout.cu_seqlens_global)
    want_gradients = torch.autograd.grad(want, full, dy)

    local = [layout.shard(full[0], rank), *full[1:]]
    local = [t.detach().to(dtype).requires_grad_() for t in local]
    cut = layout.cp_size > 1 and not HaloPlan.build(layout, rank, width - 1).silent
    with comm.record() as forward:
        y = short_convolution(*local, activation=activation, cp=cp)
    with comm.record() as backward:
        gradients = torch.autograd.grad(y, local, layout.shard(dy, rank).to(dtype))
    for ledger in (forward, backward):
        assert dict(ledger.calls) == ({"all_to_all": 1} if cut else {}), (name, ledger)
    assert y.dtype == dtype and all(g.dtype == dtype for g in gradients)
    assert_close(f"y, {name}", y, layout.shard(want, rank), TOLERANCE[dtype])
    assert_close(f"dx, {name}", gradients[0], layout.shard(want_gradients[0], rank), TOLERANCE[dtype])
    for share, expected in zip(gradients[1:], want_gradients[1:], strict=True):
        total = share.double()
        dist.all_reduce(total, group=group)
        assert_close(f"a weight's gradient, {name}", total, expected, TOLERANCE[dtype])


def all_convolutions(group, dtype):
    for name, layout in layouts(dist.get_world_size(group)).items():
        for width, activation, has_bias in ((1, None, True), (2, "silu", False), (4, "silu", True), (13, None, False)):
            batch = 2 if layout.num_documents == 1 else 1
            case = f"{name}, W={width}"
            check_convolution(group, case, layout, batch, width, activation, has_bias, dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_convolution_equals_one_device(ranks, size):
    ranks.run(all_convolutions, torch.float64, size=size)
    ranks.run(all_convolutions, torch.float32, size=size)


def convolution_on(group, layout, width):
    check_convolution(group, repr(layout), layout, 1, width, "silu", True, torch.float64)


@settings(max_examples=12, deadline=None)
@given(layout=random_layouts(), width=st.integers(1, 20))
def test_convolution_on_random_layouts(ranks, layout, width):
    ranks.run(convolution_on, layout, width, size=layout.cp_size)


@settings(max_examples=150, deadline=None)
@given(layout=random_layouts(), width=st.integers(0, 25))
def test_plans_of_all_ranks_fit_together(layout, width):
    plans = [HaloPlan.build(layout, rank, width) for rank in range(layout.cp_size)]
    tokens = [layout.shard(torch.arange(layout.total_tokens), rank, 0).tolist() for rank in range(layout.cp_size)]
    for receiver, plan in enumerate(plans):
        halo = [tokens[owner][a + i] for owner, a, n in plan.pieces for i in range(n)]
        for segment, length in zip(layout.segments(receiver), plan.lengths, strict=True):
            start = layout.cu_seqlens_global[segment.document]
            begin = max(start, segment.start_global - width)
            expected = list(range(begin, segment.start_global))
            assert halo[:length] == expected
            halo = halo[length:]
        assert not halo
        for sender, theirs in enumerate(plans):
            assert theirs.sends[receiver] == tuple((a, n) for owner, a, n in plan.pieces if owner == sender)
            assert theirs.send_counts[receiver] == plan.receive_counts[sender]
    assert all(plan.silent == (not any(sum(p.send_counts) for p in plans)) for plan in plans)


def exchange_is_the_adjoint_of_return(group):
    """<fetch(x), y> = <x, return(y)> over all ranks, and neither moves more than the layout asks for."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    layout = tiling(PACKED, size, 11, 5)
    cp = CPContext(layout, group)
    for width in (1, 6, 30):
        plan = halo_plan(cp, width)
        assert halo_plan(cp, width) is plan
        xs = [layout.shard(x, rank) for x in draw_tensors(width, (1, 41, 2, 3), (1, 41, 2, 4))]
        with comm.record() as ledger:
            halo = HaloExchange(xs, plan, group).wait()
            y = torch.randn_like(halo)
            back = [torch.zeros_like(x) for x in xs]
            HaloReturn(y, plan, group).add_to(back)
        products = torch.stack([(halo * y).sum(), sum((x * g).sum() for x, g in zip(xs, back, strict=True))])
        dist.all_reduce(products, group=group)
        assert_close("inner product", products[0], products[1], 1e-12, terms=1.0)
        moved = sum(plan.send_counts) + sum(plan.receive_counts)
        assert ledger.calls["all_to_all"] == 2 and ledger.bytes["all_to_all"] == moved * 2 * 7 * 8


def test_exchange_is_the_adjoint_of_return(ranks):
    ranks.run(exchange_is_the_adjoint_of_return, size=3)


def probe_causality(group):
    """NaN in one token: no earlier output and no other document changes; the W tokens from it on do."""
    rank, layout = dist.get_rank(group), SequenceLayout.zigzag(PACKED, dist.get_world_size(group))
    cp = CPContext(layout, group)
    x, weight = draw_tensors(0, (1, 41, 2), (2, 4))
    for t in (4, 5, 17, 27):
        poisoned = x.clone()
        poisoned[:, t] = float("nan")
        y = short_convolution(layout.shard(poisoned, rank), weight, activation="silu", cp=cp)
        stop = next(b for b in layout.cu_seqlens_global if b > t)
        token = torch.arange(41)
        reached = layout.shard((token >= t) & (token < min(t + 4, stop)), rank, 0)
        assert torch.equal(y[0, :, 0].isnan(), reached), t


def test_causality_probe(ranks):
    ranks.run(probe_causality, size=3)


def bytes_of(group, length):
    layout = SequenceLayout.contiguous(length, dist.get_world_size(group))
    x = torch.randn(1, layout.num_tokens(dist.get_rank(group)), 5, requires_grad=True)
    with comm.record() as ledger:
        short_convolution(x, torch.randn(5, 4), cp=CPContext(layout, group)).sum().backward()
    return dict(ledger.bytes)


def test_traffic_does_not_grow_with_the_length(ranks):
    short, long = (ranks.run(bytes_of, length, size=3) for length in (30, 3000))
    row = 5 * 4
    assert short == long == [{"all_to_all": 3 * row}, {"all_to_all": 6 * row}, {"all_to_all": 3 * row}]


def constant_inputs(group):
    """A rank whose x needs no gradient, or whose loss ignores the output, takes part in the backward all the same."""
    layout = SequenceLayout.contiguous(12, dist.get_world_size(group))
    rank = dist.get_rank(group)
    x = torch.randn(1, 6, 2, requires_grad=rank == 0)
    weight = torch.randn(2, 3, requires_grad=True)
    y = short_convolution(x, weight, cp=CPContext(layout, group))
    with comm.record() as ledger:
        (y * 0.0 if rank == 1 else y).sum().backward()
    return dict(ledger.calls)


def test_backward_runs_whatever_a_rank_needs(ranks):
    assert ranks.run(constant_inputs, size=2) == [{"all_to_all": 1}] * 2


def test_sixteen_bit_inputs_are_as_good_as_their_dtype():
    x, weight, bias = (t.bfloat16() for t in draw_tensors(3, (2, 50, 6), (6, 4), (6,)))
    right = reference.short_convolution(x.double(), weight.double(), bias.double(), "silu")
    y = short_convolution(x, weight, bias, "silu")
    assert y.dtype == torch.bfloat16
    assert relative_error(y, right) <= 1.01 * relative_error(right.bfloat16(), right)  # one rounding, at the end
    mixed = short_convolution(x, weight.float().requires_grad_(), bias, "silu")
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, y)


def test_gradients_agree_with_finite_differences():
    x, weight, bias = (t.requires_grad_() for t in draw_tensors(4, (1, 7, 2), (2, 3), (2,)))
    cp = CPContext.local(SequenceLayout((0, 3, 7), [((4, 7), (0, 4))]))
    assert torch.autograd.gradcheck(lambda *a: short_convolution(*a, activation="silu", cp=cp), (x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation must be one of \(None, 'silu'\), got 'relu'"),
        ({"x": torch.zeros(6, 4)}, r"x must have shape \[B, T_local, D\], got \(6, 4\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must have shape \[D, W\] with D = 4 .* got \(5, 3\)"),
        ({"weight": torch.zeros(4, 1, 3)}, r"weight must have shape .* got \(4, 1, 3\)\. A Conv1d weight"),
        ({"weight": torch.zeros(4, 0)}, r"weight must have shape .* W >= 1 taps, got \(4, 0\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[D\] with D = 4 .* got \(3,\)"),
        ({"x": torch.zeros(1, 6, 4, dtype=torch.int64)}, "x must be a tensor of a floating dtype, got torch.int64"),
        ({"x": None}, "x must be a tensor of a floating dtype, got NoneType"),
        ({"weight": [1]}, "weight must be a tensor of a floating dtype, got list. Pass float64"),
        ({"bias": 1.0}, "bias must be a tensor of a floating dtype, got float"),
        ({"x": torch.zeros(1, 0, 4)}, r"x must have no empty dimension, got shape \(1, 0, 4\)"),
        ({"cp": SequenceLayout.contiguous(6, 1)}, "cp must be a CPContext or None, got SequenceLayout. Wrap a layout"),
        ({"weight": torch.zeros(4, 3, device="meta")}, "weight must be on the device of x, cpu, got meta"),
        ({"cp": CPContext.local(7)}, "x must hold the 7 tokens of cp rank 0"),
        ({"x": torch.zeros(2, 6, 4), "cp": CPContext.local((0, 2, 6))}, "x must have B = 1 .* B = 2, 2 documents"),
    ],
)
def test_faulty_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(1, 6, 4), "weight": torch.zeros(4, 3)} | change
    with pytest.raises(ValueError, match=message):
        short_convolution(**arguments)

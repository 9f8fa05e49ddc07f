"""All exchanges of softmax layers: the numbers of one device on every rank, and the messages that are promised."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from lasp import CPContext, SequenceLayout, comm, softmax_attention
from lasp.cost.fabric import Fabric, Link
from lasp.kernels import reference
from lasp.softmax import ring as softmax_ring
from lasp.softmax.choice import softmax_choice
from lasp.softmax.table import check_heads
from tests.harness import assert_close, relative_error
from tests.lasp.layout_cases import layouts, random_layouts
from tests.lasp.models import make_model
from tests.lasp.softmax_cases import make

EXCHANGES = ("all_gather", "ring", "ulysses")
OPTIONS = ({}, {"causal": False, "scale": 0.3}, {"window": 6})
HEADS = ((12, 12), (12, 1), (12, 2), (12, 4))  # kv heads cut, sent to all ranks, to some, or refused by ulysses
DIMS = ((4, 4), (5, 3))
NAMES = ("o", "dq", "dk", "dv")


def serves(exchange, heads, size, options):
    if exchange == "ring":
        return "window" not in options
    return exchange != "ulysses" or all(heads[0] % size == 0 and (n % size == 0 or size % n == 0) for n in heads[1:])


def values(inputs, do, attention):
    """Output and gradients of ``attention`` on fresh leaves, and what it sent in the forward and in the backward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with comm.record() as forward:
        o = attention(*leaves)
    with comm.record() as backward:
        gradients = torch.autograd.grad(o, leaves, do)
    return [o.detach(), *gradients], [(dict(x.calls), dict(x.bytes)) for x in (forward, backward)]


def read_by_others(layout, causal):
    """Per rank, how many of its tokens others read, and the hops to the last one that reads any: token by token."""
    owner = torch.empty(layout.total_tokens, dtype=torch.long)
    for rank, fragments in enumerate(layout.fragments):
        for start, stop in fragments:
            owner[start:stop] = rank
    counts, hops = [0] * layout.cp_size, [0] * layout.cp_size
    for a, b in pairwise(layout.cu_seqlens_global):
        for j in range(a, b):
            home = int(owner[j])
            readers = set(owner[j if causal else a : b].tolist()) - {home}
            counts[home] += bool(readers)
            hops[home] = max([hops[home], *((rank - home) % layout.cp_size for rank in readers)])
    return counts, hops


def messages(exchange, layout, rank, batch, heads, dims, causal, itemsize):
    """The ledgers of forward and backward that the docstrings of ring and ulysses promise."""
    size, (h, kv), (d, dv) = layout.cp_size, heads, dims
    wide = max(itemsize, 4)
    if exchange == "ring":
        counts, hops = read_by_others(layout, causal)
        token = batch * kv * (d + dv)
        keys = [counts[(rank - s) % size] for s in range(size) if hops[(rank - s) % size] > s]
        gradients = [counts[(rank - s) % size] for s in range(1, size) if hops[(rank - s) % size] >= s]
        forward = sum(keys) * token * itemsize
        stages = [(len(keys), forward), (len(keys) + len(gradients), forward + sum(gradients) * token * wide)]
        return [({"send": n}, {"send": total}) if n else ({}, {}) for n, total in stages]
    if size == 1:
        return [({}, {})] * 2
    local, total, shared = layout.num_tokens(rank), layout.total_tokens, max(kv, size)
    forward = local * (h * d + shared * (d + dv)) + total * h // size * dv
    keys = total * shared // size * (d + dv) * (itemsize if kv >= size else wide)
    backward = batch * ((local * h * dv + total * h // size * d) * itemsize + keys)
    return [({"all_to_all": 2}, {"all_to_all": n}) for n in (batch * forward * itemsize, backward)]


def check_exchanges(group, name, layout, batch, heads, dims, options):
    """One case on this rank: exact in float64, and in float32 as exact as one device."""
    rank, cp, whole = dist.get_rank(group), CPContext(layout, group), CPContext.local(layout.cu_seqlens_global)
    *full, do = make(heads[1], batch, layout.total_tokens, *heads, *dims)
    borders = layout.cu_seqlens_global
    want, _ = values(full, do, lambda *x: reference.softmax_attention(*x, cu_seqlens=borders, **options))
    single = [x.float() for x in full]
    one, _ = values(single, do.float(), lambda *x: softmax_attention(*x, cp=whole, **options))
    # with one key per token dq and dk are zero, reached by cancelling terms of size ~1
    largest = [max(x.abs().max().item(), float(n in ("dq", "dk"))) for n, x in zip(NAMES, want, strict=True)]
    budget = [(x - y).abs().max().item() / top for x, y, top in zip(one, want, largest, strict=True)]
    for exchange in EXCHANGES:
        if not serves(exchange, heads, layout.cp_size, options):
            with pytest.raises(ValueError, match=exchange):
                softmax_attention(*(layout.shard(x, rank) for x in full), cp=cp, exchange=exchange, **options)
            continue
        for dtype in (torch.float64, torch.float32):
            local = [layout.shard(x, rank).to(dtype) for x in (*full, do)]
            attention = lambda *x: softmax_attention(*x, cp=cp, exchange=exchange, **options)  # noqa: E731, B023
            found, ledgers = values(local[:3], local[3], attention)
            for n, x, y, top, error in zip(NAMES, found, want, largest, budget, strict=True):
                tolerance = 1e-12 if dtype == torch.float64 else 2 * error + 1e-6
                assert x.dtype == dtype
                assert_close(f"{n}, {exchange}, {dtype}, {name}", x, layout.shard(y, rank), tolerance, top)
            if exchange != "all_gather":  # whose ledger tests/lasp/test_softmax.py counts
                causal, itemsize = options.get("causal", True), local[0].element_size()
                promised = messages(exchange, layout, rank, batch, heads, dims, causal, itemsize)
                assert ledgers == promised, f"{exchange}, {name}"


def all_cases(group):
    for i, (layout_name, layout) in enumerate(layouts(dist.get_world_size(group)).items()):
        for j, options in enumerate(OPTIONS):
            heads, dims = HEADS[(i + j) % 4], DIMS[i % 2]
            batch = 2 if layout.num_documents == 1 else 1
            name = f"{layout_name}, H={heads}, D={dims}, {options}"
            check_exchanges(group, name, layout, batch, heads, dims, options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_exchange_equals_one_device(ranks, size):
    ranks.run(all_cases, size=size)


@settings(max_examples=10, deadline=None)
@given(layout=random_layouts(), causal=st.booleans())
def test_on_random_layouts(ranks, layout, causal):
    args = f"{layout}, {causal}", layout, 1, (12, 1), (4, 4), {"causal": causal}
    ranks.run(check_exchanges, *args, size=layout.cp_size)


def sixteen_bit_errors(group):
    """Largest relative error of o, dq, dk, dv against float64, per exchange, and for the whole sequence unsharded."""
    rank, layout = dist.get_rank(group), SequenceLayout.zigzag(150, dist.get_world_size(group))
    tensors = [x.bfloat16() for x in make(4, 1, 150, 4, 2, 16, 16)]
    want, _ = values([x.double() for x in tensors[:3]], tensors[3].double(), reference.softmax_attention)
    one, _ = values(tensors[:3], tensors[3], softmax_attention)
    errors = [[relative_error(x, y) for x, y in zip(one, want, strict=True)]]
    for exchange in EXCHANGES[1:]:
        options = {"cp": CPContext(layout, group), "exchange": exchange}
        local = [layout.shard(x, rank) for x in tensors]
        found, ledgers = values(local[:3], local[3], lambda *x: softmax_attention(*x, **options))  # noqa: B023
        assert ledgers == messages(exchange, layout, rank, 1, (4, 2), (16, 16), True, 2)
        off = [(x.double() - layout.shard(y, rank)).abs().max() for x, y in zip(found, want, strict=True)]
        errors.append([(x / y.abs().max()).item() for x, y in zip(off, want, strict=True)])
    return errors


def test_sixteen_bit_errors_are_those_of_one_device(ranks):
    for one, *exchanges in ranks.run(sixteen_bit_errors, size=4):
        for many in exchanges:  # kv heads are shared by two ranks under ulysses, whose sums are fp32 on the wire
            assert all(x <= 1.5 * y + 2**-9 for x, y in zip(many, one, strict=True)), (one, many)


def order_of_events(group):
    """What this rank begins, in order: a round of messages that are not empty (m), an attention (a)."""
    layout = SequenceLayout.zigzag(24, dist.get_world_size(group))
    local = [layout.shard(x, dist.get_rank(group)) for x in make(5, 1, 24, 2, 2, 4, 4)[:3]]
    local[0].requires_grad_()
    events = []

    def noted(event, function):
        return lambda *args, **kwargs: events.append(event) or function(*args, **kwargs)

    with (
        mock.patch.object(comm.Messages, "post", noted("m", comm.Messages.post)),
        mock.patch.object(softmax_ring, "add_keys", noted("a", softmax_ring.add_keys)),
        mock.patch.object(softmax_ring, "add_gradients", noted("a", softmax_ring.add_gradients)),
    ):
        o = softmax_attention(*local, cp=CPContext(layout, group), exchange="ring")
        events.append("|")
        o.sum().backward()
    return "".join(events)


def test_the_next_shard_is_in_flight_while_one_is_computed(ranks):
    assert ranks.run(order_of_events, size=4) == ["mamamaa|ma" + "mam" * 2 + "am"] * 4


def most_shards(group):
    """The most key shards that are alive when a round begins, and the most gradients of shards."""
    size = dist.get_world_size(group)
    layout = SequenceLayout.zigzag(16 * size, size)
    local = [layout.shard(x, dist.get_rank(group)).float().requires_grad_() for x in make(6, 1, 16 * size, 2, 1, 4, 4)]
    seen, most, post = {}, {torch.bfloat16: 0, torch.float32: 0}, comm.Messages.post

    def counted(self, sends, receives):
        for _, x in (*sends, *receives):
            seen[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage()), x.dtype
        for dtype in most:
            most[dtype] = max(most[dtype], sum(d == dtype and not ref.expired() for ref, d in seen.values()))
        return post(self, sends, receives)

    with mock.patch.object(comm.Messages, "post", counted):
        o = softmax_attention(*(x.bfloat16() for x in local[:3]), cp=CPContext(layout, group), exchange="ring")
        forward = dict(most)
        o.backward(local[3].bfloat16())
    return forward[torch.bfloat16], most[torch.bfloat16], most[torch.float32]


def test_two_shards_of_keys_are_in_memory_at_a_time(ranks):
    assert all(found == (2, 2, 3) for found in ranks.run(most_shards, size=4))  # gradients: summed, sent, arriving


def unneeded_gradients(group):
    """Ranks that need fewer gradients, or whose loss ignores the output, take part in the same messages."""
    layout = SequenceLayout.zigzag(24, dist.get_world_size(group))
    rank, calls = dist.get_rank(group), []
    q, k, v, _ = (layout.shard(x, rank) for x in make(3, 1, 24, 2, 2, 4, 4))
    (q if rank else v).requires_grad_()
    for exchange in EXCHANGES[1:]:
        o = softmax_attention(q, k, v, cp=CPContext(layout, group), exchange=exchange)
        with comm.record() as ledger:
            (o * 0.0 if rank else o).sum().backward()
        calls.append(dict(ledger.calls))
    return calls


def test_backward_runs_whatever_a_rank_needs(ranks):
    assert ranks.run(unneeded_gradients, size=2) == [[{"send": 2}, {"all_to_all": 2}]] * 2


def of_a_model(group, exchange):
    """Gradient of a model with two softmax layers, and the places and names of what it sent."""
    layout, places = SequenceLayout.zigzag(16, dist.get_world_size(group)), []
    cp = CPContext(layout, group, softmax_exchange=exchange)
    model = make_model(pattern="S", num_layers=2, kv_heads=1)
    tokens = layout.shard(torch.arange(16)[None] % 7, cp.cp_rank)
    observer = comm.Observer()
    observer.entered = lambda call: places.append((call.number, call.name, call.place))
    observer.attach()
    try:
        model(tokens, cp).square().sum().backward()
    finally:
        observer.detach()
    gradient = torch.cat([x.grad.flatten() for x in model.parameters()])
    dist.all_reduce(gradient, group=group)
    return gradient, [(number - places[0][0], *names) for number, *names in places]


def test_a_models_softmax_layers_take_the_exchange_of_the_context(ranks):
    want, _ = ranks.run(of_a_model, "all_gather", size=2)[0]
    for exchange, name, steps in (("ring", "messages", (1, 2)), ("ulysses", "all_to_all", (2, 2))):
        (gradient, first), (_, second) = ranks.run(of_a_model, exchange, size=2)
        assert_close(exchange, gradient, want, 1e-5)
        forward = [f"layer {layer}, softmax, forward" for layer in (0, 1) for _ in range(steps[0])]
        backward = [f"layer {layer}, softmax, backward" for layer in (1, 0) for _ in range(steps[1])]
        assert first == second == [(i, name, place) for i, place in enumerate(forward + backward)]


def chosen(group, link, kv_heads, window):
    """What auto takes, the messages of a forward under it, and how far its output is from the gather's."""
    layout = SequenceLayout.zigzag(48, dist.get_world_size(group))
    fabric = Fabric("test", link, link, 1, 1e-6, "made up")
    cp = CPContext(layout, group, softmax_exchange="auto", fabric=fabric, nodes=(0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 48, heads, 4, generator=generator) for heads in (6, kv_heads, kv_heads))
    q, k, v = (layout.shard(x, cp.cp_rank) for x in (q, k, v))
    with comm.record() as ledger:
        o = softmax_attention(q, k, v, cp=cp, window=window, exchange=cp.softmax_exchange)
    choice = softmax_choice(cp, 1, (6, kv_heads), (4, 4), 4, window)
    error = relative_error(o, softmax_attention(q, k, v, cp=cp, window=window))
    return choice.exchange, choice.reason, set(ledger.calls), error


def test_auto_takes_what_the_fabric_serves_and_the_heads_allow(ranks):
    thin, slow = Link(1e-9, 1e3), Link(1.0, 1e12)
    for link, kv_heads, window, expected, calls in (
        (thin, 6, None, "ulysses", {"all_to_all"}),
        (thin, 2, None, "all_gather", {"all_gather"}),  # 3 ranks do not divide 2 heads
        (slow, 2, 5, "all_gather", {"all_to_all"}),  # the halo
    ):
        results = ranks.run(chosen, link, kv_heads, window, size=3)
        assert len({(name, reason) for name, reason, _, _ in results}) == 1
        for name, reason, seen, error in results:
            assert (name, seen) == (expected, calls) and reason.startswith(expected) and error < 1e-6


def refusals(group):
    """Messages of what all ranks refuse, and whether anything was sent."""
    cp = CPContext(SequenceLayout.zigzag(24, 4), group)
    x, found = torch.zeros(1, 6, 6, 4), []
    with comm.record() as ledger:
        for heads, options in (
            (6, {"exchange": "ulysses"}),
            (3, {"exchange": "ring", "window": 5}),
        ):
            with pytest.raises(ValueError, match="exchange=") as refused:
                softmax_attention(x[:, :, :heads], x[:, :, :3], x[:, :, :3], cp=cp, **options)
            found.append(str(refused.value))
        with pytest.raises(ValueError, match="softmax_exchange") as refused:
            CPContext(cp.layout, group, softmax_exchange="rings")
    return [*found, str(refused.value)], dict(ledger.calls)


def test_what_cannot_serve_is_refused_on_every_rank_with_the_alternatives(ranks):
    for (heads, window, name), calls in ranks.run(refusals, size=4):
        assert heads == (
            "exchange='ulysses' deals whole heads to ranks: cp_size = 4 must divide the H = 6 query heads, and divide "
            "or be a multiple of the Hkv = 3 kv heads. Use exchange='all_gather' or 'ring', which cut no heads, or a "
            "cp_size of 1, 3, 6."
        )
        assert window == (
            "window=5 has no use for exchange='ring': whole shards would travel for a few tokens. Use "
            "exchange='all_gather' or 'ulysses'."
        )
        assert name == (
            "softmax_exchange must be one of ('all_gather', 'ring', 'ulysses', 'auto'), got 'rings'. Did you mean "
            "'ring'?"
        )
        assert calls == {}


def test_which_heads_ulysses_deals():
    for heads, kv_heads, size in ((8, 8, 4), (8, 2, 4), (8, 1, 8), (6, 3, 1), (12, 4, 2)):
        check_heads("ulysses", heads, kv_heads, size)
    for heads, kv_heads, size in ((6, 6, 4), (12, 3, 4), (12, 4, 6), (4, 4, 8)):
        with pytest.raises(ValueError, match=f"cp_size = {size} must divide the H = {heads} .* Hkv = {kv_heads} kv"):
            check_heads("ulysses", heads, kv_heads, size)


def one_rank_missing(group, exchange, limit_s):
    """Rank 1 refuses its own bad tensor; the others end by timeout and say who is missing."""
    cp = CPContext(SequenceLayout.zigzag(48, 4), group)
    q = torch.zeros(1, 12 if cp.cp_rank != 1 else 11, 4, 4)
    try:
        softmax_attention(q, q, q, cp=cp, exchange=exchange)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("exchange", EXCHANGES[1:])
def test_a_rank_that_never_arrives_is_named_by_those_that_wait(ranks, exchange):
    results = ranks.run_to_break(one_rank_missing, exchange, size=4)
    kind, message = results[1]
    assert kind == "ValueError" and "must hold the 12 tokens of cp rank 1" in message
    for rank in (0, 2, 3):
        kind, message = results[rank]
        named = "rank 1 never reached collective" in message and "(softmax, forward)" in message
        assert kind == "CommError" and named, message

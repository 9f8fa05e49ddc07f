"""All exchanges of softmax layers: the numbers of one device on every rank, and the messages that their files promise."""

import time
from datetime import timedelta
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch.multiprocessing.reductions import StorageWeakRef

from lasp import CPContext, SequenceLayout, comm, softmax_attention, softmax_ring
from lasp.kernels import reference
from lasp.softmax_ulysses import check_heads
from tests.harness import assert_close, relative_error
from tests.lasp.test_halo import layouts, random_layouts
from tests.lasp.test_model import make_model
from tests.lasp.test_softmax import make

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
    """Per rank, how many of its tokens other ranks read, and the hops to the last rank that reads any: token by token."""
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


@settings(max_examples=15, deadline=None)
@given(layout=random_layouts())
def test_on_random_layouts(ranks, layout):
    for options in OPTIONS[:2]:
        args = f"{layout}, {options}", layout, 1, (12, 1), (4, 4), options
        ranks.run(check_exchanges, *args, size=layout.cp_size)

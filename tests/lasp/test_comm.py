"""A collective has a number and a place, the same on every rank; when it fails, the error says who is missing."""

import re
from unittest import mock

import torch
import torch.distributed as dist

from lasp import CPContext, SequenceLayout, comm
from lasp.comm import calls
from tests.lasp.models import CONV, make_model
from tests.lasp.places import Places


def _numbers(group):
    x, places = torch.ones(dist.get_world_size(group), 3), Places()
    places.attach()
    try:
        with comm.scope("a layer"):
            pending = [comm.all_gather(x, group), comm.reduce_scatter(x, group, "its own name")]
        pending.append(comm.all_to_all(x, [1] * len(x), [1] * len(x), group))
        assert len(places.open) == 3
        for one in pending:
            one.wait()
        with comm.explained("barrier", group):
            dist.barrier(group)
    finally:
        places.detach()
    assert not places.open
    return places.seen


def test_collectives_of_a_group_are_numbered_alike_on_every_rank(ranks):
    first, *others = ranks.run(_numbers, size=3)
    numbers, names = zip(*first, strict=True)
    assert names == ("a layer, all_gather", "its own name", "all_to_all", "barrier")
    assert [n - numbers[0] for n in numbers] == [0, 1, 2, 3] and all(other == first for other in others)


def _places_of_a_model(group, fields):
    layout, places = SequenceLayout.contiguous(16, dist.get_world_size(group)), Places()
    cp, model = CPContext(layout, group), make_model(**fields)
    tokens = layout.shard(torch.arange(16)[None] % 7, cp.cp_rank)
    places.attach()
    try:
        model(tokens, cp).sum().backward()
    finally:
        places.detach()
    return [place for _, place in places.seen]


def test_a_place_is_layer_operator_and_direction(ranks):
    conv, linear, softmax = "layer 1, convolution", "layer 1, linear", "layer 0, softmax"
    fields = {"mixer": CONV, "pattern": "SL", "num_layers": 2, "kv_heads": 1}
    first, second = ranks.run(_places_of_a_model, fields, size=2)
    assert (
        first
        == second
        == [
            *(f"{place}, forward" for place in (softmax, conv, linear)),
            *(f"{place}, backward" for place in (linear, conv, softmax, softmax)),  # keys again, then their gradients
        ]
    )
    halos, _ = ranks.run(_places_of_a_model, fields | {"window": 3}, size=2)
    assert halos == [*first[:-1]]
    again, _ = ranks.run(_places_of_a_model, fields | {"recompute": True}, size=2)
    assert again == [*first[:3], f"{conv}, forward", *first[3:5], f"{softmax}, forward", *first[5:]]


def _out_of_step(group, limit_s):
    """Rank 0 leaves out a collective, so its second one meets the others' third."""
    x = torch.ones(dist.get_world_size(group), 3)
    with mock.patch.object(calls, "_SILENCE_S", limit_s):
        try:
            comm.all_gather(x, group).wait()
            if dist.get_rank() != 0:
                comm.all_gather(x, group).wait()
            comm.reduce_scatter(x, group).wait()
        except comm.CommError as error:
            return str(error)


def _late(group, limit_s):
    """Rank 1 does not come to the second one."""
    comm.all_gather(torch.ones(3), group).wait()
    if dist.get_rank() == 1:
        return None
    try:
        with comm.scope("a layer"):
            comm.all_gather(torch.ones(3), group).wait()
    except comm.CommError as error:
        return str(error)


def test_without_a_watchdog_ranks_that_fail_tell_each_other_where(ranks):
    for message in ranks.run_to_break(_out_of_step, size=2):
        assert re.fullmatch(
            r"the ranks part at collective \d+: rank 0 as \(reduce_scatter\), rank 1 as \(all_gather\)", message
        ), message
    waiting, _ = ranks.run_to_break(_late, size=2)
    assert re.match(
        r"rank 1 never reached collective \d+ \(a layer, all_gather\), or died; rank 0 waits there since [\d.]+ s",
        waiting,
    ), waiting

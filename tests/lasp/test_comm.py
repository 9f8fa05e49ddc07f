"""A collective that fails says which one it was, who is missing, and who waits in another one."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lasp import comm


def _numbers(group):
    x = torch.ones(dist.get_world_size(group), 3)
    places = []
    for issue in (lambda: comm.all_gather(x, group), lambda: comm.reduce_scatter(x, group)) * 2:
        pending = issue()
        pending.wait()
        places.append(pending._place)
    pending = comm.all_to_all(x, [1] * len(x), [1] * len(x), group)
    pending.wait()
    return [*places, pending._place]


def test_collectives_of_a_group_are_numbered_alike_on_every_rank(ranks):
    first, *others = ranks.run(_numbers, size=3)
    names, numbers = zip(*(place.split() for place in first), strict=True)
    assert names == ("all_gather", "reduce_scatter", "all_gather", "reduce_scatter", "all_to_all")
    assert [int(n) - int(numbers[0]) for n in numbers] == [0, 1, 2, 3, 4] and all(other == first for other in others)


def _out_of_step(group):
    """Rank 0 leaves out a collective, so its second one meets the others' third."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    x = torch.ones(dist.get_world_size(group), 3)
    try:
        comm.all_gather(x, group).wait()
        if dist.get_rank() != 0:
            comm.all_gather(x, group).wait()
        comm.reduce_scatter(x, group).wait()
    except comm.CommError as error:
        return str(error)


def _late(group):
    """Rank 1 has failed in the first collective, the other one waits in the second."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    comm.all_gather(torch.ones(3), group).wait()
    if dist.get_rank() == 1:
        number = group._get_sequence_number_for_group()
        dist.distributed_c10d._get_default_store().set(f"lasp/waiting/{group.group_name}/1", f"all_gather {number}")
        time.sleep(5)
        return
    try:
        comm.all_gather(torch.ones(3), group).wait()
    except comm.CommError as error:
        return str(error)


def test_ranks_that_wait_in_different_collectives_say_so(ranks):
    early, late = ranks.run(_out_of_step, size=2)
    ranks.restart()
    waiting, _ = ranks.run(_late, size=2)
    ranks.restart()
    assert early.startswith("reduce_scatter 2 failed on rank 0") and "rank 1 in all_gather 2;" in early
    assert late.startswith("all_gather 2 failed on rank 1") and "rank 0 in reduce_scatter 2;" in late
    number = int(waiting.split()[1])
    assert f"rank 1 in all_gather {number - 1}; those with the lower number are behind" in waiting
    assert "entered it" not in waiting

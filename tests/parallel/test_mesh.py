import dataclasses

import pytest
import torch
import torch.distributed as dist

from lasp import comm
from lasp.comm import calls
from lasp.parallel.mesh import Mesh
from lasp.parallel.user_errors import USER_ERRORS, sentence


def _places(group, cp_size, dp_size):
    mesh = Mesh.build(cp_size, dp_size, group)
    return (
        mesh.dp_rank,
        mesh.cp_rank,
        dist.get_process_group_ranks(mesh.cp_group),
        dist.get_process_group_ranks(mesh.dp_group),
        mesh.sum(torch.tensor([mesh.rank])).item(),
        mesh.gather(mesh.rank),
    )


def test_context_parallel_neighbours_are_neighbouring_ranks(ranks):
    places = ranks.run(_places, 2, None, size=4)
    assert [p[:2] for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [p[2] for p in places] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [p[3] for p in places] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(p[4:] == (6, [0, 1, 2, 3]) for p in places)


def test_sizes_that_do_not_fill_the_ranks_are_refused(ranks):
    for cp_size, dp_size, message in ((3, None, "must divide"), (2, 3, "2 \\* 2|one place per rank")):
        outcomes = ranks.outcomes(_places, cp_size, dp_size, size=4)
        assert not any(ok for ok, _ in outcomes)
        with pytest.raises(ValueError, match=message):
            raise ValueError(outcomes[0][1])
    assert ranks.run(_places_of_groups, 2, 1, size=2) == [([0, 1], None)] * 2
    with pytest.raises(ValueError, match="dp_size \\* cp_size = 1 \\* 2"):
        Mesh.build(2, 1)


def _places_of_groups(group, cp_size, dp_size):
    mesh = Mesh.build(cp_size, dp_size, group)
    return dist.get_process_group_ranks(mesh.cp_group), mesh.dp_group


def _first_rank_work(group, kind):
    mesh = Mesh.build(1, None, group)

    def work():
        if kind == "rejected":
            raise ValueError("no such file")
        return 1 / 0 if kind == "failed" else mesh.rank + 40

    try:
        return mesh.on_first(work)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)


def test_the_first_ranks_result_or_failure_is_everybodys(ranks):
    assert ranks.run(_first_rank_work, "fine", size=3) == [40, 40, 40]
    assert ranks.run(_first_rank_work, "rejected", size=2) == [("ValueError", "no such file")] * 2
    first, second = ranks.run(_first_rank_work, "failed", size=2)
    assert first[0] == "ZeroDivisionError" and second == ("RuntimeError", f"rank 0 failed: {first[0]}: {first[1]}")


def _flags(group):
    mesh = Mesh.build(1, None, group)
    return mesh.any(mesh.rank == 2), mesh.any(False), mesh.broadcast(torch.tensor([mesh.rank + 7])).item()


def test_any_rank_can_stop_all(ranks):
    assert ranks.run(_flags, size=3) == [(True, False, 7)] * 3


def _full_disk(group):
    def work():
        raise PermissionError(13, "Permission denied", "x")

    try:
        Mesh.build(2, 1, group).on_first(work)
    except OSError as error:
        return sentence(error)


def test_a_refused_write_of_the_first_rank_is_everybodys(ranks):
    message = "cannot use x: Permission denied. Name a path that exists and can be used."
    assert ranks.run(_full_disk, size=2) == [message] * 2


def _every_kind(group):
    mesh, found = Mesh.build(1, 2, group), []
    for kind in USER_ERRORS:

        def work(kind=kind):
            raise kind(f"{kind.__name__} says what to do.")

        try:
            mesh.on_first(work)
        except Exception as error:
            found.append((type(error), str(error)))
    return found


def test_what_a_user_can_mend_is_the_same_error_on_every_rank(ranks):
    for found in ranks.run(_every_kind, size=2):
        assert found == [(kind, f"{kind.__name__} says what to do.") for kind in USER_ERRORS]


METHODS = {
    "all_reduce": lambda mesh: mesh.sum(torch.ones(2)),
    "all_gather_object": lambda mesh: mesh.gather(1),
    "broadcast": lambda mesh: mesh.broadcast(torch.ones(2)),
    "broadcast_object_list": lambda mesh: mesh.on_first(int),
}


@pytest.mark.parametrize("collective", METHODS)
def test_a_collective_that_fails_says_who_is_missing(monkeypatch, collective):
    mesh = dataclasses.replace(Mesh.build(), cp_size=2, ranks=(0, 1))
    monkeypatch.setattr(calls, "last_number", lambda group: 6)
    monkeypatch.setattr(calls, "_ask_the_failed", lambda call, _: f"{call.number} {call.place}: rank 1 is missing")
    for fault, kind, message in (
        ("[gloo/pair.cc:544] Connection closed by peer", comm.CommError, "^7 (all_|broad)[a-z]+: rank 1 is missing"),
        ("out of memory", RuntimeError, "^out of memory"),
    ):

        def fail(*_, fault=fault, **__):
            raise RuntimeError(fault)

        monkeypatch.setattr(dist, collective, fail)
        with pytest.raises(kind, match=message):
            METHODS[collective](mesh)

"""Before the first step: do all ranks of the job run the same thing? A difference is named, and nothing hangs.

:func:`check_ranks` is called as soon as the ranks can talk, before any group is made of them: configuration, code,
device, and whether all see ``run_dir``. Ranks with different sizes would wait for one another in different groups.
:func:`check_model` is called on the freshly built model, before an engine copies the first rank's values to all.

Each is one small all-gather of a digest; only where digests differ do ranks exchange what is behind them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.comm.hangs import name_ranks
from lasp.launch.config.schema import RunConfig
from lasp.parallel.file_errors import writing
from lasp.parallel.mesh import Mesh

Facts = Mapping[str, Any]
_OF_ONE_NODE = ("torchrun", "ray")  # sections that may differ between nodes
_SHOWN = 4  # differences in one message
_RUN_DIR_S = 20.0  # until a shared file system shows a new file
_SOURCES = ("*.py", "*.json")


def check_ranks(config: RunConfig, device: torch.device) -> None:
    """Refuse a job whose ranks differ in configuration, code or kind of device, or do not share ``run_dir``.

    All ranks of the default group call it.

    Raises:
        ValueError: the same on every rank, naming ranks, hosts, keys and values.
        OSError: rank 0 cannot write ``run_dir``; on every rank.
    """
    everyone = Mesh.build(1, device=device)  # a row of ranks: makes no group
    if everyone.world_size == 1:
        return
    _compare(everyone, facts_of(config, device))
    _check_run_dir(config.run_dir, everyone, min(_RUN_DIR_S, config.timeout_s / 2))


def check_model(model: nn.Module, mesh: Mesh) -> None:
    """Refuse a job whose ranks have built different models, or do not agree on who is in which group.

    Args:
        model: with its initial values, equal by seed.
        mesh: the job; all its ranks call it.

    Raises:
        ValueError: the same on every rank, naming ranks, hosts, and the first tensors or groups that differ.
    """
    if mesh.world_size == 1:
        return
    groups = {
        name: tuple(dist.get_process_group_ranks(group))
        for name, group in (("cp", mesh.cp_group), ("dp", mesh.dp_group))
        if group is not None
    }
    places = {"cp": mesh.cp_rank, "dp": mesh.dp_rank}
    everybody = mesh.gather((mesh.ranks[_position(mesh)], mesh.rank, groups, places))
    if fault := _group_fault(everybody):
        raise ValueError(f"{fault} All ranks must make the same groups in the same order: run the same code on all.")
    values = {f"initial parameter {name}": f"bits {checksum(x):#x}" for name, x in model.named_parameters()}
    _compare(mesh, {"shape of the model": _digest({n: tuple(p.shape) for n, p in model.named_parameters()}), **values})


def facts_of(config: RunConfig, device: torch.device) -> Facts:
    """What must be equal on all ranks before they can work together, by name."""
    settings = {key: value for key, value in config.portable().items() if key not in _OF_ONE_NODE}
    fabric = config.exchange_options.fabric  # a file may say other things on another node
    return {
        **_flatten(settings),
        **({} if fabric is None else _flatten(asdict(fabric), "links of fabric: ")),
        "kind of device": device.type,
        "version of python": ".".join(platform.python_version_tuple()[:2]),
        "version of torch": torch.__version__,
        "version of triton": _version("triton"),
        "version of lasp": _version("lasp"),
        "source code of lasp": source_digest(),
    }


def source_digest() -> str:
    """A hash of the installed source files: a change counts, committed or not."""
    rooms = ("lasp", "lasp.kernels", "lasp.parallel", "lasp.launch")
    digest = hashlib.sha256()
    for room in rooms:
        for folder in importlib.util.find_spec(room).submodule_search_locations:
            own = [path for pattern in _SOURCES for path in Path(folder).rglob(pattern)]
            for path in sorted(own):
                digest.update(f"{room}/{path.relative_to(folder).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def checksum(x: Tensor) -> int:
    """The sum of a tensor's bits as integers: exact, so that threads and vector units do not matter."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.detach().contiguous().view(whole).sum(dtype=torch.int64)) % 2**64


def difference(facts: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """The first facts that not all ranks have alike, as one sentence; None if there are none.

    Args:
        facts: one mapping per rank.
        hosts: their machines.
    """
    keys = [key for key in dict.fromkeys(key for own in facts for key in own) if len(_by_value(facts, key)) > 1]
    if not keys:
        return None
    shown = "; ".join(_sentence(facts, hosts, key) for key in keys[:_SHOWN])
    more = f"; and {len(keys) - _SHOWN} more differ" if len(keys) > _SHOWN else ""
    code = [key for key in keys if key.startswith(("version of", "source code"))]
    remedy = {
        len(keys): "Install the same code on every node.",
        0: "Start every rank with the same file and overrides.",
    }.get(len(code), "Start every rank with the same code, file and overrides.")
    if keys[0].startswith(("initial parameter", "shape of")):
        remedy = "The same seed must give the same model: run the same code and torch on the same kind of machine."
    if keys == ["kind of device"]:
        remedy = "Set device= to what every node has, or leave the node without devices out."
    return f"{shown}{more}. All ranks of a job must agree. {remedy}"


def _compare(mesh: Mesh, facts: Facts) -> None:
    """Raise on every rank if the facts differ anywhere."""
    if len(set(mesh.gather(_digest(facts)))) == 1:
        return
    everybody = mesh.gather((dict(facts), socket.gethostname()))
    raise ValueError(difference([own for own, _ in everybody], [host for _, host in everybody]))


def _by_value(facts: Sequence[Facts], key: str) -> list[tuple[str, list[int]]]:
    """Each value of ``key`` with the ranks that have it; the one that most have, or rank 0, last."""
    ranks: dict[str, list[int]] = {}
    for rank, own in enumerate(facts):
        ranks.setdefault(_shown(own, key), []).append(rank)
    return sorted(ranks.items(), key=lambda item: (len(item[1]), 0 in item[1]))


def _shown(own: Facts, key: str) -> str:
    if key not in own:
        return "nothing"
    return json.dumps(own[key]) if not isinstance(own[key], str) else own[key] or '""'


def _sentence(facts: Sequence[Facts], hosts: Sequence[str], key: str) -> str:
    *odd, (usual, rest) = _by_value(facts, key)
    said = [
        f"{name_ranks(ranks)} ({'host' if len({hosts[r] for r in ranks}) == 1 else 'hosts'} "
        f"{', '.join(dict.fromkeys(hosts[r] for r in ranks))}) {'has' if len(ranks) == 1 else 'have'} {value}"
        for value, ranks in odd
    ]
    said[0] = said[0].replace(" has ", f" has {key} = ", 1).replace(" have ", f" have {key} = ", 1)
    return f"{', '.join(said)}, {name_ranks(rest)} {'has' if len(rest) == 1 else 'have'} {usual}"


def _check_run_dir(run_dir: Path, everyone: Mesh, limit_s: float) -> None:
    """Refuse a ``run_dir`` that is another folder on another node: rank 0 leaves a file that all must find."""
    host = socket.gethostname()
    token = run_dir / everyone.on_first(partial(_leave_token, run_dir))
    try:
        seen = everyone.gather((_appears(token, limit_s), host))
    finally:
        if everyone.is_first:
            token.unlink(missing_ok=True)
    blind = [rank for rank, (found, _) in enumerate(seen) if not found]
    if blind:
        hosts = ", ".join(dict.fromkeys(seen[rank][1] for rank in blind))
        raise ValueError(
            f"run_dir {run_dir.absolute()} must be one folder for all ranks, but {name_ranks(blind)} (on {hosts}) did "
            f"not find a file that rank 0 ({seen[0][1]}) wrote there, within {limit_s:g} s. Set run_dir= to a "
            "folder on a file system that all nodes share, at the same path."
        )


def _leave_token(run_dir: Path) -> str:
    name = f".preflight-{uuid.uuid4().hex[:12]}"
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).touch()
    return name


def _appears(path: Path, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _group_fault(everybody: Sequence[tuple[int, int, dict, dict]]) -> str | None:
    """What contradicts itself in the places and groups that ranks say they have; None if nothing does."""
    by_rank = {rank: (place, groups, places) for rank, place, groups, places in everybody}
    owners: dict[int, int] = {}
    for rank, (place, groups, places) in by_rank.items():
        if owners.setdefault(place, rank) != rank:
            return f"rank {owners[place]} and rank {rank} both have place {place} of the mesh."
        for name, members in groups.items():
            if rank not in members or members.index(rank) != places[name]:
                return f"rank {rank} has {name}_rank {places[name]} in a {name}_group of ranks {list(members)}."
            for other in members:
                theirs = by_rank[other][1].get(name, ())
                if theirs != members:
                    return (
                        f"rank {rank} has a {name}_group of ranks {list(members)}, rank {other} one of {list(theirs)}."
                    )
    return None


def _position(mesh: Mesh) -> int:
    """This rank's index in the mesh's world group, which is the order of its gathers."""
    return dist.get_rank(mesh.world_group)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat

"""One forward exchange, timed on every rank: made-up state maps of one layer go through :mod:`lasp.exchange`.

No layer runs beside it, so that the time is that of the exchange alone, from ``start`` to the end of ``wait``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lasp import CPContext, SequenceLayout
from lasp.cost import Case
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import AUTO, EXCHANGES, new_exchange
from lasp.kernels.state import StateMap, Transition
from lasp.launch.bench.ranks import Ranks
from lasp.parallel.mesh import Mesh

KINDS = tuple(kind.value for kind in Transition)
DIM = 64  # K = V of a head
HEAD_BYTES = DIM * DIM * 4
_WARM_UP = 2  # first the connections are made, then their windows grow
_SAMPLE = 64  # values of an entry state that are compared
TOLERANCE = 1e-5


def case_of(nodes: Sequence[int], state_bytes: int, kind: str, layout: str = "contiguous") -> Case:
    """The cost model's view of one cell.

    Raises:
        ValueError: the state is no whole number of heads.
    """
    counts = tuple(list(nodes).count(node) for node in dict.fromkeys(nodes))
    transition = heads_of(state_bytes) * Transition(kind).numbers(DIM) * 4
    return Case(counts, state_bytes, transition, 2 if layout == "zigzag" else 1, DIM)


def heads_of(state_bytes: int) -> int:
    """Heads of 64 x 64 in fp32 that make a state of so many bytes.

    Raises:
        ValueError: it is no whole number.
    """
    if state_bytes < HEAD_BYTES or state_bytes % HEAD_BYTES:
        raise ValueError(
            f"a state is made of heads of {HEAD_BYTES} bytes (64 x 64 in fp32), so its size must be a multiple of 16K, "
            f"got {state_bytes}. Choose one like 256K."
        )
    return state_bytes // HEAD_BYTES


def time_exchanges(
    ranks: Ranks,
    repeats: Mapping[str, int],
    *,
    state_bytes: int,
    kind: str,
    layout: str = "contiguous",
    fabric: Fabric | None = None,
) -> dict[str, tuple[list[float], list[list[float]]]]:
    """Per exchange: seconds of each repeat, the slowest rank's; and some values of the entry states of every rank.

    Args:
        repeats: of each exchange. They take turns, so that what disturbs the machine for a while disturbs all.
        fabric: for ``auto`` and for the slices of others.
    """
    answers = ranks.ask(
        f"{__name__}:measure",
        repeats=dict(repeats),
        nodes=list(ranks.nodes),
        fabric=None if fabric is None else asdict(fabric),
        state_bytes=state_bytes,
        kind=kind,
        layout=layout,
    )
    slowest = {name: [max(times) for times in zip(*(a["seconds"][name] for a in answers))] for name in repeats}
    return {name: (times, [a["samples"][name] for a in answers]) for name, times in slowest.items()}


def measure(
    mesh: Mesh,
    *,
    repeats: Mapping[str, int],
    nodes: Sequence[int],
    fabric: dict[str, Any] | None,
    state_bytes: int,
    kind: str,
    layout: str,
) -> dict[str, Any]:
    """Seconds of each exchange's repeats after those that warm up, a barrier before each; and part of what came out."""
    cut = getattr(SequenceLayout, layout)(4 * mesh.world_size, mesh.world_size)
    contexts = {name: context_over(mesh, cut, name, nodes, fabric) for name in repeats}
    maps = _maps(mesh, state_bytes, kind, len(cut.segments(mesh.cp_rank)))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    samples: dict[str, list[float]] = {}
    shuffled = random.Random(0)  # alike on all ranks: no exchange always follows the same one
    for turn in range(_WARM_UP + max(repeats.values())):
        for name in shuffled.sample(list(repeats), len(repeats)):
            if turn < _WARM_UP + repeats[name]:
                seconds, samples[name] = _exchange_once(mesh, contexts[name], maps)
                times[name].append(seconds)
    mesh.any(False)
    return {"seconds": {name: found[_WARM_UP:] for name, found in times.items()}, "samples": samples}


def _exchange_once(mesh: Mesh, cp: CPContext, maps: StateMap) -> tuple[float, list[float]]:
    plan = cp.chain_plan(True, False)
    mesh.any(False)
    started = time.perf_counter()
    with torch.no_grad():
        one = new_exchange(cp, plan, maps, None)
        one.start(maps, None)
        entry, _ = one.wait(None)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return time.perf_counter() - started, _sampled(entry)


def context_over(
    mesh: Mesh, layout: SequenceLayout, exchange: str, nodes: Sequence[int], fabric: dict[str, Any] | None
) -> CPContext:
    """The context of an exchange, with the fabric (plain values) where it takes its slices from one."""
    if fabric is None or not (exchange == AUTO or EXCHANGES[exchange].takes_fabric):
        return CPContext(layout, mesh.cp_group, exchange)
    built = Fabric(**{**fabric, **{level: Link(**fabric[level]) for level in ("within", "between")}})
    return CPContext(layout, mesh.cp_group, exchange, nodes=nodes, fabric=built)


def _maps(mesh: Mesh, state_bytes: int, kind: str, segments: int) -> StateMap:
    """The same for every exchange: decays near one, so that states of far ranks still show."""
    heads = heads_of(state_bytes) if state_bytes >= HEAD_BYTES else 1
    dim = DIM if state_bytes >= HEAD_BYTES else 16  # a tiny state for overheads
    seed = torch.Generator().manual_seed(mesh.rank)
    draw = lambda *shape: torch.rand(segments, 1, heads, *shape, generator=seed)  # noqa: E731
    state = (draw(dim, dim) - 0.5).to(mesh.device)
    if kind == Transition.DENSE:
        eye = torch.eye(dim).expand(segments, 1, heads, dim, dim)
        return StateMap(state, matrix=(0.9 * eye + 0.1 / dim * draw(dim, dim)).to(mesh.device))
    if kind == Transition.IDENTITY:
        return StateMap(state)
    return StateMap(state, (-0.1 * draw(1 if kind == Transition.SCALAR else dim)).to(mesh.device))


def _sampled(entry: torch.Tensor | None) -> list[float]:
    if entry is None:
        return []
    flat = entry.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].double().tolist()


def difference(samples: list[list[float]], expected: list[list[float]]) -> float:
    """Largest difference between entry states over the largest value; a rank that nothing enters may say so."""
    pairs = [
        (x, y) for a, b in zip(samples, expected) for x, y in zip(a or [0.0] * len(b), b or [0.0] * len(a), strict=True)
    ]
    scale = max((abs(y) for _, y in pairs), default=0.0) or 1.0
    return max((abs(x - y) / scale for x, y in pairs), default=0.0)

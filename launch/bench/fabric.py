"""``lasp bench fabric``: alpha-beta links of each level, fitted to messages between ranks.

Two ranks of a node, and two of different nodes, send one message back and forth; a line through half the round trips
of several sizes gives latency and rate (Hockney, Parallel Computing 20(3), 1994). Then all ranks pass one on to the
next at once: where the ranks of all nodes share the processors of one machine, what that takes longer is the
processors' time per message and per byte. The rest of an all-gather of a tiny state is the overhead of an exchange.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lasp import comm
from lasp.cost import Case
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import estimate
from lasp.launch.bench.exchange_cell import time_exchanges
from lasp.launch.bench.ranks import Ranks
from lasp.launch.config.sizes import readable
from lasp.parallel.mesh import Mesh

SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
_SMALL, _MANY, _FEW = 1 << 16, 15, 5  # up to so many bytes, rounds; of larger ones
_LEAST_S, _FASTEST = 1e-7, 1e13  # a fitted latency or rate beyond is none
_HOPS = 5
_TINY = 1 << 10  # a state whose exchange is all overhead


def measure_fabric(ranks: Ranks, name: str, source: str, *, sizes: Sequence[int] = SIZES) -> tuple[Fabric, dict]:
    """The fabric between these ranks, and what it was fitted to.

    Args:
        name, source: of the fabric.
        sizes: bytes of messages.

    Raises:
        ValueError: there is one rank, between which nothing can be measured.
    """
    if ranks.size < 2:
        raise ValueError("a fabric is measured between ranks, got 1 rank. Start at least two: --ranks 2.")
    nodes = ranks.nodes
    counts = tuple(nodes.count(node) for node in dict.fromkeys(nodes))
    pairs = {"within": _pair(nodes, same=True), "between": _pair(nodes, same=False)}
    points: dict[str, dict[int, float]] = {}
    for level, pair in pairs.items():
        if pair is not None:
            answers = ranks.ask(f"{__name__}:ping_pong", pair=pair, sizes=list(sizes))
            points[level] = {size: statistics.median(times) for size, times in zip(sizes, answers[pair[0]])}
    links = {level: fit_link(found) for level, found in points.items()}
    links = {level: links.get(level) or next(iter(links.values())) for level in pairs}  # a level that there is not
    fabric = Fabric(name, links["within"], links["between"], _interfaces(ranks), 0.0, source)

    if ranks.one_machine and ranks.device == "cpu":  # all share its processors
        together = _pass_on_seconds(ranks, sizes)
        points["all at once"] = together
        alone = {size: max(links[level].seconds(size) for level in points if level in links) for size in sizes}
        extra = {size: (seconds - alone[size]) / ranks.size for size, seconds in together.items()}
        message_s, byte_s = _nonnegative_line(extra, weights={s: 1 / t for s, t in together.items()})
        fabric = replace(fabric, message_s=message_s, byte_s=byte_s)

    case = Case(counts, _TINY, 0)
    tiny, _ = time_exchanges(ranks, {"all_gather": _MANY}, state_bytes=_TINY, kind="identity")["all_gather"]
    overhead = max(0.0, statistics.median(tiny) - estimate("all_gather", case, fabric).seconds)
    points["all_gather of a tiny state"] = {_TINY: statistics.median(tiny)}
    return replace(fabric, overhead_s=overhead), {
        level: {str(s): t for s, t in p.items()} for level, p in points.items()
    }


def ping_pong(mesh: Mesh, *, pair: Sequence[int], sizes: Sequence[int]) -> list[list[float]]:
    """Seconds of one way, per size and round, on the first of ``pair``; other ranks wait."""
    me, times = mesh.rank, []
    for size in sizes:
        x, found = torch.zeros(max(1, size // 4), device=mesh.device), []
        mesh.any(False)
        if me in pair:
            other = pair[1 - pair.index(me)]
            for _ in range(_rounds(size) + 1):
                started = time.perf_counter()
                _transfer(mesh, x, to=other if me == pair[0] else None, of=None if me == pair[0] else other)
                _transfer(mesh, x, to=None if me == pair[0] else other, of=other if me == pair[0] else None)
                found.append((time.perf_counter() - started) / 2)
        times.append(found[1:])
    mesh.any(False)
    return times


def pass_on(mesh: Mesh, *, sizes: Sequence[int], hops: int) -> list[list[float]]:
    """Seconds in which this rank ``hops`` times has sent a message to the next rank and got one from the last."""
    times, after, before = [], (mesh.rank + 1) % mesh.world_size, (mesh.rank - 1) % mesh.world_size
    for size in sizes:
        x, found = torch.zeros(max(1, size // 4), device=mesh.device), []
        for _ in range(_FEW + 1):
            mesh.any(False)
            started = time.perf_counter()
            for _ in range(hops):
                _transfer(mesh, x, to=after, of=before)
            found.append(time.perf_counter() - started)
        times.append(found[1:])
    return times


def _pass_on_seconds(ranks: Ranks, sizes: Sequence[int]) -> dict[int, float]:
    """Of one hop of all ranks at once: of many hops less that of one, so that leaving a barrier is no part of it."""
    few, many = (
        [
            statistics.median(map(max, zip(*times)))
            for times in zip(*ranks.ask(f"{__name__}:pass_on", sizes=list(sizes), hops=hops))
        ]
        for hops in (1, _HOPS)
    )
    return {size: max((long - short) / (_HOPS - 1), _LEAST_S) for size, short, long in zip(sizes, few, many)}


def fit_link(points: dict[int, float]) -> Link:
    """Latency: of the smallest message. Rate: of the line from there that is nearest to the others, large ones most."""
    smallest = min(points)
    latency = max(points[smallest], _LEAST_S)
    rest = {size - smallest: seconds - latency for size, seconds in points.items() if size > smallest}
    per_byte = sum(n * t for n, t in rest.items()) / sum(n * n for n in rest)
    return Link(latency, 1 / max(per_byte, 1 / _FASTEST))


def _nonnegative_line(points: dict[int, float], weights: dict[int, float]) -> tuple[float, float]:
    """``a, b >= 0`` that minimise the sum of ``(weight * (a + b * size - value)) ** 2``."""
    rows = [(weights[s] ** 2, s, y) for s, y in points.items()]
    w, ws, wss = (sum(k * s**power for k, s, _ in rows) for power in (0, 1, 2))
    wy, wsy = sum(k * y for k, _, y in rows), sum(k * s * y for k, s, y in rows)
    determinant = w * wss - ws * ws
    if determinant > 0:
        a, b = (wy * wss - wsy * ws) / determinant, (w * wsy - ws * wy) / determinant
        if a >= 0 and b >= 0:
            return a, b
    only_a, only_b = (max(0.0, wy / w), 0.0), (0.0, max(0.0, wsy / wss))
    miss = lambda line: sum(k * (line[0] + line[1] * s - y) ** 2 for k, s, y in rows)  # noqa: E731
    return min(only_a, only_b, key=miss)


def describe(fabric: Fabric) -> list[tuple[str, str]]:
    """Names and values for a table."""
    rows = [
        (level, f"{link.latency_s * 1e6:.1f} us, {link.bytes_per_s / 1e6:,.1f} MB/s")
        for level, link in (("within a node", fabric.within), ("between nodes, one interface", fabric.between))
    ]
    rows += [("interfaces per node", str(fabric.nics_per_node)), ("per exchange", f"{fabric.overhead_s * 1e6:.1f} us")]
    shared = f"{fabric.message_s * 1e6:.2f} us per message, {fabric.byte_s * 1e9:.3f} ns per byte"
    return [*rows, ("processors that all ranks share", shared)]


def markdown(fabric: Fabric, points: dict[str, dict[str, float]]) -> list[str]:
    """The fabric as tables: what was fitted, and to what."""
    lines = [f"# Fabric {fabric.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in describe(fabric)]
    lines += ["", "| messages | bytes | measured ms | the fitted link ms |", "|---|---|---|---|"]
    for level, found in points.items():
        for size, seconds in found.items():
            link = {"within": fabric.within, "between": fabric.between}.get(level)
            fitted = "-" if link is None else f"{link.seconds(int(size)) * 1e3:.3f}"
            lines.append(f"| {level} | {readable(int(size))} | {seconds * 1e3:.3f} | {fitted} |")
    return lines


def draw(figure: Any, fabric: Fabric, points: dict[str, dict[str, float]]) -> None:
    """Measured points and fitted lines."""
    axes = figure.add_subplot(xlabel="bytes of a message", ylabel="seconds", xscale="log", yscale="log")
    for level, found in points.items():
        sizes = [int(size) for size in found]
        (line,) = axes.plot(sizes, list(found.values()), "o", label=f"{level}: measured")
        link = {"within": fabric.within, "between": fabric.between}.get(level)
        if link is not None:
            fitted = [link.seconds(size) for size in sizes]
            axes.plot(sizes, fitted, "-", color=line.get_color(), label=f"{level}: {link.latency_s * 1e6:.0f} us + n / "
                      f"{link.bytes_per_s / 1e6:,.0f} MB/s")  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)


def as_dict(fabric: Fabric) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(fabric)


def from_dict(values: dict[str, Any]) -> Fabric:
    """What :func:`as_dict` made."""
    links = {level: Link(**values[level]) for level in ("within", "between")}
    return Fabric(**{**values, **links})


def _rounds(size: int) -> int:
    return _MANY if size <= _SMALL else _FEW


def _pair(nodes: Sequence[int], *, same: bool) -> list[int] | None:
    """The first two ranks that share a node, or that do not."""
    pairs = ([a, b] for a in range(len(nodes)) for b in range(a + 1, len(nodes)) if (nodes[a] == nodes[b]) == same)
    return next(pairs, None)


def _interfaces(ranks: Ranks) -> int:
    """Interfaces of a node: GPUs have one each as clusters are built today; processes on CPUs share one."""
    return max(ranks.nodes.count(node) for node in set(ranks.nodes)) if ranks.device == "cuda" else 1


def _transfer(mesh: Mesh, x: torch.Tensor, *, to: int | None, of: int | None) -> None:
    """Send ``x`` and receive a tensor like it, at once, and wait for both."""
    messages, got = comm.Messages(mesh.cp_group, "bench"), torch.empty_like(x)
    sends, receives = ([] if peer is None else [(peer, y)] for peer, y in ((to, x), (of, got)))
    messages.wait(messages.post(sends, receives))
    messages.close()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)

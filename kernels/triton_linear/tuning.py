"""Tiles measured on the device at hand, for the table of :mod:`lasp.kernels.triton_linear.tiles`.

The stages of the operator run with every tile that may serve an entry. The caller hands the stages in, because the
operator itself asks for a measurement when it first needs an entry, and this file must not import it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from triton.errors import TritonError

from lasp.kernels.segments import SegmentTable
from lasp.kernels.triton_linear.decays import Decay
from lasp.kernels.triton_linear.tiles import Entry, Plan, Tile, plan, tile_table

HEADS, LENGTHS = 16, {False: 1 << 11, True: 1 << 14}  # of the inputs that stand for few and for many B * H * T
PASSES = (("states",), ("o",), ("dq",), ("dv", "dk"))  # kernels that are launched together
Measure = Callable[[Callable[[], object]], float]
Stages = tuple[type, type]  # Forward and Backward


def tune_once(asked: Entry, device: torch.device, stages: Stages) -> None:
    """Measure an entry and store it, unless the user's table or this process has it.

    Args:
        asked: the entry of the table.
        device: see :func:`tune`.
        stages: Forward and Backward of the operator, which are run.

    Raises:
        ValueError: the table cannot be written.
    """
    if str(asked) not in tile_table().measured:
        tile_table().check_writable()
        with torch.cuda.device(device):  # where the clock looks
            tile_table().store(asked, tune(asked, device, stages))


def tune(
    asked: Entry,
    device: torch.device,
    stages: Stages,
    measure: Measure | None = None,
    *,
    heads: int = HEADS,
    length: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tile]:
    """The fastest tile of each kernel for ``asked``.

    Args:
        asked: the entry of the table.
        device: where to measure: a GPU of that architecture.
        stages: Forward and Backward of the operator, which are run.
        measure: seconds that a call takes; default: Triton's ``do_bench``, median, with a cold cache.
        heads, length, dtype: of the inputs, K = V = ``asked.dim``; default: those that stand for the entry.

    Returns:
        A tile for each of ``KERNELS``; where none of the candidates compiles, the one in the table.
    """
    measure = _median_seconds if measure is None else measure
    dtype = (torch.float32 if asked.wide else torch.bfloat16) if dtype is None else dtype
    length = LENGTHS[asked.many] if length is None else length
    tiles = dict(tile_table().tiles(asked))
    for kernels in PASSES:
        times: dict[Tile, float] = {}
        for tile in candidates(asked):
            tried = tiles | dict.fromkeys(kernels, tile)
            try:
                times[tile] = measure(_pass(kernels[0], asked, tried, stages, heads, length, dtype, device))
            except TritonError:  # too much shared memory, or no code for it
                continue
        if times:
            tiles |= dict.fromkeys(kernels, min(times, key=times.__getitem__))
        message = "tiles of %s, %s: %s of %d that compiled"
        logging.getLogger("lasp").info(message, asked, " and ".join(kernels), tiles[kernels[0]], len(times))
    return tiles


def candidates(asked: Entry) -> Iterator[Tile]:
    """Tiles worth trying."""
    blocks, stages = ((16, 32), (1, 2)) if asked.wide else ((32, 64, 128), (2, 3))
    for block, warps, depth in product(blocks, (4, 8), stages):
        if block <= asked.dim:
            yield Tile(block, warps, depth)


def _pass(
    name: str,
    asked: Entry,
    tiles: dict[str, Tile],
    stages: Stages,
    heads: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], object]:
    """The stage of the operator that launches kernel ``name``, after all stages before it have run."""
    q, k, v, do = (torch.randn(1, length, heads, asked.dim, dtype=dtype, device=device) for _ in range(4))
    table = SegmentTable([(0, length)], device)
    arguments = k, v, _gate(asked, heads, length, device), None, table, heads, True, asked.dim**-0.5
    kind = Decay[asked.decay.upper()]
    planned = replace(plan(asked.arch, dtype, asked.dim, asked.dim, kind, heads * length), tiles=tiles)
    forward = _with_plan(stages[0], planned)(*arguments)
    if name == "states":
        return forward.state_maps
    exits = forward.state_maps(q=q)
    if name == "o":
        return lambda: forward.finish(exits.state)
    known = {"saved": forward.saved, "kept_gates": forward.kept_gates, "entry": exits.state, "exits": exits}
    known |= {"needs_dg": kind.per_token, "needs_d_entry": False}
    backward = _with_plan(stages[1], planned)(*arguments, q=q, do=do, **known)
    grads = backward.state_maps(local=name != "dq")
    return backward.local if name == "dq" else lambda: backward.finish(grads)


def _with_plan(stages: type, planned: Plan) -> type:
    return type(stages.__name__, (stages,), {"_plan": lambda self: planned})


def _gate(asked: Entry, heads: int, length: int, device: torch.device) -> Tensor | None:
    shape = Decay[asked.decay.upper()].gate_shape(1, length, heads, asked.dim)
    return None if shape is None else torch.nn.functional.logsigmoid(torch.randn(shape, device=device)) / 16


def _median_seconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3

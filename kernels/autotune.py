"""Measure tiles and write them into the table of :mod:`lasp.kernels.triton_tiles`.

    LASP_AUTOTUNE=1 [LASP_TILES=FILE] python train.py                      entries as they are first needed
    LASP_AUTOTUNE=1 LASP_TILES=FILE python -m lasp.kernels.autotune --dims 128    chosen entries at once

Entries that FILE has are not measured again; those of the shipped table are, once per process. An entry takes minutes:
each kernel is compiled and timed with every tile that may serve it. That waits for the device, so tune before a CUDA
graph is captured and before many ranks would tune side by side.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from triton.errors import TritonError

from lasp.kernels import lightning
from lasp.kernels.segments import SegmentTable
from lasp.kernels.triton_tiles import DECAYS, DIMS, KERNELS, Entry, Plan, Tile, entry, plan, tile_table

HEADS, LENGTHS = 16, {False: 1 << 11, True: 1 << 14}  # of the inputs that stand for few and for many B * H * T
PASSES = (("states",), ("o",), ("dq",), ("dv", "dk"))  # kernels that are launched together
Measure = Callable[[Callable[[], object]], float]


def tune_once(asked: Entry, device: torch.device) -> None:
    """Measure an entry and store it, unless the user's table or this process has it.

    Raises:
        ValueError: the table cannot be written.
    """
    if str(asked) not in tile_table().measured:
        tile_table().check_writable()
        with torch.cuda.device(device):  # where the clock looks
            tile_table().store(asked, tune(asked, device))


def tune(
    asked: Entry,
    device: torch.device,
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
                times[tile] = measure(_pass(kernels[0], asked, tried, heads, length, dtype, device))
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
    name: str, asked: Entry, tiles: dict[str, Tile], heads: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """The stage of the operator that launches kernel ``name``, all before it done."""
    q, k, v, do = (torch.randn(1, length, heads, asked.dim, dtype=dtype, device=device) for _ in range(4))
    table = SegmentTable([(0, length)], device)
    arguments = q, k, v, _gate(asked, heads, length, device), table, True, asked.dim**-0.5
    kind = DECAYS.index(asked.decay)
    planned = replace(plan(asked.arch, dtype, asked.dim, asked.dim, kind, heads * length), tiles=tiles)
    forward = _with_plan(lightning.Forward, planned)(*arguments)
    if name == "states":
        return forward.state_maps
    exits = forward.state_maps().state
    if name == "o":
        return lambda: forward.finish(exits)
    known = {"saved": forward.saved, "entry": exits, "exits": exits, "do": do, "needs_dg": kind > 1}
    backward = _with_plan(lightning.Backward, planned)(*arguments, **known)
    grads = backward.state_maps(local=name != "dq")
    return backward.local if name == "dq" else lambda: backward.finish(grads)


def _with_plan(stages: type, planned: Plan) -> type:
    return type(stages.__name__, (stages,), {"_plan": lambda self: planned})


def _gate(asked: Entry, heads: int, length: int, device: torch.device) -> Tensor | None:
    shapes = {"fixed": (heads,), "token": (1, length, heads), "channel": (1, length, heads, asked.dim)}
    if asked.decay == "none":
        return None
    return torch.nn.functional.logsigmoid(torch.randn(shapes[asked.decay], device=device)) / 16


def _median_seconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--dims", default="64,128,256", help=f"comma-separated, of {DIMS}")
    parser.add_argument("--decays", default=",".join(DECAYS), help="comma-separated")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args(argv)
    dims, decays = options.dims.split(","), options.decays.split(",")
    if not set(dims) <= set(map(str, DIMS)) or not set(decays) <= set(DECAYS):
        parser.error(f"--dims takes {DIMS}, --decays {DECAYS}; got {options.dims} and {options.decays}")
    if not torch.cuda.is_available():
        parser.error("tiles are measured on a GPU, and torch sees none here")
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    for dim, decay, length in product(map(int, dims), decays, LENGTHS.values()):
        kind, dtype = DECAYS.index(decay), getattr(torch, options.dtype)
        asked = entry(10 * major + minor, dtype, dim, dim, kind, HEADS * length)
        before = tile_table().tiles(asked)
        tune_once(asked, device)
        after = tile_table().tiles(asked)
        print(asked, *(f"{name} {before[name]} -> {after[name]}" for name in KERNELS), sep="\n  ", flush=True)
    print(f"written to {tile_table().path}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())

"""Measure tiles and write them into the table of :mod:`lasp.kernels.triton_linear.tiles`.

    LASP_AUTOTUNE=1 [LASP_TILES=FILE] python train.py                      entries as they are first needed
    LASP_AUTOTUNE=1 LASP_TILES=FILE python -m lasp.kernels.autotune --dims 128    chosen entries at once

Entries that FILE has are not measured again. Those of the shipped table are, once per process. An entry takes minutes,
because each kernel is compiled and timed with every tile that may serve it. Timing waits for the device. So tune before
a CUDA graph is captured, and before many ranks would tune side by side.
"""

from __future__ import annotations

import argparse
import logging
import sys
from itertools import product

import torch

from lasp.kernels.triton_linear.decays import Decay
from lasp.kernels.triton_linear.operator import Backward, Forward
from lasp.kernels.triton_linear.tiles import DECAYS, DIMS, KERNELS, entry, tile_table
from lasp.kernels.triton_linear.tuning import HEADS, LENGTHS, tune_once


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
        kind, dtype = Decay[decay.upper()], getattr(torch, options.dtype)
        asked = entry(10 * major + minor, dtype, dim, dim, kind, HEADS * length)
        before = tile_table().tiles(asked)
        tune_once(asked, device, (Forward, Backward))
        after = tile_table().tiles(asked)
        print(asked, *(f"{name} {before[name]} -> {after[name]}" for name in KERNELS), sep="\n  ", flush=True)
    print(f"written to {tile_table().path}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())

"""Tile choices of the Triton kernels: a shipped table, so that a new packed length never re-tunes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut and launched.

    Attributes:
        block: channels of the result that one program owns.
        warps, stages: launch options.
    """

    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """All choices of one call.

    Attributes:
        chunk: tokens per chunk, C.
        superchunk: most tokens per superchunk, L.
        tiles: of each of ``KERNELS``; dv and dk share a launch, so their warps and stages are equal.
    """

    chunk: int
    superchunk: int
    tiles: dict[str, Tile]


KERNELS = ("states", "o", "dq", "dv", "dk")
ARCHITECTURES = (80, 90, 100)  # smallest compute capability that each part of the table is for
DIMS = (64, 128, 256)  # largest of K and V that each part of the table is for

_QUARTER, _HALF, _FULL = Tile(32, 8, 2), Tile(64, 8, 2), Tile(128, 8, 2)
_SMALL, _STATES = Tile(64, 4, 2), Tile(128, 8, 3)
_SHARED = dict.fromkeys(KERNELS, _FULL) | {"states": _STATES}
_SPLIT = dict.fromkeys(KERNELS, _HALF)
_ALL_SMALL = dict.fromkeys(KERNELS, _SMALL)
# (architecture, dim): tiles for decays that all channels share, tiles for decays of channels
_TABLE = {
    (80, 64): (_ALL_SMALL, _SPLIT | {"dq": _QUARTER, "dk": _QUARTER}),
    (80, 128): (_SPLIT, _SPLIT | {"dq": _QUARTER, "dv": _QUARTER, "dk": _QUARTER}),
    (80, 256): (dict.fromkeys(KERNELS, _QUARTER), dict.fromkeys(KERNELS, _QUARTER)),
    (90, 64): (_ALL_SMALL, _ALL_SMALL),
    (90, 128): (_SHARED, _SHARED | {"dq": _HALF, "dk": _HALF}),
    (90, 256): (_SPLIT, _SPLIT | {"o": _QUARTER, "dv": _QUARTER}),
    (100, 64): (_ALL_SMALL, _ALL_SMALL),
    (100, 128): (_SHARED, _SHARED | {"dq": _HALF, "dk": _HALF}),
    (100, 256): (_SPLIT, dict.fromkeys(KERNELS, _QUARTER)),
}
_FEW_TOKENS = 1 << 16  # B * H * T below which programs are too few for a device, so they share less


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size``, at least ``least``: tensor cores take 16 and more."""
    return max(least, 1 << (size - 1).bit_length())


def superchunk(decay: int, tokens: int) -> int:
    """L for ``tokens`` = B * H * T: enough programs to fill a device, few enough states to be cheap.

    Gate gradients are anchored once per superchunk, so with decays per token or channel it stays shorter.
    """
    most = 4096 if decay < 2 else 1024
    return min(max(1 << max(tokens // 256, 1).bit_length() - 1, 256), most)


def plan(arch: int, dtype: torch.dtype, key_dim: int, value_dim: int, decay: int, tokens: int) -> Plan:
    """The choices for compute capability ``arch`` (0: the interpreter)."""
    tiles = {kernel: tile(arch, dtype.itemsize, key_dim, value_dim, decay, tokens, kernel) for kernel in KERNELS}
    return Plan(64 if dtype.itemsize < 4 else 16, superchunk(decay, tokens), tiles)


def tile(arch: int, itemsize: int, key_dim: int, value_dim: int, decay: int, tokens: int, kernel: str) -> Tile:
    """The tile of one kernel."""
    outer = power_of_two(value_dim if kernel in ("states", "o", "dv") else key_dim)
    if itemsize == 4:  # IEEE products on CUDA cores: small blocks
        return Tile(min(outer, 32), 4, 1) if kernel == "states" else Tile(16, 8, 1)
    known = max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])
    dim = next(d for d in DIMS if d >= max(key_dim, value_dim))
    chosen = _TABLE[known, dim][decay == 3][kernel]
    block = min(chosen.block, outer, 64 if tokens < _FEW_TOKENS else 256)
    return Tile(block, chosen.warps, chosen.stages)

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
        tiles: by kernel: ``states``, ``scan``, ``o``, ``dq``, ``dv``, ``dk``.
    """

    chunk: int
    superchunk: int
    tiles: dict[str, Tile]


KERNELS = ("states", "o", "dq", "dv", "dk")


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
    tiles = {kernel: tile(arch, dtype.itemsize, key_dim, value_dim, decay, kernel) for kernel in KERNELS}
    return Plan(64, superchunk(decay, tokens), tiles)


def tile(arch: int, itemsize: int, key_dim: int, value_dim: int, decay: int, kernel: str) -> Tile:
    """The tile of one kernel."""
    inner, outer = (key_dim, value_dim) if kernel in ("states", "o", "dv") else (value_dim, key_dim)
    inner, outer = power_of_two(inner), power_of_two(outer)
    if itemsize == 4:  # IEEE products on CUDA cores: small blocks
        return Tile(min(outer, 32), 4, 1)
    return Tile(min(outer, 64), 4, 2)

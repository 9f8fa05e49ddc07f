"""The tiles of the Triton kernels come from a table, so that a new packed length never starts a measurement.

The table is ``tiles.json`` beside this file: one entry per architecture, head dim, decay and bucket of B * H * T.
``LASP_TILES=FILE`` names a table whose entries come before the shipped ones. On a GPU, ``LASP_AUTOTUNE=1`` measures an
entry when it is first needed and writes it into the table in use: see :mod:`lasp.kernels.autotune`.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from lasp.kernels.triton_linear.decays import Decay


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut and launched.

    Attributes:
        block: channels of the result that one program owns, a power of two.
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
DECAYS = tuple(kind.name.lower() for kind in Decay)
ARCHITECTURES = (80, 90, 100)  # of the shipped table; sm_80 also serves all GPUs but Hopper and B200
DIMS = (64, 128, 256)  # the largest of K and V that each part of the table is for
SHIPPED = Path(__file__).with_name("tiles.json")
_NAME = re.compile(rf"fp32|sm_\d+ D=({'|'.join(map(str, DIMS))}) ({'|'.join(DECAYS)}) (few|many)( fp32)?")
_MANY_TOKENS = 1 << 16  # with a smaller B * H * T, programs are too few for a device unless tiles are small


@dataclass(frozen=True)
class Entry:
    """What one entry of the table is for; ``str`` of it is the entry's name.

    Attributes:
        arch: compute capability, as 90.
        dim: one of ``DIMS``.
        decay: one of ``DECAYS``.
        many: whether B * H * T is enough to fill a device.
        wide: fp32 inputs: IEEE products on CUDA cores.
    """

    arch: int
    dim: int
    decay: str
    many: bool
    wide: bool

    def __str__(self) -> str:
        return f"sm_{self.arch} D={self.dim} {self.decay} {'many' if self.many else 'few'}{' fp32' * self.wide}"


class TileTable:
    """Entries of the shipped table and of the one that ``LASP_TILES`` names.

    Attributes:
        path: the file of the table in use; measured entries are written into it.
        measured: names of the entries that the user's table has or that this process has measured.
    """

    def __init__(self, path: Path):
        own = _read(path) if path != SHIPPED and path.exists() else {}
        self.path = path
        self.measured: set[str] = set(own)
        self._entries = _read(SHIPPED) | own

    def tiles(self, entry: Entry) -> dict[str, Tile]:
        """The tile of each of ``KERNELS``: as measured on this architecture, else as shipped for its family.

        One shipped entry serves all of fp32.
        """
        if str(entry) in self._entries:
            return self._entries[str(entry)]
        return self._entries["fp32" if entry.wide else str(replace(entry, arch=_family(entry.arch)))]

    def check_writable(self) -> None:
        """Raise a ValueError if no entry could be stored."""
        if not os.access(self.path.parent, os.W_OK) or self.path.is_dir():
            raise ValueError(f"LASP_AUTOTUNE=1 cannot write the tile table {self.path}. Point LASP_TILES elsewhere.")

    def store(self, entry: Entry, tiles: dict[str, Tile]) -> None:
        """Take a measured entry and write it into the file. What others wrote there meanwhile stays."""
        self._entries[str(entry)] = tiles
        self.measured.add(str(entry))
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = (_read(self.path) if self.path.exists() else {}) | {str(entry): tiles}
            rows = {name: json.dumps({k: astuple(t) for k, t in e.items()}) for name, e in entries.items()}
            text = ",\n".join(f" {json.dumps(name)}: {row}" for name, row in rows.items())
            scratch = self.path.with_name(self.path.name + ".new")
            scratch.write_text("{\n" + text + "\n}\n")
            scratch.replace(self.path)


def _read(path: Path) -> dict[str, dict[str, Tile]]:
    try:
        entries = json.loads(path.read_text())
        found = {name: {kernel: Tile(*tiles[kernel]) for kernel in KERNELS} for name, tiles in entries.items()}
        legal = all(_NAME.fullmatch(name) and _fits(tiles) for name, tiles in found.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        legal = False
    if not legal:
        name = Entry(90, 128, "token", True, False)
        raise ValueError(
            f"the tile table {path} must map names such as '{name}' to {{kernel: [block, warps, stages]}} for "
            f"{KERNELS}: "
            "blocks from 16 to 256 and warps to 16 powers of two, 1 to 8 stages, dv and dk alike in warps and stages. "
            "Mend it, or point LASP_TILES elsewhere."
        )
    return found


def _fits(tiles: dict[str, Tile]) -> bool:
    powers = (16, 32, 64, 128, 256)
    for tile in tiles.values():
        if not all(type(x) is int for x in astuple(tile)):
            return False
        if tile.block not in powers or tile.warps not in (1, 2, 4, 8, 16) or tile.stages not in range(1, 9):
            return False
    return astuple(tiles["dv"])[1:] == astuple(tiles["dk"])[1:]


def _family(arch: int) -> int:
    """The architecture whose shipped tiles serve. Only Hopper and B200 have their own; the others share sm_80's."""
    return {9: 90, 10: 100}.get(arch // 10, 80)


def autotuned() -> bool:
    """Whether ``LASP_AUTOTUNE`` asks to measure."""
    value = os.environ.get("LASP_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"LASP_AUTOTUNE must be 0 or 1, got {value!r}.")
    return value == "1"


@functools.cache
def _table(path: str | None) -> TileTable:
    if path and not Path(path).exists() and not autotuned():
        raise ValueError(f"LASP_TILES names {path}, which does not exist. LASP_AUTOTUNE=1 would make it.")
    return TileTable(Path(path) if path else SHIPPED)


def tile_table() -> TileTable:
    """The table in use, read once per process."""
    return _table(os.environ.get("LASP_TILES"))


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size``, at least ``least``: tensor cores take 16 and more."""
    return max(least, 1 << (size - 1).bit_length())


def superchunk(decay: int, tokens: int) -> int:
    """L for ``tokens`` = B * H * T: short enough to give a device enough programs, long enough for few states.

    Sums of gate gradients start anew at each superchunk, so with decays per token or channel it is kept shorter.
    """
    most = 1024 if Decay(decay).per_token else 4096
    return min(max(1 << max(tokens // 256, 1).bit_length() - 1, 256), most)


def entry(arch: int, dtype: torch.dtype, key_dim: int, value_dim: int, decay: int, tokens: int) -> Entry:
    """The entry of the table that serves a call; ``arch`` is the compute capability, as 90, or 0: the interpreter."""
    dim = next(d for d in DIMS if d >= max(key_dim, value_dim))
    return Entry(arch, dim, DECAYS[decay], tokens >= _MANY_TOKENS, dtype.itemsize == 4)


def plan(arch: int, dtype: torch.dtype, key_dim: int, value_dim: int, decay: int, tokens: int) -> Plan:
    """The choices of a call."""
    chosen = tile_table().tiles(entry(arch, dtype, key_dim, value_dim, decay, tokens))
    return Plan(64 if dtype.itemsize < 4 else 16, superchunk(decay, tokens), fit(chosen, key_dim, value_dim))


def fit(tiles: dict[str, Tile], key_dim: int, value_dim: int) -> dict[str, Tile]:
    """``tiles`` with blocks no wider than the kernel's result: it has V channels for states, o and dv, else K."""
    widest = {kernel: power_of_two(value_dim if kernel in ("states", "o", "dv") else key_dim) for kernel in KERNELS}
    return {kernel: Tile(min(t.block, widest[kernel]), t.warps, t.stages) for kernel, t in tiles.items()}

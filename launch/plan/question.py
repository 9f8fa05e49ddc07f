"""What is to be planned: a model, its tokens, GPUs, a fabric; and how a command line says such numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from lasp.cost.fabric import Fabric
from lasp.launch.plan.roofline import DEVICES, Device
from lasp.models.config import ModelConfig
from lasp.parallel.engines.table import ENGINES

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_BYTES = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        model: without recomputation and tiles: the planner decides on them, if ``free``.
        seq_len, batch: tokens of a sequence, sequences of a step.
        gpus, gpus_per_node: ranks, and those of a node.
        fabric: the wires.
        memory: bytes of one GPU.
        device: what computes.
        engine: a name in the table of engines, or ``auto``: those that it proposes.
        layout: ``contiguous`` or ``zigzag``.
        dtype_bytes: of activations.
        tokens_per_s: measured speed of one GPU without context parallelism, without recomputation; None: the roofline.
        offload: kept activations go to host memory; the copies are taken to be hidden.

    Raises:
        ValueError: numbers that do not divide or cannot be.
    """

    model: ModelConfig
    seq_len: int
    gpus: int
    fabric: Fabric
    device: Device
    batch: int = 1
    gpus_per_node: int = 8
    memory: float = 80e9
    engine: str = "auto"
    layout: str = "contiguous"
    dtype_bytes: int = 2
    tokens_per_s: float | None = None
    offload: bool = False

    def __post_init__(self):
        for name in ("seq_len", "gpus", "batch", "gpus_per_node", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.seq_len < 2:
            raise ValueError(f"seq-len must be at least 2, a token to read and one to predict, got {self.seq_len}.")
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto or one of {', '.join(ENGINES)}, got {self.engine!r}.")
        if self.layout not in ("contiguous", "zigzag"):
            raise ValueError(f"layout must be contiguous or zigzag, got {self.layout!r}.")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus = {self.gpus} must be a multiple of gpus-per-node = {self.gpus_per_node}, or at most one node. "
                f"Use {self.gpus // self.gpus_per_node * self.gpus_per_node} or "
                f"{-(-self.gpus // self.gpus_per_node) * self.gpus_per_node}, or set --gpus-per-node."
            )
        if self.gpus > self.seq_len * self.batch:
            raise ValueError(
                f"gpus = {self.gpus} are more than the {self.seq_len * self.batch} tokens of a step (seq-len = "
                f"{self.seq_len}, batch = {self.batch}): each rank needs one. Use fewer GPUs or longer sequences."
            )
        if self.tokens_per_s is not None and not 0 < self.tokens_per_s < inf:
            raise ValueError(f"tokens-per-s must be a measured speed, finite and above 0, got {self.tokens_per_s}.")


def parse_size(text: str, what: str) -> int:
    """Tokens: a number with an optional K, M or G (powers of 1024).

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", str(text).strip().upper())
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if size < 1 or size != int(size):
        raise ValueError(
            f"{what} must be a whole number of at least 1 with an optional K, M or G, like 32K or 4M, got {text!r}."
        )
    return int(size)


def parse_bytes(text: str, what: str) -> float:
    """Bytes: a number with B, MB, GB, TB or MiB, GiB, TiB.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", str(text).strip().upper())
    if not found or found[2] not in _BYTES or float(found[1]) == 0:
        raise ValueError(f"{what} must be a number of bytes with a unit, like 80GB or 40GiB, got {text!r}.")
    return float(found[1]) * _BYTES[found[2]]


def device_of(name: str | None, fabric: Fabric) -> Device:
    """The device of this name, or the one that a preset fabric is about.

    Raises:
        ValueError: an unknown name, or none and a fabric of your own.
    """
    if name is None:
        name = {"h100-ib": "h100", "a100-ib": "a100", "ethernet-25g": "a100", "laptop": "cpu"}.get(fabric.name)
    if name not in DEVICES:
        what = "must be given with a fabric of your own" if name is None else f"{name!r} is unknown"
        raise ValueError(f"device {what}: choose one of {', '.join(DEVICES)} with --device.")
    return DEVICES[name]

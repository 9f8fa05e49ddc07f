"""What is to be planned: a model, its tokens, GPUs, a fabric."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lasp.cost.fabric import Fabric
from lasp.launch.plan.roofline import DEVICES, Device
from lasp.models.config import ModelConfig
from lasp.parallel.engines.table import ENGINES


@dataclass(frozen=True)
class PlannedJob:
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

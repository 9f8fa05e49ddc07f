"""The optimizer of every engine: AdamW with a schedule, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) with linear warmup and a cosine decay.

    Attributes:
        lr: peak learning rate, reached after ``warmup_steps``; ``min_lr`` is that of the last step.
        steps: length of the schedule.
        weight_decay: decoupled, for matrices only: norms, biases and gates (one dimension) have none.
        clip: largest global gradient norm; None: no clipping.
    """

    lr: float
    steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def lr_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        span = max(1, self.steps - self.warmup_steps - 1)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + math.cos(math.pi * progress))

"""Checkpoints of a small made-up model."""

import torch

from lasp.parallel.checkpoints.saver import Saver
from lasp.parallel.mesh import Mesh

CONFIG = {"dim": 4, "mixer": {"heads": 2, "decay": "none"}}


def tensors_of(seed):
    flat = torch.randn(30, generator=torch.Generator().manual_seed(seed))
    parts = {"a": flat[:12].view(3, 4), "b": flat[12:]}  # views of one buffer, as the engine's are
    return {f"{kind}.{name}": x for kind in ("model", "exp_avg", "exp_avg_sq") for name, x in parts.items()}


def save(directory, step, extras=None, **options):
    state = {"model": CONFIG, "data_position": 7 * step, "config": {}, "tokenizer": "bytes"}
    with Saver(directory, Mesh.build(), **options) as saver:
        return saver.save(step, lambda folder: tensors_of(step), state, extras)

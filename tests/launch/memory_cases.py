"""What a block really keeps for its backward on the CPU, beside what the memory model counts."""

import torch

from lasp.launch.plan.activations import Load, saved_by_block
from lasp.launch.plan.memory import total
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama

WIDTHS = {2: torch.bfloat16, 4: torch.float32}
ROWS, LENGTH = 2, 250


def config_of(options, **more) -> ModelConfig:
    return ModelConfig.from_dict({"vocab_size": 64, "dim": 64, "heads": 2, "ffn_dim": 160, **options, **more})


def saved_bytes(config, dtype):
    """Storages that a forward keeps for its backward, parameters excepted."""
    model = LinearLlama(config, dtype=dtype)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model(torch.zeros(ROWS, LENGTH, dtype=torch.int64))
    assert hidden.requires_grad
    return sum(x.untyped_storage().nbytes() for place, x in storages.items() if place not in parameters)


def kept_and_counted(options, width) -> tuple[float, float]:
    """Bytes of one block: the difference between models of 3 blocks and of 1 is two; and what the model counts."""
    one, three = (config_of(options, num_layers=n) for n in (1, 3))
    kept = (saved_bytes(three, WIDTHS[width]) - saved_bytes(one, WIDTHS[width])) / 2
    return kept, total(saved_by_block(one, one.layer_kinds[0], Load(ROWS * LENGTH, width, "cpu", ROWS)).all)

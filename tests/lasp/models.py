"""Small models that tests share."""

import torch

from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama

BASE = {"vocab_size": 32, "dim": 16, "num_layers": 3, "pattern": "SL", "heads": 2, "ffn_dim": 24}
CONV = {"preset": "gla", "conv_width": 4, "conv_activation": "silu"}


def make_model(seed=0, dtype=torch.float64, **fields) -> LinearLlama:
    config = ModelConfig.from_dict({**BASE, **fields})
    return LinearLlama(config, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens_like(*shape):
    return torch.randint(0, BASE["vocab_size"], shape)

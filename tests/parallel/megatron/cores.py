"""Cores of attention as Megatron would make them, without its process groups."""

from types import SimpleNamespace

import torch


class Group:
    """A process group that nothing is sent on."""

    def __init__(self, size, rank=0):
        self.size, self.rank = (lambda: size), (lambda: rank)


def config(**options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    return TransformerConfig(**{**sizes, "attention_dropout": 0.0, "use_cpu_initialization": True, **options})


def core(name="LinearCoreAttention", options=None, tp=1, cp=2, **arguments):
    from megatron.core.transformer.enums import AttnMaskType

    import lasp.parallel.megatron as plugin

    given = {
        "config": config(**(options or {})),
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "cp_comm_type": None,
        "softmax_scale": None,
        "pg_collection": SimpleNamespace(tp=Group(tp), cp=Group(cp)),
    }
    return getattr(plugin, name)(**{**given, **arguments})


def call(length=6, keys=None, width=8):
    q = torch.zeros(length, 2, 4, width)
    return q, *(torch.zeros(keys or length, 2, 2, 8) for _ in "kv")

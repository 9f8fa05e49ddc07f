"""Specs of one's own for Megatron-LM: ``--spec hybrid_specs gated``, with this folder on PYTHONPATH."""

from lasp.parallel.megatron.megatron_lm import layer_spec

gated = layer_spec("LLLS", mixer={"decay": "scalar", "gate": "mamba", "feature": "elu1", "out_gate": "silu"})

"""What a type checker sees of the public names: `make lint` checks this file with mypy --strict; nothing runs it.

Each line with an ignored error is a wrong call: strict mode complains of an ignore that ignores nothing.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

import lasp
from lasp import (
    CPContext,
    ExchangeOptions,
    SequenceLayout,
    comm,
    linear_attention,
    short_convolution,
    softmax_attention,
)
from lasp.models import LinearLlama, MixerConfig, ModelConfig, num_parameters

x = torch.zeros(1, 6, 2, 4)
weight = torch.zeros(8, 3)

assert_type(lasp.__version__, str)

layout = SequenceLayout.contiguous((0, 5, 12), 2)
assert_type(layout, SequenceLayout)
assert_type(SequenceLayout.zigzag(12, 2), SequenceLayout)
assert_type(SequenceLayout((0, 5, 12), [((0, 6),), ((6, 12),)]), SequenceLayout)
assert_type(layout.shard(x, 0), Tensor)
assert_type(layout.unshard([x, x]), Tensor)
assert_type(layout.position_ids(0), Tensor)
assert_type(layout.cu_seqlens(0), Tensor)
SequenceLayout.contiguous("12", 2)  # type: ignore[arg-type]
SequenceLayout.zigzag(12)  # type: ignore[call-arg]

assert_type(CPContext(layout, None, "all_gather", nodes=(0, 0), wire_dtype=torch.bfloat16), CPContext)
assert_type(CPContext.local((0, 5, 12)), CPContext)
CPContext(12)  # type: ignore[arg-type]
CPContext(layout, None, exchange=3)  # type: ignore[arg-type]

options = ExchangeOptions(exchange="ring")
assert_type(options, ExchangeOptions)
assert_type(options.context(layout, None), CPContext)
ExchangeOptions(exchanges="ring")  # type: ignore[call-arg]

with comm.record() as ledger:
    assert_type(ledger, comm.Ledger)
    assert_type(ledger.calls["all_gather"], int)
    assert_type(ledger.bytes["all_gather"], int)

assert_type(linear_attention(x, x, x), tuple[Tensor, Tensor | None])
o, state = linear_attention(x, x, x, None, None, cp=None, initial_state=None, output_final_state=True, impl="torch")
linear_attention(x, x)  # type: ignore[call-arg]
linear_attention(x, x, x, cp=layout)  # type: ignore[arg-type]
linear_attention(x, x, x, scale="1")  # type: ignore[arg-type]
state.sum()  # type: ignore[union-attr]

assert_type(softmax_attention(x, x, x, causal=True, window=4, exchange="all_gather"), Tensor)
softmax_attention(x, x, x, 4)  # type: ignore[arg-type, call-arg]
softmax_attention(x, x, x, window=4.5)  # type: ignore[arg-type]

assert_type(short_convolution(x.flatten(2), weight, None, "silu", cp=None), Tensor)
short_convolution(x.flatten(2))  # type: ignore[call-arg]
short_convolution(x, weight, activation=1)  # type: ignore[arg-type]

config = ModelConfig(vocab_size=256, dim=64, num_layers=4, mixer=MixerConfig(decay="fixed", slopes="alibi"))
assert_type(ModelConfig.preset("tiny"), ModelConfig)
assert_type(MixerConfig.preset("gla"), MixerConfig)
assert_type(num_parameters(config), int)
model = LinearLlama(config, device="cpu")
assert_type(model.logits(x), Tensor)
ModelConfig(dim=64)  # type: ignore[call-arg]
LinearLlama(64)  # type: ignore[arg-type]

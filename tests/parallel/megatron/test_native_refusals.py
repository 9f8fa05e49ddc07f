"""Layouts that would meet foreign positions, and native models that Megatron would build otherwise, are refused."""

from types import SimpleNamespace

import pytest
import torch

from lasp.cp_context import CPContext
from lasp.models.config import ModelConfig
from tests.parallel.megatron.cores import call, config, core
from tests.parallel.megatron.world import Case, enter_mesh, on_cpu


def mesh(tp=1, pp=1):
    return SimpleNamespace(tp_size=tp, pp_size=pp)


MODELS = [
    (
        {"pattern": "LS", "mixer": {"heads": 2}},
        {},
        "as many heads in linear as in softmax layers: mixer.heads = 2, heads",
    ),
    ({"mixer": {"expand_v": 2.0}}, {}, "heads of one width, got {'mixer.key_dim': 8, 'mixer.value_dim': 16}"),
    ({"pattern": "LS", "head_dim": 16}, {}, "heads of one width"),
    ({"mixer": {"decay": "channel", "gate": "logsigmoid", "gate_rank": 4}}, {}, "has no mixer.gate_rank, got 4"),
    ({"ffn_tile": 16}, {}, "has no model.ffn_tile, got 16: the feed-forward layers are Megatron's. Leave it out"),
    ({"mixer": {"out_norm": "srms"}}, {"tp": 2}, "out_norm=srms spans all heads, and tp_size = 2 cuts them"),
    ({}, {"tp": 3}, r"vocab_size \(filled up\) = 128 must be a multiple of tp_size = 3"),
    ({"ffn_dim": 50}, {"tp": 4}, "ffn_dim = 50 must be a multiple of tp_size = 4"),
    ({"heads": 2}, {"tp": 4}, "heads = 2 must be a multiple of tp_size = 4"),
    ({"num_layers": 5}, {"pp": 2}, "num_layers = 5 must be a multiple of pp_size"),
]


@pytest.mark.parametrize("options, sizes, message", MODELS, ids=str)
def test_models(options, sizes, message):
    from lasp.parallel.megatron.model import check_model

    model = ModelConfig.from_dict({"vocab_size": 61, "dim": 32, "num_layers": 4, "heads": 4, "ffn_dim": 96, **options})
    with pytest.raises(ValueError, match=message):
        check_model(model, mesh(**sizes), None, False)


def test_options_without_effect():
    from lasp.parallel.megatron.model import check_model

    model = ModelConfig(vocab_size=61, dim=32, num_layers=4, ffn_dim=96)
    with pytest.raises(ValueError, match="virtual_stages = 2 has no effect with pp_size = 1"):
        check_model(model, mesh(), 2, False)
    with pytest.raises(ValueError, match="sequence_parallel has no effect with tp_size = 1"):
        check_model(model, mesh(), None, True)


def test_layouts_of_other_tokens_and_groups():
    from lasp.parallel.megatron.layouts import LayoutParams

    with pytest.raises(ValueError, match="cp must be a CPContext, got 7"):
        LayoutParams(7)
    params = LayoutParams(CPContext.local(5))
    with pytest.raises(ValueError, match=r"gives cp rank 0 5 tokens, and the model received 6. Cut the batch"):
        core(cp=1)(*call(), packed_seq_params=params)
    assert core(cp=1)(*call(5), packed_seq_params=params).shape == (5, 2, 32)


def test_a_step_of_sequences_of_two_lengths():
    from lasp.parallel.megatron.engine import run_schedule

    batches = [SimpleNamespace(cp=CPContext.local(length)) for length in (8, 6)]
    with pytest.raises(ValueError, match=r"the sequences of a step must have one length, got \[6, 8\]"):
        run_schedule([], batches, mesh(), count=3)


def gpt(spec_options=None, **model_options):
    """A model of one stage."""
    from megatron.core.models.gpt import GPTModel

    from lasp.parallel.megatron import hybrid_layer_spec

    settings = config(num_query_groups=4)
    spec = hybrid_layer_spec(settings, "LS", **(spec_options or {}))
    options = {"position_embedding_type": "rope", "rotary_base": 100, **model_options}
    return GPTModel(settings, spec, 64, 32, **options)


@on_cpu
def orders(_):
    """The checks, each rank by itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from lasp.parallel.megatron.layouts import LayoutOrder, LayoutParams

    enter_mesh(Case())
    tokens, params = torch.zeros(1, 8, dtype=torch.int64), LayoutParams(CPContext.local((0, 3, 8)))
    with pytest.raises(ValueError, match=r"LayoutParams need LayoutOrder\(model\): Megatron's RoPE does not know"):
        gpt()(tokens, None, None, packed_seq_params=params)
    model = gpt()
    LayoutOrder(model)
    assert model(tokens, None, None, packed_seq_params=params).shape == (1, 8, 64)
    with pytest.raises(ValueError, match="packed_seq_params must be LayoutParams with LayoutOrder, got NoneType"):
        model(tokens, None, None)
    for spec, options, message in (
        (
            {"softmax_core": DotProductAttention},
            {},
            "must be LASP's to read a layout, got DotProductAttention in layer 2",
        ),
        ({}, {"position_embedding_type": "learned_absolute"}, "serves position_embedding_type 'rope' and 'none'"),
        ({}, {"rotary_percent": 0.5}, "needs RoPE of all kv_channels = 8 with base 100 and without scaling"),
        ({}, {"rope_scaling": True, "rotary_base": 10**6}, "with base 1e\\+06 and without scaling"),
        ({}, {"seq_len_interpolation_factor": 2.0}, "without scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            LayoutOrder(gpt(spec, **options))
    with pytest.raises(ValueError, match=r"chunks must have GPTModels, got \['Linear'\]"):
        LayoutOrder(torch.nn.Linear(2, 2))


def test_orders(gpt_ranks):
    gpt_ranks.run(orders, size=8)

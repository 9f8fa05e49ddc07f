"""What would train silently wrong is refused by name, before anything is sent."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from tests.parallel.megatron.cores import Group, call, config, core
from tests.parallel.megatron.world import Case, on_cpu, prepare, run_step

CONTIGUOUS = Case(cp=2, pattern="LLLL", order="contiguous")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cp_comm_type": ["p2p"] * 4}, r"cp_comm_type must be one of .* got the list"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"window_size": (7, 0)}, r"window_size must be None .* got \(7, 0\). Use the spec's window"),
        ({"softmax_type": "learnable"}, "softmax_type must be 'vanilla'"),
        ({"attention_output_gate": True}, "attention_output_gate must be False .* Use the mixer's out_gate"),
    ],
)
def test_options_of_the_model(options, message):
    with pytest.raises(ValueError, match=message):
        core(options=options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tp": 3}, "num_attention_heads must be a multiple of the tensor-parallel size: 4 heads, 3 ranks"),
        ({"cp_comm_type": "a2a"}, "cp_comm_type must be one of .* got 'a2a'"),
        ({"attention_type": "cross"}, "attention_type must be 'self', got 'cross'"),
        ({"chunk": 4}, "chunk is no argument of a LASP core_attention"),
        ({"order": "ring"}, "order must be one of .* got 'ring'"),
        (
            {"mixer": {"conv_width": 4}},
            "conv_width = 4 needs a key and value head per query head: .* = 4, .* = 2. Pass",
        ),
        ({"mixer": "gla"}, "mixer.expand_k must be 1.0 under Megatron, got 0.5: kv_channels"),
        ({"mixer": {"position": "rope"}}, "mixer.position must be 'none' under Megatron, got 'rope': Megatron rotates"),
        ({"mixer": {"heads": 8}}, "mixer.heads must be 4 under Megatron, got 8"),
        ({"mixer": {"out_norm": "srms"}, "tp": 2}, "out_norm='srms' spans all 4 heads, but this rank has 2"),
        ({"mixer": {"decays": "none"}}, "MixerConfig has no field decays"),
    ],
    ids=str,
)
def test_arguments_of_a_core(arguments, message):
    with pytest.raises(ValueError, match=message):
        core(**arguments)


def test_a_convolution_behind_a_rotation():
    for frequency in (None, [1, 1, 0, 1]):
        options = {"num_query_groups": 4, "no_rope_freq": frequency}
        with pytest.raises(ValueError, match=r"conv_width = 4 needs config.no_rope_freq\[2\] = 1, got no_rope_freq = "):
            core(options=options, mixer={"conv_width": 4}, layer_number=3)
    core(options=options, mixer={"conv_width": 4}, layer_number=2)


def test_masks_other_than_causal():
    from megatron.core.transformer.enums import AttnMaskType

    for kind in (AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.padding_causal):
        with pytest.raises(ValueError, match="attn_mask_type must be causal, got AttnMaskType"):
            core("SoftmaxCoreAttention", attn_mask_type=kind)
        with pytest.raises(ValueError, match="attn_mask_type must be causal, got AttnMaskType"):
            core()(*call(), attn_mask_type=kind)


@pytest.mark.parametrize("name", ["LinearCoreAttention", "SoftmaxCoreAttention"])
def test_calls(name):
    layer = core(name)
    mask, packed = torch.zeros(1, 1, 6, 6), SimpleNamespace(qkv_format="thd")
    for arguments, options, message in (
        (call(), {"attention_mask": mask}, r"attention_mask must be None, got shape \(1, 1, 6, 6\)"),
        (call(), {"attention_bias": mask}, "attention_bias must be None"),
        (call(), {"sinks": mask}, "sinks is no argument of forward"),
        (call(1, keys=6), {}, "query, key and value must have as many tokens: 1, 6 and 6. Inference"),
        (call(), {"packed_seq_params": packed}, r"query must be \[s, heads, width\] with packed_seq_params"),
        (call(5), {}, r"two chunks of equal length, got 5 tokens .* a multiple of 2 \* cp_size = 4"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments, **options)


def test_a_gate_without_its_projection():
    layer = core(mixer={"decay": "scalar", "gate": "mamba"}, cp=1)
    with pytest.raises(ValueError, match=r"kv_channels = 8, followed by 1 .* got a width of 8. .* LinearSelfAttention"):
        layer(*call())


def test_specs():
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from lasp.parallel.megatron import hybrid_layer_spec

    for options, arguments, message in (
        ({}, {}, "pattern and config.linear_attention_freq are both None"),
        ({}, {"pattern": "LXS"}, "pattern must be made of L .* got 'LXS'"),
        ({"linear_attention_freq": 4}, {"pattern": "LS"}, "pattern 'LS', over 4 layers 'LSLS', must be .* 'LLLS'"),
        ({"linear_attention_freq": [1, 0]}, {}, "linear_attention_freq must have num_layers = 4 entries, got 2"),
        ({}, {"pattern": "L", "window": 3}, "window = 3 and softmax_core = None have no effect"),
        ({"softmax_scale": 0.5}, {"pattern": "L"}, "softmax_scale = 0.5 has no effect"),
        ({}, {"pattern": "LS", "order": "ring"}, "order must be one of"),
        (
            {"context_parallel_size": 2},
            {"pattern": "LS", "softmax_core": DotProductAttention},
            "DotProductAttention has no context parallelism, and context_parallel_size is 2",
        ),
        (
            {},
            {"pattern": "LS", "softmax_core": DotProductAttention, "order": "contiguous"},
            "DotProductAttention reads its tokens in zigzag order",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hybrid_layer_spec(config(**options), **arguments)


def test_packed_borders():
    from megatron.core.packed_seq_params import PackedSeqParams

    from lasp.parallel.megatron import CPContexts
    from lasp.parallel.megatron.contexts import packed_layout

    borders = torch.tensor([0, 8, 16], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"padded to a multiple of 2 \* cp_size = 4, got 6 tokens in document 1"):
        packed_layout([0, 4, 10], 2)
    for order, options, message in (
        ("contiguous", {"qkv_format": "thd"}, "packed_seq_params needs order='zigzag', got 'contiguous'"),
        ("zigzag", {"qkv_format": "sbhd"}, "qkv_format must be 'thd', got 'sbhd'"),
        ("zigzag", {"qkv_format": "thd"}, "must have cu_seqlens_q, equal to cu_seqlens_kv"),
        ("zigzag", {"qkv_format": "thd", "cu_seqlens_q": borders, "cu_seqlens_kv": borders + 1}, "equal to cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=message):
            CPContexts(order).of_packed(PackedSeqParams(**options), 8, Group(2))


@on_cpu
def _packed_group(_, case):
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from lasp.parallel.megatron import CPContexts
    from tests.parallel.megatron.world import enter_mesh

    enter_mesh(case)
    contexts, borders = CPContexts(), torch.tensor([0, 8, 16], dtype=torch.int32)
    cp, tp = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    same = contexts.of_packed(PackedSeqParams("thd", borders, cp_group=cp), 8, cp)
    assert same is contexts.of_packed(PackedSeqParams("thd", borders), 8, cp)
    borders[1] = 12  # in place: another layout
    assert contexts.of_packed(PackedSeqParams("thd", borders), 8, cp).layout.cu_seqlens_global == (0, 12, 16)
    messages = []
    for options in ({"cp_group": tp}, {"local_cp_size": 1}):
        with pytest.raises(ValueError, match="must not change the cp_group per batch") as error:
            contexts.of_packed(PackedSeqParams("thd", borders, **options), 8, cp)
        messages.append(str(error.value))
    with pytest.raises(ValueError, match=r"must end at the tokens of the batch, cp_size \* 6 = 12, got 16"):
        contexts.of_packed(PackedSeqParams("thd", borders), 6, cp)
    return messages


def test_a_packed_batch_has_the_cp_group_of_the_model(gpt_ranks):
    gpt_ranks.run(_packed_group, Case(tp=2, pp=2, cp=2), size=8)


@on_cpu
def _half_set(_, case, half):
    from tests.parallel.megatron import world

    chunks = prepare(dataclasses.replace(case, order="contiguous"))
    if half == "no owner":  # contiguous cores below Megatron's RoPE
        for module in chunks[0].modules():
            if hasattr(module, "contexts"):
                module.contexts = type(module.contexts)("contiguous")
    run_step(dataclasses.replace(case, order="zigzag") if half == "zigzag batch" else case, chunks)
    return world.VOCAB


@pytest.mark.parametrize(
    "half, message",
    [
        ("no owner", r"order='contiguous' needs ContiguousOrder\(model\)"),
        ("zigzag batch", "input_ids must be a tensor that ContiguousOrder.shard returned"),
    ],
)
def test_contiguous_order_by_half(gpt_ranks, half, message):
    outcomes = gpt_ranks.outcomes(_half_set, CONTIGUOUS, half, size=8)
    assert all(not ok and re.search(f"ValueError: {message}", text) for ok, text in outcomes), outcomes[0][1]


@on_cpu
def _owners(_, case):
    from lasp.parallel.megatron import ContiguousOrder

    zigzag = prepare(dataclasses.replace(case, order="zigzag"))
    with pytest.raises(ValueError, match="every attention layer must have order='contiguous', got zigzag in layer 1"):
        ContiguousOrder(zigzag)
    with pytest.raises(ValueError, match=r"chunks must have GPTModels, got \['TransformerBlock'\]"):
        ContiguousOrder(prepare(case)[0].module.decoder)
    chunks = prepare(case)
    with pytest.raises(ValueError, match=r"tokens must have a sequence length .* cp_size = 2, got 7"):
        chunks.order.shard({"tokens": torch.zeros(1, 7)})
    with pytest.raises(ValueError, match="attention_mask must be None"):
        chunks.order.shard({"attention_mask": torch.zeros(1, 1, 8, 8)})
    with pytest.raises(ValueError, match="inference_context must be None, got SimpleNamespace"):
        chunks[0].module.decoder.layers[0].self_attention(
            torch.zeros(4, 1, 32), None, inference_context=SimpleNamespace()
        )


def test_contiguous_order_owns_contiguous_layers_alone(gpt_ranks):
    gpt_ranks.run(_owners, CONTIGUOUS, size=8)


@pytest.mark.parametrize("options", [{"position_embedding_type": "yarn"}, {"mtp_process": True}], ids=str)
def test_contiguous_order_of_models_that_follow_zigzag(options):
    from lasp.parallel.megatron import ContiguousOrder

    model = torch.nn.Module()
    for name, value in {
        "position_embedding_type": "rope",
        "pg_collection": SimpleNamespace(cp=Group(2)),
        **options,
    }.items():
        setattr(model, name, value)
    with pytest.raises(
        ValueError, match=r"contiguous order serves .* without multi-token prediction, got '(yarn|rope)'"
    ):
        ContiguousOrder(model)

"""Loss and every gradient of a GPT on eight ranks of a Megatron mesh, against one process with the same weights."""

import dataclasses

import pytest
import torch

from tests.harness import relative_error
from tests.parallel.megatron.world import MICROBATCHES, Case, distributed_step, lone_step, whole

FULL = Case(tp=2, pp=2, cp=2)
FIXED = {"decay": "fixed", "slopes": "alibi", "per_layer_slopes": True, "feature": "silu"}
POSITIVE = {"decay": "fixed", "slopes": "retnet", "feature": "elu1"}
TOKEN = {"decay": "scalar", "gate": "mamba", "out_gate": "silu"}
CHANNEL = {"decay": "channel", "gate": "logsigmoid", "out_gate": "sigmoid", "feature": "silu"}
LEARNT_FEATURES = {"feature": "hadamard", "feature_dim": 6}


def check(ranks, case):
    """Compares, and returns how many messages each rank sent on the cp group."""
    lone_loss, lone = ranks.run(lone_step, case, size=8)[0]
    results = ranks.run(distributed_step, case, size=8)
    losses = [loss for loss, _, _ in results if loss is not None]
    found = whole([part for _, part, _ in results])
    assert losses and found.keys() == lone.keys()
    tolerance = 1e-12 if case.dtype == torch.float64 else 5e-6
    worst = max((relative_error(g, lone[name]), name) for name, replicas in found.items() for g in replicas)
    assert max(relative_error(loss, lone_loss) for loss in losses) <= tolerance
    assert worst[0] <= tolerance, worst[1]
    assert all(gradient.abs().max() > 0 for gradient in lone.values())
    return [calls for _, _, calls in results]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tp_pp_cp(gpt_ranks, sequence_parallel):
    check(gpt_ranks, dataclasses.replace(FULL, sequence_parallel=sequence_parallel))


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mixer", [POSITIVE, {**TOKEN, "feature": "elu1"}], ids=str)
def test_fp32(gpt_ranks, mixer, order):
    """With a positive kernel; test_fp32_where_one_process_is_no_better has another one."""
    check(gpt_ranks, dataclasses.replace(FULL, mixer=mixer, order=order, dtype=torch.float32, sequence_parallel=True))


def test_fp32_where_one_process_is_no_better(gpt_ranks):
    """Where q . k may be near 0 the output norm amplifies rounding: the error of one process is the measure."""
    case = dataclasses.replace(FULL, sequence_parallel=True)
    narrow = dataclasses.replace(case, dtype=torch.float32)
    _, exact = gpt_ranks.run(lone_step, case, size=8)[0]
    _, alone = gpt_ranks.run(lone_step, narrow, size=8)[0]
    found = whole([part for _, part, _ in gpt_ranks.run(distributed_step, narrow, size=8)])
    own = max(relative_error(alone[name].double(), g) for name, g in exact.items())
    worst = max(relative_error(g.double(), exact[name]) for name, replicas in found.items() for g in replicas)
    assert worst <= 2 * own


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mixer", ["linear", FIXED, TOKEN, CHANNEL, LEARNT_FEATURES], ids=str)
def test_mixers(gpt_ranks, mixer, order):
    check(gpt_ranks, dataclasses.replace(FULL, mixer=mixer, order=order, sequence_parallel=True))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("mixer", ["basic", CHANNEL], ids=str)
def test_recompute(gpt_ranks, mixer, recompute):
    check(gpt_ranks, dataclasses.replace(FULL, mixer=mixer, recompute=recompute, sequence_parallel=True))


@pytest.mark.parametrize("mixer", ["basic", TOKEN], ids=str)
def test_packed_documents(gpt_ranks, mixer):
    check(gpt_ranks, dataclasses.replace(FULL, mixer=mixer, packed=True))


@pytest.mark.parametrize(
    ("exchange", "softmax", "packed"), [("hierarchical", "ring", True), ("all_scan", "ulysses", False)]
)
def test_other_exchanges(gpt_ranks, exchange, softmax, packed):
    own = {"exchange": exchange, "softmax_exchange": softmax, "packed": packed, "recompute": "full"}
    check(gpt_ranks, dataclasses.replace(FULL, mixer=CHANNEL, **own))


def test_a_windowed_softmax_layer(gpt_ranks):
    check(gpt_ranks, dataclasses.replace(FULL, window=7))


@pytest.mark.parametrize("mixer", [FIXED, CHANNEL], ids=str)
def test_fewer_groups_than_tensor_parallel_ranks(gpt_ranks, mixer):
    check(gpt_ranks, Case(tp=4, cp=2, groups=2, mixer=mixer))


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_interleaved_pipeline_with_data_parallelism(gpt_ranks, order):
    check(gpt_ranks, Case(pp=2, vp=2, cp=2, mixer=TOKEN, order=order))


@pytest.mark.parametrize("stages", [{"layout": "Et|tttL"}, {"layout": "Et|t|t|tL", "vp": 2}], ids=str)
def test_uneven_stages(gpt_ranks, stages):
    check(gpt_ranks, Case(pp=2, cp=4, mixer=TOKEN, pattern="LLS", **stages))


def test_a_stage_without_attention_in_contiguous_order(gpt_ranks):
    check(gpt_ranks, Case(pp=2, cp=4, layout="E|ttttL", mixer=TOKEN, order="contiguous"))


def test_more_context_parallel_ranks_than_heads(gpt_ranks):
    check(gpt_ranks, Case(cp=8, pattern="LLLL", mixer=FIXED, config={"num_attention_heads": 2}))


def test_norms_of_queries_and_keys(gpt_ranks):
    check(gpt_ranks, dataclasses.replace(FULL, mixer=CHANNEL, config={"qk_layernorm": True}))


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mixer", ["basic", CHANNEL], ids=str)
def test_one_message_per_linear_layer_direction_and_micro_batch(gpt_ranks, mixer, order):
    calls = check(gpt_ranks, Case(tp=2, pp=2, cp=2, pattern="L", mixer=mixer, order=order))
    assert calls == [{"all_gather": 2 * 2 * MICROBATCHES}] * 8  # 2 layers per stage, 2 directions


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_repeats_the_forward_message_alone(gpt_ranks, recompute):
    calls = check(gpt_ranks, Case(tp=2, pp=2, cp=2, pattern="L", recompute=recompute))
    assert calls == [{"all_gather": 2 * 3 * MICROBATCHES}] * 8

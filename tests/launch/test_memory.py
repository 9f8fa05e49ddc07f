"""The memory model against what autograd saves and what the allocator gives, on the CPU."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lasp import CPContext, linear_attention
from lasp.kernels.torch_linear.operator import tokens_per_state
from lasp.launch.plan.activations import Load, saved_by_block
from lasp.launch.plan.memory import Setup, block_sizes, predict_memory, total
from lasp.layout import SequenceLayout
from lasp.models.config import ModelConfig
from lasp.models.features import FEATURES
from lasp.models.gates import GATES
from lasp.models.linear_llama import LinearLlama, num_parameters
from lasp.models.presets import MIXER_PRESETS
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from tests.launch.memory_cases import LENGTH, ROWS, WIDTHS, config_of, kept_and_counted

CONV = {"decay": "scalar", "gate": "mamba", "conv_width": 4, "conv_activation": "silu", "out_gate": "sigmoid"}
ENTRIES = {f"gate {name}": {"decay": "channel", "gate": name} for name in GATES}
ENTRIES |= {f"feature {name}": {"feature": name, "key_dim": 16} for name in FEATURES}
MIXERS = ENTRIES | {name: name for name in MIXER_PRESETS}
KINDS = {name: {"mixer": mixer} for name, mixer in MIXERS.items()} | {
    "conv": {"mixer": CONV},
    "conv and rank": {"mixer": {"preset": "gla", "conv_width": 4, "conv_activation": "silu", "out_gate_rank": 8}},
    "full norm": {"mixer": {"out_norm": "full_rms", "decay": "scalar", "gate": "logsigmoid"}},
    "softmax": {"pattern": "S"},
    "grouped queries, window": {"pattern": "S", "kv_heads": 1, "window": 16},
    "tiled": {"mixer": "basic", "ffn_tile": 64},
    "recompute": {"mixer": "gla", "recompute": True},
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_keeps(kind, width):
    """Within 1 % of what is counted."""
    kept, counted = kept_and_counted(KINDS[kind], width)
    if "recompute" in KINDS[kind]:  # its input alone
        assert kept < 0.05 * counted
        counted = ROWS * LENGTH * config_of(KINDS[kind], num_layers=1).dim * width
    assert counted == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    "tokens, segments, heads, width", [(300, 1, 2, 8), (2000, 1, 1, 8), (9000, 2, 4, 16), (240, 8, 2, 4)]
)
def test_the_operator_says_how_many_states_it_keeps(tokens, segments, heads, width):
    q, k, v = (torch.randn(1, tokens, heads, width) for _ in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_attention(q.requires_grad_(), k, v, cp=CPContext.local(range(0, tokens + 1, tokens // segments)))
    length = tokens_per_state(tokens, segments, 1, heads, width, width, "cpu")
    states = -(-tokens // length)
    assert states != segments  # as many states are those at the segments' ends
    assert (states, 1, heads, width, width) in kept


def peak_of_a_step(group, config, length, dtype, cp_size=1, engine="ddp"):
    """Bytes that a training step allocates at its fullest on a rank, beside what was there before it."""
    mesh = Mesh.build(cp_size, 1, group) if cp_size > 1 else Mesh.build(1, 1, device=torch.device("cpu"))
    engine = build_engine(engine, LinearLlama(config), mesh, OptimizerSettings(lr=1e-3, steps=10), dtype)
    tokens = torch.randint(0, config.vocab_size, (1, cp_size * length))
    batch = Batch.cut(tokens, SequenceLayout.contiguous(cp_size * length, cp_size), mesh)
    engine.step([batch])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        engine.step([batch])
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


TILED = {"recompute": True, "ffn_tile": 128}
STEPS = [
    ({"mixer": "basic"}, 4),
    ({"mixer": "basic", "recompute": True}, 4),
    ({"mixer": "basic", **TILED}, 4),
    ({"mixer": "gla", **TILED}, 2),
    ({"mixer": CONV, **TILED}, 2),
    ({"pattern": "S", **TILED}, 4),
]


@pytest.mark.parametrize("options, width", STEPS, ids=str)
def test_the_fullest_moment_of_a_step(options, width):
    config = config_of(options, num_layers=3, vocab_size=256, dim=96, ffn_dim=384)
    measured = peak_of_a_step(None, config, 2048, WIDTHS[width])
    memory = predict_memory(config, Setup("ddp", Load(2048, width, "cpu")))
    assert total(memory.phases[memory.phase]) == pytest.approx(measured, rel=0.10)


def test_the_fullest_moment_of_a_sharded_engine_on_two_ranks(ranks):
    """fsdp2 and exchanges: never more than a tenth too low, a fifth too high."""
    config = config_of({"mixer": "gla", **TILED}, num_layers=3, vocab_size=256, dim=96, ffn_dim=384)
    measured = max(ranks.run(peak_of_a_step, config, 1024, torch.float32, 2, "fsdp2", size=2))
    memory = predict_memory(config, Setup("fsdp2", Load(1024, 4, "cpu", cp_size=2), ranks=2))
    passing = total(t for t in memory.held if t.name.startswith(("gathered", "gradients")))  # come and go within a step
    assert 0.9 * measured < total(memory.phases[memory.phase]) + passing < 1.2 * measured


def million(**options):
    return dataclasses.replace(ModelConfig.preset("linear-llama3-1b"), **options)


def test_each_remedy_takes_from_its_own_term():
    load = Load(65536, cp_size=16)
    plain = predict_memory(million(), Setup("ddp", load, 16)).peak
    tiled = predict_memory(million(ffn_tile=4096), Setup("ddp", load, 16)).peak
    again = predict_memory(million(recompute=True), Setup("ddp", load, 16)).peak
    hosted = predict_memory(million(), Setup("ddp", load, 16, offload=True)).peak
    hidden = 16 * 4 * 65536 * 8192 * 2
    assert plain - tiled == pytest.approx(hidden, rel=0.05)
    assert again < tiled < plain and hosted < plain
    states = {e: total(predict_memory(million(), Setup(e, load, 16)).held) for e in ("ddp", "zero1", "zero2", "fsdp2")}
    assert states["fsdp2"] < states["zero2"] < states["zero1"] < states["ddp"]


def test_the_papers_model_at_256k_tokens_per_gpu_fits_80_gb():
    """4096K tokens on 16 GPUs: not without recomputation, and with it even where the hidden activations are whole."""
    load = Load(2**18, cp_size=16)
    peak = lambda engine, **options: predict_memory(million(**options), Setup(engine, load, 16)).peak  # noqa: E731
    assert peak("fsdp2", recompute=True, ffn_tile=8192) < 40e9
    assert peak("fsdp2", ffn_tile=8192) > 80e9
    assert peak("fsdp2", recompute=True) < 80e9


# Bytes per parameter of N on R ranks, written out once more: weights, gradients (fp32), master copy (fp32), two moments
# (fp32 each). "cut" stands on every rank for its share alone. In bf16 a weight is 2 bytes; in fp32 it is its own master
# copy under ddp, while the others keep one beside the weights that they compute with.
HELD = {  # (engine, width of a weight): bytes per parameter that are whole, and bytes per parameter that are cut
    ("ddp", 2): (2 + 4 + 4 + 8, 0),
    ("ddp", 4): (4 + 4 + 8, 0),
    ("zero0", 2): (2 + 4 + 4 + 8, 0),
    ("zero0", 4): (4 + 4 + 4 + 8, 0),
    ("zero1", 2): (2 + 4, 4 + 8),
    ("zero2", 2): (2, 4 + 4 + 8),
    ("zero3", 2): (0, 2 + 4 + 4 + 8),
    ("zero3", 4): (0, 4 + 4 + 4 + 8),
    ("fsdp2", 2): (0, 4 + 4 + 8),
    ("fsdp2", 4): (0, 4 + 4 + 8),
    ("megatron", 2): (2 + 4, 4 + 8),
}
BUCKET = 256 * 2**20  # bytes of gradients that zero2 and zero3 sum at once


@pytest.mark.parametrize("engine, width", HELD)
@pytest.mark.parametrize("ranks", [2, 16])
def test_what_is_held_is_the_closed_form_of_the_engine(engine, width, ranks):
    """A model of 1.2e9 parameters: more than a bucket, more than zero3 keeps gathered."""
    config, tokens = million(), 8192
    blocks = [size for size, _ in block_sizes(config)]
    n = sum(blocks) + config.vocab_size * config.dim  # head and embedding are one; the final norm is no term of its own
    whole, cut = HELD[engine, width]
    expected = n * whole + n * cut / ranks + 2 * 8 * tokens  # with tokens and labels
    if engine in ("zero2", "zero3"):
        expected += BUCKET
    if engine == "zero3":
        expected += 10**9 * width  # gathered
    if engine == "fsdp2":  # a block and the next are gathered, and what stands outside of blocks; one's gradients
        expected += 2 * max(blocks) * width + (n - sum(blocks)) * width + max(blocks) * (width + 4)
    held = predict_memory(config, Setup(engine, Load(tokens, width, "cpu"), ranks)).held
    assert total(held) == pytest.approx(expected, rel=1e-12)
    on_gpu = predict_memory(config, Setup(engine, Load(tokens, width), ranks)).held
    assert total(on_gpu) - total(held) == 2 * 2**30  # the context


def test_a_model_smaller_than_a_bucket_is_gathered_whole():
    config = config_of({"mixer": "basic"}, num_layers=3)
    n = num_parameters(config) - config.dim  # without the final norm
    held = predict_memory(config, Setup("zero3", Load(100, 4, "cpu"), ranks=4)).held
    assert total(held) == pytest.approx(n * (4 + 4 + 4 + 8) / 4 + 4 * n + 4 * n + 16 * 100, rel=1e-12)


@pytest.mark.parametrize("pp_size, micro_batches, in_flight", [(1, 8, 1), (4, 1, 1), (4, 3, 3), (4, 4, 4), (4, 8, 4)])
def test_stages_keep_the_micro_batches_that_are_in_flight(pp_size, micro_batches, in_flight):
    """The first stage has min(pp, micro batches) on their way: that many times the inputs of its blocks, in bf16."""
    config, tokens = million(recompute=True), 8192
    setup = Setup("megatron", Load(tokens), 8, pp_size=pp_size, micro_batches=micro_batches)
    (inputs,) = (t for t in predict_memory(config, setup).phases["loss"] if t.name == "inputs of blocks")
    assert inputs.bytes == in_flight * config.num_layers / pp_size * tokens * config.dim * 2


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_activations_grow_with_the_micro_batches_in_flight(micro_batches):
    """Without recomputation too, and at the peak: every further one brings all that the stage's blocks keep."""
    config, load = million(), Load(8192)
    peak = lambda count: predict_memory(config, Setup("megatron", load, 8, pp_size=4, micro_batches=count)).peak  # noqa: E731
    of_stage = config.num_layers / 4 * total(saved_by_block(config, "L", load).all)
    assert peak(micro_batches) - peak(1) == pytest.approx((min(4, micro_batches) - 1) * of_stage, rel=1e-9)


def test_tensor_and_pipeline_ranks_share_parameters_and_activations():
    setup = lambda tp, pp: Setup("megatron", Load(8192, tp_size=tp), 8, pp_size=pp, micro_batches=4)  # noqa: E731
    one, two, staged = (predict_memory(million(), setup(*sizes)) for sizes in ((1, 1), (2, 1), (1, 2)))
    assert total(two.held) < total(one.held) and two.peak < one.peak
    assert total(staged.held) < total(one.held)
    with pytest.raises(ValueError, match=r"engine must be one of .*got 'zero9'"):
        predict_memory(million(), Setup("zero9", Load(8)))

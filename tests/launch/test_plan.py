"""The planner: its candidates, its choice, its YAML, and what it refuses."""

import dataclasses
import re

import pytest
import yaml
from click.testing import CliRunner

from lasp import cost
from lasp.cost.fabric import Fabric, Link
from lasp.exchange import EXCHANGES
from lasp.launch.cli import cli
from lasp.launch.config.schema import checked
from lasp.launch.config.sizes import parse_bytes, parse_size
from lasp.launch.plan import search as plan
from lasp.launch.plan.activations import Load
from lasp.launch.plan.question import PlannedJob, device_of
from lasp.launch.plan.roofline import EFFICIENCY, predict_work
from lasp.launch.plan.search import make_plan, nothing_fits
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import num_parameters

K, M = 2**10, 2**20
H100 = Fabric.of("h100-ib")


def job(name="linear-llama3-1b", fabric="a100-ib", **options) -> PlannedJob:
    wires = Fabric.of(fabric)
    options = {"seq_len": 4 * M, "gpus": 16, **options}
    return PlannedJob(model=ModelConfig.preset(name), fabric=wires, device=device_of(None, wires), **options)


def planned(*arguments) -> str:
    """What ``lasp plan`` prints."""
    result = CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def yaml_of(output: str) -> dict:
    return yaml.safe_load(output[output.index("# predicted") :])


def test_the_papers_model_fits_at_256k_tokens_per_gpu():
    """4096K tokens on 16 GPUs, where LASP-2 runs out of memory on 128."""
    plan = make_plan(job())
    assert plan.best.cp == 16 and plan.best.recompute and plan.best.engine == "fsdp2"
    assert plan.best.memory.peak < 0.9 * 80e9
    assert not any(plan.fits(c) for c in plan.candidates if not c.recompute)
    leanest = make_plan(job(memory=40e9)).best
    assert leanest.ffn_tile is not None and leanest.memory.peak < 40e9


def test_half_the_gpus_need_the_tile():
    best = make_plan(job(gpus=8)).best
    assert best.recompute and best.ffn_tile and best.memory.peak < 80e9
    plan = make_plan(job(gpus=4))
    assert plan.best is None
    message = nothing_fits(plan)
    assert re.search(
        r"nothing fits: 4194304 tokens x 1 on 4 GPUs of 80 GB. Nearest: cp 4, .* with a predicted peak of \d+.\d GB, "
        r"most of it inputs of blocks \(\d+.\d GB\). 8 GPUs would do, or --memory",
        message,
    ), message


def test_candidates_cover_meshes_exchanges_and_recomputation_and_the_fastest_that_fits_is_chosen():
    plan = make_plan(job(seq_len=64 * K, gpus=16, batch=4))
    meshes = {(c.tp, c.pp, c.cp, c.dp) for c in plan.candidates}
    assert {(1, 1, 16, 1), (1, 1, 4, 4), (2, 1, 8, 1), (1, 2, 2, 4), (8, 2, 1, 1)} <= meshes
    assert all(tp * pp * cp * dp == 16 and 4 % dp == 0 for tp, pp, cp, dp in meshes)
    kinds = {(c.exchange, c.recompute) for c in plan.candidates if (c.tp, c.pp, c.cp) == (1, 1, 16)}
    assert kinds == {(e, r) for e in EXCHANGES for r in (False, True)}
    assert {c.engine for c in plan.candidates if c.tp * c.pp > 1} == {"megatron"}
    fitting = [c.tokens_per_s for c in plan.candidates if plan.fits(c)]
    assert plan.best.tokens_per_s == max(fitting)
    for c in plan.candidates:
        assert c.step_s == pytest.approx(c.compute_s + c.exposed_s) and c.exposed_s >= 0
        assert c.tokens_per_s == pytest.approx(4 * 64 * K / c.step_s / 16)


def test_a_slower_fabric_exposes_more_and_costs_speed():
    fast, slow = (make_plan(job(fabric=name, seq_len=256 * K)).best for name in ("a100-ib", "ethernet-25g"))
    assert slow.exposed_s > 3 * fast.exposed_s and slow.tokens_per_s < fast.tokens_per_s


def test_compute_is_the_roofline_or_a_measured_speed():
    """6 N operations per token of a model without attention to speak of; a measured speed scales all of it."""
    config = ModelConfig.preset("linear-llama3-1b")
    device = device_of(None, H100)
    seconds = predict_work(config, Load(16 * K), 16 * K, device).total
    assert 16 * K / seconds == pytest.approx(device.flops * EFFICIENCY / (6 * num_parameters(config)), rel=0.1)
    measured = job(gpus=1, seq_len=16 * K, tokens_per_s=1234.0)
    plain = [c for c in make_plan(measured).candidates if not c.recompute and c.tp * c.pp == 1]
    assert [c.tokens_per_s for c in plain] == pytest.approx([1234.0])
    again = [c for c in make_plan(measured).candidates if c.recompute]
    assert 0.7 < again[0].tokens_per_s / 1234.0 < 0.8  # a fourth forward pass


def test_hybrids_price_their_softmax_layers():
    model = {"pattern": "LLLS", "kv_heads": 4}
    wires = Fabric.of("h100-ib")
    config = dataclasses.replace(ModelConfig.preset("linear-llama3-1b"), **model)
    plan = make_plan(PlannedJob(config, seq_len=256 * K, gpus=16, fabric=wires, device=device_of(None, wires)))
    assert plan.best.softmax_exchange in ("all_gather", "ring")  # 4 key heads do not divide over 16 ranks
    whole = make_plan(PlannedJob(ModelConfig.preset("linear-llama3-1b"), 256 * K, 16, wires, device_of(None, wires)))
    assert plan.best.tokens_per_s < whole.best.tokens_per_s


def test_the_command_prints_predictions_terms_and_a_valid_run():
    output = planned(
        *("--model", "linear-llama3-1b", "--seq-len", "4M", "--gpus", "16", "--fabric", "a100-ib", "--explain")
    )
    for text in ("PREDICTION, nothing here was measured", "Candidates (predicted)", "inputs of blocks", "no: "):
        assert text in output
    assert "hierarchical" in output and "recommended: cp 16, dp 1, fsdp2, recompute" in output
    run = checked(yaml_of(output), "the plan")
    assert (run.cp_size, run.dp_size, run.engine, run.data.seq_len) == (16, 1, "fsdp2", 4 * M)
    assert run.model.recompute and run.dtype == "bfloat16" and run.torchrun.nodes == 2


def test_a_runs_yaml_file_keeps_what_is_not_planned():
    output = planned("--model", "configs/quickstart.yaml", "--fabric", "laptop", "--gpus", "2")
    values = yaml_of(output)
    assert values["optimizer"]["lr"] == 7e-3 and values["model"]["mixer"]["conv_width"] == 4
    assert (values["cp_size"], values["data"]["seq_len"]) == (2, 16 * K)
    assert "backend=megatron needs CUDA devices" in output


def test_an_engine_and_a_batch_of_your_own():
    output = planned(
        *("--model", "1b-gla", "--seq-len", "8K", "--gpus", "8", "--fabric", "h100-ib"),
        *("--engine", "fsdp2", "--batch", "8", "--layout", "zigzag"),
    )
    values = yaml_of(output)
    assert (values["engine"], values["dp_size"], values["layout"]) == ("fsdp2", 8, "zigzag")
    assert "exchange" not in values  # one rank per sequence


@pytest.mark.parametrize(
    "text, size", [("32K", 32 * K), ("4M", 4 * M), ("4m", 4 * M), ("1.5K", 1536), ("1000", 1000), ("1G", 2**30)]
)
def test_sizes(text, size):
    assert parse_size(text, "seq-len") == size
    assert parse_bytes("80GB", "memory") == 80e9 and parse_bytes("80 GiB", "memory") == 80 * 2**30


@pytest.mark.parametrize("text", ["", "4X", "0", "-4K", "1.0001", "K", "1e6", "4 M M"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match=rf"seq-len must be a whole number .* like 32K or 4M, got {text!r}"):
        parse_size(text, "seq-len")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpus": 12}, "gpus = 12 must be a multiple of gpus-per-node = 8, or at most one node. Use 8 or 16"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"seq_len": 4}, "gpus = 16 are more than the 4 tokens of a step"),
        (
            {"seq_len": 8, "batch": 3, "engine": "ddp"},
            "no mesh fits gpus = 16, batch = 3.*cp would be above seq-len = 8",
        ),
        ({"engine": "zero9"}, "engine must be auto or one of ddp, fsdp2, .*got 'zero9'"),
        ({"layout": "spiral"}, "layout must be contiguous or zigzag, got 'spiral'"),
        ({"tokens_per_s": 0.0}, "tokens-per-s must be a measured speed, finite and above 0, got 0.0"),
        ({"tokens_per_s": float("inf")}, "tokens-per-s must be a measured speed, finite and above 0, got inf"),
        ({"gpus": 1, "engine": "zero3"}, "engine=zero3 needs at least 2 ranks .*, got gpus = 1. Use ddp"),
        ({"fabric": "laptop", "engine": "megatron"}, "engine=megatron needs CUDA devices, got device cpu"),
        ({"gpus": 1, "seq_len": 1}, "seq-len must be at least 2, a token to read and one to predict, got 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_jobs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(job(**options))


BASE = {"--model": "1b-gla", "--seq-len": "4M", "--gpus": "256", "--fabric": "h100-ib"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--model": "2b-gla"}, r"unknown model '2b-gla': choose a preset, tiny, linear-llama3-1b, 1b-gla, or name"),
        ({"--fabric": "h200"}, r"unknown fabric 'h200': the presets are h100-ib, a100-ib"),
        ({"--memory": "80"}, r"memory must be a number of bytes with a unit, like 80GB or 40GiB, got '80'"),
        ({"--seq-len": "4X"}, r"seq-len must be a whole number"),
        ({"--seq-len": None}, r"--seq-len and --gpus are needed with a preset"),
        ({"--device": "tpu"}, r"device 'tpu' is unknown: choose one of h100, a100, cpu with --device"),
        ({"--gpus": "8", "--seq-len": "64M"}, r"nothing fits: 67108864 tokens x 1 on 8 GPUs of 80 GB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_commands_that_are_refused(changes, message):
    options = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    result = CliRunner().invoke(cli, ["plan", *(x for pair in options.items() for x in pair)])
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception)), result.exception


def test_memory_that_no_number_of_gpus_reaches(monkeypatch):
    monkeypatch.setattr(plan, "_MOST_GPUS", 64)
    asked = dataclasses.replace(job(gpus=8, seq_len=M), memory=1e9)
    message = nothing_fits(make_plan(asked))
    assert "More of this size, up to 64, would not do, or --memory" in message
    enough = parse_bytes(re.search(r"--memory (\w+)\.", message)[1], "memory")
    assert make_plan(dataclasses.replace(asked, memory=enough)).best is not None


def test_ulysses_is_planned_where_ranks_share_kv_heads():
    """32 query heads over 8 kv heads and 16 ranks: each kv head goes to two ranks, as in a run."""
    slow = Link(1e-6, 1e9)  # where a rank's share of the heads is all that should travel
    fabric = Fabric("slow", slow, slow, nics_per_node=8, overhead_s=1e-6, source="made up")
    model = dataclasses.replace(ModelConfig.preset("linear-llama3-1b"), pattern="S", heads=32, kv_heads=8)
    asked = dataclasses.replace(job(gpus=16, seq_len=64 * K), fabric=fabric, model=model)
    found = {c.cp: c.softmax_exchange for c in make_plan(asked).candidates if c.tp * c.pp == 1}
    assert found[16] == "ulysses"


def test_candidates_of_one_mesh_price_an_exchange_once(monkeypatch):
    asked, estimate = [], cost.estimate
    monkeypatch.setattr(cost, "estimate", lambda *case, **how: asked.append((*case, *how)) or estimate(*case, **how))
    fabric = dataclasses.replace(H100, name="this test's")  # answers are kept
    make_plan(dataclasses.replace(job(), fabric=fabric))
    assert 0 < len(asked) == len(set(asked))

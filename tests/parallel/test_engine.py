import math
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lasp.layout import SequenceLayout
from lasp.parallel.checkpoints.tensor_files import read_tensors, read_whole, write_tensors
from lasp.parallel.engines import zero_stages
from lasp.parallel.engines.build import build_engine
from lasp.parallel.engines.optimizer import OptimizerSettings
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from tests.harness import assert_close

SETTINGS = OptimizerSettings(lr=0.05, steps=6, warmup_steps=2, clip=0.05, weight_decay=0.2)


class TokenModel(nn.Module):
    """Stands in for a language model: no token sees another, so any cut is right by itself. Sizes divide nothing."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(11, 6, generator=generator))
        self.scale = nn.Parameter(torch.ones(6))
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.5, generator=generator)
        self.output_weight = nn.Parameter(torch.randn(11, 6, generator=generator))

    def forward(self, tokens, cp):
        x = self.embed[tokens]
        for layer in self.layers:
            x = x + layer(x)
        return x * self.scale


def _sequences(steps, per_step=4):
    return torch.randint(0, 11, (steps, per_step, 12), generator=torch.Generator().manual_seed(1))


def _run(group, dp_size, cp_size, steps, dtype, poison=None, name="ddp", resume_at=None):
    mesh = Mesh.build(cp_size, dp_size, group)
    make = lambda: build_engine(name, TokenModel(mesh.rank), mesh, SETTINGS, dtype)  # noqa: E731  unequal: the first's
    engine = make()
    layout = SequenceLayout.contiguous((0, 5, 12), cp_size)
    curve = []
    for step, sequences in enumerate(_sequences(steps)):
        if step == resume_at:
            folder = _written(engine)
            engine = make()
            _restore(engine, step, folder)
        if poison == (step, mesh.rank):
            share = engine.model.embed.detach()
            (share.to_local() if name == "fsdp2" else share).fill_(math.nan)
        mine = sequences[mesh.dp_rank :: mesh.dp_size]
        result = engine.step([Batch.cut(tokens[None], layout, mesh) for tokens in mine])
        curve.append((result.loss, result.grad_norm, result.lr))
    computes_with = {name: _full(p).float() for name, p in engine.model.named_parameters()}
    return curve, read_whole(_written(engine), "model."), computes_with


def _written(engine):
    """A new folder with all that a checkpoint holds of an engine."""
    folder = Path(engine.mesh.on_first(tempfile.mkdtemp)) / "tensors"
    write_tensors(folder, engine.tensors(), engine.mesh.world_group)
    engine.mesh.gather(None)
    return folder


def _restore(engine, step, folder):
    engine.load(step, lambda tensors: read_tensors(folder, tensors, engine.mesh.world_group))


def _full(p):
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()


def _plain_training(steps):
    """The same by torch's own means on one device."""
    model = TokenModel(0).double()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [model.scale], "weight_decay": 0.0},
        ],
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
    )
    curve = []
    for step, sequences in enumerate(_sequences(steps)):
        labels = sequences.roll(-1, 1)
        labels[:, [4, 11]] = -100
        logits = model(sequences, None) @ model.output_weight.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item(), SETTINGS.lr_at(step)))
    return curve, dict(model.named_parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("dp_size, cp_size", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_training_equals_plain_torch_on_one_device(ranks, dp_size, cp_size, engine):
    if engine == "fsdp2" and dp_size * cp_size == 1:
        pytest.skip("nothing to cut")
    expected_curve, expected = _plain_training(6)
    runs = ranks.run(_run, dp_size, cp_size, 6, torch.float64, None, engine, 3, size=dp_size * cp_size)
    for curve, _, _ in runs:
        for step, wanted in zip(curve, expected_curve, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5)  # clipping in torch adds 1e-6 to the norm
    parameters = runs[0][1]
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        assert_close(name, value, expected[name].detach(), 1e-4)
    assert expected_curve[0][1] > SETTINGS.clip  # clipping was active


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_keeps_fp32_master_weights(ranks, engine):
    (curve, parameters, narrow), (_, _, others) = ranks.run(_run, 1, 2, 6, torch.bfloat16, None, engine, size=2)
    exact, _, _ = _run(None, 1, 1, 6, torch.float32)
    assert all(value.dtype == torch.float32 for value in parameters.values())
    assert any((value != value.bfloat16().float()).any() for value in parameters.values())
    assert all(torch.equal(narrow[name], value) for name, value in others.items())
    if engine == "ddp":
        assert all(torch.equal(narrow[name], value.bfloat16().float()) for name, value in parameters.items())
    assert [c[0] for c in curve] == pytest.approx([c[0] for c in exact], rel=0.02)


def test_schedule_warms_up_and_ends_at_the_minimum():
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, steps=11, warmup_steps=4)
    rates = [settings.lr_at(step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


def _error_of_run(group, poison, engine):
    try:
        _run(group, 1, 2, 3, torch.float32, poison, engine)
    except FloatingPointError as error:
        return str(error)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_one(ranks):
    for message in ranks.run(_error_of_run, (1, 1), "ddp", size=2):
        assert message.startswith("step 2: loss nan") and "rank(s) [1]" in message


def test_sharded_parameters_that_are_not_finite_stop_all_ranks(ranks):
    for message in ranks.run(_error_of_run, (1, 1), "fsdp2", size=2):
        assert message.startswith("step 2: loss nan")


def test_float16_is_refused():
    with pytest.raises(ValueError, match="loss scaling"):
        build_engine("ddp", TokenModel(0), Mesh.build(), SETTINGS, torch.float16)


def test_engines_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least 2 ranks"):
        build_engine("fsdp2", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)
    with pytest.raises(ValueError, match=r"one of ddp, fsdp2, zero0, .*, zero3, got 'zero9'. Did you mean zero3"):
        build_engine("zero9", TokenModel(0), Mesh.build(), SETTINGS, torch.float32)


ZERO = ("zero0", "zero1", "zero2", "zero3")


class SometimesUsed(TokenModel):
    """A matrix that only odd steps read: in the others it has no gradient, and decays all the same."""

    def __init__(self, seed):
        super().__init__(seed)
        self.extra = nn.Parameter(torch.full((6, 6), 0.1))
        self.step = 0

    def forward(self, tokens, cp):
        x = super().forward(tokens, cp)
        return x @ self.extra if self.step % 2 else x


def _steps(engine, first, last, sequences):
    """Curve of steps first..last-1 on a dp 2 x cp 2 mesh, and a folder with what a checkpoint holds after them."""
    mesh, layout, curve = engine.mesh, SequenceLayout.contiguous((0, 5, 12), engine.mesh.cp_size), []
    for step in range(first, last):
        engine.model.step = step
        mine = sequences[step][mesh.dp_rank :: mesh.dp_size]
        result = engine.step([Batch.cut(tokens[None], layout, mesh) for tokens in mine])
        curve.append((result.loss, result.grad_norm))
    return curve, _written(engine)


def _engine(name, dtype=torch.float32, persistent=0, bucket=2**20, model=SometimesUsed):
    """On dp 2 x cp 2. ``persistent`` 0: stage 3 cuts the smallest parameters too."""
    with mock.patch.multiple(zero_stages, PERSISTENT_ELEMENTS=persistent, BUCKET_ELEMENTS=bucket):
        mesh = Mesh.build(2, 2)
        return build_engine(name, model(mesh.rank), mesh, SETTINGS, dtype)


def _uninterrupted(group, name, dtype, sizes):
    engine = _engine(name, dtype, **sizes)
    curve, saved = _steps(engine, 0, 6, _sequences(6))
    layout = SequenceLayout.contiguous((0, 5, 12), 2)
    held_out = [Batch.cut(tokens[None], layout, engine.mesh) for tokens in _sequences(1)[0]]
    return curve, read_whole(saved), engine.evaluate(held_out), engine.evaluate([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_stage_trains_as_ddp_does(ranks, dtype):
    curve, saved, held_out, nothing = ranks.run(_uninterrupted, "ddp", dtype, {}, size=4)[0]
    assert curve[0][1] > SETTINGS.clip and nothing is None
    buckets = [(name, {"bucket": 40}) for name in ("zero1", "zero2", "zero3")]  # parameters have 6, 36 and 66 elements
    for name, sizes in [*((name, {}) for name in ZERO), ("zero3", {"persistent": 40}), *buckets]:
        results = ranks.run(_uninterrupted, name, dtype, sizes, size=4)
        for theirs in results:
            # 1e-6 is the rounding of fp32 in either dtype: nothing is summed, kept or sent in 16 bits
            assert theirs[0] == [pytest.approx(wanted, rel=1e-6) for wanted in curve], name
            assert theirs[2] == pytest.approx(held_out, rel=1e-6) and theirs[3] is None
        assert results[0][1].keys() == saved.keys()
        for key, value in results[0][1].items():
            assert value.dtype == torch.float32
            assert_close(f"{name} {key}", value, saved[key], 2e-5)
    assert any((x != x.bfloat16()).any() for key, x in saved.items() if key.startswith("model."))


def _resumed(group, names):
    """From one engine to the next, three steps each, and two engines of the last kind from the last checkpoint."""
    sequences, curve, saved = _sequences(3 * len(names) + 3), [], None
    for index, name in enumerate(names):
        engine = _engine(name)
        if index:
            _restore(engine, 3 * index, saved)
        part, saved = _steps(engine, 3 * index, 3 * index + 3, sequences)
        curve += part
    end = 3 * len(names)
    straight = _steps(engine, end, end + 3, sequences)
    fresh = _engine(names[-1])
    _restore(fresh, end, saved)
    return curve + straight[0], straight, _steps(fresh, end, end + 3, sequences)


def _straight(group, steps):
    return _steps(_engine("ddp"), 0, steps, _sequences(steps))


def test_a_checkpoint_goes_from_any_engine_to_any_and_back_to_its_own_bit_for_bit(ranks):
    expected, saved = ranks.run(_straight, 12, size=4)[0]
    for names in (
        ("zero3", "fsdp2", "zero1"),
        ("ddp", "zero2", "zero3"),
        ("zero1", "ddp", "zero2"),
        ("zero2", "zero3", "zero0"),
    ):
        for curve, straight, fresh in ranks.run(_resumed, names, size=4):
            assert curve == [pytest.approx(wanted, rel=1e-5) for wanted in expected], names
            assert straight[0] == fresh[0], names
            one, other = read_whole(straight[1]), read_whole(fresh[1])
            assert one.keys() == other.keys() == read_whole(saved).keys()
            for key, x in one.items():
                assert torch.equal(x, other[key]), f"{names}: {key}"


def _owned(group, name):
    return {key: x.numel() for key, x in _engine(name).tensors().items()}


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_every_rank_writes_its_share_of_a_checkpoint(ranks, name):
    parts = ranks.run(_owned, name, size=4)
    names = [name for name, _ in SometimesUsed(0).named_parameters()]
    wanted = [f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in names]
    assert sorted(key for part in parts for key in part) == sorted(wanted)
    assert [sum(part.values()) for part in parts] == [198, 198, 216, 126]  # 3 times 66, 66, 36 + 36, 36 + 6


def _recovers(group, name, dtype):
    """Curve with a step in the middle whose gradient is not finite, and is done again after it was refused."""
    engine, sequences = _engine(name, dtype, persistent=1000, model=TokenModel), _sequences(4)
    curve, saved = _steps(engine, 0, 2, sequences)
    if engine.mesh.rank == 1:
        engine.model.embed.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan"):
        _steps(engine, 2, 3, sequences)
    after = read_whole(_written(engine))
    assert engine.step_count == 2 and all(torch.equal(x, after[key]) for key, x in read_whole(saved).items())
    _restore(engine, 2, saved)
    return curve + _steps(engine, 2, 4, sequences)[0]


def _never_failed(group, name, dtype):
    return _steps(_engine(name, dtype, persistent=1000, model=TokenModel), 0, 4, _sequences(4))[0]


@pytest.mark.parametrize("name", ZERO)
def test_a_step_that_is_refused_leaves_nothing_behind(ranks, name):
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks.run(_recovers, name, dtype, size=4) == ranks.run(_never_failed, name, dtype, size=4)


def _what_deepspeed_has(group):
    """Names that zero_stages reads and DeepSpeed no longer has; groups and operators of its own."""
    import deepspeed

    both = ("averaged_gradients",)
    flat = (*both, "all_grad_tensors", "single_partition_of_fp32_groups", "update_lp_params")
    wanted = {
        "zero0": (),
        "zero1": (*flat, "_lazy_init_hp_params_optimizer_state"),
        "zero2": (*flat, "_lazy_init_hp_params_optimizer_state"),
        "zero3": (
            *both,
            "fp32_partitioned_groups_flat",
            "fp16_partitioned_groups_flat",
            "grad_partitions_flat_buffer",
            "parameter_offload",
        ),
    }
    engines = {name: _engine(name).loss for name in wanted}
    missing = [f"{n}: {a}" for n, names in wanted.items() for a in names if not hasattr(engines[n].optimizer, a)]
    missing += [] if hasattr(engines["zero0"], "buffered_allreduce_fallback") else ["buffered_allreduce_fallback"]
    groups = [(engine.data_parallel_group, engine.seq_dp_world_size) for engine in engines.values()]
    own = [size for chosen, size in groups if chosen is not dist.group.WORLD or size != 4]
    return missing, own, dict(vars(deepspeed.ops)["__compatible_ops__"]), deepspeed.comm.comm.cdb.shm_comm_op


def test_deepspeed_has_what_is_read_of_it_and_makes_no_group_and_no_operator(ranks):
    for missing, own, operators, compiled in ranks.run(_what_deepspeed_has, size=4):
        assert not missing, f"this DeepSpeed has no {missing}: adapt lasp.parallel.engines.zero_stages to it"
        assert not own and operators == {"deepspeed_shm_comm": False} and compiled is None


def _refusal(group, dp_size):
    with pytest.raises(ValueError) as caught:
        build_engine("zero1", TokenModel(0), Mesh.build(1, dp_size, group), SETTINGS, torch.float32)
    return str(caught.value)


def test_what_deepspeed_cannot_do_is_refused(ranks):
    assert "needs a mesh over all 4 ranks of the default process group" in ranks.run(_refusal, 2, size=2)[0]
    assert "zero1 needs at least 2 ranks" in ranks.run(_refusal, 1, size=1)[0]
    with pytest.raises(ValueError, match=r"zero2 computes in float32 or bfloat16, got dtype=float64"):
        build_engine("zero2", TokenModel(0), Mesh.build(), SETTINGS, torch.float64)

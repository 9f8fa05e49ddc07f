"""DeepSpeed's stages and the other engines on dp 2 x cp 2: one curve, one checkpoint, and what is refused."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lasp.layout import SequenceLayout
from lasp.parallel.checkpoints.tensor_files import read_whole
from lasp.parallel.engines import zero_stages
from lasp.parallel.engines.build import build_engine
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, shift_labels
from tests.harness import assert_close
from tests.parallel.engine_cases import (
    SETTINGS,
    STEPS,
    Plain,
    TokenModel,
    plain_loss,
    restore,
    token_sequences,
    written,
)
from tests.rounding import bound

ENGINES = ("ddp", "zero3", "fsdp2", "zero1", "zero2", "zero0")
LAYOUT = SequenceLayout.contiguous((0, 5, 12), 2)
SMALL = 40  # elements: parameters have 6, 36 and 66


class SometimesUsed(TokenModel):
    """A matrix that only odd steps read: in the others it has no gradient, and decays all the same."""

    def __init__(self, seed):
        super().__init__(seed)
        self.extra = nn.Parameter(torch.full((6, 6), 0.1))
        self.step = 0

    def forward(self, tokens, cp):
        x = super().forward(tokens, cp)
        return x @ self.extra if self.step % 2 else x


def _engine(name, dtype=torch.float32, persistent=0, bucket=2**20, model=SometimesUsed):
    """On dp 2 x cp 2. ``persistent`` 0: stage 3 cuts the smallest parameters too."""
    with mock.patch.multiple(zero_stages, PERSISTENT_ELEMENTS=persistent, BUCKET_ELEMENTS=bucket):
        mesh = Mesh.build(2, 2)
        return build_engine(name, model(mesh.rank), mesh, SETTINGS, dtype)


def _cut(sequences, mesh):
    return [Batch.cut(tokens[None], LAYOUT, mesh) for tokens in sequences[mesh.dp_rank :: mesh.dp_size]]


def _steps(engine, first, last):
    """Curve of steps first..last-1, and a folder with what a checkpoint holds after them."""
    curve, sequences = [], token_sequences(last)
    for step in range(first, last):
        engine.model.step = step
        result = engine.step(_cut(sequences[step], engine.mesh))
        curve.append((result.loss, result.grad_norm))
    return curve, written(engine)


HELD_OUT = (4, 3, 1, 0)  # sequences over two dp ranks: 2 and 2, 2 and 1, 1 and 0, none


def _uninterrupted(group, name, sizes):
    engine = _engine(name, **sizes)
    curve, saved = _steps(engine, 0, STEPS)
    evaluated = [engine.evaluate(_cut(token_sequences(1)[0][:count], engine.mesh)) for count in HELD_OUT]
    return curve, read_whole(saved), evaluated


@pytest.fixture(scope="module")
def plain():
    return Plain(SometimesUsed, STEPS)


RUNS = [(name, {"bucket": SMALL} if name.startswith("zero") else {}) for name in ENGINES]
RUNS += [("zero3", {"persistent": SMALL})]


@pytest.mark.parametrize("name, sizes", RUNS, ids=str)
def test_every_engine_trains_and_evaluates_as_plain_torch_does(ranks, plain, name, sizes):
    results = ranks.run(_uninterrupted, name, sizes, size=4)
    with torch.no_grad():
        held_out = [plain_loss(plain.model, token_sequences(1)[0][:count]).item() for count in HELD_OUT[:-1]]
    for curve, _, evaluated in results:
        plain.check_curve(curve, torch.float32, name)
        assert evaluated == [*(pytest.approx(x, rel=bound(plain.own_error)) for x in held_out), None]
    saved = results[0][1]
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert saved.keys() == {f"{kind}.{key}" for kind in ("model", "exp_avg", "exp_avg_sq") for key in plain.parameters}
    masters = {key.removeprefix("model."): x for key, x in saved.items() if key.startswith("model.")}
    plain.check_parameters(masters, torch.float32, name)


def _each_step(group, name, folders):
    """Steps in bf16, each from a checkpoint that is given, or from its own: the curve, folders before and after."""
    engine = _engine(name, torch.bfloat16)
    curve, before, after = [], [], []
    for step in range(2):
        before.append(folders[step] if folders else written(engine))
        restore(engine, step, before[-1])
        part, saved = _steps(engine, step, step + 1)
        curve += part
        after.append(saved)
    return curve, before, after


def _cancelling(model, sequences):
    """By how much the gradients of the micro batches of all ranks are larger than their sum: largest over largest."""
    parts = []
    labels = shift_labels(sequences, SequenceLayout.contiguous((0, 5, 12), 1))
    for row, wanted in zip(sequences, labels):
        for half in LAYOUT.fragments:
            (start, stop), *_ = half
            logits = model(row[start:stop], None) @ model.output_weight.T
            loss = nn.functional.cross_entropy(logits, wanted[start:stop], reduction="sum")
            parts.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    sums = [(sum(p.abs() for p in of).max() / abs(sum(of)).max()).item() for of in zip(*parts) if abs(sum(of)).max()]
    return max(sums)


def test_bf16_gradients_are_summed_in_fp32_by_every_engine(ranks):
    """Step by step from the same checkpoint: later a parameter that rounds to another bf16 would hide what is meant.

    Eight gradients, of two micro batches on four ranks, are the same to the last bit in every engine. A sum of
    eight in fp32 is off by up to 7 * 2**-24 of the sum of their absolute values, two orders by twice that. In the
    update it grows by lr / eps at most for either moment. Summed in bf16 they would be off by up to 7 * 2**-9.
    """
    curve, folders, wanted = ranks.run(_each_step, "ddp", None, size=4)[0]
    off = 2 * 7 * 2**-24 * max(_cancelling(SometimesUsed(0).double(), x) for x in token_sequences(2))
    for name in ENGINES[1:]:
        theirs, _, written = ranks.run(_each_step, name, folders, size=4)[0]
        for step, (mine, expected) in enumerate(zip(theirs, curve, strict=True)):
            assert mine[0] == pytest.approx(expected[0], rel=2**-24), (name, step)
            assert mine[1] == pytest.approx(expected[1], rel=off), (name, step)
            found, right = read_whole(written[step]), read_whole(wanted[step])
            assert found.keys() == right.keys()
            largest = max(x.abs().max().item() for key, x in right.items() if key.startswith("exp_avg."))
            for key, x in right.items():
                if key.startswith("model."):
                    moved = 2 * SETTINGS.lr / SETTINGS.eps * off * largest / (1 - SETTINGS.betas[0])
                    limit = 2**-23 + moved / x.abs().max().item()
                else:
                    limit = 2 * off
                assert_close(f"{name} step {step} {key}", found[key], x, limit)
        assert any((x != x.bfloat16()).any() for key, x in found.items() if key.startswith("model."))


def _relay(group):
    """Two steps in each engine from the checkpoint of the one before; the second also by a fresh one of its kind."""
    curve, saved, pairs = [], None, []
    for index, name in enumerate(ENGINES):
        engine, begin = _engine(name), 2 * index
        if index:
            restore(engine, begin, saved)
        first, halfway = _steps(engine, begin, begin + 1)
        second, saved = _steps(engine, begin + 1, begin + 2)
        fresh = _engine(name)
        restore(fresh, begin + 1, halfway)
        again, also = _steps(fresh, begin + 1, begin + 2)
        pairs.append((name, second, again, read_whole(saved), read_whole(also)))
        curve += first + second
    return curve, pairs


def test_a_checkpoint_goes_from_engine_to_engine_and_back_to_its_own_bit_for_bit(ranks):
    plain = Plain(SometimesUsed, 2 * len(ENGINES))
    for curve, pairs in ranks.run(_relay, size=4):
        plain.check_curve(curve, torch.float32, "relay")
        for name, second, again, one, other in pairs:
            assert second == again, name
            assert one.keys() == other.keys()
            for key, x in one.items():
                assert torch.equal(x, other[key]), f"{name}: {key}"


def _recovers(group, name, dtype):
    """The curve and end of two steps, and of the same two after a step whose loss is not finite was refused."""
    engine = _engine(name, dtype, persistent=1000, model=TokenModel)
    _, saved = _steps(engine, 0, 2)
    expected = _steps(engine, 2, 4)
    restore(engine, 2, saved)
    if engine.mesh.rank == 1:
        embed = engine.model.embed
        getattr(embed, "ds_tensor", embed.data).fill_(math.nan)  # stage 3 computes with shares
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan"):
        _steps(engine, 2, 3)
    after = read_whole(written(engine))
    assert engine.step_count == 2 and all(torch.equal(x, after[key]) for key, x in read_whole(saved).items())
    restore(engine, 2, saved)
    found = _steps(engine, 2, 4)
    assert found[0] == expected[0]
    one, other = read_whole(found[1]), read_whole(expected[1])
    assert all(torch.equal(x, other[key]) for key, x in one.items())


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in ("zero0", "zero1", "zero2", "zero3")]
    + [("zero0", torch.float32), ("zero3", torch.float32)],  # where the master copy is the parameters, or is not whole
    ids=str,
)
def test_a_step_that_is_refused_leaves_nothing_behind(ranks, name, dtype):
    ranks.run(_recovers, name, dtype, size=4)


def _what_engines_have(group):
    """Names that zero_stages reads and DeepSpeed no longer has; groups and operators of its own; sizes
    of what this rank writes to a checkpoint."""
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
    made = {name: _engine(name) for name in ("ddp", *wanted)}
    engines = {name: made[name].loss for name in wanted}
    missing = [f"{n}: {a}" for n, names in wanted.items() for a in names if not hasattr(engines[n].optimizer, a)]
    missing += [] if hasattr(engines["zero0"], "buffered_allreduce_fallback") else ["buffered_allreduce_fallback"]
    groups = [(engine.data_parallel_group, engine.seq_dp_world_size) for engine in engines.values()]
    own = [size for chosen, size in groups if chosen is not dist.group.WORLD or size != 4]
    found = (missing, own, dict(vars(deepspeed.ops)["__compatible_ops__"]), deepspeed.comm.comm.cdb.shm_comm_op)
    return found, {name: {key: x.numel() for key, x in made[name].tensors().items()} for name in made}


@pytest.fixture(scope="module")
def built(ranks):
    return ranks.run(_what_engines_have, size=4)


def test_deepspeed_has_what_is_read_of_it_and_makes_no_group_and_no_operator(built):
    for (missing, own, operators, compiled), _ in built:
        assert not missing, f"this DeepSpeed has no {missing}: adapt lasp.parallel.engines.zero_stages to it"
        assert not own and operators == {"deepspeed_shm_comm": False} and compiled is None


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3"])
def test_every_rank_writes_its_share_of_a_checkpoint(built, name):
    parts = [sizes[name] for _, sizes in built]
    names = [name for name, _ in SometimesUsed(0).named_parameters()]
    wanted = [f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in names]
    assert sorted(key for part in parts for key in part) == sorted(wanted)
    assert [sum(part.values()) for part in parts] == [198, 198, 216, 126]  # 3 times 66, 66, 36 + 36, 36 + 6


def _refusal(group, dp_size):
    with pytest.raises(ValueError) as caught:
        build_engine("zero1", TokenModel(0), Mesh.build(1, dp_size, group), SETTINGS, torch.float32)
    return str(caught.value)


def test_what_deepspeed_cannot_do_is_refused(ranks):
    assert "needs a mesh over all 4 ranks of the default process group" in ranks.run(_refusal, 2, size=2)[0]
    assert "zero1 needs at least 2 ranks" in ranks.run(_refusal, 1, size=1)[0]
    with pytest.raises(ValueError, match=r"zero2 computes in float32 or bfloat16, got dtype=float64"):
        build_engine("zero2", TokenModel(0), Mesh.build(), SETTINGS, torch.float64)

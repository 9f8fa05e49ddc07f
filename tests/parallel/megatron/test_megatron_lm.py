"""What ``pretrain_gpt.py --spec`` builds from one object: the right layers in every stage, equal to one process."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.harness import relative_error
from tests.parallel.megatron import world
from tests.parallel.megatron.cores import Group, config
from tests.parallel.megatron.world import LENGTH, MICROBATCHES, VOCAB, Case, distributed_step, lone_step, on_cpu, whole

EXAMPLES = str(Path(__file__).parents[3] / "examples")
SPEC = ("lasp.parallel.megatron.megatron_lm", "spec")
GATED = ("hybrid_specs", "gated")
MIXER = {"decay": "scalar", "gate": "mamba", "feature": "elu1", "out_gate": "silu"}

MESH = Case(tp=2, pp=2, cp=2, config={"linear_attention_freq": 3})
INTERLEAVED = Case(pp=2, vp=2, cp=2, pattern="LLLS", mixer=MIXER)
UNEVEN = Case(pp=2, vp=2, cp=4, pattern="LLLS", mixer=MIXER, layout="Et|tt|t|L")
WITHOUT_LAYERS = Case(pp=2, cp=4, pattern="LLLS", mixer=MIXER, layout="E|ttttL")


def build_chunks(case, first_config, name):
    """What ``gpt_builder`` of Megatron-LM does with ``--spec`` (commits 383d08f, 00caa53, fcb181a): per chunk, a config
    of its own and ``import_module(args.spec)``, handed on uncalled."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import import_module

    sys.path.insert(0, EXAMPLES)
    chunks = []
    for stage in range(case.vp or 1):
        vp_stage = None if case.vp is None else stage
        place = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunk = GPTModel(
            config=world.make_config(case) if stage else first_config,
            transformer_layer_spec=import_module(name),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        chunk.to(case.dtype)
        world.set_weights(chunk)
        chunks.append(chunk)
    sys.path.remove(EXAMPLES)
    return chunks


def step_by_spec(group, case, name):
    """distributed_step of a model that ``--spec`` made."""
    with mock.patch.object(world, "make_chunks", lambda case, config: build_chunks(case, config, name)):
        return distributed_step(group, case)


def places(chunks):
    """Of each parameter in a distributed checkpoint: its key, global shape and offset."""
    tensors = [t for chunk in chunks for t in chunk.module.sharded_state_dict().values() if hasattr(t, "global_shape")]
    return sorted((t.key, t.global_shape, t.global_offset) for t in tensors)


@on_cpu
def layers_by_spec(_, case, name):
    """This rank's layers per chunk, "2S" for a second layer with softmax; how many contexts; checkpoint places."""
    stock = places(world.prepare(case))
    assert stock
    with mock.patch.object(world, "make_chunks", lambda case, config: build_chunks(case, config, name)):
        chunks = world.prepare(case)
    kinds, contexts = [], set()
    for chunk in chunks:
        cores = [layer.self_attention.core_attention for layer in chunk.module.decoder.layers]
        kinds.append(" ".join(f"{core.layer_number}{type(core).__name__[0]}" for core in cores))
        contexts |= {id(core.contexts) for core in cores}
    return kinds, len(contexts), places(chunks) == stock


@pytest.mark.parametrize(
    "case, name, expected",
    [
        (MESH, SPEC, (["1L 2L"], ["3S 4L"])),
        (INTERLEAVED, GATED, (["1L", "3L"], ["2L", "4S"])),
        (UNEVEN, GATED, (["1L", "4S"], ["2L 3L", ""])),
        (WITHOUT_LAYERS, GATED, ([""], ["1L 2L 3L 4S"])),
    ],
    ids=["mesh", "interleaved", "uneven", "without layers"],
)
def test_every_stage_has_its_layers_and_checkpoint_keys(gpt_ranks, case, name, expected):
    results = gpt_ranks.run(layers_by_spec, case, name, size=8)
    for rank, (kinds, contexts, same_places) in enumerate(results):
        assert kinds == expected[rank // 4]  # pipeline stages are the outermost dimension of the mesh
        assert contexts == min(1, len("".join(kinds))) and same_places


@pytest.mark.parametrize(
    "case, name",
    [(MESH, SPEC), (INTERLEAVED, GATED), (UNEVEN, GATED), (WITHOUT_LAYERS, GATED)],
    ids=["mesh", "interleaved", "uneven", "without layers"],
)
def test_training_equals_one_process(gpt_ranks, case, name):
    """Whose layers hybrid_layer_spec made for a mesh of one."""
    lone_loss, lone = gpt_ranks.run(lone_step, case, size=8)[0]
    results = gpt_ranks.run(step_by_spec, case, name, size=8)
    losses = [loss for loss, _, _ in results if loss is not None]
    assert losses and max(relative_error(loss, lone_loss) for loss in losses) <= 1e-12
    found = whole([part for _, part, _ in results])
    assert found.keys() == lone.keys()
    worst = max((relative_error(g, lone[name]), name) for name, replicas in found.items() for g in replicas)
    assert worst[0] <= 1e-12, worst[1]


def test_messages_are_those_of_the_block_spec(gpt_ranks):
    case = dataclasses.replace(MESH, pattern="L", config={"linear_attention_freq": [1, 1, 1, 1]})
    results = gpt_ranks.run(step_by_spec, case, SPEC, size=8)
    assert [calls for _, _, calls in results] == [{"all_gather": 2 * 2 * MICROBATCHES}] * 8


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({}, {}, "pattern and config.linear_attention_freq are both None"),
        ({"linear_attention_freq": 3}, {"pattern": "LS"}, "pattern 'LS', over 4 layers 'LSLS', must be that of config"),
        ({"mtp_num_layers": 1}, {"pattern": "L"}, "mtp_num_layers must be None with a layer_spec, got 1: .* Leave"),
    ],
)
def test_what_no_layer_is_built_for(options, arguments, message):
    from types import SimpleNamespace

    from lasp.parallel.megatron.megatron_lm import layer_spec

    groups = SimpleNamespace(tp=Group(1), cp=Group(1), pp=Group(1))
    with pytest.raises(ValueError, match=message):
        layer_spec(**arguments)(config=config(**options), layer_number=1, pg_collection=groups)

"""Which layers a stage builds, and what a core is before any training."""

import pytest
import torch

from tests.parallel.megatron.cores import Group, config, core


def kinds(block):
    """One character per layer spec: the kind of its core."""
    cores = [layer.submodules.self_attention.submodules.core_attention.module.__name__ for layer in block.layer_specs]
    return "".join(name[0] for name in cores)


def stage(settings, pattern=None, **place):
    from lasp.parallel.megatron import hybrid_layer_spec

    return kinds(hybrid_layer_spec(settings, pattern, **place))


def test_a_pattern_sets_the_frequency_and_a_frequency_the_pattern():
    settings = config(num_layers=6)
    assert stage(settings, "LLS", pp_rank=0) == "LLSLLS"
    assert settings.linear_attention_freq == [1, 1, 0, 1, 1, 0]
    assert stage(settings, pp_rank=0) == "LLSLLS"
    assert stage(config(num_layers=6, linear_attention_freq=4), pp_rank=0) == "LLLSLL"
    assert stage(config(num_layers=6, linear_attention_freq=4), "LLLS", pp_rank=0) == "LLLSLL"


def test_stages_build_their_own_layers():
    uneven = {"num_layers": 8, "pipeline_model_parallel_size": 3, "pipeline_dtype": torch.float32}
    uneven |= {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}
    assert [stage(config(**uneven), "LLLS", pp_rank=rank) for rank in range(3)] == ["L", "LLSL", "LLS"]
    virtual = {"num_layers": 8, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    settings = config(**virtual, pipeline_dtype=torch.float32)
    built = {(v, r): stage(settings, "LLSS", vp_stage=v, pp_rank=r) for v in (0, 1) for r in (0, 1)}
    assert built == {(0, 0): "LL", (0, 1): "SS", (1, 0): "LL", (1, 1): "SS"}


def test_layers_share_one_set_of_contexts():
    from lasp.parallel.megatron import hybrid_layer_spec

    block = hybrid_layer_spec(config(), "LS", pp_rank=0)
    cores = [layer.submodules.self_attention.submodules.core_attention for layer in block.layer_specs]
    assert len({id(spec.params["contexts"]) for spec in cores}) == 1


@pytest.mark.parametrize("mixer", [{"decay": "channel", "gate": "mamba"}, {"feature": "hadamard"}], ids=str)
def test_initial_values_do_not_depend_on_tensor_parallelism(mixer):
    from types import SimpleNamespace

    def parameters(tp, rank):
        torch.manual_seed(3)
        groups = SimpleNamespace(tp=Group(tp, rank), cp=Group(1))
        return dict(core(mixer=mixer, pg_collection=groups).named_parameters())

    whole, parts = parameters(1, 0), [parameters(2, rank) for rank in range(2)]
    for name, value in whole.items():
        shards = [part[name] for part in parts]
        assert torch.equal(torch.cat(shards) if "decay" in name else shards[0], value), name
        assert "decay" in name or torch.equal(shards[1], value), name


def test_a_core_in_bf16_is_near_the_one_in_fp32():
    mixer = {"decay": "fixed", "slopes": "alibi", "feature": "elu1"}
    tensors = [torch.randn(9, 2, heads, 8) for heads in (4, 2, 2)]
    exact = core(mixer=mixer, cp=1)(*tensors)
    rounded = core(mixer=mixer, cp=1, options={"params_dtype": torch.bfloat16})(*(x.bfloat16() for x in tensors))
    assert exact.shape == (9, 2, 32) and rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05

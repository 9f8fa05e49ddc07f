"""A gate and a feature map that these tests enter into their tables alone are taken wherever a model goes."""

import re
from unittest import mock

import pytest
import torch
from torch import nn

from lasp.cost.fabric import Fabric
from lasp.launch import verify
from lasp.launch.config.schema import load_config
from lasp.launch.plan.question import PlannedJob, device_of
from lasp.launch.plan.search import make_plan
from lasp.layout import SequenceLayout
from lasp.models.config import MixerConfig, ModelConfig
from lasp.models.gates import GATES, Gate
from lasp.models.linear_llama import LinearLlama
from lasp.models.linear_mixer import LinearMixer
from lasp.models.sizes import LinearSizes
from lasp.parallel.gpt.rules import check_model
from lasp.parallel.gpt.weights import to_megatron, to_native
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, LossModel
from tests.doc_lists import LISTS, split
from tests.lasp.model_entries import Quadratic, entered
from tests.launch.helpers import tiny_yaml
from tests.launch.memory_cases import kept_and_counted

MIXERS = {
    "gate": {"decay": "scalar", "gate": "quadratic", "feature": "silu"},
    "gate per channel": {"decay": "channel", "gate": "quadratic", "gate_rank": 4},
    "feature map": {"feature": "halves", "normaliser": "sum", "out_norm": "none"},
    "both": {"decay": "channel", "gate": "quadratic", "feature": "halves"},
}


@pytest.fixture
def entries():
    with entered():
        yield


def config_of(mixer, **options) -> ModelConfig:
    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "heads": 2, "ffn_dim": 48}
    return ModelConfig.from_dict({**sizes, "mixer": MIXERS[mixer], **options})


def make(config, dtype):
    return LinearLlama(config, generator=torch.Generator().manual_seed(3), dtype=dtype)


def test_without_their_entries_both_are_refused():
    with pytest.raises(ValueError, match=r"gate must be one of \['logsigmoid', 'mamba'\], got 'quadratic'"):
        MixerConfig.from_dict(MIXERS["gate"])
    with pytest.raises(ValueError, match=r"feature must be one of \['identity', .*\], got 'halves'"):
        MixerConfig.from_dict(MIXERS["feature map"])


def test_the_configuration_takes_them(entries, tmp_path):
    overrides = [f"model.mixer={{{', '.join(f'{key}: {value}' for key, value in MIXERS['both'].items())}}}"]
    mixer = load_config(tiny_yaml(tmp_path), overrides).model.mixer
    assert (mixer.gate, mixer.feature) == ("quadratic", "halves")
    with pytest.raises(ValueError, match=r"gate must be one of .*'quadratic'\], got 'quadrat'. Did you mean 'quad"):
        MixerConfig(decay="scalar", gate="quadrat")
    with pytest.raises(ValueError, match=r"gate_tau=2 has no effect: only gate='logsigmoid' reads it"):
        MixerConfig(decay="scalar", gate="quadratic", gate_tau=2)
    with pytest.raises(ValueError, match=r"feature must be one of .*'halves'\], got 'silu'. Choose one"):
        MixerConfig(feature="silu", normaliser="sum")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_trains_with_them(entries, mixer):
    model = make(config_of(mixer), torch.float32)
    mesh = Mesh.build()
    batch = Batch.cut(torch.arange(40).remainder(7)[None], SequenceLayout.contiguous(40, 1), mesh)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for _ in range(10):
        loss = LossModel(model)(batch) / 39
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # the sequence repeats


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_memory_model_counts_what_they_keep(entries, mixer, width):
    kept, counted = kept_and_counted({"mixer": MIXERS[mixer]}, width)
    assert counted == pytest.approx(kept, rel=0.01)


def test_the_planner_plans_them(entries, monkeypatch):
    wires = Fabric.of("h100-ib")
    config = config_of("both", dim=1024, heads=8, num_layers=8, ffn_dim=4096)
    question = PlannedJob(config, 2**18, 8, wires, device_of(None, wires))
    leanest = lambda: min(c.memory.peak for c in make_plan(question).candidates if not c.recompute)  # noqa: E731
    lean = leanest()
    sizes = LinearSizes.of(config)
    assert (sizes.state_dim, sizes.decays) == (2 * sizes.key_dim, 2 * sizes.key_dim)
    monkeypatch.setitem(GATES, "quadratic", Gate(Quadratic, "g", kept={"cpu": 3, "cuda": 4}))
    one_more = config.num_layers * 2**18 / 8 * sizes.transition_elements * 4
    assert leanest() - lean == pytest.approx(one_more, rel=0.01)


@pytest.mark.parametrize("mixer", ["gate", "feature map", "both"])
def test_their_weights_have_a_place_in_megatrons_layout(entries, mixer):
    config = config_of(mixer, heads=4, vocab_size=128)
    check_model(config, mock.Mock(tp_size=2, pp_size=1), None, False)
    native = {name: torch.randn(p.shape) for name, p in make(config, torch.float32).named_parameters()}
    whole = to_megatron(native, config)
    sizes = LinearSizes.of(config)
    assert whole["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (4 * (3 * 8 + sizes.decays), 32)
    back = to_native(whole, config)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


@pytest.mark.parametrize("mixer", ["gate", "both"])
def test_heads_are_cut_by_what_the_gate_says(entries, mixer):
    """A rank of tensor parallelism has the part of the gate's parameters that its heads need."""
    config = config_of(mixer)
    whole = LinearMixer(config, dtype=torch.float64).decay
    for p in whole.parameters():
        nn.init.normal_(p)
    z = torch.randn(1, 6, whole.proj.out_features, dtype=torch.float64)
    for head in range(2):
        part = LinearMixer(config, dtype=torch.float64, heads=range(head, head + 1)).decay
        part.load_state_dict(
            {
                name: p.chunk(2)[head] if name in part.per_head else p
                for name, p in whole.named_parameters(recurse=False)
            }
        )
        assert torch.equal(part(z.chunk(2, -1)[head]).squeeze(2), whole(z)[:, :, head])


def traced(group, config, dtype, cp_size):
    """One step of a rank, with the entries in the tables of its process."""
    with entered():
        mesh = Mesh.build(cp_size, 1, group) if cp_size > 1 else Mesh.build()
        tokens = torch.randint(0, config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
        layout = SequenceLayout.zigzag((0, 5, 30, 48), cp_size)
        return verify.trace_step(make(config, dtype), Batch.cut(tokens, layout, mesh), [], mesh)


@pytest.mark.parametrize("mixer", MIXERS)
def test_verify_finds_two_ranks_equal_to_one(entries, ranks, mixer):
    config = config_of(mixer)
    truth, single = (traced(None, config, dtype, 1) for dtype in (torch.float64, torch.float32))
    parts = ranks.run(traced, config, torch.float32, 2, size=2)
    found = verify.compare(truth, single, parts, SequenceLayout.zigzag((0, 5, 30, 48), 2))
    assert any("mixer" in f.name for f in found)
    assert verify.explain(found, config.layer_kinds) is None, [f for f in found if f.ranks]


@pytest.mark.parametrize("file, marker", LISTS)
def test_the_lists_in_docs_are_the_tables(file, marker):
    assert split(file, marker)[1] == LISTS[file, marker](), "write them anew: python -m tests.doc_lists"


def test_an_entry_is_listed_in_docs(entries):
    assert re.search(r"^\| `quadratic` \| `-exp\(rate\) z\^2` \| none \|$", LISTS["models.md", "gates"](), re.M)
    row = r"^\| `halves` \| .* \| 32 \| yes \| yes \|$"
    assert re.search(row, LISTS["models.md", "feature maps"](), re.M)

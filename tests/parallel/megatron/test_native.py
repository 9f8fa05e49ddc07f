"""A native model on a Megatron mesh, in any layout, against the same model and weights on one device, in fp64."""

import dataclasses

import pytest
import torch

from lasp import comm
from lasp.launch import verify
from lasp.layout import SequenceLayout
from lasp.models.config import ModelConfig
from lasp.models.linear_llama import LinearLlama
from lasp.parallel.gpt.traces import join_traces
from lasp.parallel.gpt.weights import padded_vocab_size, to_megatron, to_native
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch
from tests.harness import relative_error
from tests.lasp.model_entries import entered
from tests.parallel.megatron.world import Case, enter_mesh, on_cpu

DOCUMENTS = (0, 5, 6, 6, 31, 48)  # of any length, one of them empty
HELD_OUT = ((0, 20, 28), (0, 26))  # the second one is shorter, though not on every one of four cp ranks


@pytest.fixture(autouse=True)
def _entries():
    """A gate and a feature map of the tests' own, here as in the ranks."""
    with entered():
        yield


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, a mesh, and how the sequence is cut."""

    model: dict
    tp: int = 1
    pp: int = 1
    cp: int = 1
    layout: str = "contiguous"
    virtual_stages: int | None = None
    sequence_parallel: bool = False

    @property
    def config(self) -> ModelConfig:
        sizes = {"vocab_size": 61, "dim": 32, "num_layers": 4, "heads": 4, "ffn_dim": 48}
        return ModelConfig.from_dict({**sizes, **self.model})


def make(run, mesh):
    """The model with weights of its seed, and this rank's part of a sequence and of a held-out one."""
    model = LinearLlama(run.config, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batches = []
    held_out = HELD_OUT[:1] if run.sequence_parallel else HELD_OUT  # tokens of a cp rank that tp divides
    for documents in (DOCUMENTS, *held_out):
        generator = torch.Generator().manual_seed(documents[-1])
        tokens = torch.randint(0, run.config.vocab_size, (1, documents[-1]), generator=generator)
        batches.append(Batch.cut(tokens, getattr(SequenceLayout, run.layout)(documents, mesh.cp_size), mesh))
    return model, batches[0], batches[1:]


@on_cpu
def traced(_, run):
    """This rank's trace, and its messages of attention."""
    from lasp.parallel.megatron.mesh import current_mesh
    from lasp.parallel.megatron.trace import trace_step

    enter_mesh(Case(tp=run.tp, pp=run.pp, cp=run.cp, vp=run.virtual_stages))
    mesh = current_mesh(torch.device("cpu"))
    with entered(), comm.record() as ledger:
        options = {"virtual_stages": run.virtual_stages, "sequence_parallel": run.sequence_parallel}
        return trace_step(*make(run, mesh), mesh, **options), dict(ledger.calls)


def check(ranks, run):
    """Compares everything on every cp rank, and returns the messages of each rank."""
    size = run.tp * run.pp * run.cp
    assert size == 8
    results = ranks.run(traced, run, size=size)
    mesh = Mesh.build()
    expected = verify.trace_step(*make(run, mesh), mesh)
    parts = join_traces(
        [trace for trace, _ in results], run.config, run.tp, run.cp, sequence_parallel=run.sequence_parallel
    )
    layout = getattr(SequenceLayout, run.layout)(DOCUMENTS, run.cp)
    for rank, part in enumerate(parts):
        assert part.keys() == expected.keys()
        for name, x in expected.items():
            wanted = layout.shard(x, rank, dim=0) if name.startswith(("output", "gradient")) else x
            assert relative_error(part[name], wanted) <= 1e-12, (name, rank)
    assert all(x.abs().max() > 0 for x in expected.values())
    return [calls for _, calls in results]


CONVOLUTION = {"conv_width": 4, "conv_activation": "silu"}
GATED = {"decay": "channel", "gate": "logsigmoid", "out_gate": "sigmoid", "feature": "silu"}
RUNS = {
    "hybrid": Run({"pattern": "SLLL", "window": 9, "mixer": {"feature": "silu", **CONVOLUTION}}, tp=2, pp=2, cp=2),
    "untied, zigzag": Run(
        {"pattern": "LS", "tie_embeddings": False, "mixer": GATED}, tp=2, pp=2, cp=2, layout="zigzag"
    ),
    "sequence parallel": Run({"pattern": "SL", "mixer": GATED}, tp=2, pp=2, cp=2, sequence_parallel=True),
    "groups": Run({"pattern": "LS", "kv_heads": 2, "mixer": {**GATED, **CONVOLUTION}}, tp=4, cp=2),
    "interleaved": Run(
        {"pattern": "LLS", "mixer": {"decay": "fixed", "slopes": "alibi"}}, pp=2, cp=4, virtual_stages=2
    ),
    "rotated": Run(
        {"mixer": {"decay": "fixed", "slopes": "retnet", "position": "rope", "out_gate": "silu"}}, tp=4, cp=2
    ),
    "learnt features": Run({"mixer": {"feature": "hadamard", "feature_dim": 6}, "rope_theta": 500.0}, tp=4, cp=2),
    "own gate and map": Run({"mixer": {"decay": "channel", "gate": "quadratic", "feature": "halves"}}, tp=4, cp=2),
    "softmax": Run({"pattern": "S", "kv_heads": 1, "head_dim": 12}, tp=4, cp=2, layout="zigzag"),
    "narrow keys": Run({"mixer": {"heads": 2, "key_dim": 6, "value_dim": 6}}, tp=2, pp=2, cp=2),
    "state space": Run({"mixer": {"decay": "scalar", "gate": "mamba", **CONVOLUTION}}, pp=2, cp=4),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_mesh_equals_the_native_model(gpt_ranks, name):
    check(gpt_ranks, RUNS[name])


def test_recompute_sends_no_state_twice(gpt_ranks):
    """Two messages per linear layer would be three with the forward repeated; one more for each held-out sequence."""
    run = Run({"pattern": "L", "recompute": True, "mixer": GATED}, tp=2, pp=2, cp=2)
    calls = check(gpt_ranks, run)
    assert calls == [{"all_gather": 2 * (2 + len(HELD_OUT))}] * 8


@pytest.mark.parametrize("name", RUNS)
def test_weights_go_there_and_back(name):
    config = RUNS[name].config
    native = dict(LinearLlama(config, generator=torch.Generator().manual_seed(1)).state_dict())
    whole = to_megatron(native, config)
    assert whole["output_layer.weight"].shape == (padded_vocab_size(config), config.dim)
    again = to_native(whole, config)
    assert again.keys() == native.keys()
    assert all(torch.equal(again[key], x) for key, x in native.items())
    assert not any(torch.equal(again[key], x.flip(0)) for key, x in native.items() if x.dim() == 2)

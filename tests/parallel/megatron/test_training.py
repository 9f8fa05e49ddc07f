"""Adam steps under data parallelism, and checkpoints that are read on another mesh."""

import dataclasses

import pytest
import torch

from tests.harness import relative_error
from tests.parallel.megatron.world import Case, gather, lone_loss, lone_model, on_cpu, prepare, run_step, whole

STEPS, LEARNING_RATE, CLIP = 3, 1e-2, 1.0
TOKEN = {"decay": "scalar", "gate": "mamba", "out_gate": "silu", "feature": "elu1"}
CHANNEL = {"decay": "channel", "gate": "logsigmoid", "out_gate": "sigmoid", "feature": "silu"}


@on_cpu
def _lone_training(_, case):
    model = lone_model(case)
    if model is None:
        return None
    optimizer, losses = torch.optim.Adam(model.parameters(), LEARNING_RATE, (0.9, 0.99), 1e-3), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = lone_loss(case, model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@on_cpu
def _training(_, case):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    chunks = prepare(case)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        min_lr=LEARNING_RATE,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_eps=1e-3,
        clip_grad=CLIP,
        params_dtype=torch.float32,
        use_distributed_optimizer=case.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(run_step(case, chunks))
        done, _, _ = optimizer.step()
        assert done
    return None if losses[0] is None else [x.item() for x in losses], gather(chunks, lambda p: p)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("mesh", [{"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=str)
def test_adam_steps(gpt_ranks, mesh, distributed_optimizer):
    case = Case(
        cp=2, dtype=torch.float32, mixer=TOKEN, spread=True, distributed_optimizer=distributed_optimizer, **mesh
    )
    expected, parameters = gpt_ranks.run(_lone_training, case, size=8)[0]
    results = gpt_ranks.run(_training, case, size=8)
    for losses, _ in results:
        assert losses is None or losses == pytest.approx(expected, rel=1e-6)
    found = whole([part for _, part in results])
    assert found.keys() == parameters.keys()
    worst = max((relative_error(p, parameters[name]), name) for name, replicas in found.items() for p in replicas)
    assert worst[0] <= 5e-5, worst[1]
    assert expected[-1] < expected[0]


@on_cpu
def _save(_, case, folder):
    from megatron.core import dist_checkpointing

    chunks = prepare(case)
    state = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state if len(chunks) > 1 else state["model0"], folder)


@on_cpu
def _load(_, case, folder):
    """This mesh's parameters after they were spoilt and read."""
    from megatron.core import dist_checkpointing

    chunks = prepare(case)
    kept = gather(chunks, lambda p: p)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(float("nan"))
    (model,) = [chunk.module for chunk in chunks]
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    for name, (_, _, value) in gather(chunks, lambda p: p).items():
        assert torch.equal(value, kept[name][2]), name
    return len(kept)


@pytest.mark.parametrize("mixer", [CHANNEL, TOKEN, {"feature": "hadamard"}], ids=str)
def test_a_checkpoint_is_read_on_other_meshes(gpt_ranks, tmp_path, mixer):
    """Weights are a function of their global names, so those read must be those that the mesh had."""
    saved = Case(tp=2, pp=2, cp=2, mixer=mixer)
    gpt_ranks.run(_save, saved, str(tmp_path), size=8)
    for mesh in ({"tp": 4, "cp": 2}, {"cp": 8}, {"tp": 1, "pp": 2, "cp": 4, "order": "contiguous"}):
        read = gpt_ranks.run(_load, dataclasses.replace(saved, **{"tp": 1, "pp": 1, **mesh}), str(tmp_path), size=8)
        assert min(read) > 10

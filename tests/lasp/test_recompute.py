"""Activation checkpointing: the same gradients, and no exchange twice."""

import torch
import torch.distributed as dist

from lasp import CPContext, SequenceLayout, comm
from tests.lasp.test_model import make_model, tokens_like


def step(group, tokens, recompute):
    layout = SequenceLayout.zigzag((0, 11, 40), dist.get_world_size(group))
    cp = CPContext(layout, group)
    model = make_model(mixer="gla", pattern="LL", num_layers=4, recompute=recompute)
    local = layout.shard(tokens, cp.cp_rank)
    saved = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with watch, comm.record() as forward:
        hidden = model(local, cp)
    with comm.record() as backward:
        hidden.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert cp.tape is None
    return dict(forward.calls), dict(backward.calls), grads, sum(saved)


def test_recomputation_gives_the_same_gradients_without_a_second_exchange(ranks):
    tokens = tokens_like(1, 40)
    plain = ranks.run(step, tokens, False, size=2)
    again = ranks.run(step, tokens, True, size=2)
    for (_, _, expected, kept), (forward, backward, grads, kept_again) in zip(plain, again, strict=True):
        assert forward == backward == {"all_gather": 4}
        assert kept_again < 0.5 * kept
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)

"""Activation checkpointing: the same gradients, and no exchange twice."""

import pytest
import torch
import torch.distributed as dist

from lasp import CPContext, SequenceLayout, comm, linear_attention
from lasp.models.recompute import recompute
from tests.lasp.models import make_model, tokens_like


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


def twice(group, nested):
    """Gradients of two backward passes through one graph, the calls in them, and the gradients without recomputation.

    The final states enter the loss, and the block changes them in place.
    """
    layout = SequenceLayout.zigzag((0, 11, 40), dist.get_world_size(group))
    cp = CPContext(layout, group)

    def block(x):
        o, state = linear_attention(x, x, x, cp=cp, output_final_state=True)
        return o + state.mul_(0.5).mean()

    def pair(x):
        return block(recompute(block, x, cp=cp)) if nested else block(block(x))

    x = layout.shard(torch.arange(160.0, dtype=torch.float64).sin().view(1, 40, 1, 4), cp.cp_rank)
    x.requires_grad_()
    weights = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)
    (expected,) = torch.autograd.grad((block(block(x)) * weights).sum(), x)
    loss = (recompute(pair, x, cp=cp) * weights).sum()
    seen = []
    for retain in (True, False):
        with comm.record() as calls:
            seen.append(torch.autograd.grad(loss, x, retain_graph=retain)[0])
        assert dict(calls.calls) == {"all_gather": 2} and cp.tape is None
    return expected, *seen


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_retained_graph_runs_backward_again_without_an_exchange(ranks, nested):
    for expected, first, second in ranks.run(twice, nested, size=2):
        assert expected.any() and torch.equal(first, expected) and torch.equal(second, expected)

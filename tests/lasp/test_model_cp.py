"""The model over a cp_group equals the model on one device: hidden states, loss, every parameter's gradient."""

import pytest
import torch
import torch.nn.functional as F

from lasp import CPContext, SequenceLayout, comm
from tests.harness import assert_close
from tests.lasp.models import CONV, make_model, tokens_like

SETTINGS = {
    "basic": {"mixer": "basic", "pattern": "LLS"},
    "sum": {"mixer": "linear", "pattern": "SLL", "tie_embeddings": False},
    "lightning": {"mixer": "lightning", "pattern": "L"},
    "retnet_window": {"mixer": "retnet", "pattern": "SL", "window": 9, "kv_heads": 1},
    "gla_conv": {"mixer": CONV, "pattern": "LSL"},
    "mamba": {"mixer": {"decay": "scalar", "gate": "mamba", "conv_width": 3}, "pattern": "LS"},
    "rebased": {"mixer": "rebased", "pattern": "L"},
    "recompute": {"mixer": "gla", "pattern": "SL", "recompute": True},
    "bidirectional": {"mixer": {"preset": "basic", "causal": False}, "pattern": "LS"},
}
PACKED = (0, 5, 6, 6, 20, 29)
LAYOUTS = {
    "contiguous": lambda size: SequenceLayout.contiguous(PACKED[-1], size),
    "contiguous_packed": lambda size: SequenceLayout.contiguous(PACKED, size),
    "zigzag": lambda size: SequenceLayout.zigzag(PACKED[-1], size),
    "zigzag_packed": lambda size: SequenceLayout.zigzag(PACKED, size),
}


def train_step(model, tokens, labels, cp):
    """Hidden states, the sum of token losses, the gradients in the parameters' order."""
    hidden = model(tokens, cp)
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    return hidden.detach(), loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def rank_step(group, fields, layout, tokens, labels):
    cp = CPContext(layout, group)
    local = (layout.shard(x, cp.cp_rank) for x in (tokens, labels))
    return train_step(make_model(**fields), *local, cp)


@pytest.mark.parametrize(
    "layout, size", [("contiguous", 4), ("contiguous_packed", 2), ("zigzag", 2), ("zigzag_packed", 4)]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_model_over_ranks_equals_one_device(ranks, name, layout, size):
    layout = LAYOUTS[layout](size)
    model, tokens, labels = make_model(**SETTINGS[name]), tokens_like(1, PACKED[-1]), tokens_like(1, PACKED[-1])
    results = ranks.run(rank_step, SETTINGS[name], layout, tokens, labels, size=size)
    hidden, loss, grads = train_step(model, tokens, labels, CPContext.local(layout.cu_seqlens_global))

    assert_close("hidden", layout.unshard([r[0] for r in results]), hidden, 1e-10)
    assert_close("loss", sum(r[1] for r in results), loss, 1e-10)
    for i, (parameter, _) in enumerate(model.named_parameters()):
        assert_close(f"gradient of {parameter}", sum(r[2][i] for r in results), grads[i], 1e-10)


def test_rows_of_a_batch_over_ranks(ranks):
    layout = SequenceLayout.zigzag(22, 4)
    fields = SETTINGS["gla_conv"]
    tokens, labels = tokens_like(3, 22), tokens_like(3, 22)
    results = ranks.run(rank_step, fields, layout, tokens, labels, size=4)
    hidden, _, grads = train_step(make_model(**fields), tokens, labels, None)
    assert_close("hidden", layout.unshard([r[0] for r in results]), hidden, 1e-10)
    for i, grad in enumerate(grads):
        assert_close(f"gradient {i}", sum(r[2][i] for r in results), grad, 1e-10)


def rank_traffic(group, fields, layout, tokens):
    cp = CPContext(layout, group)
    model = make_model(**fields)
    with comm.record() as forward:
        hidden = model(layout.shard(tokens, cp.cp_rank), cp)
    with comm.record() as backward:
        hidden.sum().backward()
    return dict(forward.calls), dict(backward.calls)


@pytest.mark.parametrize("mixer", ["basic", "linear", "lightning", "gla", "based"])
def test_one_exchange_per_linear_layer_and_direction(ranks, mixer):
    layout = SequenceLayout.zigzag(PACKED, 2)
    fields = {"mixer": mixer, "pattern": "L"}
    for forward, backward in ranks.run(rank_traffic, fields, layout, tokens_like(1, 29), size=2):
        assert sum(forward.values()) == sum(backward.values()) == 3


def rank_prefill(group, fields, layout, tokens, last):
    cp = CPContext(layout, group)
    model = make_model(**fields)
    _, cache = model.prefill(layout.shard(tokens, cp.cp_rank), cp)
    with torch.no_grad():
        return cache.position, model.step(last, cache)[0]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mixer", ["linear", "gla", "retnet"])
def test_every_rank_decodes_from_a_prefill_over_ranks(ranks, mixer, layout):
    fields = {"mixer": mixer, "pattern": "L"}
    tokens = tokens_like(1, PACKED[-1] + 1)
    expected = make_model(**fields)(tokens)[:, -1:]
    arguments = fields, LAYOUTS[layout](4), tokens[:, :-1], tokens[:, -1:]
    for position, hidden in ranks.run(rank_prefill, *arguments, size=4):
        assert position == PACKED[-1]
        assert_close("hidden", hidden, expected, 1e-10)


def rank_refused_prefill(group, fields, layout, tokens):
    cp = CPContext(layout, group)
    with pytest.raises(ValueError, match=r"prefill over cp_size = 2 ranks needs a model of linear layers"):
        make_model(**fields).prefill(layout.shard(tokens, cp.cp_rank), cp)


@pytest.mark.parametrize("fields", [{"pattern": "SL"}, {"pattern": "L", "mixer": CONV}], ids=["softmax", "conv"])
def test_prefill_over_ranks_refuses_caches_that_would_be_cut(ranks, fields):
    ranks.run(rank_refused_prefill, fields, SequenceLayout.contiguous(8, 2), tokens_like(1, 8), size=2)

"""Recurrent decoding against the parallel forward pass."""

import pytest
import torch

from lasp import CPContext
from lasp.models.generation import generate
from lasp.models.presets import MIXER_PRESETS
from tests.harness import assert_close
from tests.lasp.models import CONV, make_model, tokens_like

SETTINGS = {
    **{name: {"mixer": name, "pattern": "L"} for name in MIXER_PRESETS},
    "softmax": {"pattern": "S", "kv_heads": 1},
    "softmax_first": {"pattern": "SLL", "mixer": "gla"},
    "softmax_last": {"pattern": "LLS", "mixer": "retnet"},
    "window": {"pattern": "SLL", "mixer": "based", "window": 4},
    "window_of_one": {"pattern": "SL", "mixer": "basic", "window": 1},
    "window_beyond": {"pattern": "SL", "mixer": "basic", "window": 50},
    "conv": {"pattern": "LSL", "mixer": CONV, "window": 3},
}


@pytest.mark.parametrize("prompt", [1, 7])
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_decoding_equals_the_parallel_forward(name, prompt):
    """Token by token from one prefill; then one forward over everything gives the same logits at every place."""
    model = make_model(**SETTINGS[name])
    tokens = tokens_like(2, prompt)
    hidden, cache = model.prefill(tokens)
    logits = [model.logits(hidden)]
    for _ in range(9):
        token = logits[-1][:, -1:].argmax(-1)
        tokens = torch.cat([tokens, token], 1)
        hidden, cache = model.step(token, cache)
        assert hidden.shape == (2, 1, 16)
        logits.append(model.logits(hidden))
    assert cache.position == prompt + 9
    assert_close("logits", torch.cat(logits, 1), model.logits(model(tokens)), 1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_of_several_tokens_and_two_continuations_of_one_cache(name):
    model = make_model(**SETTINGS[name])
    tokens, other = tokens_like(2, 12), tokens_like(2, 4)
    _, cache = model.prefill(tokens[:, :6])
    first, middle = model.step(tokens[:, 6:8], cache)
    rest, _ = model.step(tokens[:, 8:], middle)
    branch, _ = model.step(other, cache)
    assert_close("hidden", torch.cat([first, rest], 1), model(tokens)[:, 6:], 1e-10)
    assert_close("branch", branch, model(torch.cat([tokens[:, :6], other], 1))[:, 6:], 1e-10)


def test_caches_are_as_small_as_the_layers_allow():
    _, cache = make_model(pattern="LS", mixer=CONV, window=4).prefill(tokens_like(2, 30))
    linear, softmax = cache.layers[:2]
    assert linear.state.shape == (2, 2, 4, 8)
    assert linear.conv.shape == (2, 3, 2 * 8 + 16)
    assert softmax.k.shape == softmax.v.shape == (2, 3, 2, 8)
    _, cache = make_model(pattern="S").prefill(tokens_like(2, 30))
    assert cache.layers[0].k.shape[1] == 30


def test_prefill_with_a_context():
    model = make_model(mixer=CONV)
    tokens = tokens_like(1, 9)
    hidden, cache = model.prefill(tokens[:, :8], CPContext.local(8))
    step, cache = model.step(tokens[:, 8:], cache)
    assert cache.position == 9
    assert_close("hidden", torch.cat([hidden, step], 1), model(tokens), 1e-10)


@pytest.mark.parametrize("name", ["gla", "window"])
def test_generate_takes_the_most_likely_token(name):
    model = make_model(**SETTINGS[name])
    prompt = tokens_like(2, 5)
    out = generate(model, prompt, 7)
    assert out.shape == (2, 12) and torch.equal(out[:, :5], prompt)
    best = model.logits(model(out[:, :-1])).argmax(-1)
    assert torch.equal(out[:, 5:], best[:, 4:])
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_generate_ends_at_eos():
    model = make_model(mixer="gla")
    prompt = tokens_like(3, 5)
    free = generate(model, prompt, 12)
    eos = free[0, 8].item()
    out = generate(model, prompt, 12, eos=eos)
    for row, wanted in zip(out, free, strict=True):
        after = (wanted[5:] == eos).nonzero()
        end = 5 + after[0].item() if len(after) else len(wanted)
        end = min(end, len(row))
        assert torch.equal(row[:end], wanted[:end])
        assert (row[end:] == eos).all()
    alone = generate(model, prompt[:1], 12, eos=eos)
    assert alone[0, -1] == eos and (alone[0, 5:] == eos).sum() == 1


def test_sampling_follows_its_generator_and_temperature():
    model = make_model(mixer="gla")
    prompt = tokens_like(2, 5)

    def draw(seed, temperature):
        return generate(model, prompt, 10, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0, 1.0), draw(0, 1.0))
    assert not torch.equal(draw(0, 1.0), draw(1, 1.0))
    assert torch.equal(draw(0, 1e-4), generate(model, prompt, 10))


def test_errors():
    tokens = tokens_like(1, 4)
    with pytest.raises(ValueError, match=r"prefill needs a causal model, got mixer\.causal = False\. Use forward"):
        make_model(mixer={"causal": False}).prefill(tokens)
    with pytest.raises(ValueError, match="prefill needs one document, got cp with 2"):
        make_model().prefill(tokens, CPContext.local((0, 2, 4)))
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with T >= 1, got shape \(1, 0\)"):
        generate(make_model(), tokens[:, :0], 3)
    with pytest.raises(ValueError, match="max_new_tokens and temperature must not be negative, got -1"):
        generate(make_model(), tokens, -1)
    with pytest.raises(ValueError, match="generator has no effect at temperature = 0"):
        generate(make_model(), tokens, 1, generator=torch.Generator())

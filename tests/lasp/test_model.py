import dataclasses

import pytest
import torch

from lasp import CPContext
from lasp.models.config import ModelConfig
from lasp.models.features import init_normal
from lasp.models.linear_llama import LinearLlama, num_parameters
from lasp.models.presets import MIXER_PRESETS
from tests.harness import assert_close, relative_error
from tests.lasp.models import BASE, CONV, make_model, tokens_like


@pytest.mark.parametrize("name", MIXER_PRESETS)
def test_every_parameter_of_every_family_gets_a_gradient(name):
    model = make_model(mixer=name, tie_embeddings=False)
    hidden = model(tokens_like(2, 9))
    assert hidden.shape == (2, 9, 16)
    model.logits(hidden).logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("mixer", ["linear", "lightning", CONV], ids=["linear", "lightning", "conv"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_equal_documents_alone(mixer, window):
    model = make_model(mixer=mixer, window=window)
    borders = (0, 7, 8, 8, 20)
    tokens = tokens_like(1, 20)
    packed = model(tokens, CPContext.local(borders))
    alone = [model(tokens[:, a:b]) for a, b in zip(borders, borders[1:], strict=False) if a < b]
    assert_close("hidden", packed, torch.cat(alone, 1), 1e-12)


@pytest.mark.parametrize("name", [*MIXER_PRESETS, "conv"])
def test_causality_probe(name):
    """A changed token moves itself and what follows in its document, and nothing else."""
    model = make_model(mixer=CONV if name == "conv" else name)
    tokens, cp = tokens_like(1, 14), CPContext.local((0, 9, 14))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % BASE["vocab_size"]
    moved = (model(tokens, cp) - model(changed, cp)).abs().amax(-1)[0]
    assert moved[:4].max() < 1e-13 and moved[9:].max() < 1e-13
    assert moved[4:9].min() > 1e-8


@pytest.mark.parametrize("mixer", ["basic", "linear", "based"])
def test_bidirectional_model_reads_its_whole_document(mixer):
    model = make_model(mixer={"preset": mixer, "causal": False})
    tokens, cp = tokens_like(1, 14), CPContext.local((0, 9, 14))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % BASE["vocab_size"]
    moved = (model(tokens, cp) - model(changed, cp)).abs().amax(-1)[0]
    assert moved[:9].min() > 1e-8
    assert moved[9:].max() < 1e-13


def test_parameters_of_linear_llama3_1b():
    """16 layers of four 2048 x 2048 projections and SwiGLU at 8192, norms, and one embedding of 128256 tokens."""
    config = ModelConfig.preset("linear-llama3-1b")
    layer = 4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048 + 128
    assert num_parameters(config) == 16 * layer + 2048 + 128256 * 2048 == 1_336_479_744
    hybrid = dataclasses.replace(config, pattern="LLLS", kv_heads=16)
    assert num_parameters(config) - num_parameters(hybrid) == 4 * 128  # softmax layers have no output norm


@pytest.mark.parametrize("name", MIXER_PRESETS)
def test_number_of_parameters_without_storage(name):
    model = make_model(mixer=name)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_names_and_state_dict_round_trip():
    model, other = make_model(seed=0, mixer="gla"), make_model(seed=1, mixer="gla")
    names = set(model.state_dict())
    assert {"embed.weight", "norm.weight", "layers.0.mixer.q_proj.weight", "layers.1.mixer.decay.bias"} <= names
    assert {"layers.1.mixer_norm.weight", "layers.2.mlp.down_proj.weight"} <= names
    tokens = tokens_like(1, 6)
    assert relative_error(other(tokens), model(tokens)) > 0.1
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(tokens), model(tokens))


def test_same_seed_same_model_and_no_other_source_of_chance():
    before = torch.get_rng_state()
    first, again = make_model(seed=3, mixer="gla"), make_model(seed=3, mixer="gla")
    assert torch.equal(before, torch.get_rng_state())
    low = make_model(seed=3, mixer="gla", dtype=torch.bfloat16)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), low.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a.bfloat16(), c), name


def test_a_model_made_on_meta_is_filled_later():
    config = make_model(mixer="rebased").config
    model = LinearLlama(config, device="meta", dtype=torch.float64).to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(5))
    tokens = tokens_like(1, 6)
    assert torch.equal(model(tokens), make_model(seed=5, mixer="rebased")(tokens))


def test_initial_scales():
    model = make_model(dim=128, heads=4, ffn_dim=256, mixer="gla", tie_embeddings=False)
    mixer = model.layers[1].mixer
    assert mixer.q_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert mixer.o_proj.weight.std().item() == pytest.approx((128 * 6) ** -0.5, rel=0.05)
    assert model.output_weight.std().item() == pytest.approx(0.02, rel=0.05)
    weight = torch.zeros(4, 4, device="meta")
    init_normal(weight, 1.0, None)  # no storage, nothing to do


def test_output_weight_is_the_embedding_or_a_head_of_its_own():
    tied, own = make_model(), make_model(tie_embeddings=False)
    assert tied.output_weight is tied.embed.weight
    assert own.output_weight is own.head.weight and own.output_weight.shape == (32, 16)
    hidden = tied(tokens_like(1, 3))
    assert_close("logits", tied.logits(hidden), hidden @ tied.embed.weight.T, 1e-14)


@pytest.mark.parametrize("name", ["basic", "gla"])
def test_recompute_changes_memory_only(name):
    tokens = tokens_like(2, 8)
    grads, saved = [], []
    for recompute in (False, True):
        model, bytes_saved = make_model(mixer=name, recompute=recompute), 0

        def pack(x):
            nonlocal bytes_saved
            bytes_saved += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model.logits(model(tokens)).logsumexp(-1).sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        saved.append(bytes_saved)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert saved[1] < saved[0] / 4


@pytest.mark.parametrize("name", MIXER_PRESETS)
def test_bf16_and_autocast_stay_near_fp64(name):
    """The budget is what rounding the parameters to bf16 costs an otherwise exact model, times a small factor."""
    low, mixed = make_model(mixer=name, dtype=torch.bfloat16), make_model(mixer=name, dtype=torch.float32)
    exact, rounded = make_model(mixer=name), make_model(mixer=name)
    rounded.load_state_dict({key: value.double() for key, value in low.state_dict().items()})
    tokens = tokens_like(1, 40)
    budget = 8 * relative_error(rounded(tokens), exact(tokens))
    hidden = low(tokens)
    assert hidden.dtype == torch.bfloat16
    assert relative_error(hidden, rounded(tokens)) < budget
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = mixed(tokens)
    assert relative_error(hidden, exact(tokens)) < budget
    hidden.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixed.parameters())


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(4, dtype=torch.int64), r"tokens must be int64 \[B, T\], got torch.int64 of shape \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.int32), r"tokens must be int64 \[B, T\], got torch.int32"),
        (torch.zeros(1, 5, dtype=torch.int64), "tokens must hold the 4 tokens of cp rank 0 along dim 1, got 5"),
        (torch.zeros(2, 4, dtype=torch.int64), "tokens must have B = 1 when the layout packs more than one document"),
    ],
)
def test_token_errors(tokens, message):
    with pytest.raises(ValueError, match=message):
        make_model()(tokens, CPContext.local((0, 3, 4)))
